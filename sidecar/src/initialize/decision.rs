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
                    "{what}, and {only_here}: move the member directory away to have it restored, or make a member of its database with `sidecar restore --skip-hash-check --snapshot-file …/member/snap/db`"
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
            let why = format!("{sound_at}, and is that of a member of another name: the volume is another's");
            return (Decision::Refuse { may_pass: false }, why);
        }
        (Live::Serves { .. }, _) => {
            return (
                Decision::Join,
                format!("{sound_at}, and its cluster has removed this member: it comes back as a learner"),
            );
        }
        _ => {}
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
            refuse(false, "there is nothing to restore; move the data away, or allow to start empty")
        }
    }
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
        (Live::NoQuorum { .. }, Backups::Upto { .. }) | (Live::NoQuorum { knows_us: true }, _) => {
            wait("the other members have no quorum; when they have, it comes back to them")
        }
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
            "no other member serves; {} of {} members say that they lost their data, and one that has it may have more than the backups",
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
mod tests {
    use super::*;

    const OURS: u64 = 7;

    fn sound(revision: i64, unapplied: u64) -> Data {
        let (cluster_id, repairs, restored_since, voters, differs) = (OURS, None, false, 1, None);
        Data::Sound(Sound { cluster_id, revision, unapplied, repairs, restored_since, voters, differs })
    }

    fn upto(last: i64) -> Backups {
        Backups::Upto { last, timeline: 1, cluster_id: Some(OURS) }
    }

    fn unknown() -> Backups {
        Backups::Unknown { why: "no route".into() }
    }

    fn spoiled() -> Backups {
        Backups::Damaged { why: "timeline.json".into() }
    }

    fn damaged() -> Data {
        damaged_of(None, 1, false)
    }

    fn damaged_of(cluster_id: Option<u64>, voters: usize, restored_since: bool) -> Data {
        let (part, evidence) = (Part::Database, "page 7".into());
        Data::Damaged(Damaged { part, evidence, cluster_id, voters, restored_since, only_here: None })
    }

    /// Data whose hash is not the one recorded, and that has more than the backups.
    fn only_here() -> Data {
        let Data::Damaged(damaged) = damaged_of(Some(OURS), 1, false) else { unreachable!() };
        Data::Damaged(Damaged { only_here: Some("it has more".into()), ..damaged })
    }

    fn alone(data: Data, backups: Backups, may_start_empty: bool) -> Facts {
        let (live, cannot_write) = (Live::Nobody, None);
        Facts { data, backups, replicas: 1, is_existing: false, live, lost: 0, may_start_empty, cannot_write }
    }

    fn of_three(data: Data, backups: Backups, live: Live, lost: usize) -> Facts {
        Facts { replicas: 3, live, lost, ..alone(data, backups, false) }
    }

    fn check(facts: &Facts, expected: Decision) {
        let (decision, why) = decide(facts);
        assert_eq!(decision, expected, "{facts:?}: {why}");
        assert!(!why.is_empty());
    }

    const KEEP: Decision = Decision::Keep;
    const LATER: Decision = Decision::Refuse { may_pass: true };
    const NEVER: Decision = Decision::Refuse { may_pass: false };

    #[test]
    fn every_case_of_one_is_decided() {
        let with = |change: fn(&mut Sound)| {
            let Data::Sound(mut sound) = sound(5, 0) else { unreachable!() };
            change(&mut sound);
            Data::Sound(sound)
        };
        let restored = with(|sound| sound.restored_since = true);
        let restored_as_another = with(|sound| (sound.restored_since, sound.cluster_id) = (true, 99));
        let foreign = with(|sound| sound.cluster_id = 99);
        let of_several = with(|sound| sound.voters = 3);
        let unnamed = Backups::Upto { last: 5, timeline: 1, cluster_id: None };
        // Data, backups, may start empty, and what follows.
        let cases = [
            (sound(5, 0), Backups::NotConfigured, false, KEEP),
            (sound(5, 0), Backups::Empty, false, KEEP),
            (sound(5, 0), unknown(), false, KEEP),
            (sound(5, 0), spoiled(), false, NEVER),
            (Data::Absent, spoiled(), true, NEVER),
            (damaged(), spoiled(), true, NEVER),
            (sound(5, 0), upto(5), false, KEEP),
            (sound(5, 3), upto(8), false, KEEP),
            (sound(5, 2), upto(8), false, Decision::Append),
            (sound(5, 0), upto(8), true, Decision::Append),
            (restored, upto(8), false, KEEP),
            (restored_as_another, upto(8), false, KEEP),
            (of_several, upto(8), false, KEEP),
            (foreign.clone(), upto(5), true, NEVER),
            (foreign.clone(), unnamed, false, KEEP),
            (foreign, Backups::Empty, false, KEEP),
            (Data::Absent, Backups::NotConfigured, false, Decision::Bootstrap),
            (Data::Absent, Backups::Empty, false, Decision::Bootstrap),
            (Data::Absent, Backups::Begun, false, Decision::Bootstrap),
            (Data::Absent, unknown(), true, LATER),
            (Data::Absent, upto(5), false, Decision::Restore),
            (damaged(), Backups::NotConfigured, false, NEVER),
            (damaged(), Backups::NotConfigured, true, Decision::Bootstrap),
            (damaged(), Backups::Empty, false, NEVER),
            (damaged(), Backups::Empty, true, Decision::Bootstrap),
            (damaged(), unknown(), true, LATER),
            (damaged(), upto(5), true, Decision::Restore),
            (damaged_of(Some(OURS), 1, false), upto(5), false, Decision::Restore),
            (damaged_of(Some(99), 1, false), upto(5), true, NEVER),
            (damaged_of(Some(99), 1, true), upto(5), false, Decision::Restore),
            (damaged_of(Some(OURS), 3, false), upto(5), true, NEVER),
            (damaged_of(Some(OURS), 3, false), Backups::NotConfigured, true, NEVER),
            (only_here(), upto(5), true, NEVER),
        ];
        for (data, backups, may_start_empty, expected) in cases {
            check(&alone(data, backups, may_start_empty), expected);
        }
    }

    #[test]
    fn every_case_of_several_is_decided() {
        let serves = |us| Live::Serves { cluster_id: OURS, us };
        let (started, foreign) = (serves(Place::Started), Live::Serves { cluster_id: 99, us: Place::Started });
        let (strangers, friends) = (Live::NoQuorum { knows_us: false }, Live::NoQuorum { knows_us: true });
        let (wait, join, bootstrap) = (Decision::Wait, Decision::Join, Decision::Bootstrap);
        // Data, backups, the others, how many lost theirs, and what follows.
        let mut cases = vec![
            (sound(5, 0), upto(8), Live::Nobody, 0, KEEP),
            (sound(5, 0), upto(4), friends, 0, KEEP),
            (sound(5, 0), upto(8), started, 0, KEEP),
            (sound(5, 0), Backups::NotConfigured, started, 0, KEEP),
            (sound(5, 0), unknown(), started, 0, KEEP),
            (sound(5, 0), spoiled(), Live::Nobody, 0, KEEP),
            (Data::Absent, spoiled(), Live::Nobody, 3, NEVER),
            (damaged(), spoiled(), started, 0, join),
            (sound(5, 0), upto(8), foreign, 0, NEVER),
            (sound(5, 0), Backups::Upto { last: 8, timeline: 1, cluster_id: Some(99) }, Live::Nobody, 0, NEVER),
            (sound(5, 0), upto(8), serves(Place::NotListed), 0, join),
            (sound(5, 0), upto(8), serves(Place::Added), 0, join),
            (sound(5, 0), upto(8), serves(Place::Alive), 0, LATER),
            (sound(5, 0), upto(8), serves(Place::Another), 0, NEVER),
            (sound(5, 0), Backups::Begun, Live::Nobody, 0, KEEP),
            (Data::Absent, Backups::Empty, serves(Place::New), 0, bootstrap),
            (Data::Absent, Backups::NotConfigured, serves(Place::New), 0, bootstrap),
            (Data::Absent, unknown(), serves(Place::New), 0, bootstrap),
            (Data::Absent, upto(8), serves(Place::New), 0, join),
            (damaged(), upto(8), serves(Place::New), 0, join),
            (Data::Absent, Backups::Begun, Live::Nobody, 2, wait),
            (Data::Absent, Backups::Begun, Live::Nobody, 3, bootstrap),
            (Data::Absent, Backups::Begun, strangers, 3, bootstrap),
            (Data::Absent, Backups::Begun, strangers, 0, wait),
            (damaged(), Backups::Begun, Live::Nobody, 3, wait),
            (Data::Absent, Backups::Empty, Live::Nobody, 0, bootstrap),
            (Data::Absent, Backups::NotConfigured, strangers, 0, bootstrap),
            (Data::Absent, Backups::NotConfigured, friends, 0, wait),
            (damaged(), Backups::NotConfigured, Live::Nobody, 0, wait),
            (damaged(), Backups::Empty, strangers, 3, wait),
            (only_here(), upto(8), Live::Nobody, 3, wait),
            (only_here(), upto(8), started, 0, join),
        ];
        for lost in [Data::Absent, damaged()] {
            cases.extend([
                (lost.clone(), unknown(), Live::Nobody, 3, LATER),
                (lost.clone(), upto(8), Live::Nobody, 2, wait),
                (lost.clone(), upto(8), Live::Nobody, 3, Decision::Restore),
                (lost.clone(), upto(8), strangers, 3, wait),
                (lost.clone(), upto(8), friends, 3, wait),
                (lost.clone(), upto(8), started, 0, join),
                (lost.clone(), unknown(), started, 0, join),
                (lost.clone(), Backups::NotConfigured, foreign, 0, join),
                (lost.clone(), upto(8), serves(Place::NotListed), 3, join),
                (lost.clone(), upto(8), serves(Place::Added), 0, join),
                (lost, upto(8), serves(Place::Alive), 0, LATER),
            ]);
        }
        for (data, backups, live, lost, expected) in cases {
            check(&of_three(data, backups, live, lost), expected);
        }
    }

    #[test]
    fn a_cluster_that_exists_is_not_begun_again() {
        let facts = of_three(Data::Absent, Backups::NotConfigured, Live::Nobody, 0);
        check(&Facts { is_existing: true, ..facts.clone() }, Decision::Wait);
        check(&facts, Decision::Bootstrap);
        let begun = of_three(Data::Absent, Backups::Begun, Live::Nobody, 3);
        check(&Facts { is_existing: true, ..begun }, Decision::Wait);
        // One member is left in the configuration, and others serve still.
        let live = Live::Serves { cluster_id: OURS, us: Place::Started };
        check(&Facts { live, ..alone(damaged(), upto(8), false) }, Decision::Join);
    }

    /// Whatever the facts are, some things are never done.
    #[test]
    fn what_is_never_done_is_never_decided() {
        let serves = |us| [OURS, 99].map(|cluster_id| Live::Serves { cluster_id, us });
        let places = [Place::NotListed, Place::Added, Place::New, Place::Started, Place::Alive, Place::Another];
        let mut lives: Vec<_> = places.into_iter().flat_map(serves).collect();
        lives.extend([Live::Nobody, Live::NoQuorum { knows_us: false }, Live::NoQuorum { knows_us: true }]);
        let of = |cluster_id| Backups::Upto { last: 8, timeline: 1, cluster_id };
        let stores = [
            Backups::NotConfigured,
            Backups::Empty,
            Backups::Begun,
            unknown(),
            spoiled(),
            of(None),
            of(Some(OURS)),
            of(Some(99)),
        ];
        let mut datas = vec![Data::Absent, damaged(), only_here(), sound(5, 0), sound(5, 9), sound(9, 0)];
        for (of_cluster, voters) in [(OURS, 1), (OURS, 3), (99, 1)] {
            datas.extend([false, true].map(|since| damaged_of(Some(of_cluster), voters, since)));
        }
        let mut count = 0;
        for (data, backups) in datas.iter().flat_map(|data| stores.iter().map(move |backups| (data, backups))) {
            for (live, bits) in lives.iter().flat_map(|live| (0..32usize).map(move |bits| (*live, bits))) {
                let (replicas, lost) = if bits & 1 == 0 { (1, 0) } else { (3, bits >> 3) };
                let facts = Facts {
                    data: data.clone(),
                    backups: backups.clone(),
                    replicas,
                    is_existing: bits & 2 != 0,
                    live,
                    lost,
                    may_start_empty: bits & 4 != 0,
                    cannot_write: None,
                };
                let (decision, why) = decide(&facts);
                count += 1;
                let never = |what: bool, rule: &str| assert!(!what, "{rule}: {facts:?}: {decision:?}: {why}");
                let is_sound = matches!(data, Data::Sound(_));
                let replaces = matches!(decision, Decision::Restore | Decision::Bootstrap);
                let is_served = matches!(live, Live::Serves { .. });
                never(is_sound && replaces, "sound data is never replaced from the store");
                never(!is_sound && matches!(decision, Decision::Keep | Decision::Append), "etcd starts on no damage");
                never(
                    matches!(backups, Backups::Unknown { .. } | Backups::Damaged { .. }) && replaces && !is_served,
                    "what is not known is not there",
                );
                never(
                    matches!(backups, Backups::Upto { .. }) && decision == Decision::Bootstrap && !is_served,
                    "nothing begins anew beside backups",
                );
                never(*data == only_here() && replaces && !is_served, "what is nowhere else stays");
                never(is_served && decision == Decision::Restore, "nothing is restored beside a cluster that serves");
                never(replicas > 1 && lost < replicas && decision == Decision::Restore, "who is away may have more");
                never(
                    matches!(backups, Backups::NotConfigured | Backups::Empty | Backups::Begun)
                        && matches!(decision, Decision::Restore | Decision::Append),
                    "there is nothing to restore",
                );
                let is_foreign = Cause::of(&facts) == Cause::ForeignCluster;
                never(
                    is_foreign && matches!(decision, Decision::Keep | Decision::Append | Decision::Restore),
                    "foreign",
                );
                never(matches!(live, Live::Serves { us: Place::Alive, .. }) && decision == Decision::Join, "it runs");
            }
        }
        assert_eq!(count, datas.len() * stores.len() * lives.len() * 32);
    }

    #[test]
    fn each_thing_that_is_found_has_its_own_name() {
        let with = |change: fn(&mut Sound)| {
            let Data::Sound(mut sound) = sound(5, 0) else { unreachable!() };
            change(&mut sound);
            Data::Sound(sound)
        };
        let serves = |us| Live::Serves { cluster_id: OURS, us };
        let log = Data::Damaged(Damaged {
            part: Part::Log,
            evidence: "missing".into(),
            cluster_id: None,
            voters: 1,
            restored_since: false,
            only_here: None,
        });
        let cases = [
            (Data::Absent, upto(5), Live::Nobody, Cause::NoData),
            (sound(5, 0), upto(5), Live::Nobody, Cause::Sound),
            (with(|sound| sound.repairs = Some("torn".into())), upto(5), Live::Nobody, Cause::Repairable),
            (sound(5, 0), upto(8), Live::Nobody, Cause::Behind),
            (sound(5, 3), upto(8), Live::Nobody, Cause::Sound),
            (with(|sound| sound.restored_since = true), upto(8), Live::Nobody, Cause::Sound),
            (with(|sound| sound.cluster_id = 99), upto(5), Live::Nobody, Cause::ForeignCluster),
            (sound(5, 0), upto(5), Live::Serves { cluster_id: 99, us: Place::Started }, Cause::ForeignCluster),
            (sound(5, 0), upto(5), serves(Place::Another), Cause::AnotherMember),
            (sound(5, 0), upto(5), serves(Place::NotListed), Cause::Removed),
            (sound(5, 0), upto(5), serves(Place::Alive), Cause::RunsElsewhere),
            (damaged(), upto(5), Live::Nobody, Cause::Damaged(Part::Database)),
            (damaged_of(Some(99), 1, false), upto(5), Live::Nobody, Cause::ForeignCluster),
            (log, upto(5), Live::Nobody, Cause::Damaged(Part::Log)),
        ];
        for (data, backups, live, expected) in cases {
            let facts = Facts { live, ..alone(data, backups, false) };
            assert_eq!(Cause::of(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn rows_that_differ_are_damage_only_beside_backups_of_their_own() {
        let with = |agree: &[bool], restored_since| {
            let Data::Sound(sound) = sound(5, 1) else { unreachable!() };
            let differs = Some(Differs { evidence: "hash".into(), agree: agree.to_vec() });
            Data::Sound(Sound { restored_since, differs, ..sound })
        };
        let decided = |data: Data, last| decide(&alone(data.judged(&upto(last)), upto(last), true)).0;
        let (yes, no) = ([true; 8], [false; 8]);
        assert_eq!(decided(with(&yes, false), 6), Decision::Restore);
        assert_eq!(decided(with(&yes, false), 5), NEVER, "its log may have one more");
        assert_eq!(decided(with(&yes, true), 6), KEEP, "it was restored: other rows are to be expected");
        let one_differs = [&yes[..3], &no[..1], &yes[..4]].concat();
        assert_eq!(decided(with(&one_differs, false), 6), Decision::Restore);
        // Another history, also where it ends with the same by chance.
        for agree in [&no[..], &[&yes[..], &no[..2]].concat(), &[&no[..], &yes[..1]].concat()] {
            assert_eq!(decided(with(agree, false), 6), KEEP, "{agree:?}");
        }
        for agree in [&[][..], &yes[..3], &no[..3], &[&yes[..], &no[..1]].concat()] {
            assert_eq!(decided(with(agree, false), 6), NEVER, "{agree:?}");
        }
        assert_eq!(decided(sound(5, 1), 6), KEEP);
    }

    #[test]
    fn the_reason_has_the_evidence() {
        let facts = Facts { cannot_write: Some("read-only".into()), ..alone(sound(5, 0), upto(5), false) };
        assert!(decide(&facts).1.ends_with("; read-only"));
        let (_, why) = decide(&alone(damaged(), upto(9), false));
        assert!(why.contains("page 7") && why.contains("revision 9"), "{why}");
    }
}
