//! `sidecar serve`.

use std::path::PathBuf;

use proto::config::SidecarConfig;
use tokio_util::sync::CancellationToken;

use super::snapshot::parse_schedule;
use super::write_out;
use crate::catalog::Layout;
use crate::etcd::EtcdFlags;
use crate::initialize::{self, Member};
use crate::server::{self, Files};
use crate::store::{Open, Store};
use crate::supervise::{self, Supervisor};
use crate::{Error, Result, snapshotter};

/// Look after a member: its data before etcd starts, its backups while it leads.
///
/// Serves the API that `sidecar launch` asks before it starts etcd. Ends on SIGTERM, when the last delta is in the store.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What it goes by: a YAML file, described in the README.
    #[arg(long, env = "SIDECAR_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// Print the configuration as it is understood, defaults included, and end.
    #[arg(long)]
    print_config: bool,
}

pub(super) async fn run(args: Args, stop: CancellationToken) -> Result<u8> {
    let place = args.config.display().to_string();
    let text = std::fs::read_to_string(&args.config).map_err(Error::io("read", &place))?;
    let config = SidecarConfig::parse(&text).map_err(|error| Error::invalid(format!("{place}: {error}")))?;
    if args.print_config {
        let json = serde_json::to_string_pretty(&config);
        let json = json.map_err(|error| Error::Bug { what: format!("print the configuration: {error}") })?;
        write_out(format!("{json}\n").as_bytes())?;
        return Ok(0);
    }
    let settings = settings(&config)?;
    let server = server_settings(&config)?;
    let supervisor = Supervisor::start(settings, stop.clone());
    let served = server::serve(server, supervisor.clone(), stop.clone()).await;
    stop.cancel();
    supervisor.drained().await;
    served.map(|()| 0)
}

fn settings(config: &SidecarConfig) -> Result<supervise::Settings> {
    let pod = std::env::var("POD_NAME").ok();
    let member = Member::read(&config.member.etcd_config, pod.as_deref())?;
    let store = config.store.as_ref().map(|store| Store::open(&store.url, Open::Existing)).transpose()?;
    let (cert, key) = (config.etcd.cert.clone(), config.etcd.key.clone());
    if cert.is_some() != key.is_some() {
        return Err(Error::invalid("etcd.cert and etcd.key go together"));
    }
    let etcd = EtcdFlags {
        endpoints: config.etcd.endpoints.clone(),
        cacert: config.etcd.cacert.clone(),
        cert,
        key,
        insecure_skip_tls_verify: false,
        user: None,
        password: None,
        command_timeout: 5,
    };
    let full_schedule = parse_schedule(&config.snapshots.full_schedule)?;
    let backup = store.clone().map(|store| snapshotter::Settings {
        etcd: etcd.clone(),
        store,
        layout: Layout::Steward,
        full_schedule,
        delta_period: config.snapshots.delta_period,
        delta_max_bytes: config.snapshots.delta_max_bytes,
    });
    let initialize = initialize::Settings { member, store, may_start_empty: config.safety.may_start_empty };
    Ok(supervise::Settings { initialize, etcd, backup })
}

fn server_settings(config: &SidecarConfig) -> Result<server::Settings> {
    let server = &config.server;
    let listen = server.listen.parse().map_err(|_| {
        Error::invalid(format!("server.listen {:?} is not an address and a port, such as 0.0.0.0:8080", server.listen))
    })?;
    let tls = match (&server.tls, server.insecure) {
        (Some(tls), false) => {
            Some(Files { cert: tls.cert.clone(), key: tls.key.clone(), client_ca: tls.client_ca.clone() })
        }
        (None, true) => None,
        (Some(_), true) => return Err(Error::invalid("server.tls and server.insecure exclude each other")),
        (None, false) => {
            return Err(Error::invalid(
                "give server.tls, or say server.insecure: true to let everybody call everything",
            ));
        }
    };
    Ok(server::Settings { listen, tls, etcd_wrapper: server.etcd_wrapper })
}
