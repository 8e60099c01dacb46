//! Defragmentation: one member at a time, followers first, a leader of several only when another leads. It ends where the
//! cluster has other worries.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::etcd::{Alarm, Etcd, EtcdFlags, Role, Status};
use crate::metrics::Metrics;
use crate::{Error, Result};

/// Sizes of a database before and after, in bytes.
pub type Sizes = (i64, i64);

/// A member that takes longer than this to read through its quorum has enough to do.
const MOST_LATENCY: Duration = Duration::from_millis(500);
/// A member that is further behind what is committed is catching up.
const MOST_BEHIND: u64 = 5_000;
/// Less than that is not worth an interruption out of turn.
const LEAST_URGENT_BYTES: i64 = 64 << 20;

/// Defragments the member that `etcd` is of. `quiet` is held: no full snapshot is read from the leader meanwhile.
pub(super) async fn this_member(etcd: &mut Etcd, status: &Status, quiet: &Mutex<()>) -> Result<Sizes> {
    // First: handing leadership over would end the full snapshot that holds it.
    let _quiet = quiet.lock().await;
    if status.role == Role::Leader {
        // Who leads and does not answer would cost the cluster an election; a cluster of one waits anyway.
        hand_over(etcd, status).await?;
    }
    etcd.defragment().await?;
    let after = etcd.status().await?.db_size;
    tracing::info!(before = status.db_size, after, "the database is defragmented");
    Ok((status.db_size, after))
}

/// Hands leadership over to a member that votes; who that is, `None` when there is no other.
pub(super) async fn hand_over(etcd: &mut Etcd, status: &Status) -> Result<Option<u64>> {
    let others = etcd
        .members()
        .await?
        .into_iter()
        .filter(|listed| listed.id != status.member_id && !listed.is_learner && !listed.client_urls.is_empty());
    let mut last = Ok(None);
    for other in others {
        last = etcd.move_leader(other.id).await.map(|()| Some(other.id));
        // The answer may have been lost; and whoever leads by now, it is not this one.
        if last.is_err()
            && let Ok(now) = etcd.status().await
            && ![0, status.member_id].contains(&now.leader_id)
        {
            last = Ok(Some(now.leader_id));
        }
        if let Ok(Some(to)) = last {
            tracing::info!(to = format!("{to:x}"), "leadership is handed over");
            break;
        }
    }
    last
}

/// A member that was asked how it is, and how long it took to say so.
#[derive(Debug)]
struct Asked {
    etcd: Etcd,
    status: Status,
    took: Duration,
}

/// The members of the cluster that `etcd` is of, each as it is now. Fails unless all answer: one that does not may be
/// defragmented by somebody else.
async fn all_members(flags: &EtcdFlags, etcd: &mut Etcd) -> Result<Vec<Asked>> {
    let mut asked = Vec::new();
    for member in etcd.members().await? {
        if member.is_learner || member.client_urls.is_empty() {
            return Err(Error::precondition("a member has yet to join: nothing is defragmented"));
        }
        let other = EtcdFlags { endpoints: member.client_urls, ..flags.clone() };
        let (mut etcd, _) = Etcd::connect(&other).await?;
        let started = Instant::now();
        let status = etcd.current_status().await?;
        asked.push(Asked { etcd, status, took: started.elapsed() });
    }
    Ok(asked)
}

/// What a cluster has to do that is more urgent: nothing, or why nobody may go away for a while. To be full may be what it is
/// done for.
fn pressure(members: &[(Status, Duration)], may_be_full: bool) -> Option<String> {
    let committed = members.iter().map(|(status, _)| status.raft_index).max().unwrap_or(0);
    members.iter().find_map(|(status, took)| {
        let member = format!("member {:x}", status.member_id);
        let behind = committed.saturating_sub(status.raft_applied_index);
        let is_worry = |alarm: &Alarm| !(may_be_full && *alarm == Alarm::NoSpace);
        if let Some((id, alarm)) = status.alarms.iter().find(|(_, alarm)| is_worry(alarm)) {
            Some(format!("member {id:x} has the alarm {}", alarm.name()))
        } else if status.leader_id == 0 {
            Some(format!("{member} knows no leader"))
        } else if *took > MOST_LATENCY {
            Some(format!("{member} takes {took:?} to answer"))
        } else if behind > MOST_BEHIND {
            Some(format!("{member} is {behind} entries behind"))
        } else {
            None
        }
    })
}

/// All members, none of which is under pressure.
async fn all_well(flags: &EtcdFlags, etcd: &mut Etcd, may_be_full: bool) -> Result<Vec<Asked>> {
    let asked = all_members(flags, etcd).await?;
    let seen: Vec<_> = asked.iter().map(|asked| (asked.status.clone(), asked.took)).collect();
    match pressure(&seen, may_be_full) {
        Some(why) => Err(Error::precondition(format!("{why}: no database is defragmented now"))),
        None => Ok(asked),
    }
}

/// Defragments the member that `flags` lead to, when all are well.
pub(super) async fn own(flags: &EtcdFlags, quiet: &Mutex<()>) -> Result<Sizes> {
    let (mut etcd, status) = Etcd::connect(flags).await?;
    all_well(flags, &mut etcd, true).await?;
    this_member(&mut etcd, &status, quiet).await
}

/// Defragments every member whose file is free to at least that share. `flags` lead to the leader, and with other endpoints to
/// the others. Before each one all must be well, and the leader the same.
pub(super) async fn cluster(
    flags: &EtcdFlags,
    least_free_share: f64,
    quiet: &Mutex<()>,
    metrics: &Metrics,
) -> Result<Vec<Sizes>> {
    let (mut leader, ours) = Etcd::connect(flags).await?;
    let mut done = Vec::new();
    let mut seen = Vec::new();
    loop {
        let mut asked = all_well(flags, &mut leader, false).await?;
        if asked.iter().any(|asked| asked.status.leader_id != ours.member_id) {
            if done.is_empty() {
                return Ok(done);
            }
            return Err(Error::precondition("another member leads by now: it is left to it to defragment the rest"));
        }
        asked.sort_by_key(|asked| asked.status.role == Role::Leader);
        let next = asked.into_iter().find(|asked| !seen.contains(&asked.status.member_id));
        let Some(Asked { mut etcd, status, .. }) = next else { return Ok(done) };
        seen.push(status.member_id);
        if !is_worth_it(&status, least_free_share) {
            continue;
        }
        let is_last = status.role == Role::Leader;
        let started = Instant::now();
        let defragmented = this_member(&mut etcd, &status, quiet).await;
        metrics.defragmented(etcd.endpoint(), defragmented.is_ok(), started.elapsed());
        done.push(defragmented?);
        if is_last {
            return Ok(done);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share")]
fn is_worth_it(status: &Status, least_free_share: f64) -> bool {
    let free = status.db_size.saturating_sub(status.db_size_in_use);
    tracing::info!(
        member = format!("{:x}", status.member_id),
        bytes = status.db_size,
        free,
        "look whether to defragment"
    );
    status.db_size > 0 && free as f64 >= least_free_share * status.db_size as f64
}

/// Whether so much of a database is free that it is not left until its time comes.
#[expect(clippy::cast_precision_loss, reason = "a share")]
pub(super) fn is_urgent(status: &Status, urgent_free_share: f64) -> bool {
    let free = status.db_size.saturating_sub(status.db_size_in_use);
    urgent_free_share > 0.0 && free >= LEAST_URGENT_BYTES && free as f64 >= urgent_free_share * status.db_size as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_other_worries_is_left_alone() {
        type Change = fn(&mut (Status, Duration));
        let status = |member_id| Status {
            member_id,
            leader_id: 1,
            raft_index: 10_000,
            raft_applied_index: 9_990,
            db_size: 100 << 20,
            db_size_in_use: 20 << 20,
            ..Status::default()
        };
        let quick = Duration::from_millis(3);
        let with = |change: Change| {
            let mut members = vec![(status(1), quick), (status(2), quick)];
            change(&mut members[1]);
            pressure(&members, false)
        };
        assert_eq!(with(|_| {}), None);
        let cases: [(Change, &str); 4] = [
            (|(status, _)| status.alarms = vec![(2, Alarm::NoSpace)], "NOSPACE"),
            (|(status, _)| status.leader_id = 0, "no leader"),
            (|(_, took)| *took = Duration::from_secs(1), "to answer"),
            (|(status, _)| status.raft_applied_index = 1, "entries behind"),
        ];
        for (change, said) in cases {
            assert!(with(change).is_some_and(|why| why.contains(said)), "{said}");
        }
        let full = vec![(Status { alarms: vec![(2, Alarm::NoSpace)], ..status(2) }, quick)];
        assert_eq!(pressure(&full, true), None);
        let free = status(1);
        assert!(is_urgent(&free, 0.75) && !is_urgent(&free, 0.9) && !is_urgent(&free, 0.0));
        assert!(!is_urgent(&Status { db_size: 50 << 20, db_size_in_use: 1, ..free }, 0.75));
    }
}
