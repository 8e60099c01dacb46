//! What keeps a member healthy, asked of it.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, CompactionOptions};

use super::{Etcd, deadline};
use crate::Result;

/// A database of 8 GB on a slow disk.
const DEFRAGMENT_DEADLINE: Duration = Duration::from_secs(600);

/// What a member warns of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// Its database has reached the quota: nothing can be written.
    NoSpace,
    /// Its data differs from that of the others.
    Corrupt,
}

impl Alarm {
    /// As etcdctl prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoSpace => "NOSPACE",
            Self::Corrupt => "CORRUPT",
        }
    }

    /// Reads one of the errors of a status, such as `memberID:10501334649042878790 alarm:NOSPACE `, and whose it is. To be
    /// asked for alarms costs the cluster an entry in its log; a status costs nothing.
    pub(super) fn parse(text: &str) -> Option<(u64, Self)> {
        let field = |name| text.split_whitespace().find_map(|word| word.strip_prefix(name));
        let alarm = match field("alarm:")? {
            "NOSPACE" => Self::NoSpace,
            "CORRUPT" => Self::Corrupt,
            _ => return None,
        };
        Some((field("memberID:")?.parse().ok()?, alarm))
    }
}

impl Etcd {
    /// Defragments this member's database; it does not serve meanwhile.
    pub async fn defragment(&mut self) -> Result<()> {
        deadline(DEFRAGMENT_DEADLINE, self.client.defragment()).await.map_err(self.fail("defragment")).map(drop)
    }

    /// Hands leadership over. Only the leader can.
    pub async fn move_leader(&mut self, to: u64) -> Result<()> {
        deadline(self.timeout, self.client.move_leader(to)).await.map_err(self.fail("hand leadership over")).map(drop)
    }

    /// Compacts the history up to a revision, and waits until its rows are gone.
    pub async fn compact(&mut self, revision: i64) -> Result<()> {
        let options = CompactionOptions::new().with_physical();
        let compacting = self.client.compact(revision, Some(options));
        match deadline(DEFRAGMENT_DEADLINE, compacting).await {
            // Somebody else has.
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::OutOfRange => Ok(()),
            compacted => compacted.map_err(self.fail("compact")).map(drop),
        }
    }

    /// Says that a member has space again.
    pub async fn disarm_no_space(&mut self, member_id: u64) -> Result<()> {
        let mut options = AlarmOptions::new();
        options.with_member(member_id);
        let disarming = self.client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options));
        deadline(self.timeout, disarming).await.map_err(self.fail("clear the alarm")).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_status_are_alarms() {
        let of = |text| Alarm::parse(text);
        assert_eq!(
            of("memberID:10501334649042878790 alarm:NOSPACE "),
            Some((10_501_334_649_042_878_790, Alarm::NoSpace))
        );
        assert_eq!(of("memberID:7 alarm:CORRUPT"), Some((7, Alarm::Corrupt)));
        for other in
            ["etcdserver: no leader", "", "alarm:NOSPACE", "memberID:x alarm:NOSPACE", "memberID:1 alarm:OTHER"]
        {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
