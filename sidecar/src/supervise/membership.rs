//! A member's place in its cluster: a learner that has caught up votes, and the cluster knows where its peers reach it. And
//! members that nobody configures any more, and nobody reaches, leave it.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::Result;
use crate::etcd::{Etcd, EtcdFlags, Listed, Role, Status};
use crate::initialize::Settings;

/// How often it is looked whether the cluster has the member's peer URLs.
const URLS_PERIOD: Duration = Duration::from_secs(30);

/// Sees to it.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    looked_at: Option<Instant>,
    /// Since when members that nobody configures cannot be reached, by id.
    gone_since: HashMap<u64, Instant>,
    looked_for_gone_at: Option<Instant>,
}

impl Keeper {
    /// Removes members that the configuration does not name and that have not been reached for so long. Only the leader does.
    pub(super) async fn remove_gone(
        &mut self,
        settings: &Settings,
        flags: &EtcdFlags,
        after: Duration,
        etcd: &mut Etcd,
    ) {
        // Whoever is not there takes a while to be found so.
        if self.looked_for_gone_at.is_some_and(|at| at.elapsed() < (after / 3).min(URLS_PERIOD)) {
            return;
        }
        self.looked_for_gone_at = Some(Instant::now());
        let configured: BTreeSet<_> = settings.member.cluster.members().iter().map(|member| &member.name).collect();
        let listed = match etcd.members().await {
            Ok(listed) => listed,
            Err(error) => return tracing::debug!(%error, "the members cannot be listed"),
        };
        self.gone_since.retain(|id, _| listed.iter().any(|member| member.id == *id));
        for member in &listed {
            // One without a name was added, and may be on its way.
            if configured.contains(&member.name) || member.name.is_empty() || answers(flags, member).await {
                self.gone_since.remove(&member.id);
                continue;
            }
            let since = *self.gone_since.entry(member.id).or_insert_with(Instant::now);
            if since.elapsed() < after {
                continue;
            }
            let name = &member.name;
            match etcd.remove_member(member.id).await {
                Ok(()) => tracing::warn!(name, "a member that is not configured and not reached is removed"),
                // Such as when too few others are up.
                Err(error) => tracing::warn!(name, %error, "a member that is gone cannot be removed"),
            }
        }
    }

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

/// Whether an etcd is there.
async fn answers(flags: &EtcdFlags, member: &Listed) -> bool {
    for url in &member.client_urls {
        let flags = EtcdFlags { endpoints: vec![url.clone()], command_timeout: 2, ..flags.clone() };
        if Etcd::reach(&flags, url).await.is_ok() {
            return true;
        }
    }
    false
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
