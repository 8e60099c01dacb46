//! A real S3 server that does not know conditional puts: it overwrites.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Result;

use crate::store::Store;
use crate::{eventually, free_port, program};

/// A running garage; killed when dropped.
#[derive(Debug)]
pub struct Garage {
    child: Child,
    port: u16,
}

const KEY_ID: &str = "GK0123456789abcdef01234567";
const SECRET: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

impl Garage {
    /// Starts a server that keeps its objects under `dir`, with one bucket.
    pub async fn start(dir: &Path, bucket: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let (port, rpc) = (free_port()?, free_port()?);
        let place = dir.display();
        let settings = format!(
            "metadata_dir = \"{place}/meta\"\ndata_dir = \"{place}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{SECRET}\"\n[s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\n"
        );
        let path = dir.join("garage.toml");
        std::fs::write(&path, settings)?;
        let log = File::create(dir.join("log"))?;
        let child = Command::new(program("garage", "garage")?)
            .arg("-c")
            .arg(&path)
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", KEY_ID)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET)
            .env("GARAGE_DEFAULT_BUCKET", bucket)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let garage = Self { child, port };
        let store = garage.store(&format!("{bucket}/ready"));
        eventually(Duration::from_secs(180), || async { store.list().await.map(drop) }).await?;
        Ok(garage)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A prefix in its bucket, `bucket/prefix`.
    pub fn store(&self, place: &str) -> Store {
        let environment = [
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_REGION", "garage".to_owned()),
            ("AWS_ACCESS_KEY_ID", KEY_ID.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ];
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Store { url: format!("s3://{place}"), environment }
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
