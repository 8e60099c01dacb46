//! The configuration of a member's etcd: what we go by, and what etcd gets.

use std::path::{Path, PathBuf};

use etcd_format::membership::NewCluster;
use serde_json::{Map, Value};

use crate::{Error, Result, small_file};

/// The token of a cluster that is given none, as etcd has it.
pub const DEFAULT_TOKEN: &str = "etcd-cluster";

/// A member, as the configuration of its etcd has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where its data is.
    pub data_dir: PathBuf,
    /// The cluster that it begins or is restored into.
    pub cluster: NewCluster,
    /// Client URLs of the other members, as far as the file has them.
    pub others: Vec<String>,
    /// What its etcd is started with.
    config: Map<String, Value>,
    /// Its own peer URLs.
    peer_urls: Vec<String>,
    token: String,
}

impl Member {
    /// Reads a file as `etcd --config-file` takes it. One file may serve all members of a cluster, as the predecessor has it:
    /// `initial-advertise-peer-urls` and `advertise-client-urls` are then lists by member, and `pod` says which we are.
    pub fn read(path: &Path, pod: Option<&str>) -> Result<Self> {
        let place = path.display().to_string();
        let text = small_file::read_text(path).map_err(Error::io("read the configuration of etcd in", &place))?;
        Self::parse(&text, pod).map_err(|what| Error::invalid(format!("the configuration of etcd in {place}: {what}")))
    }

    pub(super) fn parse(text: &str, pod: Option<&str>) -> Result<Self, String> {
        let mut config: Map<String, Value> = proto::config::read_yaml(text).map_err(|error| error.to_string())?;
        // etcd takes its keys whatever their case; what is not seen here would be another log, or another cluster.
        if let Some(key) = config.keys().find(|key| key.chars().any(|letter| letter.is_ascii_uppercase())) {
            return Err(format!("{key}: keys are in lower case"));
        }
        if config.get("force-new-cluster").is_some_and(|value| *value != Value::Bool(false)) {
            return Err("force-new-cluster begins another cluster at each start; restore the member instead".into());
        }
        if let (None, Some(names)) = (pod, members_listed(&config)) {
            return Err(format!(
                "it is of several members, and POD_NAME does not say which this one is: one of {names}"
            ));
        }
        let name = match (pod, text_of(&config, "member-name-prefix")?) {
            (Some(pod), Some(prefix)) => format!("{prefix}-{pod}"),
            (Some(pod), None) if is_by_member(&config) => pod.to_owned(),
            (_, _) => text_of(&config, "name")?.unwrap_or("default").to_owned(),
        };
        config.insert("name".into(), name.clone().into());
        let others = urls_of_others(&config, &name);
        for key in ["initial-advertise-peer-urls", "advertise-client-urls"] {
            if let Some(Value::Object(by_member)) = config.get(key) {
                let urls = by_member.get(&name).and_then(Value::as_array);
                let urls = urls.ok_or_else(|| {
                    let whence = if pod.is_some() { ", which POD_NAME says that this is" } else { "" };
                    format!("{key} has no list for member {name}{whence}")
                })?;
                let urls: Vec<_> = urls.iter().filter_map(Value::as_str).collect();
                let joined = urls.join(",");
                config.insert(key.into(), joined.into());
            }
        }
        if config.get("wal-dir").is_some_and(|dir| dir.as_str() != Some("")) {
            return Err("wal-dir is not supported: keep the log in the data directory".into());
        }
        let peer_urls = text_of(&config, "initial-advertise-peer-urls")?.unwrap_or("http://localhost:2380");
        let listed = text_of(&config, "initial-cluster")?.map_or_else(
            || peer_urls.split(',').map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(","),
            str::to_owned,
        );
        let token = text_of(&config, "initial-cluster-token")?.filter(|token| !token.is_empty());
        let token = token.unwrap_or(DEFAULT_TOKEN).to_owned();
        let cluster = NewCluster::parse(&listed, &token).map_err(|error| error.to_string())?;
        let peer_urls = cluster.member(&name).map_err(|error| error.to_string())?.peer_urls.clone();
        let data_dir = match text_of(&config, "data-dir")?.filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir),
            None => return Err("data-dir is missing".into()),
        };
        // The sidecar and etcd may run in different directories.
        if !data_dir.is_absolute() {
            return Err(format!("data-dir {} is not an absolute path", data_dir.display()));
        }
        Ok(Self { name, data_dir, cluster, others, config, peer_urls, token })
    }

    /// Whether its configuration says that the cluster exists already.
    pub fn is_existing(&self) -> bool {
        self.config.get("initial-cluster-state").and_then(Value::as_str) == Some("existing")
    }

    /// Where its peers reach it.
    pub fn peer_urls(&self) -> &[String] {
        &self.peer_urls
    }

    /// Where it says that clients reach it.
    pub fn advertised_client_urls(&self) -> Vec<String> {
        let urls = self.config.get("advertise-client-urls").and_then(Value::as_str).unwrap_or_default();
        urls.split(',').map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()).collect()
    }

    /// Ports that its etcd listens at for clients.
    pub fn client_ports(&self) -> Vec<u16> {
        let urls = self.config.get("listen-client-urls").and_then(Value::as_str).unwrap_or("http://localhost:2379");
        urls.split(',').filter_map(|url| url::Url::parse(url.trim()).ok()?.port_or_known_default()).collect()
    }

    /// Certificates that its etcd uses, and the key of each in its configuration.
    pub fn tls_files(&self) -> Vec<(String, PathBuf)> {
        let sections = ["client-transport-security", "peer-transport-security"];
        let files = sections.iter().flat_map(|section| ["cert-file", "trusted-ca-file"].map(|file| (*section, file)));
        let named = files.filter_map(|(section, file)| {
            let path = self.config.get(section)?.get(file)?.as_str().filter(|path| !path.is_empty())?;
            Some((format!("{section}.{file}"), PathBuf::from(path)))
        });
        named.collect()
    }

    /// The cluster that it begins when it is restored: of it alone, and no other cluster's id, so that whoever still runs on
    /// what was before does not take it for one of theirs.
    pub fn restored_cluster(&self, unix_us: i64) -> Result<NewCluster> {
        let members = self.peer_urls.iter().map(|url| format!("{}={url}", self.name)).collect::<Vec<_>>().join(",");
        NewCluster::parse(&members, &format!("{}-{unix_us}", self.token)).map_err(Error::format("the restored cluster"))
    }

    /// What its etcd is started with: the file as it was, for this member; `joins` is the cluster that it comes to, where that
    /// serves already. JSON, which is YAML.
    pub fn etcd_config(&self, joins: Option<&str>) -> String {
        let mut config = self.config.clone();
        if let Some(cluster) = joins {
            config.insert("initial-cluster".into(), cluster.into());
            config.insert("initial-cluster-state".into(), "existing".into());
        }
        Value::Object(config).to_string()
    }
}

fn urls_of_others(config: &Map<String, Value>, name: &str) -> Vec<String> {
    let by_member = config.get("advertise-client-urls").and_then(Value::as_object);
    let others = by_member.into_iter().flatten().filter(|(other, _)| *other != name);
    others
        .flat_map(|(_, urls)| urls.as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// The members that it has lists for.
fn members_listed(config: &Map<String, Value>) -> Option<String> {
    let by_member = config.get("initial-advertise-peer-urls").and_then(Value::as_object)?;
    Some(by_member.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
}

fn is_by_member(config: &Map<String, Value>) -> bool {
    ["initial-advertise-peer-urls", "advertise-client-urls"]
        .iter()
        .any(|key| config.get(*key).is_some_and(Value::is_object))
}

fn text_of<'c>(config: &'c Map<String, Value>, key: &str) -> Result<Option<&'c str>, String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("{key} is {other}, which is not a text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_configuration_passes_through() {
        let text = "name: m1\ndata-dir: /d\nsnapshot-count: 75000\nmetrics: basic\ninitial-cluster: m1=http://127.0.0.1:2380\n";
        let member = Member::parse(text, Some("pod-0")).unwrap();
        assert_eq!((member.name.as_str(), member.data_dir.as_path()), ("m1", Path::new("/d")));
        let config: Map<String, Value> = serde_json::from_str(&member.etcd_config(None)).unwrap();
        assert_eq!((&config["snapshot-count"], &config["metrics"]), (&75_000.into(), &"basic".into()));
    }

    #[test]
    fn one_file_serves_all_members() {
        let text = "name: etcd-config\ndata-dir: /d\ninitial-cluster: e-0=https://e-0:2380,e-1=https://e-1:2380\ninitial-advertise-peer-urls:\n  e-0: [https://e-0:2380]\n  e-1: [https://e-1:2380, https://e-1b:2380]\nadvertise-client-urls:\n  e-0: [https://e-0:2379]\n  e-1: [https://e-1:2379]\n";
        let member = Member::parse(text, Some("e-1")).unwrap();
        let config: Map<String, Value> = serde_json::from_str(&member.etcd_config(None)).unwrap();
        assert_eq!(config["name"], "e-1");
        assert_eq!(config["initial-advertise-peer-urls"], "https://e-1:2380,https://e-1b:2380");
        assert_eq!(config["advertise-client-urls"], "https://e-1:2379");
        assert_eq!(
            (member.cluster.members().len(), member.others.as_slice()),
            (2, ["https://e-0:2379".to_owned()].as_slice())
        );
        let joining: Map<String, Value> =
            serde_json::from_str(&member.etcd_config(Some("e-1=https://e-1:2380"))).unwrap();
        assert_eq!(joining["initial-cluster-state"], "existing");
        let restored = [member.restored_cluster(1).unwrap(), member.restored_cluster(2).unwrap()];
        assert!(restored[0].members().len() == 1 && restored[0].id() != restored[1].id());
        assert!(Member::parse(text, Some("e-7")).is_err_and(|what| what.contains("e-7")));
        assert!(Member::parse(text, None).is_err_and(|what| what.contains("POD_NAME") && what.contains("e-0, e-1")));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, said) in [
            ("name: m1\n", "data-dir"),
            ("data-dir: 5\n", "data-dir"),
            ("data-dir: default.etcd\n", "absolute"),
            ("data-dir: /d\nwal-dir: /w\n", "wal-dir"),
            ("data-dir: /d\nname: a\ninitial-cluster: b=http://127.0.0.1:2380\n", "not in the initial cluster"),
            ("data-dir: [\n", "line"),
            ("data-dir: /d\nWal-Dir: /w\n", "Wal-Dir: keys are in lower case"),
            ("data-dir: /d\nforce-new-cluster: true\n", "another cluster at each start"),
        ] {
            let refused = Member::parse(text, None);
            assert!(refused.as_ref().is_err_and(|what| what.contains(said)), "{refused:?}");
        }
    }
}
