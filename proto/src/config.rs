//! What a sidecar goes by: a YAML file, version `v1`.
//!
//! Unknown fields are refused, with their line: a misspelt one would otherwise be a default that nobody chose. Secrets are
//! never in it; credentials of stores come from their own files or the environment.

use std::path::PathBuf;
use std::time::Duration;

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
}

impl SidecarConfig {
    /// Reads it.
    pub fn parse(yaml: &str) -> Result<Self, Error> {
        let config: Self = serde_saphyr::from_str(yaml)?;
        if config.api_version == API_VERSION { Ok(config) } else { Err(Error::Version(config.api_version)) }
    }
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SidecarConfig {
    /// [`API_VERSION`].
    pub api_version: String,
    /// The member that it looks after.
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
    /// The API.
    #[serde(default)]
    pub server: Server,
    /// What may be done where data would be lost.
    #[serde(default)]
    pub safety: Safety,
}

/// The member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Whom its certificate must be signed by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cacert: Option<PathBuf>,
    /// Our certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl Default for Etcd {
    fn default() -> Self {
        Self { endpoints: vec!["http://127.0.0.1:2379".to_owned()], cacert: None, cert: None, key: None }
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
    /// When a full snapshot is due: cron in UTC, five fields. Empty for only when needed.
    pub full_schedule: String,
    /// A delta is closed at least so often, when anything changed.
    #[serde(with = "duration")]
    pub delta_period: Duration,
    /// A delta is closed when it has so many bytes before compression.
    pub delta_max_bytes: u64,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self { full_schedule: "0 * * * *".to_owned(), delta_period: Duration::from_secs(20), delta_max_bytes: 10 << 20 }
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
    /// Serve without TLS and let everybody call everything. For trying things, and where only loopback reaches it.
    pub insecure: bool,
    /// Answer gardener/etcd-wrapper over plain HTTP, without a client's certificate, which it has not.
    pub etcd_wrapper: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self { listen: "127.0.0.1:8080".to_owned(), tls: None, insecure: false, etcd_wrapper: false }
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

/// What may be done where data would be lost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Safety {
    /// Begin a new cluster where the data is damaged and there is no backup. What is there is moved aside.
    pub may_start_empty: bool,
}

/// Durations such as `20s`.
mod duration {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}ms", duration.as_millis()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| D::Error::custom("it must be a duration such as 20s"))?;
        let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
        let parsed = match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => seconds(1),
            "m" => seconds(60),
            "h" => seconds(3600),
            _ => None,
        };
        parsed.ok_or_else(|| D::Error::custom("it must be a duration such as 500ms, 20s, 5m or 1h"))
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
        let other = LEAST.replace("/v1", "/v9");
        assert!(SidecarConfig::parse(&other).is_err_and(|error| error.to_string().contains("/v9")));
    }
}
