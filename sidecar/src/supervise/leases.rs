//! Tells Kubernetes how the member and its backups do, in leases that somebody else made and watches: what is in them is the
//! predecessor's, to the letter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, Utc};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use super::Supervisor;
use crate::etcd::{Role, Status};
use crate::{Error, Result};

/// Whether the member's peers reach it over TLS.
const TLS_ENABLED: &str = "member.etcd.gardener.cloud/tls-enabled";
/// One call to Kubernetes.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked whether there are new backups.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// How often a lease that somebody else writes at the same time is read again.
const MOST_ATTEMPTS: u32 = 3;
/// Between two tries to write what could not be written.
const RETRY_PERIOD: Duration = Duration::from_secs(10);

/// Which leases are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    /// Where they are; that of the service account, or of the kubeconfig, by default.
    pub namespace: Option<String>,
    /// How often the member's is renewed.
    pub heartbeat_period: Duration,
    /// How often a delta is due: its lease is renewed as often, also when nothing has changed.
    pub delta_period: Duration,
    /// That of the newest full snapshot.
    pub full: Option<String>,
    /// That of the newest delta.
    pub delta: Option<String>,
}

/// Begins to keep them.
pub(super) fn start(supervisor: &Arc<Supervisor>) {
    let Some(leases) = supervisor.settings.leases.clone() else { return };
    let (this, heart) = (supervisor.clone(), leases.clone());
    supervisor.tasks.spawn(async move {
        tokio::select! {
            () = beat(&this, &heart) => {}
            () = this.stop.cancelled() => {}
        }
    });
    let this = supervisor.clone();
    supervisor.tasks.spawn(async move {
        tokio::select! {
            () = follow_backups(&this, &leases) => {}
            () = this.stop.cancelled() => {}
        }
    });
}

async fn beat(supervisor: &Supervisor, leases: &Leases) {
    let member = &supervisor.settings.initialize.member;
    let is_tls = member.peer_urls().iter().all(|url| url.starts_with("https://"));
    let mut writer = Writer::new(leases);
    let mut tick = tokio::time::interval(leases.heartbeat_period);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let observed = supervisor.observed();
        // What cannot be asked, or knows no leader, is not known to live: its lease runs out.
        let (Some(role), Some(status)) = (observed.role, &observed.status) else { continue };
        if status.leader_id == 0 {
            continue;
        }
        let written = writer.write(&member.name, &heartbeat(role, status, is_tls, Utc::now())).await;
        writer.tell(&member.name, &written);
    }
}

async fn follow_backups(supervisor: &Supervisor, leases: &Leases) {
    // One each: trouble with one lease is none with the other.
    let (mut full_writer, mut delta_writer) = (Writer::new(leases), Writer::new(leases));
    let (mut full_told, mut delta_told) = (None, None::<Instant>);
    let (mut full_retry, mut delta_retry) = (Instant::now(), Instant::now());
    let mut tick = tokio::time::interval(LOOK_PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if !supervisor.observed.borrow().backing_up {
            // Another member's sidecar writes them meanwhile.
            full_told = None;
            continue;
        }
        let standing = supervisor.settings.metrics.standing();
        if let (Some(name), Some(full)) = (&leases.full, standing.full)
            && full_told != Some(full)
            && full_retry <= Instant::now()
        {
            let written = full_writer.raise(name, full).await;
            match &written {
                Ok(()) => full_told = Some(full),
                Err(_) => full_retry = Instant::now() + RETRY_PERIOD,
            }
            full_writer.tell(name, &written);
        }
        // Many small deltas in a short time are told once.
        let is_due = delta_told.is_none_or(|told| told.elapsed() >= leases.delta_period / 2);
        if let (Some(name), Some(confirmed)) = (&leases.delta, standing.confirmed)
            && is_due
            && delta_told.is_none_or(|told| confirmed > told)
            && delta_retry <= Instant::now()
        {
            let written = delta_writer.follow(name, standing.delta).await;
            match &written {
                Ok(()) => delta_told = Some(Instant::now()),
                Err(_) => delta_retry = Instant::now() + RETRY_PERIOD.min(leases.delta_period),
            }
            delta_writer.tell(name, &written);
        }
    }
}

fn renewed(at: DateTime<Utc>) -> Value {
    json!({"spec": {"renewTime": at.to_rfc3339_opts(SecondsFormat::Micros, true)}})
}

fn held(holder: &str, at: DateTime<Utc>) -> Value {
    let mut patch = renewed(at);
    patch["spec"]["holderIdentity"] = holder.into();
    patch
}

fn heartbeat(role: Role, status: &Status, is_tls: bool, at: DateTime<Utc>) -> Value {
    // A learner is a member here: what reads it knows no other word.
    let role = if role == Role::Leader { "Leader" } else { "Member" };
    let mut patch = held(&format!("{:x}:{:x}:{role}", status.member_id, status.cluster_id), at);
    patch["metadata"] = json!({"annotations": {TLS_ENABLED: is_tls.to_string()}});
    patch
}

/// Whether a lease has a later revision. One that is known to have been taken before is of what was there before a restore.
fn is_newer(spec: &LeaseSpec, revision: i64, taken: DateTime<Utc>) -> bool {
    let held = spec.holder_identity.as_ref().and_then(|held| held.parse::<i64>().ok());
    let renewed_ms = spec.renew_time.as_ref().map(|time| time.0.as_millisecond());
    held.is_some_and(|held| held > revision) && renewed_ms.is_none_or(|renewed| renewed >= taken.timestamp_millis())
}

/// What a delta's lease is to have: the last revision, and when it was seen that the store has all.
fn of_delta(spec: &LeaseSpec, delta: Option<(i64, i64)>, at: DateTime<Utc>) -> Value {
    let taken = |unix_ms| DateTime::from_timestamp_millis(unix_ms).unwrap_or_default();
    match delta {
        Some((last, unix_ms)) if !is_newer(spec, last, taken(unix_ms)) => held(&last.to_string(), at),
        None if spec.holder_identity.is_none() => held("0", at),
        Some(_) | None => renewed(at),
    }
}

/// Writes leases.
struct Writer<'l> {
    leases: &'l Leases,
    api: Option<Api<Lease>>,
    /// Whether the last one failed: that is said once.
    fails: bool,
}

impl<'l> Writer<'l> {
    fn new(leases: &'l Leases) -> Self {
        Self { leases, api: None, fails: false }
    }

    async fn api(&mut self) -> Result<Api<Lease>> {
        if let Some(api) = &self.api {
            return Ok(api.clone());
        }
        let client = call("connect to", "the cluster", kube::Client::try_default()).await?;
        let api = match &self.leases.namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::default_namespaced(client),
        };
        Ok(self.api.insert(api).clone())
    }

    async fn write(&mut self, name: &str, patch: &Value) -> Result<()> {
        let api = self.api().await?;
        call("renew the lease", name, api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
    }

    /// Writes a full snapshot's, unless the lease has a newer one.
    async fn raise(&mut self, name: &str, (revision, unix_ms): (i64, i64)) -> Result<()> {
        let taken = DateTime::from_timestamp_millis(unix_ms).unwrap_or_default();
        self.change(name, |spec| (!is_newer(spec, revision, taken)).then(|| held(&revision.to_string(), taken))).await
    }

    /// Writes a delta's. Where there is none since the full snapshot, it keeps the revision that it has.
    async fn follow(&mut self, name: &str, delta: Option<(i64, i64)>) -> Result<()> {
        self.change(name, |spec| Some(of_delta(spec, delta, Utc::now()))).await
    }

    /// Writes what follows from what is there, unless it is nothing. Somebody else may write it at the same time, and what was
    /// sent earlier may arrive later.
    async fn change(&mut self, name: &str, decide: impl Fn(&LeaseSpec) -> Option<Value>) -> Result<()> {
        let api = self.api().await?;
        let mut attempt = 1;
        loop {
            let lease = call("read the lease", name, api.get(name)).await?;
            let Some(mut patch) = decide(&lease.spec.unwrap_or_default()) else { return Ok(()) };
            patch["metadata"] = json!({"resourceVersion": lease.metadata.resource_version});
            let patched = tokio::time::timeout(CALL_DEADLINE, async {
                api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await
            });
            match patched.await {
                Ok(Err(kube::Error::Api(status))) if status.code == 409 && attempt < MOST_ATTEMPTS => attempt += 1,
                patched => return answered("renew the lease", name, patched).map(drop),
            }
        }
    }

    fn tell(&mut self, name: &str, written: &Result<()>) {
        match written {
            Ok(()) if self.fails => tracing::info!(lease = name, "the lease is renewed again"),
            Err(error) if !self.fails => tracing::warn!(lease = name, %error, "the lease cannot be renewed"),
            Ok(()) | Err(_) => {}
        }
        self.fails = written.is_err();
        if self.fails {
            // Tokens and addresses may have changed.
            self.api = None;
        }
    }
}

async fn call<T>(op: &'static str, name: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    answered(op, name, tokio::time::timeout(CALL_DEADLINE, call).await)
}

fn answered<T, E>(op: &'static str, name: &str, answer: Result<kube::Result<T>, E>) -> Result<T> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Error::Unanswered { what: format!("{op} {name}: {}", crate::error::chain(&error)) }),
        Err(_) => Err(Error::Unanswered { what: format!("{op} {name}: no answer within {CALL_DEADLINE:?}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_goes_back_only_after_a_restore() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap_or_default();
        let spec = |holder: &str, seconds| -> LeaseSpec {
            serde_json::from_value(held(holder, at(seconds))["spec"].clone()).unwrap_or_default()
        };
        assert!(is_newer(&spec("9", 100), 5, at(100)) && is_newer(&spec("9", 100), 5, at(50)));
        assert!(!is_newer(&spec("9", 100), 5, at(200)), "a restored cluster begins below what was before");
        assert!(!is_newer(&spec("5", 100), 5, at(50)) && !is_newer(&LeaseSpec::default(), 5, at(1)));
        assert!(!is_newer(&spec("etcd-main-0", 100), 5, at(50)));
        let undated = LeaseSpec { holder_identity: Some("9".into()), ..LeaseSpec::default() };
        assert!(is_newer(&undated, 5, at(200)) && !is_newer(&undated, 12, at(200)));
    }

    #[test]
    fn the_lease_of_deltas_keeps_its_revision() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap_or_default();
        let spec = |holder: &str| -> LeaseSpec {
            serde_json::from_value(held(holder, at(100))["spec"].clone()).unwrap_or_default()
        };
        let now = at(200);
        assert_eq!(of_delta(&LeaseSpec::default(), None, now), held("0", now));
        assert_eq!(of_delta(&spec("9"), None, now), renewed(now), "none since the full snapshot");
        assert_eq!(of_delta(&spec("9"), Some((12, 150_000)), now), held("12", now));
        assert_eq!(of_delta(&spec("9"), Some((5, 50_000)), now), renewed(now));
        assert_eq!(of_delta(&spec("9"), Some((5, 150_000)), now), held("5", now), "restored meanwhile");
    }

    #[test]
    fn a_lease_has_what_the_predecessor_wrote() {
        let status = Status { role: Role::Leader, cluster_id: 0xcafe, member_id: 0xa8, ..Status::default() };
        let at = DateTime::from_timestamp(1_700_000_000, 5_000).unwrap_or_default();
        for (role, held) in
            [(Role::Leader, "a8:cafe:Leader"), (Role::Follower, "a8:cafe:Member"), (Role::Learner, "a8:cafe:Member")]
        {
            let expected = json!({
                "metadata": {"annotations": {"member.etcd.gardener.cloud/tls-enabled": "true"}},
                "spec": {"holderIdentity": held, "renewTime": "2023-11-14T22:13:20.000005Z"},
            });
            assert_eq!(heartbeat(role, &status, true, at), expected);
        }
    }
}
