//! What Kubernetes is told: leases in a real kube-apiserver, with what the predecessor has in them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tests::etcd::Member;
use tests::eventually;
use tests::kubernetes::{ApiServer, Client};
use tests::pod::Pod;
use tests::store::Store;

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/default/leases";
const LONG: Duration = Duration::from_secs(60);

async fn lease(kubernetes: &Client, name: &str) -> Result<Value> {
    kubernetes.get(&format!("{LEASES}/{name}")).await
}

fn renewed(lease: &Value) -> Result<DateTime<Utc>> {
    Ok(lease["spec"]["renewTime"].as_str().context("never renewed")?.parse()?)
}

/// Waits until a lease is held by what is expected.
async fn held(kubernetes: &Client, name: &str, by: &str) -> Result<Value> {
    let look = || async {
        let lease = lease(kubernetes, name).await?;
        ensure!(lease["spec"]["holderIdentity"] == by, "{name} is not held by {by}: {lease}");
        Ok(lease)
    };
    eventually(LONG, look).await
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_tell_of_member_and_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let theirs = Member::single("3.6", &dir.path().join("kubernetes-etcd"))?;
    let their_etcd = theirs.start().await?;
    let server = ApiServer::start(&dir.path().join("kubernetes"), &theirs.client_url()).await?;
    let kubeconfig = dir.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig)?;
    let kubernetes = server.client();
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.more = "snapshots: {deltaPeriod: 2s}\nkubernetes: {heartbeatPeriod: 1s, fullSnapshotLease: e-full-snap, deltaSnapshotLease: e-delta-snap}\n".into();
    // One of the schedule's would be taken for the one that is asked for.
    let serve = pod.serve()?.args(["--set", "snapshots.fullSchedule="]);
    let mut serving = serve.env("KUBECONFIG", kubeconfig.display().to_string()).spawn()?;
    let (launched, mut client) = pod.start_etcd().await?;
    // Leases that are not there yet are waited for: who watches them makes them.
    serving.logs("the lease cannot be renewed", LONG).await?;
    for name in [pod.member.name.as_str(), "e-full-snap", "e-delta-snap"] {
        let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}});
        kubernetes.create(LEASES, &lease).await?;
    }
    let header = client.status().await?;
    let header = header.header().context("no header")?;
    let holder = format!("{:x}:{:x}:Leader", header.member_id(), header.cluster_id());
    let first = held(&kubernetes, &pod.member.name, &holder).await?;
    ensure!(first["metadata"]["annotations"]["member.etcd.gardener.cloud/tls-enabled"] == "false", "{first}");
    let again = || async {
        let now = lease(&kubernetes, &pod.member.name).await?;
        ensure!(renewed(&now)? > renewed(&first)?, "not renewed: {now}");
        Ok(())
    };
    eventually(LONG, again).await?;
    // The full snapshot that a first backup is, and no delta yet, whose lease is renewed all the same.
    held(&kubernetes, "e-full-snap", "1").await?;
    held(&kubernetes, "e-delta-snap", "0").await?;
    for n in 0..10 {
        client.put("x", n.to_string(), None).await?;
    }
    let delta = held(&kubernetes, "e-delta-snap", "11").await?;
    let later = || async {
        let now = lease(&kubernetes, "e-delta-snap").await?;
        ensure!(renewed(&now)? > renewed(&delta)? + chrono::TimeDelta::seconds(3), "not renewed: {now}");
        Ok(())
    };
    eventually(LONG, later).await?;
    let before = Utc::now();
    pod.ctl(["take-snapshot", "full"]).run().await?.expect(0)?;
    let full = held(&kubernetes, "e-full-snap", "11").await?;
    let off = (renewed(&full)? - before).num_seconds();
    ensure!((-1..30).contains(&off), "it is renewed to when the snapshot was taken: {off} s off");
    // Without etcd nobody says that it lives.
    launched.terminate().await?;
    let stays = || async {
        let stopped = lease(&kubernetes, &pod.member.name).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        ensure!(renewed(&lease(&kubernetes, &pod.member.name).await?)? == renewed(&stopped)?, "it is renewed still");
        Ok(())
    };
    eventually(LONG, stays).await?;
    serving.terminate().await?.expect(0)?;
    drop(server);
    drop(their_etcd);
    Ok(())
}
