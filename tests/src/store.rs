//! Where backups go, and the sidecar's commands on it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::etcd::{Etcd, Member, ROOT};
use crate::program::Sidecar;
use crate::proxy::Proxy;
use crate::state::{self, State};

/// A store: its URL, and the environment that leads to it.
#[derive(Debug, Clone)]
pub struct Store {
    /// As `--store` takes it.
    pub url: String,
    /// Endpoint first, then credentials and CA.
    pub environment: Vec<(String, String)>,
}

impl Store {
    /// A directory.
    pub fn directory(dir: &Path) -> Self {
        Self { url: crate::file_url(dir), environment: Vec::new() }
    }

    /// The same through a proxy before its server.
    #[must_use]
    pub fn through(&self, proxy: &Proxy) -> Self {
        let mut through = self.clone();
        if let Some((_, endpoint)) = through.environment.first_mut()
            && let Some((host, rest)) = endpoint.split_once("127.0.0.1:")
        {
            let path = rest.trim_start_matches(|digit: char| digit.is_ascii_digit());
            *endpoint = format!("{host}127.0.0.1:{}{path}", proxy.port());
        }
        through
    }

    /// A command with `--store` and whatever leads there.
    pub fn command(&self, name: &str) -> Sidecar {
        let command = Sidecar::new([name, "--store", &self.url]);
        self.environment.iter().fold(command, |command, (name, value)| command.env(name, value))
    }

    fn snapshot(&self, member: &Member) -> Sidecar {
        let command = self.command("snapshot").args(["--endpoints", &member.client_url()]);
        if member.auth { command.args(["--user", &format!("{}:{}", ROOT.0, ROOT.1)]) } else { command }
    }

    /// Backs a member up for ever, with a delta so often, and no full snapshot because an hour begins.
    pub fn follow(&self, member: &Member, period: &str) -> Sidecar {
        self.snapshot(member).args(["--full-schedule", "", "--delta-period", period])
    }

    /// Takes one snapshot: `full` or `delta`.
    pub fn once(&self, kind: &str, member: &Member) -> Sidecar {
        self.snapshot(member).args(["--once", kind])
    }

    /// Restores into a directory.
    pub fn restore(&self, dir: impl Into<PathBuf>) -> Sidecar {
        self.command("restore").arg("--data-dir").arg(dir.into())
    }

    /// Restores a member to where it was.
    pub fn restore_member(&self, member: &Member) -> Sidecar {
        self.restore(&member.data_dir).args(["--initial-cluster", &member.initial_cluster])
    }

    /// Removes a member's data, restores it, starts etcd on it and reads what it has.
    pub async fn restore_and_read(&self, member: &Member) -> Result<State> {
        if member.data_dir.exists() {
            std::fs::remove_dir_all(&member.data_dir)?;
        }
        self.restore_member(member).run().await?.expect(0)?;
        state::of(member).await
    }

    /// That a member is restored to just what its etcd, which is killed, has now.
    pub async fn brings_back(&self, etcd: &mut Etcd) -> Result<()> {
        let before = state::read(&mut etcd.client().await?).await?;
        etcd.kill9()?;
        state::same(&before, &self.restore_and_read(&etcd.member).await?)
    }

    /// What `sidecar list` says.
    pub async fn list(&self) -> Result<serde_json::Value> {
        self.command("list").args(["-o", "json"]).run().await?.expect(0)?.json()
    }
}
