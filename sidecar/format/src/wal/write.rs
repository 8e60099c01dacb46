//! The first segment of a log.

use proto::Message;
use proto::disk::{ConfChange, ConfState, Entry, HardState, Metadata, Record, WalSnapshot};

use super::{ENTRY_CONF_CHANGE, kind};

/// The whole first segment of a member that starts from a snapshot.
///
/// `entries` are the encoded [`ConfChange`]s that add each member, in ascending member id; they take the indexes 1 to N of
/// term 1. All versions read it: every field is written also when it is zero.
pub fn first_segment(metadata: Metadata, entries: &[ConfChange], state: HardState, members: &ConfState) -> Vec<u8> {
    let mut segment = SegmentWriter::begin(metadata);
    for (index, change) in (1..).zip(entries) {
        segment.entry(ENTRY_CONF_CHANGE, (index, 1), change.encode_to_vec());
    }
    segment.state(state);
    segment.snapshot(&WalSnapshot {
        index: Some(entries.len() as u64),
        term: Some(1),
        conf_state: Some(members.clone()),
    });
    segment.out
}

/// Writes the first segment of a log.
pub(crate) struct SegmentWriter {
    pub(crate) out: Vec<u8>,
    crc: u32,
}

impl SegmentWriter {
    /// As etcd does when it begins.
    pub(crate) fn begin(metadata: Metadata) -> Self {
        let mut this = Self { out: Vec::new(), crc: 0 };
        this.put(kind::CRC, None);
        this.put(kind::METADATA, Some(metadata.encode_to_vec()));
        this.snapshot(&WalSnapshot { index: Some(0), term: Some(0), conf_state: None });
        this
    }

    /// An entry of a type, with its index and term.
    pub(crate) fn entry(&mut self, r#type: i32, (index, term): (u64, u64), data: Vec<u8>) {
        let entry = Entry { r#type: Some(r#type), term: Some(term), index: Some(index), data: Some(data) };
        self.put(kind::ENTRY, Some(entry.encode_to_vec()));
    }

    pub(crate) fn state(&mut self, state: HardState) {
        self.put(kind::STATE, Some(state.encode_to_vec()));
    }

    pub(crate) fn snapshot(&mut self, snapshot: &WalSnapshot) {
        self.put(kind::SNAPSHOT, Some(snapshot.encode_to_vec()));
    }

    fn put(&mut self, kind: i64, data: Option<Vec<u8>>) {
        self.crc = crc32c::crc32c_append(self.crc, data.as_deref().unwrap_or_default());
        let record = Record { r#type: Some(kind), crc: Some(self.crc), data }.encode_to_vec();
        let padding = record.len().wrapping_neg() % 8;
        let top = if padding == 0 { 0 } else { (0x80 | padding as u64) << 56 };
        self.out.extend_from_slice(&(record.len() as u64 | top).to_le_bytes());
        self.out.extend_from_slice(&record);
        self.out.resize(self.out.len() + padding, 0);
    }
}
