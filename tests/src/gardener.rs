//! The predecessor's side of a store: an independent program that writes and reads what it does.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::process::Command;

use crate::etcd::Member;
use crate::store::Store;

/// A directory as its store.
#[derive(Debug, Clone)]
pub struct Gardener {
    dir: PathBuf,
}

impl Gardener {
    /// Writes into that directory.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The same place for our program.
    pub fn store(&self) -> Store {
        Store::directory(&self.dir)
    }

    /// Runs one of its commands; fails with what it said.
    pub async fn run(&self, command: &str, arguments: &[&str]) -> Result<Value> {
        std::fs::create_dir_all(&self.dir)?;
        let program = crate::program("gardener", "gardener")?;
        let output = Command::new(program).arg(command).arg("--store").arg(&self.dir).args(arguments).output().await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "gardener {command} {arguments:?} failed: {said}");
        serde_json::from_slice(&output.stdout).context("gardener printed no JSON")
    }

    /// Takes a full snapshot; returns where it is.
    pub async fn full(&self, member: &Member, more: &[&str]) -> Result<PathBuf> {
        let url = member.client_url();
        self.path(&self.run("full", &[&["--endpoint", &url], more].concat()).await?)
    }

    /// Takes the changes from one revision to another; returns where they are.
    pub async fn delta(&self, member: &Member, from: i64, to: i64, more: &[&str]) -> Result<PathBuf> {
        let (url, from, to) = (member.client_url(), from.to_string(), to.to_string());
        let arguments = [&["--endpoint", &url, "--from", &from, "--to", &to], more].concat();
        self.path(&self.run("delta", &arguments).await?)
    }

    fn path(&self, snapshot: &Value) -> Result<PathBuf> {
        let part = |name: &str| snapshot[name].as_str().with_context(|| format!("{snapshot} has no {name}"));
        Ok(self.dir.join(part("prefix")?).join(part("snapDir")?).join(part("snapName")?))
    }
}
