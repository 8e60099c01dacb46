//! An etcd pod without Kubernetes: `sidecar serve` and `sidecar launch` beside each other.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use etcd_client::Client;
use proto::sidecar as api;
use proto::sidecar::sidecar_client::SidecarClient;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::{Channel, Endpoint};

use crate::certificates::Certificates;
use crate::etcd::Member;
use crate::network::Network;
use crate::program::{Ended, Running, Sidecar};
use crate::store::Store;
use crate::{eventually, free_port, program};

const LONG: Duration = Duration::from_secs(60);

/// What a pod has.
#[derive(Debug, Clone)]
pub struct Pod {
    dir: PathBuf,
    /// The member whose etcd runs in it.
    pub member: Member,
    /// Where its backups go.
    pub store: Option<Store>,
    /// Certificates of the API; none for plain text.
    pub tls: Option<Certificates>,
    /// More lines for the sidecar's configuration.
    pub more: String,
    /// More lines for its section `etcd`.
    pub reach_more: String,
    /// More lines for etcd's.
    pub etcd_more: String,
    /// Client URLs of the other members.
    others: Vec<String>,
    /// The network namespace that it runs in.
    network: Option<String>,
    port: u16,
}

impl Pod {
    /// A cluster of one, of a minor.
    pub fn new(dir: &Path, minor: &str, store: Option<Store>) -> Result<Self> {
        let member = Member::single(minor, &dir.join("data"))?;
        Self::of_member(dir, member, store, Vec::new())
    }

    fn of_member(dir: &Path, member: Member, store: Option<Store>, others: Vec<String>) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            member,
            store,
            tls: None,
            more: String::new(),
            reach_more: String::new(),
            etcd_more: String::new(),
            others,
            network: None,
            port: free_port()?,
        })
    }

    /// A cluster of several, of a minor.
    pub fn cluster(dir: &Path, minor: &str, names: &[&str], store: Option<&Store>) -> Result<Vec<Self>> {
        let dirs: Vec<_> = names.iter().map(|name| dir.join(name)).collect();
        let data: Vec<_> = dirs.iter().map(|dir| dir.join("data")).collect();
        let members: Vec<_> = names.iter().copied().zip(data.iter().map(PathBuf::as_path)).collect();
        Self::of_members(&dirs, &Member::cluster(minor, &members)?, store)
    }

    /// The same, each on a host of its own, all with the same ports.
    pub fn on_hosts(dir: &Path, minor: &str, network: &Network, store: Option<&Store>) -> Result<Vec<Self>> {
        let names: Vec<_> = (0..network.hosts()).map(|host| format!("m{host}")).collect();
        let dirs: Vec<_> = names.iter().map(|name| dir.join(name)).collect();
        let data: Vec<_> = dirs.iter().map(|dir| dir.join("data")).collect();
        let members: Vec<_> = names.iter().map(String::as_str).zip(data.iter().map(PathBuf::as_path)).collect();
        let mut members = Member::cluster(minor, &members)?;
        for (host, member) in members.iter_mut().enumerate() {
            (member.host, member.client_port, member.peer_port) = (network.address(host), 2379, 2380);
        }
        Member::introduce(&mut members);
        let mut pods = Self::of_members(&dirs, &members, store)?;
        for (host, pod) in pods.iter_mut().enumerate() {
            (pod.network, pod.port) = (Some(network.name(host)), 8080);
        }
        Ok(pods)
    }

    fn of_members(dirs: &[PathBuf], members: &[Member], store: Option<&Store>) -> Result<Vec<Self>> {
        let pods = members.iter().zip(dirs).map(|(member, dir)| {
            let others = members.iter().filter(|other| other.name != member.name).map(Member::client_url).collect();
            Self::of_member(dir, member.clone(), store.cloned(), others)
        });
        pods.collect()
    }

    /// Has a cluster show and want certificates everywhere: of clients, of peers and of the API. Valid for these hosts.
    pub fn secure(pods: &mut [Self], dir: &Path, hosts: &[&str]) -> Result<Certificates> {
        let tls = Certificates::issue_for(dir, hosts)?;
        for pod in &mut *pods {
            (pod.member.tls, pod.member.peer_tls, pod.tls) = (Some(tls.clone()), Some(tls.clone()), Some(tls.clone()));
        }
        let mut members: Vec<_> = pods.iter().map(|pod| pod.member.clone()).collect();
        Member::introduce(&mut members);
        let urls: Vec<_> = members.iter().map(Member::client_url).collect();
        for (at, (pod, member)) in pods.iter_mut().zip(members).enumerate() {
            pod.member = member;
            pod.others =
                urls.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, url)| url.clone()).collect();
        }
        Ok(tls)
    }

    /// Another pod for the same member, on a copy of some data.
    pub async fn twin(&self, dir: &Path, data: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let member = Member { data_dir: dir.join("data"), ..self.member.clone() };
        crate::succeed(tokio::process::Command::new("cp").arg("-r").arg(data).arg(&member.data_dir)).await?;
        Ok(Self { dir: dir.to_owned(), member, port: free_port()?, ..self.clone() })
    }

    /// The same, called with other certificates.
    #[must_use]
    pub fn with_tls(&self, tls: Certificates) -> Self {
        Self { tls: Some(tls), ..self.clone() }
    }

    /// The URL of its API.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}:{}", self.member.host, self.port)
    }

    fn write_configs(&self) -> Result<PathBuf> {
        let member = &self.member;
        let etcd = self.dir.join("etcd.yaml");
        let (name, client, peer) = (&member.name, member.client_url(), member.peer_url());
        // Several on one disk must not hold an election because that was slow.
        let is_alone = !member.initial_cluster.contains(',');
        let election = if is_alone { "" } else { "heartbeat-interval: 100\nelection-timeout: 2000\n" };
        std::fs::write(
            &etcd,
            format!(
                "name: {name}\ndata-dir: {}\nlisten-client-urls: {client}\nadvertise-client-urls: {client}\nlisten-peer-urls: {peer}\ninitial-advertise-peer-urls: {peer}\ninitial-cluster: {}\n{election}{}",
                member.data_dir.display(),
                member.initial_cluster,
                security("client", member.tls.as_ref()) + &security("peer", member.peer_tls.as_ref()) + &self.etcd_more
            ),
        )?;
        let server = match &self.tls {
            None => "  insecure: true\n".to_owned(),
            Some(tls) => {
                let (cert, key) = tls.server();
                let (cert, key, ca) = (cert.display(), key.display(), tls.ca());
                format!("  tls:\n    cert: {cert}\n    key: {key}\n    clientCa: {}\n", ca.display())
            }
        };
        if let Some(dir) = self.store.as_ref().and_then(|store| store.url.strip_prefix("file://")) {
            std::fs::create_dir_all(dir)?;
        }
        let store = self.store.as_ref().map(|store| format!("store:\n  url: {}\n", store.url)).unwrap_or_default();
        let config = self.dir.join("sidecar.yaml");
        std::fs::write(
            &config,
            format!(
                "apiVersion: sidecar.etcd-steward.io/v1\nmember:\n  etcdConfig: {}\netcd:\n  endpoints: [{client}]\n  clusterEndpoints: [{}]\n{}server:\n  listen: {}:{}\n  etcdWrapper: true\n{server}{store}{}",
                etcd.display(),
                self.others.join(", "),
                self.reach() + &self.reach_more,
                member.host,
                self.port,
                self.more
            ),
        )?;
        Ok(config)
    }

    /// How the sidecar shows itself to etcd.
    fn reach(&self) -> String {
        let of = |tls: &Certificates| {
            let (cert, key) = tls.client();
            format!("  cacert: {}\n  cert: {}\n  key: {}\n", tls.ca().display(), cert.display(), key.display())
        };
        self.member.tls.as_ref().map(of).unwrap_or_default()
    }

    /// The program `sidecar serve`.
    pub fn serve(&self) -> Result<Sidecar> {
        self.configured("serve")
    }

    /// The program `sidecar doctor`, for the same configuration.
    pub fn doctor(&self) -> Result<Sidecar> {
        self.configured("doctor")
    }

    fn configured(&self, command: &str) -> Result<Sidecar> {
        let config = self.write_configs()?.display().to_string();
        let command = Sidecar::new([command, "--config", &config]).within(self.network.as_deref());
        let environment = self.store.iter().flat_map(|store| &store.environment);
        Ok(environment.fold(command, |command, (name, value)| command.env(name, value)))
    }

    /// Starts `sidecar serve`, with no full snapshot because an hour begins, and waits until it serves.
    pub async fn start_serve(&self) -> Result<Running> {
        let mut serving = self.serve()?.args(["--set", "snapshots.fullSchedule="]).spawn()?;
        serving.logs("the API is served", LONG).await?;
        Ok(serving)
    }

    /// The program `sidecar launch`.
    pub fn launch(&self) -> Result<Sidecar> {
        let etcd = program(&format!("etcd-{}", self.member.minor), "etcd")?;
        let launch = self.calls("launch").within(self.network.as_deref()).arg("--etcd").arg(etcd);
        Ok(launch.arg("--config").arg(self.dir.join("etcd.conf.yaml")))
    }

    /// A command that calls its API, with a certificate.
    pub fn calls(&self, command: &str) -> Sidecar {
        let calls = Sidecar::new([command, "--sidecar", &self.url()]);
        match &self.tls {
            None => calls,
            Some(tls) => {
                let (cert, key) = tls.client();
                calls.arg("--cacert").arg(tls.ca()).arg("--cert").arg(cert).arg("--key").arg(key)
            }
        }
    }

    /// `sidecar ctl`.
    pub fn ctl<A: Into<std::ffi::OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Sidecar {
        self.calls("ctl").args(arguments)
    }

    /// Starts `sidecar launch`.
    pub fn start_launch(&self) -> Result<Launched> {
        Ok(Launched { running: Some(self.launch()?.spawn()?) })
    }

    /// Starts `sidecar launch`, waits for etcd and connects to it.
    pub async fn start_etcd(&self) -> Result<(Launched, Client)> {
        let launched = self.start_launch()?;
        let client = self.etcd().await.with_context(|| launched.log())?;
        Ok((launched, client))
    }

    /// A client of its etcd, once that serves.
    pub async fn etcd(&self) -> Result<Client> {
        let url = self.member.client_url();
        let connect = || async {
            let options = self.member.connect_options()?.with_timeout(Duration::from_secs(15));
            let mut client = Client::connect([url.clone()], Some(options)).await?;
            client.get("ready", None).await?;
            anyhow::Ok(client)
        };
        eventually(LONG, connect).await
    }

    /// Asks for an initialization once its API answers; how it ended.
    pub async fn initialize(&self) -> Result<api::Outcome> {
        let mut client = eventually(LONG, || self.client(true)).await?;
        let mut told = client.initialize(api::InitializeRequest::default()).await?.into_inner();
        let mut outcome = None;
        while let Some(progress) = told.message().await? {
            outcome = progress.outcome.or(outcome);
        }
        outcome.context("it ended without an outcome")
    }

    /// Where it stands.
    pub async fn status(&self) -> Result<api::StatusResponse> {
        Ok(self.client(true).await?.status(api::StatusRequest {}).await?.into_inner())
    }

    /// Has a snapshot taken.
    pub async fn take(&self, kind: api::Kind, request_id: &str) -> Result<api::TakeSnapshotResponse> {
        let request =
            api::TakeSnapshotRequest { kind: kind.into(), request_id: request_id.to_owned(), is_final: false };
        Ok(self.client(true).await?.take_snapshot(request).await?.into_inner())
    }

    /// The same, once its sidecar backs up.
    pub async fn back_up(&self, kind: api::Kind) -> Result<()> {
        eventually(LONG, || async { self.take(kind, "").await.map(drop) }).await
    }

    /// A client of its API over plain HTTP, with a certificate.
    pub fn http(&self) -> Result<reqwest::Client> {
        let Some(tls) = &self.tls else { return Ok(reqwest::Client::new()) };
        let (cert, key) = tls.client();
        let pem = [std::fs::read(cert)?, std::fs::read(key)?].concat();
        let ca = reqwest::Certificate::from_pem(&std::fs::read(tls.ca())?)?;
        Ok(reqwest::Client::builder().tls_certs_only([ca]).identity(reqwest::Identity::from_pem(&pem)?).build()?)
    }

    /// A client of its API, with a certificate or without.
    pub async fn client(&self, with_certificate: bool) -> Result<SidecarClient<Channel>> {
        self.channel(with_certificate).await.map(SidecarClient::new)
    }

    /// A connection to its API, with a certificate or without.
    pub async fn channel(&self, with_certificate: bool) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(self.url())?.connect_timeout(Duration::from_secs(5));
        let endpoint = match &self.tls {
            None => endpoint,
            Some(tls) if with_certificate => endpoint.tls_config(tls.of_client()?)?,
            Some(tls) => endpoint.tls_config(tls.of_stranger()?)?,
        };
        Ok(endpoint.connect().await?)
    }
}

/// The section of etcd's configuration that has clients or peers show a certificate.
fn security(of: &str, tls: Option<&Certificates>) -> String {
    let section = tls.map(|tls| {
        let (cert, key) = tls.server();
        let (cert, key, ca) = (cert.display(), key.display(), tls.ca());
        format!("{of}-transport-security:\n  cert-file: {cert}\n  key-file: {key}\n  client-cert-auth: true\n  trusted-ca-file: {}\n", ca.display())
    });
    section.unwrap_or_default()
}

/// A running `sidecar launch`. It is asked to end when dropped, for its etcd would outlive it.
#[derive(Debug)]
pub struct Launched {
    running: Option<Running>,
}

impl Launched {
    /// `kill -9` of the etcd that it started; it ends as that did.
    pub async fn kill_etcd(self) -> Result<()> {
        let log = self.log();
        let pid = log.rsplit("etcd is started pid=").next().and_then(|rest| rest.split(' ').next());
        let pid = Pid::from_raw(pid.context("no pid")?.parse()?).context("no pid")?;
        kill_process(pid, Signal::KILL)?;
        self.wait().await?.expect(128 + 9).map(drop)
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.running.as_ref().map(Running::log).unwrap_or_default()
    }

    /// The process.
    pub fn running(&mut self) -> Result<&mut Running> {
        self.running.as_mut().context("it has ended")
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(mut self) -> Result<Ended> {
        self.running.take().context("it has ended")?.terminate().await
    }

    /// Waits for its end.
    pub async fn wait(mut self) -> Result<Ended> {
        self.running.take().context("it has ended")?.wait().await
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let Some(pid) = self.running.as_ref().and_then(Running::pid).and_then(|id| Pid::from_raw(id.cast_signed()))
        else {
            return;
        };
        let _ = kill_process(pid, Signal::TERM);
        // The runtime that would reap it may be at its end: a zombie has ended too.
        for _ in 0..100 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
