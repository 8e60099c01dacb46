//! What a sidecar goes by: defaults, over these a YAML file, version `v1`, over that the environment, over that flags.
//!
//! Unknown fields are refused, with their line: a misspelt one would otherwise be a default that nobody chose. Secrets are
//! never in it; credentials of stores come from their own files or the environment.

mod duration;
mod fields;
mod plain;

use std::path::PathBuf;
use std::time::Duration;

pub use duration::parse as parse_duration;
pub use fields::{FIELDS, misspelt, variable};
pub use plain::{is_content, is_plain_address, is_plain_store};
use serde::{Deserialize, Serialize};

/// The version that this is.
pub const API_VERSION: &str = "sidecar.etcd-steward.io/v1";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not have the shape that it should.
    #[error("{0}")]
    Shape(#[from] serde_saphyr::Error),
    /// Another version is asked for.
    #[error("apiVersion is {0:?}; this program reads {API_VERSION}")]
    Version(String),
    /// The environment or a flag has something that does not belong there.
    #[error("{from}: {what}")]
    Override {
        /// Which variable or flag.
        from: String,
        /// What is wrong.
        what: String,
    },
    /// What is needed is nowhere.
    #[error("{0} is missing: give a file with --config, or --set {0}=…")]
    Missing(&'static str),
    /// What must not be seen may be in it; it is not repeated.
    #[error("{field} {what}")]
    Secret {
        /// Which field.
        field: &'static str,
        /// What it has, and what to do.
        what: &'static str,
    },
}

/// Reads a text. An error names line and column, and does not quote what stands there or around it: that may be a secret.
pub fn read_yaml<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, serde_saphyr::Error> {
    serde_saphyr::from_str_with_options(text, serde_saphyr::options! { with_snippet: false })
}

impl SidecarConfig {
    /// Reads a file's text.
    pub fn parse(yaml: &str) -> Result<Self, Error> {
        Self::layered(Some(yaml), |_| None, &[])
    }

    /// Reads a file's text, if there is one, and puts over it what the environment has and what `sets` say, as
    /// `field=value` each: the value is YAML, or a list with commas.
    pub fn layered(
        yaml: Option<&str>,
        environment: impl Fn(&str) -> Option<String>,
        sets: &[String],
    ) -> Result<Self, Error> {
        let file: Self = yaml.map_or_else(|| Ok(Self::default()), read_yaml)?;
        if file.api_version != API_VERSION {
            return Err(Error::Version(file.api_version));
        }
        let refused = |from: &str, what: String| Error::Override { from: from.to_owned(), what };
        let mut tree = serde_json::to_value(&file).map_err(|error| refused("the file", error.to_string()))?;
        let mut layers = Vec::new();
        for field in FIELDS {
            let variable = variable(field);
            layers.extend(environment(&variable).map(|value| (variable, field.to_owned(), value)));
        }
        for set in sets {
            let (field, value) = set.split_once('=').unwrap_or((set, ""));
            if field.len() == set.len() {
                // Where the value begins is not known.
                let end =
                    field.find(|letter: char| !letter.is_ascii_alphabetic() && letter != '.').unwrap_or(field.len());
                let known = FIELDS.iter().find(|known| **known == &field[..end]).map_or("", |known| known);
                return Err(refused(&format!("--set {known}…"), "it is not field=value".into()));
            }
            if !FIELDS.contains(&field) {
                // What follows the name may be of the value.
                let end = field.find(|letter: char| !letter.is_ascii_alphabetic() && letter != '.');
                let name = &field[..end.unwrap_or(field.len())];
                let what = format!("there is no field of that name; there are {}", FIELDS.join(", "));
                return Err(refused(&format!("--set {name}…"), what));
            }
            let from = format!("--set {field}");
            layers.push((from, field.to_owned(), value.to_owned()));
        }
        // Some fields only make sense together: what the last layer leaves wrong, the first to make it so is blamed for.
        let (mut config, mut wrong) = (file, None);
        for (from, field, value) in layers {
            put(&mut tree, &field, value_of(&field, &value));
            match serde_json::from_value(tree.clone()) {
                Ok(read) => (config, wrong) = (read, None),
                Err(error) => wrong = wrong.or_else(|| Some(refused(&from, error.to_string()))),
            }
        }
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        if config.member.etcd_config.as_os_str().is_empty() {
            return Err(Error::Missing("member.etcdConfig"));
        }
        plain::check(&config)?;
        Ok(config)
    }
}

/// A value as a person writes it: a list has commas, a number or a truth value is one where it reads as one.
fn value_of(field: &str, text: &str) -> serde_json::Value {
    let texts = ["Lease", ".namespace", ".schedule", ".fullSchedule", ".url", "Dir", ".listen"];
    if field.ends_with("ndpoints") {
        return text.split(',').map(str::trim).filter(|url| !url.is_empty()).collect();
    }
    match serde_json::from_str(text) {
        Ok(value @ (serde_json::Value::Number(_) | serde_json::Value::Bool(_)))
            if !texts.iter().any(|end| field.ends_with(end)) =>
        {
            value
        }
        _ => text.into(),
    }
}

fn put(tree: &mut serde_json::Value, field: &str, value: serde_json::Value) {
    let mut at = tree;
    for part in field.split('.') {
        if !at.is_object() {
            *at = serde_json::Value::Object(serde_json::Map::new());
        }
        at = &mut at[part];
    }
    *at = value;
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SidecarConfig {
    /// [`API_VERSION`].
    pub api_version: String,
    /// The member that it looks after.
    #[serde(default)]
    pub member: Member,
    /// How the member is reached once it runs.
    #[serde(default)]
    pub etcd: Etcd,
    /// Where backups go; none for only the check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<Store>,
    /// When backups are taken.
    #[serde(default)]
    pub snapshots: Snapshots,
    /// Which backups go; without it all stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// When deltas are merged into a full snapshot; without it never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compaction: Option<Compaction>,
    /// When the newest chain is restored to see that it can be; without it never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// When etcd's database is defragmented; without it only on request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defragmentation: Option<Defragmentation>,
    /// How fast what is done beside backups may be.
    #[serde(default)]
    pub background: Background,
    /// The API.
    #[serde(default)]
    pub server: Server,
    /// What may be done where data would be lost.
    #[serde(default)]
    pub safety: Safety,
    /// Leases that tell Kubernetes how the member and its backups do; without it Kubernetes is not spoken to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
}

impl Default for SidecarConfig {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            member: Member::default(),
            etcd: Etcd::default(),
            store: None,
            snapshots: Snapshots::default(),
            retention: None,
            compaction: None,
            verification: None,
            defragmentation: None,
            background: Background::default(),
            server: Server::default(),
            safety: Safety::default(),
            kubernetes: None,
        }
    }
}

/// The member.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Member {
    /// A file with the configuration of its etcd, as `etcd --config-file` takes it: name, data directory, cluster, listeners.
    pub etcd_config: PathBuf,
}

/// How etcd is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Etcd {
    /// Client URLs of the member.
    pub endpoints: Vec<String>,
    /// Client URLs of the other members, or of a service that leads to them. Not needed where the configuration of etcd has
    /// `advertise-client-urls` by member.
    pub cluster_endpoints: Vec<String>,
    /// Whom its certificate must be signed by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cacert: Option<PathBuf>,
    /// Our certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Who we are where auth is on; needs the role `root`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A file with that user's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// A member that the configuration of etcd does not name, and that cannot be reached for so long, is removed from the
    /// cluster; without it none ever is.
    #[serde(with = "duration::optional", skip_serializing_if = "Option::is_none")]
    pub remove_members_after: Option<Duration>,
}

impl Default for Etcd {
    fn default() -> Self {
        let endpoints = vec!["http://127.0.0.1:2379".to_owned()];
        let (cluster_endpoints, user, password_file) = (Vec::new(), None, None);
        let (cacert, cert, key, remove_members_after) = (None, None, None, None);
        Self { endpoints, cluster_endpoints, cacert, cert, key, user, password_file, remove_members_after }
    }
}

/// Where backups go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Store {
    /// `file:///directory`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    pub url: String,
}

/// When backups are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Snapshots {
    /// When a full snapshot is due: cron in local time, five fields. Empty for only when needed.
    pub full_schedule: String,
    /// A delta is closed at least so often, when anything changed.
    #[serde(with = "duration")]
    pub delta_period: Duration,
    /// A delta is closed when it has so many bytes before compression.
    pub delta_max_bytes: u64,
    /// A full snapshot is read from etcd as fast as this, in bytes a second, so that its clients notice little of it; 0 for as
    /// fast as it goes.
    pub full_bytes_per_second: u64,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self {
            full_schedule: "0 * * * *".to_owned(),
            delta_period: Duration::from_secs(20),
            delta_max_bytes: 10 << 20,
            full_bytes_per_second: 64 << 20,
        }
    }
}

/// Which full snapshots stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetentionPolicy {
    /// All of this hour, one for each hour of the day, for each of seven days, and for each of four weeks.
    #[default]
    #[serde(alias = "Exponential")]
    Exponential,
    /// The newest so many.
    #[serde(alias = "LimitBased")]
    LimitBased,
}

/// Which backups go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retention {
    /// Which full snapshots stay.
    pub policy: RetentionPolicy,
    /// With `limit-based`: so many.
    pub max_backups: u32,
    /// Deltas younger than this stay, with what they build upon.
    #[serde(with = "duration")]
    pub deltas: Duration,
    /// How often it is looked what can go.
    #[serde(with = "duration")]
    pub period: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        let (deltas, period) = (Duration::ZERO, Duration::from_secs(12 * 3600));
        Self { policy: RetentionPolicy::default(), max_backups: 7, deltas, period }
    }
}

/// When deltas are merged into a full snapshot, so that a restore does not read ever more of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Compaction {
    /// When so many follow the newest full snapshot.
    pub deltas: u32,
    /// Where it works; it takes as much room as the database, and as the new full snapshot.
    pub work_dir: PathBuf,
}

impl Default for Compaction {
    fn default() -> Self {
        Self { deltas: 1000, work_dir: std::env::temp_dir() }
    }
}

/// When the newest chain is restored to see that it can be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Verification {
    /// Cron in local time, five fields.
    pub schedule: String,
    /// Where it is restored to; it takes as much room as the database.
    pub work_dir: PathBuf,
}

impl Default for Verification {
    fn default() -> Self {
        Self { schedule: "30 3 * * *".to_owned(), work_dir: std::env::temp_dir() }
    }
}

/// When etcd's database is defragmented: member after member, the leader last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Defragmentation {
    /// Cron in local time, five fields.
    pub schedule: String,
    /// Only where at least this share of the file is free.
    pub least_free_share: f64,
    /// Where at least this share is free, and 64 MiB, it does not wait for the schedule; 0 for it always does.
    pub urgent_free_share: f64,
    /// Compact, defragment and clear the alarm when etcd has run out of space.
    pub resolve_no_space: bool,
}

impl Default for Defragmentation {
    fn default() -> Self {
        Self {
            schedule: "0 0 */3 * *".to_owned(),
            least_free_share: 0.3,
            urgent_free_share: 0.75,
            resolve_no_space: false,
        }
    }
}

/// How fast what is done beside backups may be: merging, verifying, deleting. etcd comes first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Background {
    /// Bytes read from and written to the store a second; 0 for as fast as it goes.
    pub bytes_per_second: u64,
}

impl Default for Background {
    fn default() -> Self {
        Self { bytes_per_second: 16 << 20 }
    }
}

/// The API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Server {
    /// Address and port.
    pub listen: String,
    /// Certificates; required unless `insecure`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ServerTls>,
    /// How the sidecars of other members are called; with the certificates of `tls` when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<ServerPeers>,
    /// Serve without TLS and let everybody call everything. For trying things, and where only loopback reaches it.
    pub insecure: bool,
    /// Answer gardener/etcd-wrapper over HTTP, without a client's certificate, which it has not.
    pub etcd_wrapper: bool,
    /// Take snapshots for whoever asks at `/snapshot/…`, as Gardener and etcd-druid do, without a client's certificate.
    pub open_snapshots: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            tls: None,
            peers: None,
            insecure: false,
            etcd_wrapper: false,
            open_snapshots: false,
        }
    }
}

/// Certificates of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerTls {
    /// Its own certificate.
    pub cert: PathBuf,
    /// The key of that.
    pub key: PathBuf,
    /// Whom a client's certificate must be signed by.
    pub client_ca: PathBuf,
}

/// How the sidecars of other members are called: they listen on the same port, at the host of their member's first client URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServerPeers {
    /// Whom their certificates must be signed by.
    pub cacert: PathBuf,
    /// A certificate that they take from a client.
    pub cert: PathBuf,
    /// The key of that.
    pub key: PathBuf,
}

/// What may be done where data would be lost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Safety {
    /// Begin a new cluster where the data is damaged and there is no backup. What is there is moved aside.
    pub may_start_empty: bool,
}

/// Which leases are kept, with what the predecessor has in them. They must exist: who watches them makes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Kubernetes {
    /// Where they are; that of the service account, or of the kubeconfig, when empty.
    pub namespace: String,
    /// How often the member's lease, which has its name, is renewed.
    #[serde(with = "duration")]
    pub heartbeat_period: Duration,
    /// The lease of the newest full snapshot; none when empty.
    pub full_snapshot_lease: String,
    /// The lease of the newest delta; none when empty.
    pub delta_snapshot_lease: String,
}

impl Default for Kubernetes {
    fn default() -> Self {
        let (full_snapshot_lease, delta_snapshot_lease) = (String::new(), String::new());
        Self {
            namespace: String::new(),
            heartbeat_period: Duration::from_secs(10),
            full_snapshot_lease,
            delta_snapshot_lease,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "apiVersion: sidecar.etcd-steward.io/v1\nmember:\n  etcdConfig: /etc/etcd.yaml\n";

    #[test]
    fn the_least_is_enough() -> Result<(), Error> {
        let config = SidecarConfig::parse(LEAST)?;
        assert_eq!(config.etcd.endpoints, ["http://127.0.0.1:2379"]);
        assert!(config.store.is_none() && !config.server.insecure && !config.safety.may_start_empty);
        let more = "snapshots: {deltaPeriod: 5m}\nserver: {listen: '0.0.0.0:8080', insecure: true}\n";
        let config = SidecarConfig::parse(&format!("{LEAST}{more}"))?;
        assert_eq!(config.snapshots.delta_period, Duration::from_secs(300));
        assert_eq!(config.snapshots.full_schedule, "0 * * * *");
        Ok(())
    }

    #[test]
    fn what_is_misspelt_is_refused_with_its_line() {
        for (more, said) in [
            ("snapshots:\n  deltaperiod: 5m\n", ["deltaperiod", "5"]),
            ("store:\n  url: file:///a\n  password: b\n", ["password", "6"]),
            ("snapshots: {deltaPeriod: 5 weeks}\n", ["duration", "4"]),
        ] {
            let error = SidecarConfig::parse(&format!("{LEAST}{more}")).map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|error| said.iter().all(|word| error.contains(word))), "{error:?}");
        }
        assert!(matches!(SidecarConfig::layered(None, |_| None, &[]), Err(Error::Missing("member.etcdConfig"))));
        let other = LEAST.replace("/v1", "/v9");
        assert!(SidecarConfig::parse(&other).is_err_and(|error| error.to_string().contains("/v9")));
    }

    /// Of each: what the file has, the environment, a flag, and what follows.
    #[test]
    fn flags_count_before_the_environment_before_the_file() -> Result<(), Error> {
        type Read = fn(&SidecarConfig) -> String;
        type Case = (&'static str, &'static str, Option<&'static str>, Option<&'static str>, Read, &'static str);
        let cases: [Case; 9] = [
            ("snapshots.deltaPeriod", "", None, None, |c| format!("{:?}", c.snapshots.delta_period), "20s"),
            (
                "snapshots.deltaPeriod",
                "snapshots: {deltaPeriod: 5s}",
                None,
                None,
                |c| format!("{:?}", c.snapshots.delta_period),
                "5s",
            ),
            (
                "snapshots.deltaPeriod",
                "snapshots: {deltaPeriod: 5s}",
                Some("7s"),
                None,
                |c| format!("{:?}", c.snapshots.delta_period),
                "7s",
            ),
            (
                "snapshots.deltaPeriod",
                "snapshots: {deltaPeriod: 5s}",
                Some("7s"),
                Some("9s"),
                |c| format!("{:?}", c.snapshots.delta_period),
                "9s",
            ),
            (
                "store.url",
                "",
                Some("s3://a/b"),
                None,
                |c| c.store.as_ref().map_or_else(String::new, |store| store.url.clone()),
                "s3://a/b",
            ),
            (
                "etcd.endpoints",
                "",
                Some("http://a:1, http://b:2"),
                None,
                |c| c.etcd.endpoints.join(" "),
                "http://a:1 http://b:2",
            ),
            (
                "server.insecure",
                "server: {insecure: false}",
                None,
                Some("true"),
                |c| c.server.insecure.to_string(),
                "true",
            ),
            ("snapshots.fullSchedule", "", Some("5"), None, |c| c.snapshots.full_schedule.clone(), "5"),
            ("retention.policy", "", None, Some("limit-based"), |c| format!("{:?}", c.retention), "LimitBased"),
        ];
        for (field, file, environment, flag, read, expected) in cases {
            let sets: Vec<_> = flag.iter().map(|value| format!("{field}={value}")).collect();
            let environment = |name: &str| environment.filter(|_| name == variable(field)).map(str::to_owned);
            let config = SidecarConfig::layered(Some(&format!("{LEAST}{file}\n")), environment, &sets)?;
            assert!(read(&config).contains(expected), "{field}: {}", read(&config));
        }
        Ok(())
    }

    #[test]
    fn every_field_can_be_set_and_no_other() {
        for field in FIELDS {
            let value = match field {
                _ if field.ends_with("eriod") || field.ends_with("After") || field == "retention.deltas" => "3s",
                _ if field.ends_with("policy") => "exponential",
                "store.url" => "s3://a/b",
                "etcd.endpoints" | "etcd.clusterEndpoints" => "http://a:1",
                _ if field.ends_with("Bytes")
                    || field.ends_with("PerSecond")
                    || field.ends_with("ackups")
                    || field == "compaction.deltas" =>
                {
                    "3"
                }
                _ if field.ends_with("Share") => "0.5",
                _ if field.ends_with("nsecure")
                    || field.ends_with("Empty")
                    || field.ends_with("Wrapper")
                    || field.ends_with("openSnapshots")
                    || field.ends_with("Space") =>
                {
                    "true"
                }
                _ => "text",
            };
            let tls = "server: {tls: {cert: a, key: b, clientCa: c}, peers: {cacert: a, cert: b, key: c}}\n";
            let set = SidecarConfig::layered(Some(&format!("{LEAST}{tls}")), |_| None, &[format!("{field}={value}")]);
            assert!(set.is_ok(), "{field}: {set:?}");
        }
        // Whatever is in a configuration with everything is in the table.
        let all = SidecarConfig {
            store: Some(Store { url: "a".into() }),
            retention: Some(Retention::default()),
            compaction: Some(Compaction::default()),
            verification: Some(Verification::default()),
            defragmentation: Some(Defragmentation::default()),
            kubernetes: Some(Kubernetes::default()),
            ..SidecarConfig::default()
        };
        let tree = serde_json::to_value(&all).unwrap();
        for (section, fields) in tree.as_object().unwrap() {
            for field in fields.as_object().into_iter().flat_map(|fields| fields.keys()) {
                assert!(FIELDS.contains(&format!("{section}.{field}").as_str()), "{section}.{field}");
            }
        }
        assert_eq!(variable("snapshots.deltaMaxBytes"), "SIDECAR_SNAPSHOTS_DELTA_MAX_BYTES");
        let wrong = ["SIDECAR_SNAPSHOTS_DELTA_PERIODD", "SIDECAR_SNAPSHOT_DELTA_PERIOD", "SIDECAR_STORE"];
        let right = ["SIDECAR_STORE_URL", "SIDECAR_CONFIG", "PATH", "SIDECAR_PORT", "SIDECAR_STORE_SERVICE_HOST"];
        assert_eq!(misspelt(wrong.into_iter().chain(right).map(str::to_owned)), wrong);
        for (set, said) in [
            ("a.b=c", "there is no field"),
            ("store.url", "field=value"),
            ("kubernetes.heartbeatPeriod=9223372036854775807s", "is longer than 3650d"),
            ("retention.deltas=5 weeks", "\"5 weeks\" is not a duration such as 500ms"),
            ("snapshots.deltaPeriod=20", "a duration such as 500ms"),
            ("server.insecure=maybe", "server.insecure"),
        ] {
            let refused = SidecarConfig::layered(Some(LEAST), |_| None, &[set.to_owned()]);
            assert!(refused.as_ref().is_err_and(|error| error.to_string().contains(said)), "{refused:?}");
        }
    }
}
