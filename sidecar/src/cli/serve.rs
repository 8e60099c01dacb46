//! `sidecar serve`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::config::{Defragmentation, FIELDS, RetentionPolicy, SidecarConfig, Snapshots, misspelt, variable};
use tokio_util::sync::CancellationToken;

use super::snapshot::parse_schedule;
use super::write_out;
use crate::catalog::Layout;
use crate::client::ApiFlags;
use crate::etcd::{EtcdFlags, Secret};
use crate::initialize::{self, Member};
use crate::metrics::Metrics;
use crate::retention::{Policy, Retention};
use crate::server::{self, Files};
use crate::snapshotter::{DELTA_BYTES, DELTA_PERIODS};
use crate::store::{Open, Store};
use crate::supervise::{self, Leases, Supervisor, Upkeep};
use crate::{Error, Result, small_file, snapshotter};

/// Looking at the store more often than that would cost more than it gains.
const LEAST_PERIOD: Duration = Duration::from_secs(1);
/// Bytes a second; requests to a store have deadlines.
const LEAST_PACE: u64 = 100_000;
/// Nobody is gone for less.
const LEAST_AWAY: Duration = Duration::from_secs(5);

/// Look after a member: its data before etcd starts, its backups while it leads.
///
/// Serves the API that `sidecar launch` asks before it starts etcd. Ends on SIGTERM, when the last delta is in the store.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFlags,
    /// Print the configuration as it is understood, defaults included, and end.
    #[arg(long)]
    print_config: bool,
    /// Serve without TLS and let everybody call everything, as `server.insecure` does.
    #[arg(long)]
    insecure: bool,
}

/// What a sidecar goes by.
#[derive(Debug, clap::Args)]
pub(super) struct ConfigFlags {
    /// What it goes by: a YAML file; `sidecar/deploy/reference.yaml` has every field. The environment counts before it: `store.url` there is
    /// SIDECAR_STORE_URL, and so on.
    #[arg(long, env = "SIDECAR_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// A field of the configuration, which counts before the file and the environment; may be given several times.
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
}

impl ConfigFlags {
    pub(super) fn is_given(&self) -> bool {
        self.config.is_some() || !self.set.is_empty()
    }

    /// Where it comes from, for messages.
    pub(super) fn place(&self) -> String {
        self.config.as_ref().map_or_else(|| "the configuration".to_owned(), |path| path.display().to_string())
    }

    pub(super) fn read(&self) -> Result<SidecarConfig> {
        let place = self.place();
        let text = self.config.as_deref().map(small_file::read_text).transpose().map_err(Error::io("read", &place))?;
        for variable in misspelt(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())) {
            tracing::warn!(variable, "the environment has what looks like a field of the configuration, and is none");
        }
        if let Some(name) = FIELDS.iter().map(|field| variable(field)).find(|name| is_not_text(name)) {
            return Err(Error::invalid(format!("the variable {name} is not UTF-8")));
        }
        let config = SidecarConfig::layered(text.as_deref(), |name| std::env::var(name).ok(), &self.set);
        config.map_err(|error| Error::invalid(format!("{place}: {error}")))
    }
}

/// It would be passed over.
fn is_not_text(name: &str) -> bool {
    matches!(std::env::var(name), Err(std::env::VarError::NotUnicode(_)))
}

pub(super) async fn run(args: Args, stop: CancellationToken) -> Result<u8> {
    let mut flags = args.config;
    flags.set.extend(args.insecure.then(|| "server.insecure=true".to_owned()));
    let config = flags.read()?;
    check(&config)?;
    if args.print_config {
        let json = serde_json::to_string_pretty(&config);
        let json = json.map_err(|error| Error::Bug { what: format!("print the configuration: {error}") })?;
        write_out(format!("{json}\n").as_bytes())?;
        return Ok(0);
    }
    let settings = settings(&config, open_store(&config)?)?;
    let server = server_settings(&config)?;
    let supervisor = Supervisor::start(settings, stop.clone());
    let served = server::serve(server, supervisor.clone(), stop.clone()).await;
    stop.cancel();
    let drained = supervisor.drained().await;
    served.and(drained).map(|()| 0)
}

/// Refuses what makes no sense, wherever it is.
pub(super) fn check(config: &SidecarConfig) -> Result<()> {
    if config.etcd.cert.is_some() != config.etcd.key.is_some() {
        return Err(Error::invalid("etcd.cert and etcd.key go together"));
    }
    if config.etcd.user.is_some() != config.etcd.password_file.is_some() {
        return Err(Error::invalid("etcd.user and etcd.passwordFile go together"));
    }
    if config.etcd.endpoints.is_empty() {
        return Err(Error::invalid("etcd.endpoints names no endpoint"));
    }
    config.store.as_ref().map_or(Ok(()), |store| Store::check_url(&store.url).map(drop))?;
    if config.compaction.as_ref().is_some_and(|compaction| compaction.deltas == 0) {
        return Err(Error::invalid("compaction.deltas is 0: nothing can be merged; leave the section out instead"));
    }
    if config.kubernetes.as_ref().is_some_and(|kubernetes| kubernetes.heartbeat_period < LEAST_PERIOD) {
        return Err(Error::invalid(format!("kubernetes.heartbeatPeriod must be {LEAST_PERIOD:?} or more")));
    }
    if config.etcd.remove_members_after.is_some_and(|after| after < LEAST_AWAY) {
        return Err(Error::invalid(format!(
            "etcd.removeMembersAfter must be {LEAST_AWAY:?} or more: a member that restarts is away for as long"
        )));
    }
    let Snapshots { delta_period, delta_max_bytes, full_bytes_per_second, ref full_schedule } = config.snapshots;
    if !DELTA_PERIODS.contains(&delta_period) {
        return Err(Error::invalid(format!("snapshots.deltaPeriod is {delta_period:?}; it must be from 100ms to 24h")));
    }
    if !DELTA_BYTES.contains(&delta_max_bytes) {
        return Err(Error::invalid(format!(
            "snapshots.deltaMaxBytes is {delta_max_bytes}; it must be from 1024 to 134217728"
        )));
    }
    if (1..LEAST_PACE).contains(&config.background.bytes_per_second) || (1..LEAST_PACE).contains(&full_bytes_per_second)
    {
        return Err(Error::invalid(format!(
            "background.bytesPerSecond and snapshots.fullBytesPerSecond are 0, for as fast as it goes, or {LEAST_PACE} or more: what is read more slowly ends by its deadlines"
        )));
    }
    parse_schedule("snapshots.fullSchedule", full_schedule)?;
    upkeep(config)?;
    server_settings(config)?;
    Ok(())
}

pub(super) fn open_store(config: &SidecarConfig) -> Result<Option<Store>> {
    config.store.as_ref().map(|store| Store::open(&store.url, Open::Existing)).transpose()
}

/// Of a configuration that was checked.
pub(super) fn settings(config: &SidecarConfig, store: Option<Store>) -> Result<supervise::Settings> {
    let pod = std::env::var("POD_NAME").ok();
    let member = Member::read(&config.member.etcd_config, pod.as_deref())?;
    let password = config.etcd.password_file.as_deref().map(|path| {
        // Who gives the password itself must not read it in the error.
        let password = small_file::read_text(path).map_err(Error::io("read", "the file of etcd.passwordFile"))?;
        Ok::<_, Error>(Secret::from(password.trim_end_matches(['\r', '\n']).to_owned()))
    });
    let etcd = EtcdFlags {
        endpoints: config.etcd.endpoints.clone(),
        cacert: config.etcd.cacert.clone(),
        cert: config.etcd.cert.clone(),
        key: config.etcd.key.clone(),
        insecure_skip_tls_verify: false,
        user: config.etcd.user.clone().map(Secret::from),
        password: password.transpose()?,
        command_timeout: 5,
        rotating: crate::rotation::Rotating::default(),
    };
    let full_schedule = parse_schedule("snapshots.fullSchedule", &config.snapshots.full_schedule)?;
    let Snapshots { delta_period, delta_max_bytes, .. } = config.snapshots;
    let quiet = Arc::<tokio::sync::Mutex<()>>::default();
    let endpoint = etcd.endpoints.first().map(String::as_str).unwrap_or_default();
    let metrics = Arc::new(Metrics::of(endpoint, member.cluster.members().len(), store.as_ref()));
    let others = others(config, &member, &etcd)?;
    let backup = store.clone().map(|store| snapshotter::Settings {
        etcd: etcd.clone(),
        others: others.as_ref().map(|others| others.endpoints.clone()).unwrap_or_default(),
        store,
        layout: Layout::Steward,
        data_dir: Some(member.data_dir.clone()),
        full_schedule,
        delta_period,
        delta_max_bytes,
        full_bytes_per_second: Some(config.snapshots.full_bytes_per_second).filter(|most| *most > 0),
        quiet: quiet.clone(),
        metrics: metrics.clone(),
    });
    let may_start_empty = config.safety.may_start_empty;
    let initialize = initialize::Settings { member, store, others, may_start_empty, metrics: metrics.clone() };
    let work_dir = config.compaction.as_ref().map_or_else(std::env::temp_dir, |compaction| compaction.work_dir.clone());
    Ok(supervise::Settings {
        initialize,
        etcd,
        backup,
        quiet,
        metrics,
        upkeep: upkeep(config)?,
        remove_members_after: config.etcd.remove_members_after,
        leases: leases(config),
        work_dir,
        background_bytes_per_second: Some(config.background.bytes_per_second).filter(|most| *most > 0),
    })
}

fn leases(config: &SidecarConfig) -> Option<Leases> {
    let kubernetes = config.kubernetes.as_ref()?;
    let given = |name: &String| Some(name.clone()).filter(|name| !name.is_empty());
    Some(Leases {
        namespace: given(&kubernetes.namespace),
        heartbeat_period: kubernetes.heartbeat_period,
        delta_period: config.snapshots.delta_period,
        full: given(&kubernetes.full_snapshot_lease),
        delta: given(&kubernetes.delta_snapshot_lease),
    })
}

fn upkeep(config: &SidecarConfig) -> Result<Upkeep> {
    let cron = |field: &str, text: &str| {
        parse_schedule(field, text)?
            .ok_or_else(|| Error::invalid(format!("{field} is empty; leave the section out instead")))
    };
    let retention = config.retention.as_ref().map(|retention| {
        let max_backups = retention.max_backups as usize;
        let policy = match retention.policy {
            RetentionPolicy::Exponential => Policy::Exponential,
            RetentionPolicy::LimitBased => Policy::LimitBased { max_backups },
        };
        (Retention { policy, deltas: retention.deltas }, retention.period)
    });
    if config.retention.as_ref().is_some_and(|retention| retention.max_backups == 0) {
        return Err(Error::invalid("retention.maxBackups is 0: at least one backup must stay"));
    }
    if config.retention.as_ref().is_some_and(|retention| retention.period < LEAST_PERIOD) {
        return Err(Error::invalid(format!("retention.period must be {LEAST_PERIOD:?} or more")));
    }
    let compaction = config.compaction.as_ref();
    let verification = config.verification.as_ref();
    let defragmentation = config.defragmentation.as_ref();
    let defragmented = |defragmentation: &Defragmentation| {
        let Defragmentation { least_free_share, urgent_free_share, .. } = *defragmentation;
        for (field, share) in [("leastFreeShare", least_free_share), ("urgentFreeShare", urgent_free_share)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::invalid(format!(
                    "defragmentation.{field} is {share}, which is not a share from 0 to 1"
                )));
            }
        }
        if urgent_free_share > 0.0 && urgent_free_share < least_free_share {
            return Err(Error::invalid(
                "defragmentation.urgentFreeShare is less than leastFreeShare: nothing would be done for it",
            ));
        }
        let cron = cron("defragmentation.schedule", &defragmentation.schedule)?;
        Ok(supervise::Defragmentation { cron, least_free_share, urgent_free_share })
    };
    Ok(Upkeep {
        retention,
        compaction: compaction.map(|compaction| (compaction.deltas as usize, compaction.work_dir.clone())),
        verification: verification
            .map(|drill| Ok::<_, Error>((cron("verification.schedule", &drill.schedule)?, drill.work_dir.clone())))
            .transpose()?,
        defragmentation: defragmentation.map(defragmented).transpose()?,
        resolve_no_space: defragmentation.is_some_and(|defragmentation| defragmentation.resolve_no_space),
    })
}

/// How the other members are reached, where there are any.
fn others(config: &SidecarConfig, member: &Member, etcd: &EtcdFlags) -> Result<Option<EtcdFlags>> {
    let is_alone = member.cluster.members().len() <= 1;
    let given = &config.etcd.cluster_endpoints;
    let endpoints = if given.is_empty() { member.others.clone() } else { given.clone() };
    if endpoints.is_empty() && is_alone {
        return Ok(None);
    }
    if endpoints.is_empty() {
        return Err(Error::invalid(
            "the cluster has several members: give the client URLs of the others in etcd.clusterEndpoints",
        ));
    }
    Ok(Some(EtcdFlags { endpoints, ..etcd.clone() }))
}

pub(super) fn server_settings(config: &SidecarConfig) -> Result<server::Settings> {
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
    let peers = match (&server.peers, &server.tls) {
        (Some(peers), _) => Some((&peers.cacert, &peers.cert, &peers.key)),
        (None, Some(tls)) => Some((&tls.client_ca, &tls.cert, &tls.key)),
        (None, None) => None,
    };
    let peers = peers.map(|(cacert, cert, key)| (cacert.clone(), cert.clone(), key.clone())).map_or_else(
        ApiFlags::default,
        |(cacert, cert, key)| ApiFlags {
            cacert: Some(cacert),
            cert: Some(cert),
            key: Some(key),
            ..ApiFlags::default()
        },
    );
    let (etcd_wrapper, open_snapshots) = (server.etcd_wrapper, server.open_snapshots);
    Ok(server::Settings { listen, tls, peers, etcd_wrapper, open_snapshots })
}
