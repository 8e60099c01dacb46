//! A member's place in its cluster: a learner that has caught up votes, and the cluster knows where its peers reach it.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::Result;
use crate::etcd::{Etcd, Role, Status};
use crate::initialize::Settings;

/// How often it is looked whether the cluster has the member's peer URLs.
const URLS_PERIOD: Duration = Duration::from_secs(30);

/// Sees to it.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    looked_at: Option<Instant>,
}

impl Keeper {
    pub(super) async fn see_to(&mut self, settings: &Settings, etcd: &mut Etcd, status: &Status) {
        let done = match status.role {
            Role::Learner => promote(settings, status.member_id).await,
            Role::Leader | Role::Follower if self.looked_at.is_none_or(|at| at.elapsed() > URLS_PERIOD) => {
                self.looked_at = Some(Instant::now());
                update_urls(settings, etcd, status.member_id).await
            }
            Role::Leader | Role::Follower => Ok(()),
        };
        if let Err(error) = done {
            tracing::debug!(%error, "the member's place in its cluster is not as it should be yet");
        }
    }
}

/// A learner cannot ask for it itself, nor can it be promoted before it has caught up.
async fn promote(settings: &Settings, id: u64) -> Result<()> {
    let Some(others) = &settings.others else { return Ok(()) };
    let mut last = Ok(());
    for endpoint in &others.endpoints {
        let promoted = async { Etcd::reach(others, endpoint.trim()).await?.0.promote(id).await };
        last = promoted.await;
        if last.is_ok() {
            tracing::info!("the member has caught up and votes from now on");
            break;
        }
    }
    last
}

async fn update_urls(settings: &Settings, etcd: &mut Etcd, id: u64) -> Result<()> {
    let wanted = settings.member.peer_urls();
    let listed = etcd.members().await?;
    let Some(ours) = listed.iter().find(|listed| listed.id == id) else { return Ok(()) };
    if ours.peer_urls.iter().collect::<BTreeSet<_>>() == wanted.iter().collect() {
        return Ok(());
    }
    etcd.update_member(id, wanted).await?;
    tracing::info!(before = ?ours.peer_urls, now = ?wanted, "the cluster knows the member's new peer URLs");
    Ok(())
}
