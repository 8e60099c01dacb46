//! `sidecar launch`.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::Result;
use crate::client::ApiFlags;
use crate::launch::{self, Settings};

/// Start etcd once its sidecar has looked at the data, and end as it does.
///
/// Asks the sidecar to initialize, shows how far that is, writes the configuration that it gives and starts etcd. SIGTERM and
/// SIGINT have it end; the second one kills it. An etcd that fails within ten seconds is sent back to initialization, twice.
/// Exits with etcd's code; 12 when the sidecar says that etcd must not start.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    api: ApiFlags,
    /// The etcd to start.
    #[arg(long, default_value = "/usr/local/bin/etcd", value_name = "FILE")]
    etcd: PathBuf,
    /// Where the configuration that the sidecar gives is written.
    #[arg(long, default_value = "etcd.conf.yaml", value_name = "FILE")]
    config: PathBuf,
}

pub(super) async fn run(args: Args, stop: CancellationToken, insist: CancellationToken) -> Result<u8> {
    let Args { api, etcd, config } = args;
    launch::launch(&Settings { api, etcd, config }, &stop, &insist).await
}
