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

    /// Alarms of the cluster, with the id of the member that each is of.
    pub async fn alarms(&mut self) -> Result<Vec<(u64, Alarm)>> {
        let asking = self.client.alarm(AlarmAction::Get, AlarmType::None, None);
        let answer = deadline(self.timeout, asking).await.map_err(self.fail("ask for alarms"))?;
        let alarms = answer.alarms().iter().filter_map(|alarm| match alarm.alarm() {
            AlarmType::None => None,
            AlarmType::Nospace => Some((alarm.member_id(), Alarm::NoSpace)),
            AlarmType::Corrupt => Some((alarm.member_id(), Alarm::Corrupt)),
        });
        Ok(alarms.collect())
    }

    /// Says that a member has space again.
    pub async fn disarm_no_space(&mut self, member_id: u64) -> Result<()> {
        let mut options = AlarmOptions::new();
        options.with_member(member_id);
        let disarming = self.client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options));
        deadline(self.timeout, disarming).await.map_err(self.fail("clear the alarm")).map(drop)
    }
}
