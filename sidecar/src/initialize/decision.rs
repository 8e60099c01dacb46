//! What is done with a data directory, given what is known. Pure.

use crate::catalog::Timeline;

/// What a member's data directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// There is none, or nothing of an etcd is in it.
    Absent,
    /// etcd can start on it.
    Sound(Sound),
    /// etcd must not.
    Damaged(Damaged),
}

/// Data that etcd must not start on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// What is damaged first of all.
    pub part: Part,
    /// What is wrong, and where.
    pub evidence: String,
    /// Id of the cluster that it is of, where that can still be read.
    pub cluster_id: Option<u64>,
    /// Voting members of its cluster, where that can still be read; else 1.
    pub voters: usize,
    /// Whether it is of a cluster that was restored since the newest backup was taken.
    pub restored_since: bool,
    /// Why it may have what is nowhere else, where etcd would run on it and only its hash is not what etcd itself had answered:
    /// that is not given up without a person.
    pub only_here: Option<String>,
}

/// A part of a member's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Its database.
    Database,
    /// Its write-ahead log.
    Log,
    /// Its raft snapshots.
    Snapshots,
}

/// What a member was found to be, whatever is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// There is no data.
    NoData,
    /// It is sound, and nothing speaks against it.
    Sound,
    /// It is sound but for what a crash left and etcd repairs, such as a log that ends in a cut write.
    Repairable,
    /// It is sound, and older than the newest backup.
    Behind,
    /// It is of another cluster than the members that run, or than the backups.
    ForeignCluster,
    /// It is that of a member of another name: the volume was swapped.
    AnotherMember,
    /// Its cluster has removed the member.
    Removed,
    /// An etcd runs as this member elsewhere.
    RunsElsewhere,
    /// A part of it is damaged.
    Damaged(Part),
}

impl Cause {
    /// What the facts say.
    pub fn of(facts: &Facts) -> Self {
        let sound = match &facts.data {
            Data::Absent => return Self::NoData,
            Data::Damaged(damaged) if damaged.foreign_to(&facts.backups).is_some() => return Self::ForeignCluster,
            Data::Damaged(damaged) => return Self::Damaged(damaged.part),
            Data::Sound(sound) => sound,
        };
        match (&facts.live, &facts.backups) {
            (Live::Serves { cluster_id, .. }, _) if *cluster_id != sound.cluster_id => Self::ForeignCluster,
            (Live::Serves { us: Place::Another, .. }, _) => Self::AnotherMember,
            (Live::Serves { us: Place::Alive, .. }, _) => Self::RunsElsewhere,
            (Live::Serves { us: Place::NotListed | Place::Added | Place::New, .. }, _) => Self::Removed,
            (Live::Serves { us: Place::Started, .. }, _) => sound.as_found(),
            _ if sound.of_another.is_some() => Self::AnotherMember,
            (_, backups) if sound.foreign_to(backups).is_some() => Self::ForeignCluster,
            (_, Backups::Upto { last, .. }) if sound.reach() < *last && !sound.restored_since => Self::Behind,
            _ => sound.as_found(),
        }
    }
}

impl Damaged {
    /// The cluster that the backups are of, when it is another.
    fn foreign_to(&self, backups: &Backups) -> Option<u64> {
        self.cluster_id.and_then(|ours| foreign_to(ours, self.restored_since, backups))
    }
}

impl Sound {
    fn foreign_to(&self, backups: &Backups) -> Option<u64> {
        foreign_to(self.cluster_id, self.restored_since, backups)
    }

    /// The revision that it may have once etcd has applied its log.
    pub(super) fn reach(&self) -> i64 {
        self.revision.saturating_add(i64::try_from(self.unapplied).unwrap_or(i64::MAX))
    }

    fn as_found(&self) -> Cause {
        if self.repairs.is_some() { Cause::Repairable } else { Cause::Sound }
    }
}

fn foreign_to(ours: u64, restored_since: bool, backups: &Backups) -> Option<u64> {
    match backups {
        Backups::Upto { cluster_id: Some(theirs), .. } if *theirs != ours && !restored_since => Some(*theirs),
        _ => None,
    }
}

/// Data that etcd can start on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sound {
    /// Id of the cluster that it is of.
    pub cluster_id: u64,
    /// Revision of its database.
    pub revision: i64,
    /// Entries of its log that its database lacks and that may make a revision: at most so many are made.
    pub unapplied: u64,
    /// What a crash left that etcd repairs when it starts, such as a write to the log that was cut.
    pub repairs: Option<String>,
    /// Whether it was restored since the newest backup was taken: it is where somebody wants it to be.
    pub restored_since: bool,
    /// Voting members of its cluster, as its log says.
    pub voters: usize,
    /// Another member of the same cluster, whose data it is.
    pub of_another: Option<String>,
    /// How its rows differ from those that etcd had when it was backed up.
    pub differs: Option<Differs>,
}

/// Rows whose hash is not the one that etcd itself had answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differs {
    /// Both hashes.
    pub evidence: String,
    /// Of the last revisions, those that the backups have too, in order: whether each is the same there.
    pub agree: Vec<bool>,
}

/// So few revisions tell nothing: they may agree by chance, and all of them be damaged.
const TOO_FEW: usize = 4;

impl Differs {
    /// Whether it is the history that was backed up, with some of its values changed. One that parted from it has an end of
    /// its own: from somewhere on nothing agrees, or hardly anything. `None` where that cannot be told.
    fn is_same_history(&self) -> Option<bool> {
        if self.agree.len() < TOO_FEW {
            return None;
        }
        let differ = self.agree.iter().filter(|agrees| !**agrees).count();
        let own_end = self.agree.iter().rev().take_while(|agrees| !**agrees).count();
        if own_end >= 2 || 4 * differ > self.agree.len() {
            return Some(false);
        }
        (own_end == 0).then_some(true)
    }
}

impl Data {
    /// What it is beside these backups: sound by itself, and yet damaged, when its rows are not those that etcd had.
    #[must_use]
    pub fn judged(self, backups: &Backups) -> Self {
        let Self::Sound(mut sound) = self else { return self };
        let Some(differs) = sound.differs.take().filter(|_| !sound.restored_since) else { return Self::Sound(sound) };
        let reach = sound.reach();
        let (what, only_here) = match (differs.is_same_history(), backups) {
            // It is backed up as such, when etcd runs.
            (Some(false), _) => return Self::Sound(sound),
            (Some(true), Backups::Upto { last, .. }) if reach > *last => {
                let only_here = format!("it may have revisions up to {reach}, where the backups end at {last}");
                ("a value in snap/db has changed", Some(only_here))
            }
            (Some(true), _) => ("a value in snap/db has changed", None),
            (None, _) => (
                "a value in snap/db has changed, or it was restored since and is another history",
                Some("too little of it is in the backups to tell which".to_owned()),
            ),
        };
        Self::Damaged(Damaged {
            part: Part::Database,
            evidence: format!("{}: {what}", differs.evidence),
            cluster_id: Some(sound.cluster_id),
            voters: sound.voters,
            restored_since: false,
            only_here,
        })
    }

    /// Its cluster and that of the backups, when it is another's.
    pub fn foreign_to(&self, backups: &Backups) -> Option<(u64, u64)> {
        match self {
            Self::Absent => None,
            Self::Sound(sound) => Some((sound.cluster_id, sound.foreign_to(backups)?)),
            Self::Damaged(damaged) => Some((damaged.cluster_id?, damaged.foreign_to(backups)?)),
        }
    }

    /// Whether nothing of it is missed when the backups, or other members, have all that they should.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Absent => true,
            Self::Sound(_) => false,
            Self::Damaged(damaged) => damaged.only_here.is_none(),
        }
    }
}

/// What the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backups {
    /// No store is configured: no backups, only the check.
    NotConfigured,
    /// There is none yet.
    Empty,
    /// There is none yet, and somebody has begun to back a cluster up.
    Begun,
    /// Up to a revision.
    Upto {
        /// The last that can be restored.
        last: i64,
        /// The timeline that it is in.
        timeline: Timeline,
        /// Id of the cluster whose backups the newest are; `None` when nothing says so.
        cluster_id: Option<u64>,
    },
    /// They do not say what they should.
    Damaged {
        /// What is wrong, and where.
        why: String,
    },
    /// It cannot be told.
    Unknown {
        /// Why.
        why: String,
    },
}

/// What the other members of the cluster do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Live {
    /// None answers, or there is none.
    Nobody,
    /// Some answer and have no quorum.
    NoQuorum {
        /// Whether they know ours as one that has run.
        knows_us: bool,
    },
    /// The cluster serves.
    Serves {
        /// Its id.
        cluster_id: u64,
        /// What ours is in it.
        us: Place,
    },
}

/// What our member is in a cluster that serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Not in its list.
    NotListed,
    /// It has never started: it was added, or the cluster began with it and has data by now.
    Added,
    /// One of those that the cluster began with, which has not come up yet; and the cluster is as empty as it is.
    New,
    /// It has run.
    Started,
    /// It runs, elsewhere than here.
    Alive,
    /// The data is that of a member of another name.
    Another,
}

/// What is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The data directory.
    pub data: Data,
    /// The store.
    pub backups: Backups,
    /// Members that the cluster is to have.
    pub replicas: usize,
    /// Whether the configuration of etcd says that the cluster exists already.
    pub is_existing: bool,
    /// The others of them.
    pub live: Live,
    /// How many members, ours included, say now that they lost their data.
    pub lost: usize,
    /// Whether to begin anew where data is damaged and there is nothing to restore.
    pub may_start_empty: bool,
    /// Why the data directory cannot be written.
    pub cannot_write: Option<String>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Start etcd on what is there.
    Keep,
    /// Append what the store has beyond it, where it is provably the same history.
    Append,
    /// Restore from the store; what is there is moved aside.
    Restore,
    /// Begin a new cluster; what is there is moved aside.
    Bootstrap,
    /// Come back to the cluster as a learner, which gets its data from the others; what is there is moved aside.
    Join,
    /// Touch nothing, and look again until the others are back or all say that they lost their data.
    Wait,
    /// Touch nothing and do not start etcd.
    Refuse {
        /// Whether to look again soon: it may pass by itself.
        may_pass: bool,
    },
}

impl Decision {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Append => "append",
            Self::Restore => "restore",
            Self::Bootstrap => "bootstrap",
            Self::Join => "join",
            Self::Wait => "wait",
            Self::Refuse { .. } => "refuse",
        }
    }
}

/// Decides, and says why.
pub fn decide(facts: &Facts) -> (Decision, String) {
    let (decision, mut why) = decide_what(facts);
    if let Some(cannot_write) = &facts.cannot_write {
        why.push_str("; ");
        why.push_str(cannot_write);
    }
    (decision, why)
}

fn decide_what(facts: &Facts) -> (Decision, String) {
    let of_one = facts.replicas <= 1;
    let is_alone = of_one && facts.live == Live::Nobody;
    match &facts.data {
        Data::Sound(sound) => with_data(sound, facts),
        Data::Absent
            if is_alone
                && facts.is_existing
                && matches!(facts.backups, Backups::Empty | Backups::Begun | Backups::NotConfigured) =>
        {
            let why = "there is neither data nor a backup, and the configuration says that the cluster exists: see to the volume and to store.url, or say initial-cluster-state: new to begin another";
            (Decision::Refuse { may_pass: false }, why.to_owned())
        }
        Data::Absent if is_alone => without_data("there is no data", facts, true),
        Data::Absent => one_of_several("there is no data", facts, true),
        Data::Damaged(damaged) => {
            let what = format!("the data is damaged: {}", damaged.evidence);
            if let (Some(theirs), Some(ours), Live::Nobody | Live::NoQuorum { .. }) =
                (damaged.foreign_to(&facts.backups), damaged.cluster_id, facts.live)
            {
                return foreign(&what, ours, "the backups are", theirs);
            }
            if is_alone && damaged.voters > 1 {
                let why = format!(
                    "{what}, and its cluster has {} voting members, of which the configuration names one: name the others in initial-cluster, or move the data away",
                    damaged.voters
                );
                return (Decision::Refuse { may_pass: false }, why);
            }
            if let (Live::Nobody, Some(only_here)) = (facts.live, &damaged.only_here) {
                let why = format!(
                    "{what}, and {only_here}: move the member directory away to have it restored, or keep what it has with `sidecar restore --snapshot-file DIR/member/snap/db --skip-hash-check --data-dir DIR --replace --name NAME --initial-cluster NAME=PEER-URL`"
                );
                let decision = if of_one { Decision::Refuse { may_pass: false } } else { Decision::Wait };
                return (decision, why);
            }
            if is_alone {
                without_data(&what, facts, facts.may_start_empty)
            } else {
                one_of_several(&what, facts, false)
            }
        }
    }
}

fn with_data(sound: &Sound, facts: &Facts) -> (Decision, String) {
    let revision = sound.revision;
    let repairs = sound.repairs.as_ref().map(|repairs| format!(" ({repairs})")).unwrap_or_default();
    let sound_at = format!("the data is sound, at revision {revision}{repairs}");
    let keep = |why: &str| (Decision::Keep, format!("{sound_at}{why}"));
    match (&facts.live, &facts.backups) {
        (Live::Serves { cluster_id, .. }, _) if *cluster_id != sound.cluster_id => {
            return foreign(&sound_at, sound.cluster_id, "the members that run are", *cluster_id);
        }
        (Live::Serves { us: Place::Started, .. }, _) => return keep("; what it misses the other members have"),
        (Live::Serves { us: Place::Alive, .. }, _) => return is_alive(&sound_at),
        (Live::Serves { us: Place::Another, .. }, _) => {
            return swapped(&sound_at, "a member of another name");
        }
        (Live::Serves { .. }, _) => {
            return (
                Decision::Join,
                format!("{sound_at}, and its cluster has removed this member: it comes back as a learner"),
            );
        }
        _ => {}
    }
    if let Some(other) = &sound.of_another {
        return swapped(&sound_at, &format!("member {other}"));
    }
    if let Some(theirs) = sound.foreign_to(&facts.backups) {
        return foreign(&sound_at, sound.cluster_id, "the backups are", theirs);
    }
    match &facts.backups {
        // A voter that forgot what it voted for may undo what a quorum has acknowledged.
        _ if facts.replicas > 1 || sound.voters > 1 => keep("; what it misses the other members have"),
        Backups::NotConfigured => keep("; there is no store to compare it with"),
        Backups::Empty | Backups::Begun => keep("; there are no backups yet"),
        // What is there is whole. Not to start for want of a store would make an outage of two.
        Backups::Unknown { why } => keep(&format!("; whether the store has more cannot be told: {why}")),
        // A store that answers and is damaged may have more, and whoever sees to it finds out.
        Backups::Damaged { why } => (
            Decision::Refuse { may_pass: false },
            format!(
                "{sound_at}, and whether the backups have more cannot be told: {why}; see to the store, or configure none"
            ),
        ),
        Backups::Upto { last, .. } => {
            if revision >= *last {
                keep(&format!(", and the backups end at {last}"))
            } else if sound.restored_since {
                keep(&format!(", restored since the backups up to {last} were taken"))
            } else if sound.reach() >= *last {
                keep(&format!(", and its log has {} entries more; the backups end at {last}", sound.unapplied))
            } else {
                (Decision::Append, format!("{sound_at}, behind the backups, which end at {last}"))
            }
        }
    }
}

fn without_data(what: &str, facts: &Facts, may_start_empty: bool) -> (Decision, String) {
    let refuse = |may_pass, why: &str| (Decision::Refuse { may_pass }, format!("{what}, and {why}"));
    match &facts.backups {
        Backups::Unknown { why } => refuse(true, &format!("whether there are backups cannot be told: {why}")),
        Backups::Damaged { why } => refuse(false, &format!("the backups are damaged: {why}")),
        Backups::Upto { last, .. } => (Decision::Restore, format!("{what}; the backups reach revision {last}")),
        Backups::Empty | Backups::Begun if may_start_empty => {
            (Decision::Bootstrap, format!("{what}, and there are no backups"))
        }
        Backups::NotConfigured if may_start_empty => (Decision::Bootstrap, format!("{what}, and no store is given")),
        Backups::Empty | Backups::Begun | Backups::NotConfigured => {
            refuse(false, "there is nothing to restore; move the data away, or set safety.mayStartEmpty")
        }
    }
}

fn swapped(what: &str, whose: &str) -> (Decision, String) {
    let why = format!("{what}, and is that of {whose}: the volume is another's; give each member its own");
    (Decision::Refuse { may_pass: false }, why)
}

fn foreign(what: &str, ours: u64, whose: &str, theirs: u64) -> (Decision, String) {
    let why = format!(
        "{what}, and of cluster {ours:x}, {whose} of {theirs:x}: the volume or the store is another's; move the data away, or give a store of its own"
    );
    (Decision::Refuse { may_pass: false }, why)
}

fn is_alive(what: &str) -> (Decision, String) {
    let why = format!("{what}, and an etcd runs as this member elsewhere: it must end first");
    (Decision::Refuse { may_pass: true }, why)
}

/// A member of several has no data of its own that counts: the others may.
fn one_of_several(what: &str, facts: &Facts, is_absent: bool) -> (Decision, String) {
    let wait = |why: &str| (Decision::Wait, format!("{what}, and {why}"));
    match (&facts.live, &facts.backups) {
        // Where the cluster was restored, what it would begin with is not what the others have, and nobody would notice.
        (Live::Serves { us: Place::New, .. }, backups) if is_absent && !matches!(backups, Backups::Upto { .. }) => {
            (Decision::Bootstrap, format!("{what}; the cluster has just begun and waits for this member"))
        }
        (Live::Serves { us: Place::Alive, .. }, _) => is_alive(what),
        (Live::Serves { .. }, _) => (Decision::Join, format!("{what}; it comes back to its cluster as a learner")),
        (Live::NoQuorum { .. }, Backups::Upto { .. }) | (Live::NoQuorum { knows_us: true }, _) => wait(
            "the other members have no quorum; when they have, it comes back to them. If they never will, a person decides: see the README for a cluster of which one member has its data still",
        ),
        (_, Backups::Unknown { why }) => {
            let why = format!("{what}, no other member serves, and whether there are backups cannot be told: {why}");
            (Decision::Refuse { may_pass: true }, why)
        }
        (_, Backups::Damaged { why }) => {
            let why = format!("{what}, no other member serves, and the backups are damaged: {why}");
            (Decision::Refuse { may_pass: false }, why)
        }
        (_, Backups::Upto { last, .. }) if facts.lost >= facts.replicas => {
            (Decision::Restore, format!("{what}, and so it is with every member; the backups reach revision {last}"))
        }
        (_, Backups::Begun | Backups::Empty | Backups::NotConfigured) if is_absent && facts.is_existing => {
            wait("no other member serves; the configuration says that the cluster exists, so it waits for them")
        }
        (_, Backups::Begun) if is_absent && facts.lost >= facts.replicas => {
            (Decision::Bootstrap, format!("{what}, and so it is with every member; there is no backup yet"))
        }
        (_, Backups::Begun) => wait(&format!(
            "no other member serves; somebody has begun to back the cluster up, and {} of {} members say that they lost their data",
            facts.lost, facts.replicas
        )),
        (_, Backups::Upto { .. }) => wait(&format!(
            "no other member serves; {} of {} members say that they lost their data, and one that has it may have more than the backups. If that is lost for good, say so by starting it without data, or restore all with `sidecar restore --all-members`",
            facts.lost, facts.replicas
        )),
        (_, Backups::Empty | Backups::NotConfigured) if is_absent => {
            (Decision::Bootstrap, format!("{what}, no other member serves, and there are no backups"))
        }
        (_, Backups::Empty | Backups::NotConfigured) => wait(
            "no other member serves; there is nothing to restore, so it waits for them; to begin anew, move it away",
        ),
    }
}

#[cfg(test)]
mod tests;
