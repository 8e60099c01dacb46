//! What is done with a data directory, given what is known. Pure.

/// What a member's data directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// There is none, or nothing of an etcd is in it.
    Absent,
    /// etcd can start on it.
    Sound(Sound),
    /// etcd must not.
    Damaged {
        /// What is wrong, and where.
        evidence: String,
    },
}

/// Data that etcd can start on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sound {
    /// Id of the cluster that it is of.
    pub cluster_id: u64,
    /// Revision of its database.
    pub revision: i64,
    /// Entries of its log that its database lacks: each may be a revision.
    pub unapplied: u64,
    /// Its log ends in a write that was cut; etcd drops that when it starts.
    pub torn: bool,
    /// Whether it was restored since the newest backup was taken: it is where somebody wants it to be.
    pub restored_since: bool,
    /// Voting members of its cluster, as its log says.
    pub voters: usize,
}

/// What the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backups {
    /// No store is configured: no backups, only the check.
    NotConfigured,
    /// There is none yet.
    Empty,
    /// Up to a revision.
    Upto {
        /// The last that can be restored.
        last: i64,
        /// Id of the cluster whose backups the newest are; `None` when nothing says so.
        cluster_id: Option<u64>,
    },
    /// It cannot be told.
    Unknown {
        /// Why.
        why: String,
    },
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
    /// Whether to begin anew where data is damaged and there is nothing to restore.
    pub may_start_empty: bool,
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
    /// Touch nothing and do not start etcd.
    Refuse {
        /// Whether to look again soon: it may pass by itself.
        may_pass: bool,
    },
}

/// Decides, and says why.
pub fn decide(facts: &Facts) -> (Decision, String) {
    match &facts.data {
        Data::Sound(sound) => with_data(sound, facts),
        Data::Absent => without_data("there is no data", facts, true),
        Data::Damaged { evidence } => {
            without_data(&format!("the data is damaged: {evidence}"), facts, facts.may_start_empty)
        }
    }
}

fn with_data(sound: &Sound, facts: &Facts) -> (Decision, String) {
    let revision = sound.revision;
    let torn = if sound.torn { "; its log ends in a cut write, which etcd drops" } else { "" };
    let sound_at = format!("the data is sound, at revision {revision}{torn}");
    let keep = |why: &str| (Decision::Keep, format!("{sound_at}{why}"));
    match &facts.backups {
        // A voter that forgot what it voted for may undo what a quorum has acknowledged.
        _ if facts.replicas > 1 || sound.voters > 1 => keep("; what it misses the other members have"),
        Backups::NotConfigured => keep("; there is no store to compare it with"),
        Backups::Empty => keep("; there are no backups yet"),
        // What is there is whole. Not to start for want of a store would make an outage of two.
        Backups::Unknown { why } => keep(&format!("; whether the store has more cannot be told: {why}")),
        Backups::Upto { cluster_id: Some(theirs), .. } if *theirs != sound.cluster_id => {
            let why = format!(
                "the data is of cluster {:x}, the backups are of {theirs:x}: the volume or the store is another's; move the data away, or give a store of its own",
                sound.cluster_id,
            );
            (Decision::Refuse { may_pass: false }, why)
        }
        Backups::Upto { last, .. } => {
            let reach = revision.saturating_add(i64::try_from(sound.unapplied).unwrap_or(i64::MAX));
            if revision >= *last {
                keep(&format!(", and the backups end at {last}"))
            } else if sound.restored_since {
                keep(&format!(", restored since the backups up to {last} were taken"))
            } else if reach >= *last {
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
        Backups::Upto { .. } if facts.replicas > 1 => refuse(
            false,
            "the other members of the cluster may have what it lacks; several members are not looked after yet",
        ),
        Backups::Upto { last, .. } => (Decision::Restore, format!("{what}; the backups reach revision {last}")),
        Backups::Empty if may_start_empty => (Decision::Bootstrap, format!("{what}, and there are no backups")),
        Backups::NotConfigured if may_start_empty => (Decision::Bootstrap, format!("{what}, and no store is given")),
        Backups::Empty | Backups::NotConfigured => {
            refuse(false, "there is nothing to restore; move the data away, or allow to start empty")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u64 = 7;

    fn sound(revision: i64, unapplied: u64) -> Data {
        Data::Sound(Sound { cluster_id: OURS, revision, unapplied, torn: false, restored_since: false, voters: 1 })
    }

    fn upto(last: i64) -> Backups {
        Backups::Upto { last, cluster_id: Some(OURS) }
    }

    fn unknown() -> Backups {
        Backups::Unknown { why: "no route".into() }
    }

    fn damaged() -> Data {
        Data::Damaged { evidence: "page 7".into() }
    }

    #[test]
    fn every_case_is_decided() {
        let (keep, later, never) =
            (Decision::Keep, Decision::Refuse { may_pass: true }, Decision::Refuse { may_pass: false });
        let restored = Data::Sound(Sound {
            cluster_id: OURS,
            revision: 5,
            unapplied: 0,
            torn: false,
            restored_since: true,
            voters: 1,
        });
        let foreign = Data::Sound(Sound {
            cluster_id: 99,
            revision: 5,
            unapplied: 0,
            torn: false,
            restored_since: false,
            voters: 1,
        });
        let unnamed = Backups::Upto { last: 5, cluster_id: None };
        // Data, backups, members, may start empty, and what follows.
        let cases = [
            (sound(5, 0), Backups::NotConfigured, 1, false, keep),
            (sound(5, 0), Backups::Empty, 1, false, keep),
            (sound(5, 0), unknown(), 1, false, keep),
            (sound(5, 0), upto(5), 1, false, keep),
            (sound(5, 0), upto(4), 3, false, keep),
            (sound(5, 0), upto(8), 3, false, keep),
            (sound(5, 3), upto(8), 1, false, keep),
            (sound(5, 2), upto(8), 1, false, Decision::Append),
            (sound(5, 0), upto(8), 1, true, Decision::Append),
            (restored, upto(8), 1, false, keep),
            (foreign.clone(), upto(5), 1, true, never),
            (foreign.clone(), unnamed, 1, false, keep),
            (foreign, Backups::Empty, 1, false, keep),
            (Data::Absent, Backups::NotConfigured, 1, false, Decision::Bootstrap),
            (Data::Absent, Backups::Empty, 3, false, Decision::Bootstrap),
            (Data::Absent, unknown(), 1, true, later),
            (Data::Absent, upto(5), 1, false, Decision::Restore),
            (Data::Absent, upto(5), 3, true, never),
            (damaged(), Backups::NotConfigured, 1, false, never),
            (damaged(), Backups::NotConfigured, 1, true, Decision::Bootstrap),
            (damaged(), Backups::Empty, 1, false, never),
            (damaged(), Backups::Empty, 1, true, Decision::Bootstrap),
            (damaged(), unknown(), 1, true, later),
            (damaged(), upto(5), 1, true, Decision::Restore),
            (damaged(), upto(5), 3, false, never),
        ];
        for (data, backups, replicas, may_start_empty, expected) in cases {
            let facts = Facts { data, backups, replicas, may_start_empty };
            let (decision, why) = decide(&facts);
            assert_eq!(decision, expected, "{facts:?}: {why}");
            assert!(!why.is_empty());
        }
    }

    #[test]
    fn the_reason_has_the_evidence() {
        let facts = Facts { data: damaged(), backups: upto(9), replicas: 1, may_start_empty: false };
        let (_, why) = decide(&facts);
        assert!(why.contains("page 7") && why.contains("revision 9"), "{why}");
    }
}
