//! `sidecar launch`.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::Result;
use crate::launch::{self, Settings};

/// Start etcd once its sidecar has looked at the data, and end as it does.
///
/// Asks the sidecar to initialize, shows how far that is, writes the configuration that it gives and starts etcd. SIGTERM and
/// SIGINT are passed on. Exits with etcd's code; 12 when the sidecar says that etcd must not start.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The sidecar's API.
    #[arg(long, env = "SIDECAR_URL", default_value = "https://127.0.0.1:8080", value_name = "URL")]
    sidecar: String,
    /// CA bundle to verify its certificate with; the system's when not given.
    #[arg(long, env = "SIDECAR_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,
    /// Client certificate.
    #[arg(long, env = "SIDECAR_CERT", value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Key of the client certificate.
    #[arg(long, env = "SIDECAR_KEY", value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The etcd to start.
    #[arg(long, default_value = "/usr/local/bin/etcd", value_name = "FILE")]
    etcd: PathBuf,
    /// Where the configuration that the sidecar gives is written.
    #[arg(long, default_value = "etcd.conf.yaml", value_name = "FILE")]
    config: PathBuf,
}

pub(super) async fn run(args: Args, stop: CancellationToken) -> Result<u8> {
    let identity = args.cert.zip(args.key);
    let Args { sidecar, cacert, etcd, config, .. } = args;
    launch::launch(&Settings { sidecar, cacert, identity, etcd, config }, &stop).await
}
