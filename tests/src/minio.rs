//! A real S3 server.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::certificates::Certificates;
use crate::direct::{self, Signer};
use crate::store::Store;
use crate::{eventually, free_port, program};

/// A running MinIO; killed when dropped.
#[derive(Debug)]
pub struct Minio {
    child: Child,
    host: String,
    port: u16,
    ca: Option<PathBuf>,
}

const USER: &str = "steward-user";
const PASSWORD: &str = "steward-password";

impl Minio {
    /// Starts a server that keeps its objects under `dir`, with one bucket.
    pub async fn start(dir: &Path, bucket: &str) -> Result<Self> {
        Self::start_on(dir, bucket, free_port()?, None).await
    }

    /// The same, at another address than this machine's own.
    pub async fn start_at(dir: &Path, bucket: &str, host: &str) -> Result<Self> {
        Self::start_server(dir, bucket, (host, free_port()?), None).await
    }

    /// The same, on a given port, and with TLS when there are certificates.
    pub async fn start_on(dir: &Path, bucket: &str, port: u16, tls: Option<&Certificates>) -> Result<Self> {
        Self::start_server(dir, bucket, ("127.0.0.1", port), tls).await
    }

    async fn start_server(
        dir: &Path,
        bucket: &str,
        (host, port): (&str, u16),
        tls: Option<&Certificates>,
    ) -> Result<Self> {
        // A directory at the top is a bucket.
        std::fs::create_dir_all(dir.join(bucket))?;
        let log = File::options().create(true).append(true).open(dir.with_extension("log"))?;
        let mut command = Command::new(program("minio", "minio")?);
        if let Some(tls) = tls {
            // It looks for these two names.
            let certs = dir.with_extension("certs");
            std::fs::create_dir_all(&certs)?;
            std::fs::copy(tls.server().0, certs.join("public.crt"))?;
            std::fs::copy(tls.server().1, certs.join("private.key"))?;
            command.arg("--certs-dir").arg(certs);
        }
        let child = command
            .args([
                "server",
                "--quiet",
                "--address",
                &format!("{host}:{port}"),
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
        let minio = Self { child, host: host.to_owned(), port, ca: tls.map(Certificates::ca) };
        let store = minio.store(&format!("{bucket}/ready"));
        let ready = || async { store.list().await.map(drop) };
        eventually(Duration::from_secs(180), ready).await?;
        Ok(minio)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same with its credentials in the files of a mounted secret, which this makes; the key that is in it.
    pub fn store_by_secret(&self, place: &str, secret: &Path) -> Result<(Store, String)> {
        let mut store = self.store(place);
        std::fs::create_dir_all(secret)?;
        let files = [
            ("AWS_ACCESS_KEY_ID", "accessKeyID"),
            ("AWS_REGION", "region"),
            ("AWS_SECRET_ACCESS_KEY", "secretAccessKey"),
        ];
        for (variable, file) in files {
            let at = store.environment.iter().position(|(name, _)| name == variable).context("no such variable")?;
            std::fs::write(secret.join(file), store.environment.remove(at).1)?;
        }
        store.environment.push(("AWS_APPLICATION_CREDENTIALS".into(), secret.display().to_string()));
        Ok((store, PASSWORD.to_owned()))
    }

    /// A prefix in one of its buckets, `bucket/prefix`.
    pub fn store(&self, place: &str) -> Store {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        let endpoint = format!("{scheme}://{}:{}", self.host, self.port);
        let environment = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", USER),
            ("AWS_SECRET_ACCESS_KEY", PASSWORD),
        ];
        let mut environment: Vec<_> =
            environment.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        environment.extend(self.ca.as_ref().map(|ca| ("AWS_CA_BUNDLE".to_owned(), ca.display().to_string())));
        Store { url: format!("s3://{place}"), environment }
    }

    /// Sends a request of S3's own protocol.
    pub async fn send(&self, method: &str, target: &str, body: &str) -> Result<()> {
        let url = format!("http://127.0.0.1:{}/{target}", self.port);
        direct::send(method, &url, body, Signer::S3 { id: USER, secret: PASSWORD, region: "us-east-1" }).await
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
