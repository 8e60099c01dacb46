//! Azure's own emulator of its blob store.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::direct::{self, Signer};
use crate::store::Store;
use crate::{eventually, free_port, program};

/// A running Azurite; killed when dropped.
#[derive(Debug)]
pub struct Azurite {
    child: Child,
    port: u16,
}

/// The account that every emulator has, and its key, which is no secret.
pub const ACCOUNT: &str = "devstoreaccount1";
/// See [`ACCOUNT`].
pub const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

impl Azurite {
    /// Starts a server that keeps its objects in memory, with one container.
    pub async fn start(log: &Path, container: &str) -> Result<Self> {
        let port = free_port()?;
        let log = File::create(log)?;
        let child = Command::new(program("azurite", "azurite-blob")?)
            .args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()])
            .args(["--inMemoryPersistence", "--silent", "--disableTelemetry"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start azurite; it needs node")?;
        let azurite = Self { child, port };
        eventually(Duration::from_secs(180), || azurite.create_container(container)).await?;
        Ok(azurite)
    }

    /// There is no other way than a signed request.
    async fn create_container(&self, container: &str) -> Result<()> {
        self.send("PUT", &format!("{container}?restype=container"), "").await
    }

    /// Sends a request of Azure's own protocol.
    pub async fn send(&self, method: &str, target: &str, body: &str) -> Result<()> {
        let url = format!("http://127.0.0.1:{}/{ACCOUNT}/{target}", self.port);
        direct::send(method, &url, body, Signer::Azure { account: ACCOUNT, key: KEY }).await
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A prefix in its container, `container/prefix`.
    pub fn store(&self, place: &str) -> Store {
        let environment = [
            ("AZURE_STORAGE_ENDPOINT", format!("http://127.0.0.1:{}/{ACCOUNT}", self.port)),
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned()),
        ];
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Store { url: format!("az://{place}"), environment }
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
