//! Real etcd processes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use etcd_client::{Client, ConnectOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::certificates::Certificates;
use crate::{eventually, free_port, program};

/// The minors that are supported.
pub const MINORS: [&str; 4] = ["3.4", "3.5", "3.6", "3.7"];

/// Name and password of the user that [`Etcd::enable_auth`] makes.
pub const ROOT: (&str, &str) = ("root", "secret");

/// How a member is started.
#[derive(Debug, Clone)]
pub struct Member {
    /// Minor, such as `3.6`.
    pub minor: String,
    /// Name of the member.
    pub name: String,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// The address that it listens on.
    pub host: String,
    /// Port for clients.
    pub client_port: u16,
    /// Port for peers.
    pub peer_port: u16,
    /// `--initial-cluster`.
    pub initial_cluster: String,
    /// Further flags.
    pub flags: Vec<String>,
    /// Whether clients must be [`ROOT`].
    pub auth: bool,
    /// What it shows clients, and whose certificates it takes from them; none for plain text.
    pub tls: Option<Certificates>,
    /// The same for its peers.
    pub peer_tls: Option<Certificates>,
}

impl Member {
    /// A cluster of one.
    pub fn single(minor: &str, data_dir: &Path) -> Result<Self> {
        let cluster = Self::cluster(minor, &[("default", data_dir)])?;
        cluster.into_iter().next().context("a cluster without members")
    }

    /// A cluster with these members.
    pub fn cluster(minor: &str, members: &[(&str, &Path)]) -> Result<Vec<Self>> {
        let mut cluster = Vec::new();
        for (name, data_dir) in members {
            cluster.push(Self {
                minor: minor.to_owned(),
                name: (*name).to_owned(),
                data_dir: data_dir.to_path_buf(),
                host: "127.0.0.1".to_owned(),
                client_port: free_port()?,
                peer_port: free_port()?,
                initial_cluster: String::new(),
                flags: Vec::new(),
                auth: false,
                tls: None,
                peer_tls: None,
            });
        }
        Self::introduce(&mut cluster);
        Ok(cluster)
    }

    /// Tells each of the others.
    pub fn introduce(cluster: &mut [Self]) {
        let initial =
            cluster.iter().map(|member| format!("{}={}", member.name, member.peer_url())).collect::<Vec<_>>().join(",");
        for member in cluster {
            member.initial_cluster.clone_from(&initial);
        }
    }

    /// The same member elsewhere, in the cluster of one that a restore without flags makes.
    #[must_use]
    pub fn restored_in(&self, data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned(), initial_cluster: "default=http://localhost:2380".into(), ..self.clone() }
    }

    /// With one more flag.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Where clients reach it.
    pub fn client_url(&self) -> String {
        format!("{}://{}:{}", scheme(self.tls.as_ref()), self.host, self.client_port)
    }

    /// Where peers reach it.
    pub fn peer_url(&self) -> String {
        format!("{}://{}:{}", scheme(self.peer_tls.as_ref()), self.host, self.peer_port)
    }

    /// How clients connect to it.
    pub fn connect_options(&self) -> Result<ConnectOptions> {
        let options = ConnectOptions::new();
        Ok(match &self.tls {
            None => options,
            Some(tls) => options.with_tls(tls.of_client()?),
        })
    }

    /// Starts it, without waiting until it serves.
    pub fn spawn(&self) -> Result<Etcd> {
        let log_path = self.data_dir.with_extension("log");
        let log = File::options().create(true).append(true).open(&log_path)?;
        let mut command = Command::new(program(&format!("etcd-{}", self.minor), "etcd")?);
        command
            .args(["--name", &self.name, "--data-dir"])
            .arg(&self.data_dir)
            .args(["--listen-client-urls", &self.client_url(), "--advertise-client-urls", &self.client_url()])
            .args(["--listen-peer-urls", &self.peer_url(), "--initial-advertise-peer-urls", &self.peer_url()])
            .args(["--initial-cluster", &self.initial_cluster, "--initial-cluster-token", "etcd-cluster"])
            .args(["--logger=zap", "--log-level=warn"])
            .args(self.election())
            .args(security("", self.tls.as_ref()))
            .args(security("peer-", self.peer_tls.as_ref()))
            .args(&self.flags)
            .env("ETCD_UNSUPPORTED_ARCH", "")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().with_context(|| format!("start etcd {}", self.minor))?;
        Ok(Etcd { member: self.clone(), child: Some(child), log_path })
    }

    /// One alone leads at once; several on one disk must not hold an election because that was slow.
    fn election(&self) -> [&'static str; 2] {
        if self.initial_cluster.contains(',') {
            ["--heartbeat-interval=100", "--election-timeout=1500"]
        } else {
            ["--heartbeat-interval=50", "--election-timeout=500"]
        }
    }

    /// Starts it and waits until it serves.
    pub async fn start(&self) -> Result<Etcd> {
        let mut etcd = self.spawn()?;
        etcd.ready().await?;
        Ok(etcd)
    }
}

fn scheme(tls: Option<&Certificates>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}

/// Flags that have clients or peers show a certificate.
fn security(of: &str, tls: Option<&Certificates>) -> Vec<String> {
    let flags = tls.map(|tls| {
        let (cert, key) = tls.server();
        let flag = |name: &str, path: &Path| format!("--{of}{name}={}", path.display());
        let files = [flag("cert-file", &cert), flag("key-file", &key), flag("trusted-ca-file", &tls.ca())];
        files.into_iter().chain([format!("--{of}client-cert-auth=true")]).collect()
    });
    flags.unwrap_or_default()
}

/// A running etcd; killed when dropped.
#[derive(Debug)]
pub struct Etcd {
    /// How it was started.
    pub member: Member,
    child: Option<Child>,
    log_path: PathBuf,
}

impl Etcd {
    /// Waits until it serves linearizable reads.
    pub async fn ready(&mut self) -> Result<()> {
        let url = self.member.client_url();
        let ready = async {
            loop {
                if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                    bail!("etcd ended with {status}");
                }
                let attempt = async {
                    let options = self.member.connect_options()?.with_timeout(Duration::from_secs(2));
                    let mut client = Client::connect([&url], Some(options)).await?;
                    client.get("ready", None).await?;
                    anyhow::Ok(())
                };
                match attempt.await {
                    Ok(()) => return Ok(()),
                    // With auth on, an anonymous read is refused by an etcd that serves.
                    Err(error) if error.to_string().contains("user name is empty") => return Ok(()),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ready)
            .await
            .unwrap_or_else(|_| bail!("not ready within 60 s"))
            .with_context(|| {
                format!(
                    "etcd {} in {}; its log:\n{}",
                    self.member.minor,
                    self.member.data_dir.display(),
                    self.log_tail()
                )
            })
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log_path).unwrap_or_default();
        log.lines().rev().take(15).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// A client of it.
    pub async fn client(&self) -> Result<Client> {
        self.client_as(self.member.auth.then_some(ROOT)).await
    }

    /// Makes the user [`ROOT`] and turns auth on; returns a client that is that user.
    pub async fn enable_auth(&mut self) -> Result<Client> {
        let mut client = self.client().await?;
        client.role_add("root").await?;
        client.user_add(ROOT.0, ROOT.1, None).await?;
        client.user_grant_role(ROOT.0, "root").await?;
        client.auth_enable().await?;
        self.member.auth = true;
        self.client().await
    }

    /// A client of it, as a user.
    pub async fn client_as(&self, user: Option<(&str, &str)>) -> Result<Client> {
        let url = self.member.client_url();
        let mut options = self.member.connect_options()?.with_timeout(Duration::from_secs(30));
        if let Some((name, password)) = user {
            options = options.with_user(name, password);
        }
        let options = &options;
        let connect = || async { Ok(Client::connect([&url], Some(options.clone())).await?) };
        eventually(Duration::from_secs(10), connect).await
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill9(&mut self) -> Result<()> {
        self.end(Signal::KILL)
    }

    /// SIGTERM, and waits until it is gone.
    pub fn stop(&mut self) -> Result<()> {
        self.end(Signal::TERM)
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill_process(Pid::from_child(&child), signal)?;
        child.wait()?;
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}
