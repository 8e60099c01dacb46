//! What is deployed as the README has it, unmodified: systemd's units, kubeadm's static pod, and the static program in a file
//! system that has nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, ConnectOptions};
use proto::sidecar as api;
use proto::sidecar::sidecar_client::SidecarClient;
use tests::certificates::Certificates;
use tests::machine::Machine;
use tests::network::{CENTRE, Network};
use tests::node::Node;
use tests::{eventually, program};
use tonic::transport::Endpoint;

const LONG: Duration = Duration::from_secs(300);

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar/deploy").join(path)
}

/// The program that depends on nothing, as images have it.
fn static_program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(3).context("no target directory")?;
    let path = target.join(format!("{}-unknown-linux-musl/debug/sidecar", std::env::consts::ARCH));
    ensure!(path.is_file(), "{} is missing: `cargo suite` builds it", path.display());
    Ok(path)
}

/// An etcd and its sidecar on a host.
struct Deployed {
    tls: Certificates,
    etcd: &'static str,
    api: &'static str,
}

impl Deployed {
    async fn etcd(&self) -> Result<Client> {
        let options = ConnectOptions::new().with_timeout(Duration::from_secs(5)).with_tls(self.tls.of_client()?);
        let mut client = Client::connect([self.etcd], Some(options)).await?;
        client.get("ready", None).await?;
        Ok(client)
    }

    async fn ready(&self) -> Result<Client> {
        eventually(LONG, || self.etcd()).await
    }

    async fn put(&self, value: &str) -> Result<()> {
        self.ready().await?.put("x", value, None).await?;
        Ok(())
    }

    async fn has(&self, value: &str) -> Result<()> {
        let got = self.ready().await?.get("x", None).await?;
        let got = got.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(got.as_deref() == Some(value.as_bytes()), "{got:?} is not {value}");
        Ok(())
    }

    async fn back_up(&self) -> Result<()> {
        let take = || async {
            let endpoint = Endpoint::from_static(self.api).tls_config(self.tls.of_client()?)?;
            let request =
                api::TakeSnapshotRequest { kind: api::Kind::Full.into(), request_id: String::new(), is_final: false };
            SidecarClient::new(endpoint.connect().await?).take_snapshot(request).await?;
            Ok(())
        };
        eventually(LONG, take).await
    }
}

#[test]
fn systemd_runs_the_units() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let network = Network::new(0)?;
    network.run(async || systemd(dir.path()).await)
}

async fn systemd(dir: &Path) -> Result<()> {
    let tls = Certificates::issue(&dir.join("pki"))?;
    let units = ["etcd.service", "etcd-sidecar.service"].map(|unit| deploy("systemd").join(unit));
    let mut etc = Vec::new();
    for name in ["etcd.yaml", "sidecar.yaml"] {
        etc.push((format!("etcd-steward/{name}"), deploy("systemd").join(name)));
    }
    for name in ["ca.crt", "server.crt", "server.key", "client.crt", "client.key"] {
        etc.push((format!("etcd-steward/pki/{name}"), dir.join("pki").join(name)));
    }
    let etc: Vec<_> = etc.iter().map(|(name, from)| (name.as_str(), from.clone())).collect();
    let programs = [static_program()?, program("etcd-3.6", "etcd")?];
    let machine = Machine::boot(&dir.join("m"), &units, &etc, &programs).await?;
    let deployed = Deployed { tls, etcd: "https://127.0.0.1:2379", api: "https://127.0.0.1:8080" };
    let active =
        async |unit: &str| eventually(LONG, || async { machine.systemctl(&["is-active", unit]).await }).await.map(drop);
    // Which it is when etcd itself has told systemd so.
    active("etcd.service").await?;
    deployed.put("1").await?;
    deployed.back_up().await?;

    // A sidecar that is restarted leaves etcd alone.
    let before = machine.property("etcd.service", "MainPID").await?;
    machine.systemctl(&["restart", "etcd-sidecar.service"]).await?;
    active("etcd-sidecar.service").await?;
    deployed.put("2").await?;
    deployed.back_up().await?;
    ensure!(machine.property("etcd.service", "MainPID").await? == before);

    // Stopped, damaged and started: it has everything.
    let data = machine.lib().join("etcd/data");
    machine.systemctl(&["stop", "etcd.service"]).await?;
    ensure!(machine.property("etcd.service", "ActiveState").await? == "inactive");
    tests::damage(&data)?;
    machine.systemctl(&["start", "etcd.service"]).await?;
    deployed.has("2").await?;

    // Killed, it comes back.
    machine.systemctl(&["kill", "--signal=KILL", "etcd.service"]).await?;
    let restarted = || async {
        ensure!(machine.property("etcd.service", "NRestarts").await? != "0");
        Ok(())
    };
    eventually(LONG, restarted).await?;
    active("etcd.service").await?;
    deployed.has("2").await?;

    // Where somebody has to decide, nothing is tried again and again.
    machine.systemctl(&["stop", "etcd.service", "etcd-sidecar.service"]).await?;
    std::fs::remove_dir_all(machine.lib().join("etcd-backups/t00000001"))?;
    for entry in std::fs::read_dir(machine.lib().join("etcd-backups"))? {
        std::fs::remove_dir_all(entry?.path())?;
    }
    tests::damage(&data)?;
    machine.systemctl(&["start", "etcd-sidecar.service"]).await?;
    ensure!(machine.systemctl(&["start", "etcd.service"]).await.is_err());
    ensure!(machine.property("etcd.service", "ExecMainStatus").await? == "12");
    tokio::time::sleep(Duration::from_secs(7)).await;
    ensure!(machine.systemctl(&["is-failed", "etcd.service"]).await? == "failed");
    Ok(())
}

#[test]
fn a_kubelet_runs_the_static_pod() -> Result<()> {
    // Sockets are in it.
    let dir = tempfile::Builder::new().prefix("n").tempdir()?;
    let network = Network::new(0)?;
    network.run(async || static_pod(dir.path()).await)
}

async fn static_pod(dir: &Path) -> Result<()> {
    let node_ip = CENTRE.to_string();
    let tls = Certificates::issue_for(&dir.join("issued"), &["127.0.0.1", "localhost", &node_ip])?;
    let (pki, config) = (dir.join("pki"), dir.join("config"));
    std::fs::create_dir_all(&pki)?;
    std::fs::create_dir_all(&config)?;
    for (name, from) in [("server", "server"), ("peer", "server"), ("healthcheck-client", "client")] {
        for kind in ["crt", "key"] {
            std::fs::copy(dir.join(format!("issued/{from}.{kind}")), pki.join(format!("{name}.{kind}")))?;
        }
    }
    std::fs::copy(tls.ca(), pki.join("ca.crt"))?;
    let fill = |from: PathBuf, to: PathBuf| -> Result<()> {
        let text = std::fs::read_to_string(from)?.replace("NODE_NAME", "node").replace("NODE_IP", &node_ip);
        Ok(std::fs::write(to, text)?)
    };
    for name in ["etcd-config.yaml", "sidecar.yaml"] {
        fill(deploy("kubeadm").join(name), config.join(name))?;
    }
    let mut node = Node::start(&dir.join("n")).await?;
    let pause = program("pause", "pause")?;
    let of_pause = "COPY pause /pause\nENTRYPOINT [\"/pause\"]";
    node.image("docker.io/steward/pause:1", of_pause, &[("pause", &pause)]).await?;
    let containerfile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/sidecar.Containerfile");
    let containerfile = std::fs::read_to_string(containerfile)?;
    node.image("docker.io/steward/sidecar:1", &containerfile, &[("sidecar", &static_program()?)]).await?;
    // As upstream's, which has a program and no shell.
    let of_etcd = "COPY etcd /usr/local/bin/etcd\nENTRYPOINT [\"/usr/local/bin/etcd\"]";
    node.image("docker.io/steward/etcd:3.6", of_etcd, &[("etcd", &program("etcd-3.6", "etcd")?)]).await?;
    node.start_kubelet(&node_ip)?;
    let manifest = std::fs::read_to_string(deploy("kubeadm/etcd.yaml"))?;
    let place = |path: &str| format!("hostPath: {{path: {}", dir.join(path).display());
    let manifest = manifest
        .replace("NODE_IP", &node_ip)
        .replace("SIDECAR_IMAGE", "docker.io/steward/sidecar:1")
        .replace("ETCD_IMAGE", "docker.io/steward/etcd:3.6")
        .replace("hostPath: {path: /var/lib/etcd", &place("data"))
        .replace("hostPath: {path: /etc/kubernetes/pki/etcd", &place("pki"))
        .replace("hostPath: {path: /etc/kubernetes/etcd-steward", &place("config"))
        .replace("hostPath: {path: /var/backups/etcd", &place("backups"));
    std::fs::write(node.manifests().join("etcd.yaml"), manifest)?;
    let deployed = Deployed { tls, etcd: "https://127.0.0.1:2379", api: "https://127.0.0.1:8085" };
    deployed.put("1").await.with_context(|| node.log())?;
    deployed.back_up().await.with_context(|| node.log())?;

    // Its data is lost while it runs, and then it is killed: the kubelet starts the container again, and it has everything.
    std::fs::remove_dir_all(dir.join("data/member"))?;
    node.kill("launch").await?;
    let restored = || async {
        ensure!(dir.join("data/member/origin.json").exists(), "it is not restored");
        Ok(())
    };
    eventually(LONG, restored).await.with_context(|| node.log())?;
    deployed.has("1").await.with_context(|| node.log())?;
    Ok(())
}
