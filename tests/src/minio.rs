//! A real S3 server.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::program::Sidecar;
use crate::{eventually, free_port, program};

/// A running MinIO; killed when dropped.
#[derive(Debug)]
pub struct Minio {
    child: Child,
    port: u16,
}

const USER: &str = "steward-user";
const PASSWORD: &str = "steward-password";

impl Minio {
    /// Starts a server that keeps its objects under `dir`, with one bucket.
    pub async fn start(dir: &Path, bucket: &str) -> Result<Self> {
        Self::start_on(dir, bucket, free_port()?).await
    }

    /// The same, on a given port.
    pub async fn start_on(dir: &Path, bucket: &str, port: u16) -> Result<Self> {
        // A directory at the top is a bucket.
        std::fs::create_dir_all(dir.join(bucket))?;
        let log = File::options().create(true).append(true).open(dir.with_extension("log"))?;
        let child = Command::new(program("minio", "minio")?)
            .args([
                "server",
                "--quiet",
                "--address",
                &format!("127.0.0.1:{port}"),
                "--console-address",
                &format!("127.0.0.1:{}", free_port()?),
            ])
            .arg(dir)
            .env("MINIO_ROOT_USER", USER)
            .env("MINIO_ROOT_PASSWORD", PASSWORD)
            .env("MINIO_UPDATE", "off")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let minio = Self { child, port };
        let url = format!("s3://{bucket}/ready");
        let ready = || async {
            let listed = minio.sidecar(Sidecar::new(["list", "--store", &url])).run().await?;
            ensure!(listed.code == 0, "{}", listed.stderr);
            Ok(())
        };
        eventually(Duration::from_secs(30), ready).await?;
        Ok(minio)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Gives a sidecar this server and its credentials.
    pub fn sidecar(&self, sidecar: Sidecar) -> Sidecar {
        sidecar
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port))
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", USER)
            .env("AWS_SECRET_ACCESS_KEY", PASSWORD)
    }

    /// `kill -9`.
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Minio {
    fn drop(&mut self) {
        self.kill9();
    }
}
