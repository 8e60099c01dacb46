//! Who the members of a cluster are: their ids, and the records etcd keeps of them.

use std::collections::{BTreeMap, BTreeSet};

use proto::disk::{ConfChange, ConfState};
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::bolt::Db;
use crate::{Error, ReadAt, Result};

/// Bucket with one record for each member.
pub const MEMBERS_BUCKET: &[u8] = b"members";
/// Bucket with the ids of members that left.
pub const MEMBERS_REMOVED_BUCKET: &[u8] = b"members_removed";
/// Bucket with cluster version and downgrade state.
pub const CLUSTER_BUCKET: &[u8] = b"cluster";

/// Id of a member. Printed, and used as a key, in lower-case hexadecimal without leading zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberId(pub u64);

impl std::fmt::Display for MemberId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// Id of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u64);

impl std::fmt::Display for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A member, as the record in the `members` bucket has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The id.
    pub id: MemberId,
    /// Where its peers reach it, sorted.
    #[serde(rename = "peerURLs", default)]
    pub peer_urls: Vec<String>,
    /// Whether it does not vote yet.
    #[serde(rename = "isLearner", default, skip_serializing_if = "std::ops::Not::not")]
    pub is_learner: bool,
    /// Its name; unknown until it has started once.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Where clients reach it; unknown until it has started once.
    #[serde(rename = "clientURLs", default, skip_serializing_if = "Vec::is_empty")]
    pub client_urls: Vec<String>,
}

/// What raft knows of a member, as the v2 store has it.
#[derive(Debug, Serialize)]
pub struct RaftAttributes<'a> {
    #[serde(rename = "peerURLs")]
    peer_urls: &'a [String],
    #[serde(rename = "isLearner", skip_serializing_if = "std::ops::Not::not")]
    is_learner: bool,
}

impl Member {
    /// The raft half of the record.
    pub fn raft_attributes(&self) -> RaftAttributes<'_> {
        RaftAttributes { peer_urls: &self.peer_urls, is_learner: self.is_learner }
    }

    /// The record as etcd writes it.
    pub fn to_json(&self) -> String {
        // Go escapes these three in every JSON string; they cannot occur outside of strings.
        let json = serde_json::to_string(self).unwrap_or_default();
        json.replace('&', "\\u0026").replace('<', "\\u003c").replace('>', "\\u003e")
    }
}

/// Derives a member's id as etcd does at bootstrap: from its sorted peer URLs and the cluster token. The name does not
/// enter.
pub fn member_id(sorted_peer_urls: &[String], token: &str) -> MemberId {
    let mut sha = Sha1::new();
    for url in sorted_peer_urls {
        sha.update(url);
    }
    sha.update(token);
    MemberId(first_u64(&sha.finalize()))
}

/// Derives a cluster's id from the ids of its members.
pub fn cluster_id(members: &BTreeSet<MemberId>) -> ClusterId {
    let mut sha = Sha1::new();
    for member in members {
        sha.update(member.0.to_be_bytes());
    }
    ClusterId(first_u64(&sha.finalize()))
}

fn first_u64(digest: &[u8]) -> u64 {
    digest.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// A cluster to be started from restored data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCluster {
    members: Vec<Member>,
    id: ClusterId,
}

impl NewCluster {
    /// Parses `--initial-cluster` (`name=url[,name=url]…`; a name may occur more than once) and derives every id.
    pub fn parse(initial_cluster: &str, token: &str) -> Result<Self> {
        let mut urls_of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for part in initial_cluster.split(',').filter(|part| !part.trim().is_empty()) {
            let (name, url) = part.trim().split_once('=').ok_or_else(|| {
                Error::invalid(format!(
                    "initial cluster entry {part:?} is not of the form name=url, such as m1=http://10.0.0.1:2380"
                ))
            })?;
            if name.is_empty() {
                return Err(Error::invalid(format!("initial cluster entry {part:?} has no name")));
            }
            let url = peer_url(url)?;
            if !seen.insert(url.clone()) {
                return Err(Error::invalid(format!("peer URL {url} occurs twice in the initial cluster")));
            }
            urls_of.entry(name.to_owned()).or_default().insert(url);
        }
        let mut members = Vec::new();
        for (name, urls) in urls_of {
            let peer_urls: Vec<String> = urls.into_iter().collect();
            let id = member_id(&peer_urls, token);
            if id.0 == 0 {
                return Err(Error::invalid(format!(
                    "member {name} would get id 0, which etcd refuses; choose another token"
                )));
            }
            members.push(Member { id, peer_urls, is_learner: false, name, client_urls: Vec::new() });
        }
        if members.is_empty() {
            return Err(Error::invalid("the initial cluster has no members"));
        }
        members.sort_by_key(|member| member.id);
        let id = cluster_id(&members.iter().map(|member| member.id).collect());
        Ok(Self { members, id })
    }

    /// The members, by ascending id.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The id.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// The member of that name.
    pub fn member(&self, name: &str) -> Result<&Member> {
        self.members.iter().find(|member| member.name == name).ok_or_else(|| {
            let names: Vec<_> = self.members.iter().map(|member| member.name.as_str()).collect();
            Error::invalid(format!(
                "member {name:?} is not in the initial cluster, whose members are {}",
                names.join(", ")
            ))
        })
    }

    /// Checks that the advertised peer URLs of a member are those the initial cluster has for it.
    pub fn check_advertised(&self, name: &str, urls: &str) -> Result<()> {
        let member = self.member(name)?;
        let advertised = urls.split(',').map(peer_url).collect::<Result<BTreeSet<_>>>()?;
        if advertised.iter().ne(member.peer_urls.iter()) {
            return Err(Error::invalid(format!(
                "--initial-advertise-peer-urls has {urls} but --initial-cluster has {} for member {name}; they must agree",
                member.peer_urls.join(",")
            )));
        }
        Ok(())
    }

    /// All members as voters.
    pub fn conf_state(&self) -> ConfState {
        let voters = self.members.iter().map(|member| member.id.0).collect();
        ConfState { voters, auto_leave: Some(false), ..ConfState::default() }
    }

    /// The log entries that add each member, as etcd's own restore writes them.
    pub fn conf_changes(&self) -> Vec<ConfChange> {
        let add = |member: &Member| {
            let context = Some(member.to_json().into_bytes());
            ConfChange { id: Some(0), r#type: Some(0), node_id: Some(member.id.0), context }
        };
        self.members.iter().map(add).collect()
    }
}

/// Brings a peer URL to the form that etcd hashes: `scheme://host:port`, nothing after it.
fn peer_url(text: &str) -> Result<String> {
    let text = text.trim();
    let bad = |why: &str| Error::invalid(format!("peer URL {text:?} {why}; it must look like http://10.0.0.1:2380"));
    let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("has no scheme"))?;
    if !["http", "https", "unix", "unixs"].contains(&scheme) {
        return Err(bad("has a scheme that etcd does not know"));
    }
    if scheme.starts_with("unix") {
        return Ok(text.to_owned());
    }
    let host = rest.strip_suffix('/').unwrap_or(rest);
    if host.contains(['/', '?', '#', '@', ' ']) {
        return Err(bad("has more than a host and a port"));
    }
    let port = host.rsplit_once(':').filter(|(name, _)| !name.is_empty()).map(|(_, port)| port);
    if port.is_none_or(|port| port.parse::<u16>().is_err()) {
        return Err(bad("has no port"));
    }
    Ok(format!("{scheme}://{host}"))
}

/// The records of the `members` bucket.
pub fn read_members<R: ReadAt>(db: &Db<R>) -> Result<Vec<Member>> {
    let mut members = Vec::new();
    for (key, value) in db.rows(MEMBERS_BUCKET)? {
        let name = key.escape_ascii();
        let member: Member = serde_json::from_slice(&value).map_err(|error| {
            Error::corrupt(0, format!("record of member {name} is not the JSON of a member: {error}"))
        })?;
        if member.id.to_string().as_bytes() != key.as_slice() {
            return Err(Error::corrupt(0, format!("record of member {name} has id {}", member.id)));
        }
        members.push(member);
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_depend_on_urls_and_token_but_not_on_names() {
        let a = NewCluster::parse("x=http://a:2380,y=http://b:2380,y=http://a.b:2380", "t").unwrap();
        let b = NewCluster::parse("p=http://b:2380,q=http://a:2380,p=http://a.b:2380/", "t").unwrap();
        assert_eq!(a.id(), b.id());
        assert_ne!(a.id(), NewCluster::parse("x=http://a:2380,y=http://b:2380", "t").unwrap().id());
        assert_eq!(a.member("y").unwrap().peer_urls, ["http://a.b:2380", "http://b:2380"]);
    }

    #[test]
    fn bad_initial_clusters_are_explained() {
        for (text, why) in [
            ("", "no members"),
            ("a", "name=url"),
            ("=http://a:1", "no name"),
            ("a=a:1", "no scheme"),
            ("a=http://a", "no port"),
            ("a=http://a:1/x", "more than a host"),
            ("a=ftp://a:1", "scheme"),
            ("a=http://a:1,b=http://a:1", "twice"),
        ] {
            let error = NewCluster::parse(text, "t").unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
