//! Defragmentation: one member at a time, followers first, a leader of several only when another leads.

use std::sync::Arc;

use tokio::sync::Mutex;

use crate::etcd::{Etcd, EtcdFlags, Role, Status};
use crate::{Error, Result};

/// Sizes of a database before and after, in bytes.
pub type Sizes = (i64, i64);

/// Defragments the member that `etcd` is of. `quiet` is held: nothing is read from its database at length meanwhile.
pub(super) async fn this_member(etcd: &mut Etcd, status: &Status, quiet: &Mutex<()>) -> Result<Sizes> {
    if status.role == Role::Leader {
        // Who leads and does not answer would cost the cluster an election; a cluster of one waits anyway.
        hand_over(etcd, status).await?;
    }
    let _quiet = quiet.lock().await;
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
        if last.is_ok() {
            tracing::info!(to = format!("{:x}", other.id), name = other.name, "leadership is handed over");
            break;
        }
    }
    last
}

/// Defragments every member whose file is free to at least that share. `flags` lead to the leader, and with other endpoints to
/// the others. Stops at the first member that is not well: the cluster has other worries.
pub(super) async fn cluster(flags: &EtcdFlags, least_free_share: f64, quiet: &Arc<Mutex<()>>) -> Result<Vec<Sizes>> {
    let (mut leader, status) = Etcd::connect(flags).await?;
    if status.role != Role::Leader {
        return Ok(Vec::new());
    }
    if let Some((id, alarm)) = leader.alarms().await?.first() {
        return Err(Error::precondition(format!(
            "member {id:x} has the alarm {}: nothing is defragmented",
            alarm.name()
        )));
    }
    let listed = leader.members().await?;
    if listed.iter().any(|member| member.is_learner || member.client_urls.is_empty()) {
        return Err(Error::precondition("a member has yet to join: nothing is defragmented"));
    }
    let mut followers = Vec::new();
    for member in listed.iter().filter(|member| member.id != status.member_id) {
        let other = EtcdFlags { endpoints: member.client_urls.clone(), ..flags.clone() };
        // All must be well before one goes away for a while.
        followers.push(Etcd::connect(&other).await?);
    }
    let mut done = Vec::new();
    for (mut etcd, before) in followers {
        if is_worth_it(&before, least_free_share) {
            done.push(this_member(&mut etcd, &before, &Mutex::default()).await?);
            etcd.current_status().await?;
        }
    }
    if is_worth_it(&status, least_free_share) {
        done.push(this_member(&mut leader, &status, quiet).await?);
    }
    Ok(done)
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
