//! A member's place in its cluster: a learner that has caught up votes, and the cluster knows where its peers reach it. And
//! members that nobody configures any more, and nobody reaches, leave it.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::Result;
use crate::etcd::{Etcd, Listed, Role, Status};
use crate::initialize::Settings;

/// How often it is looked whether the cluster has the member's peer URLs.
const URLS_PERIOD: Duration = Duration::from_secs(30);

/// How long a member has to let itself be reached.
const MOST_LOOKING: Duration = Duration::from_secs(2);

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

/// Since when members that nobody configures cannot be reached, by id.
#[derive(Debug, Default)]
pub(super) struct Gone {
    since: HashMap<u64, Instant>,
    looked_at: Option<Instant>,
}

impl Gone {
    /// How often it is looked, so that one is removed after about so long.
    pub(super) fn period(after: Duration) -> Duration {
        (after / 3).min(URLS_PERIOD)
    }

    /// Removes members that the configuration does not name and that have not been reached for so long.
    pub(super) async fn remove(&mut self, settings: &Settings, after: Duration, etcd: &mut Etcd) -> Result<()> {
        // Who has not looked for a while, as while another led, knows nothing of that time.
        if self.looked_at.is_none_or(|at| at.elapsed() > 3 * Self::period(after) + MOST_LOOKING) {
            self.since.clear();
        }
        self.looked_at = Some(Instant::now());
        let configured: BTreeSet<_> = settings.member.cluster.members().iter().map(|member| &member.name).collect();
        let listed = etcd.members().await?;
        self.since.retain(|id, _| listed.iter().any(|member| member.id == *id));
        for member in &listed {
            // One without a name was added, and may be on its way.
            if configured.contains(&member.name) || member.name.is_empty() || listens(member).await {
                self.since.remove(&member.id);
                continue;
            }
            let since = *self.since.entry(member.id).or_insert_with(Instant::now);
            if since.elapsed() >= after {
                let started = Instant::now();
                let removed = etcd.remove_member(member.id).await;
                settings.metrics.member_removed(removed.is_ok(), started.elapsed());
                // A cluster refuses it while too few of the others run; it is asked again at the next look.
                match removed {
                    Ok(()) => {
                        tracing::warn!(name = member.name, "a member that nobody configures or reaches is removed");
                    }
                    Err(error) => {
                        tracing::warn!(name = member.name, %error, "a member that is gone is not removed yet");
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether anything is where a member is to be reached. An etcd whose certificates or users are not ours lives, too.
async fn listens(member: &Listed) -> bool {
    for url in member.client_urls.iter().chain(&member.peer_urls) {
        let Ok(url) = url::Url::parse(url) else { return true };
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return true };
        let connecting = tokio::net::TcpStream::connect((host.trim_matches(['[', ']']), port));
        if matches!(tokio::time::timeout(MOST_LOOKING, connecting).await, Ok(Ok(_))) {
            return true;
        }
    }
    false
}

/// A learner cannot ask for it itself, nor can it be promoted before it has caught up.
async fn promote(settings: &Settings, id: u64) -> Result<()> {
    let Some(others) = &settings.others else { return Ok(()) };
    let (started, mut last) = (Instant::now(), Ok(()));
    for endpoint in &others.endpoints {
        let promoted = async { Etcd::reach(others, endpoint.trim()).await?.0.promote(id).await };
        last = promoted.await;
        if last.is_ok() {
            tracing::info!("the member has caught up and votes from now on");
            break;
        }
    }
    settings.metrics.member_promoted(last.is_ok(), started.elapsed());
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
