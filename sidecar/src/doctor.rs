//! Whether what a configuration says is so: certificates, the store, etcd, the disk, the clock.
//!
//! Nothing is changed but small objects of its own in the store. Each finding says what it means, so that nobody has to know
//! the sidecar to act on it.

mod certificates;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use etcd_format::datadir;
use proto::config::SidecarConfig;
use serde::Serialize;

use crate::error::is_refused;
use crate::etcd::{Etcd, EtcdFlags};
use crate::human::bytes as amount;
use crate::initialize::{self, Data, Member};
use crate::room::{Room, existing};
use crate::store::Store;
use crate::{Class, Error, Result, kinship, rotation, small_file, supervise};

/// A certificate that has no more time than this is worth knowing of.
const SOON: chrono::TimeDelta = chrono::TimeDelta::days(14);
/// How far ahead of this clock a backup's time may be.
const MOST_AHEAD: chrono::TimeDelta = chrono::TimeDelta::seconds(30);
/// What a restore needs beside the database: a log segment, and room to breathe.
const SPARE_BYTES: u64 = 128 << 20;

/// How something does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// As it should.
    Good,
    /// Worth knowing.
    Remark,
    /// Backups or restores would fail, or not be safe.
    Bad,
}

/// What was found of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How it does.
    pub health: Health,
    /// What was tried.
    pub what: Cow<'static, str>,
    /// What came of it.
    pub found: String,
}

impl Finding {
    fn good(what: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { health: Health::Good, what: what.into(), found: found.into() }
    }

    fn remark(what: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { health: Health::Remark, what: what.into(), found: found.into() }
    }

    fn bad(what: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { health: Health::Bad, what: what.into(), found: found.into() }
    }
}

/// Checks everything that a configuration names. `not_opened` is why its store could not be opened.
pub async fn examine(
    config: &SidecarConfig,
    settings: &supervise::Settings,
    not_opened: Option<&Error>,
) -> Vec<Finding> {
    let member = &settings.initialize.member;
    let (name, count) = (&member.name, member.cluster.members().len());
    let mut findings = vec![Finding::good("member", format!("{name}, in a cluster of {count}"))];
    let now = Utc::now();
    findings.extend(pairs(config, count > 1).iter().map(|pair| pair.examine(now)));
    findings.extend(
        member.tls_files().into_iter().map(|(what, path)| Pair { what, path, key: None, uses: Vec::new() }).map(
            |pair| {
                if pair.path.exists() {
                    pair.examine(now)
                } else {
                    let why = format!("{} is not there: it may be in etcd's container only", pair.path.display());
                    Finding::remark(pair.what, why)
                }
            },
        ),
    );
    findings.extend(certificates::examine(config, member));
    findings.push(listener(config, &member.client_ports()));
    let mut newest = Newest::default();
    match (&settings.initialize.store, not_opened) {
        (_, Some(error)) => findings.push(Finding::bad("store", error.to_string())),
        (None, None) => {
            findings.push(Finding::remark("store", "none is given: no backups are taken, only the data is checked"));
        }
        (Some(store), None) => match store.examine().await {
            Ok(found) => {
                findings.extend(found);
                match Newest::read(store).await {
                    Ok(read) => newest = read,
                    Err(error) => findings.push(Finding::bad("newest backup", error.to_string())),
                }
                findings.push(newest.examine(now));
            }
            Err(error) => findings.push(Finding::bad("store", error.to_string())),
        },
    }
    for endpoint in &settings.etcd.endpoints {
        let (found, ours) = etcd(&settings.etcd, endpoint.trim(), &member.client_ports()).await;
        findings.extend(found);
        if let (Some(store), Some(ours), Some(theirs)) = (&settings.initialize.store, ours, newest.cluster_id) {
            findings.extend(whose(store, ours, theirs, &member.data_dir).await);
        }
    }
    if let Some(others) = &settings.initialize.others {
        findings.extend(others_reached(others).await);
    }
    findings.extend(data(member, settings.initialize.store.as_ref()).await);
    findings.push(room(&member.data_dir, newest.bytes));
    let work_dirs = [
        ("compaction.workDir", config.compaction.as_ref().map(|compaction| &compaction.work_dir)),
        ("verification.workDir", config.verification.as_ref().map(|verification| &verification.work_dir)),
    ];
    for (what, dir) in work_dirs.into_iter().filter_map(|(what, dir)| Some((what, dir?))) {
        findings.push(work_dir(what, dir, newest.bytes));
    }
    findings
}

/// A certificate, or several of authorities, with its key if it has one.
struct Pair {
    what: String,
    path: PathBuf,
    key: Option<PathBuf>,
    /// What it is used for.
    uses: Vec<Use>,
}

/// What a certificate is shown for; none for one that others are signed by, or that is not ours to say of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// To those who call.
    Server,
    /// To those who are called.
    Client,
}

/// What the configuration names.
fn pairs(config: &SidecarConfig, is_one_of_several: bool) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let mut add = |what: &str, path: Option<&PathBuf>, key: Option<&PathBuf>, uses: &[Use]| {
        let pair =
            |path: &PathBuf| Pair { what: what.to_owned(), path: path.clone(), key: key.cloned(), uses: uses.to_vec() };
        pairs.extend(path.map(pair));
    };
    let (tls, peers) = (config.server.tls.as_ref(), config.server.peers.as_ref());
    // The sidecars of the other members are shown it, too.
    let calls_peers = peers.is_none() && config.store.is_some() && is_one_of_several;
    let of_server: &[Use] = if calls_peers { &[Use::Server, Use::Client] } else { &[Use::Server] };
    add("server.tls.cert", tls.map(|tls| &tls.cert), tls.map(|tls| &tls.key), of_server);
    add("server.tls.clientCa", tls.map(|tls| &tls.client_ca), None, &[]);
    add("server.peers.cert", peers.map(|peers| &peers.cert), peers.map(|peers| &peers.key), &[Use::Client]);
    add("server.peers.cacert", peers.map(|peers| &peers.cacert), None, &[]);
    add("etcd.cert", config.etcd.cert.as_ref(), config.etcd.key.as_ref(), &[Use::Client]);
    add("etcd.cacert", config.etcd.cacert.as_ref(), None, &[]);
    pairs
}

impl Pair {
    fn examine(&self, now: DateTime<Utc>) -> Finding {
        match self.validity() {
            Ok((not_before, not_after)) => {
                let (path, what) = (self.path.display(), self.what.clone());
                let day = |at: DateTime<Utc>| at.format("%Y-%m-%d %H:%M UTC");
                if now >= not_after {
                    Finding::bad(what, format!("{path} has expired on {}: renew it", day(not_after)))
                } else if now < not_before {
                    let clock = "renew it, or set this machine's clock";
                    Finding::bad(what, format!("{path} is not valid before {}: {clock}", day(not_before)))
                } else if not_after - now < SOON {
                    Finding::remark(what, format!("{path} expires soon, on {}: renew it", day(not_after)))
                } else {
                    Finding::good(what, format!("{path} is valid until {}", day(not_after)))
                }
            }
            Err(error) => Finding::bad(self.what.clone(), error.to_string()),
        }
    }

    /// From when until when all that is in the file is valid; an error when it, or the key, cannot be used.
    fn validity(&self) -> Result<(DateTime<Utc>, DateTime<Utc>)> {
        let read = |path: &Path| small_file::read(path).map_err(Error::io("read", path.display()));
        let bad = |path: &Path, what: &dyn std::fmt::Display| Error::invalid(format!("{}: {what}", path.display()));
        let chain = rotation::certificates(&read(&self.path)?, &self.path)?;
        let at = |time: x509_parser::time::ASN1Time| DateTime::from_timestamp(time.timestamp(), 0).unwrap_or_default();
        if let Some(Ok((_, own))) = chain.first().map(|own| x509_parser::parse_x509_certificate(own))
            && let Some(lacks) = self.uses.iter().find_map(|of| of.lacks(&own))
        {
            return Err(bad(&self.path, &lacks));
        }
        let mut times = Vec::new();
        for certificate in &chain {
            let parsed = x509_parser::parse_x509_certificate(certificate);
            let (_, parsed) = parsed.map_err(|error| bad(&self.path, &error))?;
            let (from, until) = (at(parsed.validity().not_before), at(parsed.validity().not_after));
            times.push((from, until));
        }
        if let Some(key) = &self.key {
            let private = rotation::private_key(&read(key)?, key)?;
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let both = rustls::sign::CertifiedKey::from_der(chain, private, &provider);
            both.map_err(|error| bad(key, &format!("it is not the key of {}: {error}", self.path.display())))?;
        }
        // A chain is as good as its shortest part; of authorities, one that is valid is enough.
        let (first, last) = (times.iter().map(|(from, _)| *from), times.iter().map(|(_, until)| *until));
        let times = if self.key.is_some() { (first.max(), last.min()) } else { (first.min(), last.max()) };
        Ok((times.0.unwrap_or_default(), times.1.unwrap_or_default()))
    }
}

impl Use {
    /// What those to whom it is shown would refuse it for.
    fn lacks(self, certificate: &x509_parser::certificate::X509Certificate<'_>) -> Option<&'static str> {
        let has_names = certificate.subject_alternative_name().is_ok_and(|names| names.is_some());
        let usage = certificate.extended_key_usage().ok().flatten().map(|usage| usage.value);
        let allows = |is: fn(&x509_parser::extensions::ExtendedKeyUsage<'_>) -> bool| {
            usage.as_ref().is_none_or(|usage| usage.any || is(usage))
        };
        match self {
            Self::Server if !has_names => Some(
                "it has no subject alternative name, so that no client takes it: issue it for the hosts by which the sidecar is called",
            ),
            Self::Server if !allows(|usage| usage.server_auth) => {
                Some("it may not be used by a server: issue it with the extended key usage serverAuth")
            }
            Self::Client if !allows(|usage| usage.client_auth) => {
                Some("it may not be used by a client: issue it with the extended key usage clientAuth")
            }
            _ => None,
        }
    }
}

fn listener(config: &SidecarConfig, ports_of_etcd: &[u16]) -> Finding {
    let listen = &config.server.listen;
    if listen.parse().is_ok_and(|address: std::net::SocketAddr| ports_of_etcd.contains(&address.port())) {
        return Finding::bad(
            "server.listen",
            format!("{listen} has a port of etcd's listen-client-urls: give it its own"),
        );
    }
    match std::net::TcpListener::bind(listen) {
        Ok(_) if config.server.insecure => Finding::remark(
            "server.listen",
            format!("{listen} is free; server.insecure lets everybody call everything"),
        ),
        Ok(_) => Finding::good("server.listen", format!("{listen} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Finding::remark(
            "server.listen",
            format!("{listen} is taken, which is right where the sidecar runs already"),
        ),
        Err(error) => Finding::bad("server.listen", format!("{listen}: {error}")),
    }
}

/// The newest chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Newest {
    /// When its last backup was taken, in milliseconds since 1970.
    unix_ms: Option<i64>,
    /// Size of the database that its full snapshot is.
    bytes: u64,
    cluster_id: Option<u64>,
}

impl Newest {
    async fn read(store: &Store) -> Result<Self> {
        let catalog = store.catalog().await?;
        let Some((timeline, history)) = catalog.newest_restorable() else { return Ok(Self::default()) };
        let Some(chain) = history.newest_chain() else { return Ok(Self::default()) };
        let meta = store.meta(&chain.full.name(timeline), chain.full.size).await?;
        Ok(Self {
            unix_ms: history.times().max(),
            bytes: meta.map_or(chain.full.size, |meta| meta.content_bytes),
            cluster_id: store.whose(timeline, history).await?,
        })
    }

    fn examine(&self, now: DateTime<Utc>) -> Finding {
        let what = "newest backup";
        let Some(taken) = self.unix_ms.and_then(DateTime::from_timestamp_millis) else {
            return Finding::remark(what, "there is none yet");
        };
        let of = format!("of {}, a database of {}", taken.format("%Y-%m-%d %H:%M:%S UTC"), amount(self.bytes));
        if taken - now > MOST_AHEAD {
            let clock = "that is in the future: a clock is wrong, and times of backups and retention go by it";
            return Finding::remark("clock", format!("{of}; {clock}"));
        }
        Finding::good(what, of)
    }
}

/// Whether backups of the cluster that serves may follow those of another.
async fn whose(store: &Store, ours: u64, theirs: u64, data_dir: &Path) -> Option<Finding> {
    if ours == theirs {
        return None;
    }
    let what = "cluster";
    let found = format!("the newest backups are of cluster {theirs:x}, and etcd's is {ours:x}");
    let is_kin = async { kinship::is_kin(store, &store.catalog().await?, ours, data_dir).await };
    Some(match is_kin.await {
        Ok(true) => Finding::remark(what, format!("{found}, which comes from them: right until its first backup")),
        Ok(false) => {
            let why = "nothing shows that it was restored from there: the store is another's, and nothing would be backed up into it";
            Finding::bad(what, format!("{found}; {why}; give a prefix of its own"))
        }
        Err(error) => Finding::bad(what, format!("{found}: {error}")),
    })
}

/// What a member says of itself, and what follows; and of which cluster it is.
async fn etcd(flags: &EtcdFlags, endpoint: &str, ports: &[u16]) -> (Vec<Finding>, Option<u64>) {
    let what = "etcd";
    let (mut etcd, status) = match Etcd::reach(flags, endpoint).await {
        Ok(reached) => reached,
        Err(error) if is_refused(&error) => {
            let port = url::Url::parse(endpoint).ok().and_then(|url| url.port_or_known_default());
            if port.is_some_and(|port| !ports.contains(&port)) {
                let found = format!(
                    "nothing listens at {endpoint}, nor will etcd, whose listen-client-urls have ports {ports:?}: see to etcd.endpoints"
                );
                return (vec![Finding::bad(what, found)], None);
            }
            let found = format!("nothing listens at {endpoint}, which is right before etcd is started");
            return (vec![Finding::remark(what, found)], None);
        }
        Err(error) => return (vec![Finding::bad(what, error.to_string())], None),
    };
    let is = format!("{}, {:?} of cluster {:x} at {endpoint}", status.version, status.role, status.cluster_id);
    let mut findings = vec![match datadir::Minor::parse(&status.version) {
        Ok(_) => Finding::good(what, format!("etcd {is}")),
        Err(error) => Finding::bad(what, format!("etcd {is}: {error}")),
    }];
    let auth = match etcd.auth_revision().await {
        Ok(Some((_, is_on))) => Ok(is_on),
        // 3.4 does not tell; who may read users may all that a backup needs.
        Ok(None) => etcd.auth_fingerprint().await.map(|_| true),
        Err(error) => Err(error),
    };
    findings.push(match auth {
        Ok(false) => Finding::good("auth", "off"),
        Ok(true) => Finding::good("auth", "its state can be read, so the user may back up"),
        Err(error) if status.leader_id == 0 => Finding::bad("auth", format!("{error}: the cluster has no leader")),
        Err(error) => Finding::bad("auth", format!("{error}: the user that backs up needs the role root")),
    });
    findings.extend(status.alarms.iter().map(|(member, alarm)| {
        Finding::bad("alarm", format!("{} of member {member:x}: writes or reads are refused", alarm.name()))
    }));
    (findings, Some(status.cluster_id))
}

/// Whether the other members answer: without them one that lost its data cannot come back.
async fn others_reached(others: &EtcdFlags) -> Vec<Finding> {
    let mut findings = Vec::new();
    for endpoint in &others.endpoints {
        findings.push(match Etcd::reach(others, endpoint.trim()).await {
            Ok((_, status)) => Finding::good("other members", format!("{:?} at {endpoint}", status.role)),
            Err(error) => Finding::remark("other members", error.to_string()),
        });
    }
    findings
}

/// The data directory: who may write there, and what lies in it.
async fn data(member: &Member, store: Option<&Store>) -> Vec<Finding> {
    let dir = &member.data_dir;
    let what = "data directory";
    let parent = existing(dir);
    if let Err(error) = tempfile::tempfile_in(&parent) {
        let why = "what is damaged could not be moved aside, nor anything restored";
        return vec![Finding::bad(what, format!("{} cannot be written: {error}; {why}", parent.display()))];
    }
    let mut findings = Vec::new();
    if let Ok(metadata) = std::fs::metadata(dir) {
        let (owner, us) = (std::os::unix::fs::MetadataExt::uid(&metadata), rustix::process::geteuid().as_raw());
        if owner != us {
            let why = "etcd may not read what is restored: run both as the same user";
            let found = format!("{} is of user {owner}, and this is user {us}: {why}", dir.display());
            findings.push(Finding::remark(what, found));
        }
    }
    if !dir.exists() {
        findings.push(Finding::good(what, format!("{} is not there yet", dir.display())));
        return findings;
    }
    let looked = initialize::look_into(member, store).await;
    if let Ok((data, backups, _)) = &looked
        && let Some((ours, theirs)) = data.foreign_to(backups)
    {
        let found = format!(
            "it is of cluster {ours:x}, the backups are of {theirs:x}: the store or the volume is another's, and etcd would not be started"
        );
        findings.push(Finding::bad(what, found));
    }
    findings.push(match looked {
        Ok((Data::Absent, ..)) => Finding::good(what, format!("{} has no member yet", dir.display())),
        Ok((Data::Sound(sound), _, schema)) => {
            let schema = schema.map(|minor| format!(", storage of etcd {minor}")).unwrap_or_default();
            Finding::good(what, format!("sound, at revision {}{schema}", sound.revision))
        }
        Ok((Data::Damaged(damaged), ..)) => {
            Finding::bad(what, format!("damaged: {}; `sidecar serve` decides when etcd is to start", damaged.evidence))
        }
        Err(error) if error.class() == Class::Precondition => {
            Finding::good(what, format!("in use, and not looked into: {error}"))
        }
        Err(error) => Finding::bad(what, error.to_string()),
    });
    findings
}

/// Whether a restore fits beside what is there, which it moves aside.
fn room(dir: &Path, database: u64) -> Finding {
    let what = "room for a restore";
    let needed = database.saturating_add(SPARE_BYTES);
    match Room::of(dir).map(|room| room.free) {
        Ok(None) => Finding::remark(what, format!("{} does not tell what it has room for", dir.display())),
        Ok(Some(free)) if free < needed => {
            let why = "a restore is written beside what is there, and needs";
            Finding::bad(what, format!("{} has {} free: {why} {}", dir.display(), amount(free), amount(needed)))
        }
        Ok(Some(free)) => {
            Finding::good(what, format!("{} has {} free, of {} needed", dir.display(), amount(free), amount(needed)))
        }
        Err(error) => Finding::bad(what, error.to_string()),
    }
}

fn work_dir(what: &'static str, dir: &Path, database: u64) -> Finding {
    let needed = database.saturating_mul(2).saturating_add(SPARE_BYTES);
    if let Err(error) = tempfile::tempfile_in(dir) {
        return Finding::bad(what, format!("{} cannot be written: {error}", dir.display()));
    }
    match Room::of(dir).map(|room| room.free) {
        Ok(None) => Finding::good(what, format!("{} can be written", dir.display())),
        Ok(Some(free)) if free < needed => {
            let needs = amount(needed);
            Finding::remark(what, format!("{} has {} free, and may need {needs}", dir.display(), amount(free)))
        }
        Ok(Some(free)) => Finding::good(what, format!("{} has {} free", dir.display(), amount(free))),
        Err(error) => Finding::bad(what, error.to_string()),
    }
}
