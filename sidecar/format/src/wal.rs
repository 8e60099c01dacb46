//! The write-ahead log: reading and classifying all of it, and writing the first log of a restored member.
//!
//! A segment `SEQ-INDEX.wal` (both `%016x`) is a sequence of frames: a little-endian u64 whose low 56 bits are the length
//! of the record and whose top byte, when it is not zero, is `0x80 |` the number of padding bytes; then the record; then
//! the padding to a multiple of 8. A zero length, or the end of the file, ends the segment. Each record carries the
//! CRC-32C over the data of all records since the log began; the first record of a segment restates that checksum.
//!
//! # Invariants
//! - [`read`] never returns what a checksum does not cover.
//! - A log is *torn*, which etcd repairs by itself, only when its last frame of all was cut by a crash; any other damage is
//!   corruption.

mod write;

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use proto::Message;
use proto::disk::{ConfChange, ConfState, Entry, HardState, Metadata, Record, WalSnapshot};

#[cfg(test)]
pub(crate) use write::SegmentWriter;
pub use write::first_segment;

use crate::wire::{Field, Fields};
use crate::{Error, Result};

/// Record types.
mod kind {
    pub const METADATA: i64 = 1;
    pub const ENTRY: i64 = 2;
    pub const STATE: i64 = 3;
    pub const CRC: i64 = 4;
    pub const SNAPSHOT: i64 = 5;
}

/// Entry type of a change of members.
pub const ENTRY_CONF_CHANGE: i32 = 1;
/// Field of an `InternalRaftRequest` that each of v3 has.
const HEADER: u32 = 100;
/// Types of a change of members.
const ADD_NODE: i32 = 0;
const REMOVE_NODE: i32 = 1;
const ADD_LEARNER: i32 = 3;
/// Entries that may make a revision are told apart from the others as far back as this; etcd applies many more than it has
/// not committed.
const MOST_KEY_CHANGES: usize = 200_000;
/// Crash tears writes at these boundaries.
const SECTOR: u64 = 512;
/// No record is larger than the largest segment etcd can produce.
const LARGEST_RECORD: u64 = 1 << 31;

/// Name of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentName {
    /// Position of the segment in the log, from 0.
    pub seq: u64,
    /// Index of the first entry that the segment may hold.
    pub index: u64,
}

impl SegmentName {
    /// `None` when the file name is not that of a segment.
    pub fn parse(name: &str) -> Option<Self> {
        let (seq, index) = name.strip_suffix(".wal")?.split_once('-')?;
        let hex = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
        Some(Self { seq: hex(seq)?, index: hex(index)? })
    }
}

impl std::fmt::Display for SegmentName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{:016x}.wal", self.seq, self.index)
    }
}

/// How a log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// With its last record.
    Clean,
    /// In the middle of a record that a crash cut. etcd drops it at start.
    Torn {
        /// The last segment.
        path: PathBuf,
        /// Where the record that was cut begins.
        offset: u64,
        /// What shows that it was cut.
        what: String,
    },
}

/// A change of members found in the log.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberChange {
    /// Index of the entry.
    pub index: u64,
    /// The change.
    pub change: ConfChange,
}

/// What a log says.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// Whose log it is.
    pub metadata: Metadata,
    /// The last hard state.
    pub state: HardState,
    /// Every snapshot record.
    pub snapshots: Vec<WalSnapshot>,
    /// Index and term of the entries that count, as runs of equal term: (first index, last index, term).
    pub terms: Vec<(u64, u64, u64)>,
    /// Changes of members among the entries that count.
    pub member_changes: Vec<MemberChange>,
    /// Indexes of the newest entries that may make a revision, ascending.
    key_changes: VecDeque<u64>,
    /// Index of the last entry that changes members, users, roles, whether auth is on, or the version of the cluster
    /// downwards: everything that is neither in keys nor set again by an etcd that starts. 0 for none.
    pub other_changes: u64,
    /// How the log ends.
    pub tail: Tail,
    /// Segments read.
    pub segments: Vec<SegmentName>,
}

impl Log {
    /// Index of the last entry, or of the last snapshot when there is no entry after it.
    pub fn last_index(&self) -> u64 {
        let entries = self.terms.last().map_or(0, |run| run.1);
        self.snapshots.iter().map(proto::disk::WalSnapshot::index).max().unwrap_or(0).max(entries)
    }

    /// Term of the entry at `index`, when it is in the log.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        self.terms.iter().find(|run| (run.0..=run.1).contains(&index)).map(|run| run.2)
    }

    /// How many entries after an index may make a revision, at the most: a transaction whose condition does not hold makes
    /// none.
    pub fn key_changes_after(&self, index: u64) -> u64 {
        let after = self.key_changes.iter().rev().take_while(|change| **change > index).count();
        if after == MOST_KEY_CHANGES { self.last_index().saturating_sub(index) } else { after as u64 }
    }

    /// Whether it shows that it began with a restore: its first segment has a snapshot of an etcd that had done nothing yet
    /// but to add its members.
    pub fn began_restored(&self) -> bool {
        let is_first = self.segments.first().is_some_and(|segment| (segment.seq, segment.index) == (0, 0));
        let first =
            self.snapshots.iter().filter(|snapshot| snapshot.index() > 0).min_by_key(|snapshot| snapshot.index());
        let members =
            |snapshot: &WalSnapshot| snapshot.conf_state.as_ref().map_or(9, |state| state.voters.len() as u64);
        is_first && first.is_some_and(|snapshot| snapshot.index() <= members(snapshot))
    }

    /// Who is a member at an index, given who was at an earlier one.
    pub fn members_at(&self, conf_state: &ConfState, after: u64, upto: u64) -> Members {
        let mut members = Members {
            voters: conf_state.voters.iter().copied().collect(),
            learners: conf_state.learners.iter().copied().collect(),
        };
        for change in self.member_changes.iter().filter(|change| change.index > after && change.index <= upto) {
            let id = change.change.node_id();
            match change.change.r#type() {
                ADD_NODE => {
                    members.learners.remove(&id);
                    members.voters.insert(id);
                }
                REMOVE_NODE => {
                    members.learners.remove(&id);
                    members.voters.remove(&id);
                }
                ADD_LEARNER => drop(members.learners.insert(id)),
                // Only its URLs change.
                _ => {}
            }
        }
        members
    }

    /// The newest snapshot record that is committed; etcd starts from it.
    pub fn newest_snapshot(&self) -> Option<&WalSnapshot> {
        self.snapshots
            .iter()
            .filter(|snapshot| snapshot.index() <= self.state.commit())
            .max_by_key(|snapshot| snapshot.index())
    }
}

/// Ids of the members of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Those that vote.
    pub voters: BTreeSet<u64>,
    /// Those that do not yet.
    pub learners: BTreeSet<u64>,
}

impl Members {
    /// All of them.
    pub fn all(&self) -> BTreeSet<u64> {
        self.voters.union(&self.learners).copied().collect()
    }
}

/// What a request to raft, an `InternalRaftRequest`, may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Effect {
    /// It may make a revision.
    on_keys: bool,
    /// It does more than change keys, leases, alarms and what a starting etcd publishes anew.
    on_more: bool,
}

impl Effect {
    /// What is not understood may do everything.
    fn of(request: &[u8]) -> Self {
        // header, id; v2; range, put, delete range, txn, compaction; leases and their checkpoints, alarm; authenticate;
        // version of the cluster, attributes of a member. Up to 17: a bare request of v2, which is applied anew at each start.
        let is_harmless = |number| matches!(number, 1..=17 | 100 | 1012 | 1300 | 1301);
        // put, delete range, txn, and a lease that is revoked with its keys; a bare request of v2 has other things there, and no
        // header.
        let is_of_keys = |number| matches!(number, 4..=6 | 9);
        let mut has_header = false;
        let mut effect = Self::default();
        let mut fields = Fields::new(request);
        loop {
            match fields.next() {
                Ok(None) => return Self { on_keys: effect.on_keys && has_header, ..effect },
                Ok(Some(Field::Varint(number, _) | Field::Bytes(number, _))) if is_harmless(number) => {
                    effect.on_keys |= is_of_keys(number);
                    has_header |= number == HEADER;
                }
                Ok(Some(_)) | Err(_) => return Self { on_keys: true, on_more: true },
            }
        }
    }
}

/// A [`read`] that failed: the error and the segment it is about.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", path.display())]
pub struct Damage {
    /// The segment, or the directory.
    pub path: PathBuf,
    /// What is wrong; offsets count in that file.
    #[source]
    pub error: Error,
}

/// Reads all segments of a log and checks them against each other.
///
/// Memory is the size of the largest record, and of the indexes of the newest entries that change keys.
pub fn read(dir: &Path) -> Result<Log, Damage> {
    let damage = |error: Error| Damage { path: dir.to_owned(), error };
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir)).map_err(damage)? {
        let entry = entry.map_err(Error::io("list", dir)).map_err(damage)?;
        segments.extend(entry.file_name().to_str().and_then(SegmentName::parse));
    }
    segments.sort_unstable();
    if segments.is_empty() {
        return Err(damage(Error::corrupt(0, "there is no .wal file in this directory")));
    }
    for (before, after) in segments.iter().zip(segments.iter().skip(1)) {
        if Some(after.seq) != before.seq.checked_add(1) {
            return Err(damage(Error::corrupt(
                0,
                format!("segment {after} does not follow {before}: a segment is missing"),
            )));
        }
    }
    let mut reader = Reader::default();
    for (position, segment) in segments.iter().enumerate() {
        let path = dir.join(segment.to_string());
        let damage = |error| Damage { path: path.clone(), error };
        let file = File::open(&path).map_err(Error::io("open", &path)).map_err(damage)?;
        let size = file.metadata().map_err(Error::io("measure", &path)).map_err(damage)?.len();
        let is_last = position + 1 == segments.len();
        reader.segment(*segment, size, BufReader::with_capacity(256 << 10, file), is_last, &path).map_err(damage)?;
    }
    reader.finish(segments).map_err(damage)
}

/// Reads one segment from memory, for fuzzing and tests.
#[doc(hidden)]
pub fn read_segment(bytes: &[u8]) -> Result<Log> {
    let name = SegmentName { seq: 0, index: 0 };
    let mut reader = Reader::default();
    reader.segment(name, bytes.len() as u64, std::io::Cursor::new(bytes), true, Path::new("segment"))?;
    reader.finish(vec![name])
}

#[derive(Default)]
struct Reader {
    crc: u32,
    metadata: Option<Metadata>,
    state: HardState,
    snapshots: Vec<WalSnapshot>,
    terms: Vec<(u64, u64, u64)>,
    member_changes: Vec<MemberChange>,
    key_changes: VecDeque<u64>,
    other_changes: u64,
    tail: Option<Tail>,
}

enum Frame {
    End,
    Record { end: u64, record: Record },
    Torn(String),
}

impl Reader {
    fn segment(&mut self, name: SegmentName, size: u64, mut file: impl Read, is_last: bool, path: &Path) -> Result<()> {
        let mut offset = 0;
        let mut first = true;
        loop {
            let frame = self.frame(&mut file, offset, size, is_last)?;
            match frame {
                Frame::End if first => return Err(Error::corrupt(0, "segment is empty")),
                Frame::End => return Ok(()),
                Frame::Torn(what) => {
                    self.tail = Some(Tail::Torn { path: path.to_owned(), offset, what });
                    return Ok(());
                }
                Frame::Record { end, record } => {
                    if first && record.r#type() != kind::CRC {
                        return Err(Error::corrupt(offset, "segment does not begin with a checksum record"));
                    }
                    self.record(&record, offset, name)?;
                    first = false;
                    offset = end;
                }
            }
        }
    }

    /// Reads the frame at `offset`; leaves `file` after it.
    fn frame(&self, file: &mut impl Read, offset: u64, size: u64, is_last: bool) -> Result<Frame> {
        let left = size.saturating_sub(offset);
        if left == 0 {
            return Ok(Frame::End);
        }
        let torn = |what: String| if is_last { Ok(Frame::Torn(what)) } else { Err(Error::corrupt(offset, what)) };
        if left < 8 {
            return torn(format!("{left} bytes are left where a frame of at least 8 begins"));
        }
        let mut field = [0; 8];
        file.read_exact(&mut field).map_err(Error::io("read the log", ""))?;
        let field = u64::from_le_bytes(field);
        if field == 0 {
            return Ok(Frame::End);
        }
        let length = field & 0x00ff_ffff_ffff_ffff;
        let padding = if field >> 63 == 1 { field >> 56 & 0x7 } else { 0 };
        let data_offset = offset + 8;
        let have = left - 8;
        if length > LARGEST_RECORD || length + padding > have {
            return torn(format!("a record of {length} bytes begins where {have} bytes are left"));
        }
        let mut data = Vec::new();
        file.by_ref().take(length + padding).read_to_end(&mut data).map_err(Error::io("read the log", ""))?;
        if data.len() as u64 != length + padding {
            return Err(Error::Truncated {
                what: "log record",
                offset: data_offset,
                need: length + padding,
                have: data.len() as u64,
            });
        }
        let record = data.get(..length as usize).unwrap_or_default();
        let failure = match Record::decode(record) {
            Err(error) => Some(format!("record cannot be decoded: {error}")),
            Ok(record) => match self.checksum_failure(&record) {
                None => return Ok(Frame::Record { end: data_offset + length + padding, record }),
                failure => failure,
            },
        };
        let what = failure.unwrap_or_default();
        if is_last && has_zero_sector(&data, data_offset) {
            return Ok(Frame::Torn(format!("{what}, and a whole sector of it is zero")));
        }
        Err(Error::corrupt(offset, what))
    }

    fn checksum_failure(&self, record: &Record) -> Option<String> {
        if record.r#type() == kind::CRC {
            let differs = self.crc != 0 && record.crc() != self.crc;
            return differs.then(|| {
                format!(
                    "segment continues from checksum {:#010x}, the log before it ends with {:#010x}",
                    record.crc(),
                    self.crc
                )
            });
        }
        let actual = crc32c::crc32c_append(self.crc, record.data());
        (actual != record.crc())
            .then(|| format!("record has checksum {actual:#010x}, recorded is {:#010x}", record.crc()))
    }

    fn record(&mut self, record: &Record, offset: u64, segment: SegmentName) -> Result<()> {
        if record.r#type() == kind::CRC {
            self.crc = record.crc();
            return Ok(());
        }
        self.crc = record.crc();
        let malformed = |what: &str, error: proto::DecodeError| {
            Error::corrupt(offset, format!("{what} cannot be decoded: {error}"))
        };
        match record.r#type() {
            kind::METADATA => {
                let metadata = Metadata::decode(record.data()).map_err(|error| malformed("metadata", error))?;
                if self.metadata.is_some_and(|before| before != metadata) {
                    return Err(Error::corrupt(
                        offset,
                        "metadata differs from that of the segments before: logs of two members are mixed",
                    ));
                }
                self.metadata = Some(metadata);
            }
            kind::ENTRY => {
                self.entry(&Entry::decode(record.data()).map_err(|error| malformed("entry", error))?, offset, segment)?;
            }
            kind::STATE => {
                let state = HardState::decode(record.data()).map_err(|error| malformed("hard state", error))?;
                // The kind of a record is under no checksum: an entry would decode too, with a field left over.
                if state.encoded_len() != record.data().len() {
                    return Err(Error::corrupt(offset, "hard state has more in it than a hard state has"));
                }
                self.hard_state(state, offset)?;
            }
            kind::SNAPSHOT => {
                let snapshot =
                    WalSnapshot::decode(record.data()).map_err(|error| malformed("snapshot record", error))?;
                // Up to 3.5 a member's own snapshot may be recorded after a newer one that its leader sent.
                self.snapshots.push(snapshot);
            }
            other => return Err(Error::corrupt(offset, format!("record has type {other}, which no record has"))),
        }
        Ok(())
    }

    fn hard_state(&mut self, state: HardState, offset: u64) -> Result<()> {
        let before = self.state;
        if state.term() < before.term() || state.commit() < before.commit() {
            return Err(Error::corrupt(offset, "hard state goes back in term or commit"));
        }
        if state.term() == before.term() && before.vote() != 0 && state.vote() != before.vote() {
            return Err(Error::corrupt(offset, format!("vote changes within term {}", state.term())));
        }
        self.state = state;
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, offset: u64, segment: SegmentName) -> Result<()> {
        let (index, term) = (entry.index(), entry.term());
        if index == 0 || term == 0 {
            return Err(Error::corrupt(offset, format!("entry has index {index} and term {term}")));
        }
        // A later entry with the same index replaces the earlier one and all after it.
        while let Some(run) = self.terms.last_mut() {
            if index > run.1 {
                break;
            }
            if index > run.0 {
                run.1 = index - 1;
                break;
            }
            self.terms.pop();
        }
        while self.member_changes.pop_if(|change| change.index >= index).is_some() {}
        while self.key_changes.pop_back_if(|change| *change >= index).is_some() {}
        match self.terms.last_mut() {
            Some(run) if run.1.checked_add(1) != Some(index) => {
                let snapshot = self.snapshots.last().map_or(0, proto::disk::WalSnapshot::index);
                if index > run.1.saturating_add(1) && index != snapshot.saturating_add(1) && index != segment.index {
                    return Err(Error::corrupt(
                        offset,
                        format!("entry {index} follows entry {}: entries are missing", run.1),
                    ));
                }
                self.terms.push((index, index, term));
            }
            Some(run) if run.2 > term => {
                return Err(Error::corrupt(
                    offset,
                    format!("term goes back from {} to {term} at entry {index}", run.2),
                ));
            }
            Some(run) if run.2 == term => run.1 = index,
            _ => self.terms.push((index, index, term)),
        }
        match entry.r#type() {
            0 => {
                let effect = Effect::of(entry.data());
                if effect.on_more {
                    self.other_changes = index;
                }
                if effect.on_keys {
                    if self.key_changes.len() == MOST_KEY_CHANGES {
                        self.key_changes.pop_front();
                    }
                    self.key_changes.push_back(index);
                }
                Ok(())
            }
            ENTRY_CONF_CHANGE => {
                self.other_changes = index;
                let change = ConfChange::decode(entry.data()).map_err(|error| {
                    Error::corrupt(offset, format!("member change in entry {index} cannot be decoded: {error}"))
                })?;
                if change.node_id() == 0 {
                    return Err(Error::corrupt(offset, format!("member change in entry {index} names no member")));
                }
                self.member_changes.push(MemberChange { index, change });
                Ok(())
            }
            2 => {
                self.other_changes = index;
                Ok(())
            }
            other => Err(Error::corrupt(offset, format!("entry {index} has type {other}, which no entry has"))),
        }
    }

    fn finish(self, segments: Vec<SegmentName>) -> Result<Log> {
        let Some(metadata) = self.metadata else {
            return Err(Error::corrupt(0, "log has no metadata record"));
        };
        let log = Log {
            metadata,
            state: self.state,
            snapshots: self.snapshots,
            terms: self.terms,
            member_changes: self.member_changes,
            key_changes: self.key_changes,
            other_changes: self.other_changes,
            tail: self.tail.unwrap_or(Tail::Clean),
            segments,
        };
        if log.state.commit() > log.last_index() {
            let (commit, last) = (log.state.commit(), log.last_index());
            return Err(Error::corrupt(
                0,
                format!("log commits up to index {commit} but ends at {last}; raft would panic"),
            ));
        }
        Ok(log)
    }
}

fn has_zero_sector(data: &[u8], data_offset: u64) -> bool {
    let mut rest = data;
    let mut at = data_offset;
    while !rest.is_empty() {
        let length = ((SECTOR - at % SECTOR) as usize).min(rest.len());
        let (sector, after) = rest.split_at(length);
        if sector.iter().all(|byte| *byte == 0) {
            return true;
        }
        at += length as u64;
        rest = after;
    }
    false
}

/// A request to raft that has a header, and one field of bytes with that number.
#[cfg(test)]
pub(crate) fn request(number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut varint = |mut value: u32| {
        while value >= 0x80 {
            bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
    };
    for number in [number, HEADER] {
        varint(number << 3 | 2);
        varint(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment() -> Vec<u8> {
        let metadata = Metadata { node_id: Some(1), cluster_id: Some(2) };
        let entries = [1, 2, 3].map(|id| ConfChange {
            id: Some(0),
            r#type: Some(0),
            node_id: Some(id),
            context: Some(b"{}".to_vec()),
        });
        let state = HardState { term: Some(1), vote: Some(1), commit: Some(3) };
        let members = ConfState { voters: vec![1, 2, 3], auto_leave: Some(false), ..ConfState::default() };
        first_segment(metadata, &entries, state, &members)
    }

    #[test]
    fn what_is_written_is_read() {
        let log = read_segment(&segment()).unwrap();
        assert_eq!((log.metadata.node_id(), log.metadata.cluster_id()), (1, 2));
        assert_eq!((log.state.term(), log.state.commit(), log.last_index()), (1, 3, 3));
        assert_eq!(log.member_changes.len(), 3);
        assert_eq!(log.newest_snapshot().unwrap().conf_state.as_ref().unwrap().voters, [1, 2, 3]);
        assert_eq!(log.tail, Tail::Clean);
    }

    #[test]
    fn only_what_may_make_a_revision_is_counted() {
        // put, delete range, txn, compaction, lease grant and revoke, alarm, authenticate, version of the cluster; a put.
        let requests = [4, 5, 6, 7, 8, 9, 10, 1012, 1300, 4];
        let mut segment = SegmentWriter::begin(Metadata { node_id: Some(1), cluster_id: Some(2) });
        for (index, number) in (1..).zip(requests) {
            segment.entry(0, (index, 1), request(number));
        }
        let whole = read_segment(&segment.out).unwrap();
        assert_eq!([0, 1, 3, 6, 9, 10].map(|index| whole.key_changes_after(index)), [5, 4, 2, 1, 1, 0]);
        assert_eq!(whole.other_changes, 0);
        // As 3.4 and 3.5 publish a member, which is a bare request of v2 with a value in field 4.
        segment.entry(0, (11, 1), vec![4 << 3 | 2, 0]);
        assert_eq!(read_segment(&segment.out).unwrap().key_changes_after(10), 0);
        // A leader of a later term replaces the last three.
        segment.entry(0, (9, 2), request(1400));
        let replaced = read_segment(&segment.out).unwrap();
        assert_eq!([5, 9].map(|index| replaced.key_changes_after(index)), [2, 0]);
        assert_eq!(replaced.other_changes, 9, "what is not understood may do everything");
        assert!(!whole.began_restored() && read_segment(&super::tests::segment()).unwrap().began_restored());
    }

    #[test]
    fn who_learns_does_not_vote() {
        let mut segment = SegmentWriter::begin(Metadata { node_id: Some(1), cluster_id: Some(2) });
        let mut log = |index, r#type, id| {
            let change = ConfChange { id: Some(0), r#type: Some(r#type), node_id: Some(id), context: None };
            segment.entry(ENTRY_CONF_CHANGE, (index, 1), change.encode_to_vec());
            let members = read_segment(&segment.out).unwrap().members_at(&ConfState::default(), 0, u64::MAX);
            (members.voters.into_iter().collect::<Vec<_>>(), members.learners.into_iter().collect::<Vec<_>>())
        };
        assert_eq!(log(1, ADD_NODE, 1), (vec![1], vec![]));
        assert_eq!(log(2, ADD_LEARNER, 2), (vec![1], vec![2]));
        assert_eq!(log(3, 2, 2), (vec![1], vec![2]), "other URLs");
        assert_eq!(log(4, ADD_NODE, 2), (vec![1, 2], vec![]));
        assert_eq!(log(5, REMOVE_NODE, 1), (vec![2], vec![]));
    }

    #[test]
    fn first_frame_is_the_documented_one() {
        let bytes = segment();
        assert_eq!(bytes[..16], [4, 0, 0, 0, 0, 0, 0, 0x84, 8, 4, 16, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn every_flipped_byte_is_noticed_or_harmless() {
        let whole = segment();
        let log = read_segment(&whole).unwrap();
        for at in 0..whole.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                if let Ok(read) = read_segment(&bytes) {
                    // The kind of a record is under no checksum. An entry that passes for another kind is missed where
                    // etcd would miss it: not below the snapshot that it starts from.
                    let start = |log: &Log| (log.state, log.newest_snapshot().cloned(), log.last_index());
                    let harmless = read.tail != Tail::Clean || start(&read) == start(&log);
                    assert!(harmless, "byte {at} ^ {flip}: {read:?} instead of {log:?}");
                    assert!(read.member_changes.iter().all(|change| log.member_changes.contains(change)), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn a_cut_segment_is_torn_or_ends_early_but_never_corrupt() {
        let whole = segment();
        let complete = read_segment(&whole).unwrap();
        for at in 0..whole.len() {
            match read_segment(&whole[..at]) {
                Ok(log) => assert!(complete.member_changes.starts_with(&log.member_changes), "{at}"),
                Err(error) => assert!(
                    error.to_string().contains("empty") || error.to_string().contains("no metadata"),
                    "{at}: {error}"
                ),
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = read_segment(&bytes);
        }
    }
}
