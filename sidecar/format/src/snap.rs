//! The raft snapshot file, `member/snap/TERM-INDEX.snap` (both `%016x`): a checksum around a raft snapshot, which in turn
//! holds the v2 store as JSON. etcd 3.4 and 3.5 take the members from that JSON; 3.6 only checks that nothing else is in
//! it; 3.7 does not read the file.

use proto::Message;
use proto::disk::{ConfState, SnapFile, Snapshot, SnapshotMetadata};
use serde::Serialize;
use serde_json::{Value, json};

use crate::membership::Member;
use crate::{Error, Result};

/// Name of a snapshot file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapName {
    /// Raft term of the snapshot.
    pub term: u64,
    /// Raft index of the snapshot.
    pub index: u64,
}

impl SnapName {
    /// `None` when the file name is not that of a snapshot.
    pub fn parse(name: &str) -> Option<Self> {
        let (term, index) = name.strip_suffix(".snap")?.split_once('-')?;
        let hex = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
        Some(Self { term: hex(term)?, index: hex(index)? })
    }
}

impl std::fmt::Display for SnapName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{:016x}.snap", self.term, self.index)
    }
}

/// Decodes a snapshot file and checks its checksum.
pub fn decode(bytes: &[u8]) -> Result<Snapshot> {
    let file = SnapFile::decode(bytes)
        .map_err(|error| Error::corrupt(0, format!("snapshot file cannot be decoded: {error}")))?;
    if file.data().is_empty() || file.crc() == 0 {
        return Err(Error::corrupt(0, "snapshot file is empty"));
    }
    let actual = crc32c::crc32c(file.data());
    if actual != file.crc() {
        return Err(Error::Checksum {
            what: "snapshot file",
            offset: 0,
            expected: file.crc().into(),
            actual: actual.into(),
        });
    }
    Snapshot::decode(file.data())
        .map_err(|error| Error::corrupt(0, format!("raft snapshot cannot be decoded: {error}")))
}

/// Encodes the snapshot file of a restored member: the members as the whole content of the v2 store.
pub fn encode(members: &[Member], conf_state: &ConfState, name: SnapName) -> Vec<u8> {
    let metadata =
        SnapshotMetadata { conf_state: Some(conf_state.clone()), index: Some(name.index), term: Some(name.term) };
    let data = Some(v2_store(members, name.index).to_string().into_bytes());
    let data = Snapshot { data, metadata: Some(metadata) }.encode_to_vec();
    SnapFile { crc: Some(crc32c::crc32c(&data)), data: Some(data) }.encode_to_vec()
}

/// The smallest v2 store that etcd 3.4 to 3.6 load: `/0` holds the members, `/1` must exist and be empty.
fn v2_store(members: &[Member], index: u64) -> Value {
    let members = members.iter().map(|member| {
        let path = format!("/0/members/{}", member.id);
        let attributes = directory(
            &path,
            [("raftAttributes".to_owned(), value(&format!("{path}/raftAttributes"), &member.raft_attributes()))],
        );
        (member.id.to_string(), attributes)
    });
    let members = directory("/0/members", members);
    let root = directory(
        "/",
        [("0".to_owned(), directory("/0", [("members".to_owned(), members)])), ("1".to_owned(), directory("/1", []))],
    );
    json!({ "Root": root, "CurrentIndex": index, "CurrentVersion": 2 })
}

fn node(path: &str, value: &str, children: &Value) -> Value {
    json!({
        "Path": path, "CreatedIndex": 0, "ModifiedIndex": 0, "ExpireTime": "0001-01-01T00:00:00Z",
        "Value": value, "Children": children,
    })
}

fn directory(path: &str, children: impl IntoIterator<Item = (String, Value)>) -> Value {
    node(path, "", &Value::Object(children.into_iter().collect()))
}

fn value(path: &str, content: &impl Serialize) -> Value {
    let content = serde_json::to_string(content).unwrap_or_default();
    node(path, &content, &Value::Null)
}

/// Ids of the members in the v2 store of a snapshot, for comparison; none when the JSON has no member directory.
pub fn member_ids(snapshot: &Snapshot) -> Result<Vec<u64>> {
    let store: Value = serde_json::from_slice(snapshot.data())
        .map_err(|error| Error::corrupt(0, format!("v2 store of the raft snapshot is not JSON: {error}")))?;
    let members = store.pointer("/Root/Children/0/Children/members/Children").and_then(Value::as_object);
    let mut ids = Vec::new();
    for name in members.into_iter().flat_map(serde_json::Map::keys) {
        ids.push(
            u64::from_str_radix(name, 16)
                .map_err(|_| Error::corrupt(0, format!("v2 store has a member named {name:?}, not an id")))?,
        );
    }
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::NewCluster;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_and_every_flip_is_noticed() {
        let cluster = NewCluster::parse("a=http://a:2380,b=http://b:2380", "token").unwrap();
        let name = SnapName { term: 1, index: 2 };
        let bytes = encode(cluster.members(), &cluster.conf_state(), name);
        let snapshot = decode(&bytes).unwrap();
        assert_eq!(member_ids(&snapshot).unwrap(), cluster.members().iter().map(|m| m.id.0).collect::<Vec<_>>());
        assert_eq!(SnapName::parse(&name.to_string()), Some(name));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            if let Ok(read) = decode(&damaged) {
                assert_eq!(read, snapshot, "byte {at}");
            }
            assert!(decode(&bytes[..at]).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            if let Ok(snapshot) = decode(&bytes) {
                let _ = member_ids(&snapshot);
            }
        }
    }
}
