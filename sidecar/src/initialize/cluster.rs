//! The other members of a cluster: whether they serve, what they know of ours, and how one that lost its data comes back.
//!
//! A voter that lost its data has forgotten what it voted for. It must not come back under its old id: it is taken out of the
//! cluster and added as a learner, which gets everything from the leader before it votes again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt};

use super::decision::{Live, Place};
use super::member::Member;
use crate::etcd::{CONNECT, Etcd, EtcdFlags, Listed};
use crate::metrics::Metrics;
use crate::{Error, Result};

/// Whether somebody runs as our member is asked for so long.
const IS_ALIVE_DEADLINE: Duration = Duration::from_secs(3);

/// The revision of a cluster in which nothing was written.
const BLANK: i64 = 1;

/// A cluster that serves.
#[derive(Debug)]
pub(super) struct Serving {
    /// A voting member of it.
    etcd: Etcd,
    /// Our entry in its list.
    ours: Option<(Listed, Place)>,
}

/// Looks around. `data_id` is whose data is there, when it is sound.
pub(super) async fn look(others: &EtcdFlags, member: &Member, data_id: Option<u64>) -> (Live, Option<Serving>) {
    let mut asked: FuturesUnordered<_> = others.endpoints.iter().map(|endpoint| ask(others, endpoint.trim())).collect();
    let mut live = Live::Nobody;
    while let Some(answer) = asked.next().await {
        let (mut etcd, status, mut listed) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, "a member does not answer");
                // An etcd that starts listens, and answers nothing until it has a quorum; one whose CA is another is there.
                let is_there = !matches!(error, Error::Etcd { op: CONNECT, .. }) || crate::error::is_estranged(&error);
                if is_there && live == Live::Nobody {
                    live = Live::NoQuorum { knows_us: false };
                }
                continue;
            }
        };
        // Only who reads through a quorum knows who is a member, and only after that.
        let has_quorum = async {
            let revision = etcd.current_status().await?.revision;
            Ok::<_, Error>((revision, etcd.members().await?))
        };
        let current = has_quorum.await.map(|(revision, current)| {
            listed = current;
            revision
        });
        let ours = place(&listed, member, data_id);
        let Ok(revision) = current else {
            let knows_us = ours.as_ref().is_some_and(|(_, place)| matches!(place, Place::Started | Place::Alive));
            live = Live::NoQuorum { knows_us: knows_us || matches!(live, Live::NoQuorum { knows_us: true }) };
            continue;
        };
        let ours = match ours {
            // Our own etcd does not run: its data would be in use.
            Some((ours, Place::Started)) if is_alive(others, &ours).await => Some((ours, Place::Alive)),
            // Another took its place, which lost its data since or does not run: ours is not listed under its id.
            Some((ours, Place::Started)) if data_id.is_some_and(|id| id != ours.id) => Some((ours, Place::NotListed)),
            ours => ours,
        };
        let us = match ours.as_ref().map_or(Place::NotListed, |(_, place)| *place) {
            // What it would begin with is not what the others have.
            Place::New if revision > BLANK => Place::Added,
            us => us,
        };
        return (Live::Serves { cluster_id: status.cluster_id, us }, Some(Serving { etcd, ours }));
    }
    (live, None)
}

async fn ask(others: &EtcdFlags, endpoint: &str) -> Result<(Etcd, crate::etcd::Status, Vec<Listed>)> {
    let (mut etcd, status) = Etcd::reach(others, endpoint).await?;
    let listed = etcd.members().await?;
    Ok((etcd, status, listed))
}

/// Our entry in a list: by the id of our data, or by what we are called.
fn place(listed: &[Listed], member: &Member, data_id: Option<u64>) -> Option<(Listed, Place)> {
    if let Some(ours) = listed.iter().find(|listed| Some(listed.id) == data_id) {
        let is_ours = ours.name.is_empty() || ours.name == member.name;
        return Some((ours.clone(), if is_ours { Place::Started } else { Place::Another }));
    }
    let urls: BTreeSet<_> = member.peer_urls().iter().collect();
    let is_ours =
        |listed: &&Listed| listed.name == member.name || listed.peer_urls.iter().any(|url| urls.contains(url));
    let ours = listed.iter().find(is_ours)?;
    let place = match (ours.name.is_empty(), ours.client_urls.is_empty()) {
        (true, _) => Place::Added,
        (false, true) => Place::New,
        (false, false) => Place::Started,
    };
    Some((ours.clone(), place))
}

/// Whether an etcd runs as that member.
async fn is_alive(others: &EtcdFlags, ours: &Listed) -> bool {
    let asked = ours.client_urls.iter().map(|url| async move {
        let reached = tokio::time::timeout(IS_ALIVE_DEADLINE, Etcd::reach(others, url)).await;
        matches!(reached, Ok(Ok((_, status))) if status.member_id == ours.id)
    });
    join_all(asked).await.contains(&true)
}

impl Serving {
    /// Makes ours a learner that has never started; what its etcd has for `initial-cluster`. Each step can be followed by a
    /// crash: the next look finds how far it came.
    pub(super) async fn join(mut self, member: &Member, metrics: &Metrics) -> Result<String> {
        // An id under which an etcd may have acknowledged anything is never used again with an empty log.
        let has_run = member.data_dir.join("member").exists();
        let is_unused = matches!(self.ours, Some((_, Place::Added))) && !has_run;
        if let (Some((ours, _)), false) = (&self.ours, is_unused) {
            tracing::info!(
                id = format!("{:x}", ours.id),
                name = ours.name,
                "the old member is removed from the cluster"
            );
            let started = Instant::now();
            let removed = self.etcd.remove_member(ours.id).await;
            metrics.member_removed(removed.is_ok(), started.elapsed());
            removed?;
        }
        if !is_unused {
            let started = Instant::now();
            let added = self.etcd.add_learner(member.peer_urls()).await;
            metrics.learner_added(added.is_ok(), started.elapsed());
            added?;
            tracing::info!(name = member.name, "the member is added to the cluster as a learner");
        }
        let listed = self.etcd.members().await?;
        if !matches!(place(&listed, member, None), Some((_, Place::Added))) {
            return Err(Error::Unanswered { what: "the cluster does not list the member yet that was added".into() });
        }
        Ok(initial_cluster(&listed, member))
    }
}

/// As etcd wants it of who joins: every member with exactly the URLs of the list.
fn initial_cluster(listed: &[Listed], member: &Member) -> String {
    let entries = listed.iter().flat_map(|listed| {
        let is_ours = listed.name.is_empty() && listed.peer_urls.iter().any(|url| member.peer_urls().contains(url));
        let name = match listed.name.as_str() {
            _ if is_ours => member.name.clone(),
            "" => format!("{:x}", listed.id),
            name => name.to_owned(),
        };
        listed.peer_urls.iter().map(move |url| format!("{name}={url}"))
    });
    entries.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: u64, name: &str, peer: &str, client: &str) -> Listed {
        let urls = |url: &str| if url.is_empty() { Vec::new() } else { vec![url.to_owned()] };
        Listed { id, name: name.into(), peer_urls: urls(peer), client_urls: urls(client), is_learner: false }
    }

    #[tokio::test]
    async fn who_listens_and_does_not_accept_yet_is_there() -> std::io::Result<()> {
        // As an etcd does that waits for a quorum.
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let member =
            Member::parse("name: b\ndata-dir: /d\ninitial-cluster: a=http://a:2380,b=http://b:2380\n", None).unwrap();
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        for (scheme, port, expected) in [
            ("https", listener.local_addr()?.port(), Live::NoQuorum { knows_us: false }),
            ("http", listener.local_addr()?.port(), Live::NoQuorum { knows_us: false }),
            ("https", 1, Live::Nobody),
        ] {
            let endpoints = vec![format!("{scheme}://127.0.0.1:{port}")];
            let others = EtcdFlags {
                endpoints,
                cacert: None,
                cert: None,
                key: None,
                insecure_skip_tls_verify: true,
                user: None,
                password: None,
                command_timeout: 1,
                rotating: crate::rotation::Rotating::default(),
            };
            let looked = tokio::time::timeout(Duration::from_secs(10), look(&others, &member, None)).await;
            assert_eq!(looked.map(|(live, _)| live).ok(), Some(expected), "{scheme} {port}");
        }
        Ok(())
    }

    #[test]
    fn we_are_found_by_id_by_name_and_by_url() {
        let member =
            Member::parse("name: b\ndata-dir: /d\ninitial-cluster: a=http://a:2380,b=http://b:2380\n", None).unwrap();
        let place = |listed: &[Listed], id| place(listed, &member, id).map(|(_, place)| place);
        let a = listed(1, "a", "http://a:2380", "http://a:2379");
        assert_eq!(place(std::slice::from_ref(&a), None), None);
        assert_eq!(place(&[a.clone(), listed(2, "b", "http://b:2380", "http://b:2379")], None), Some(Place::Started));
        assert_eq!(place(&[a.clone(), listed(2, "b", "http://b:2380", "")], None), Some(Place::New));
        let added = [a.clone(), listed(2, "", "http://b:2380", "")];
        assert_eq!(place(&added, None), Some(Place::Added));
        assert_eq!(place(&added, Some(1)), Some(Place::Another));
        assert_eq!(place(&added, Some(2)), Some(Place::Started));
        assert_eq!(place(&added, Some(9)), Some(Place::Added));
        assert_eq!(initial_cluster(&added, &member), "a=http://a:2380,b=http://b:2380");
        let two = [a, listed(2, "", "http://b:2380", ""), listed(12, "", "http://c:2380", "")];
        assert_eq!(initial_cluster(&two, &member), "a=http://a:2380,b=http://b:2380,c=http://c:2380");
    }
}
