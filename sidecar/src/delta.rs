//! The content of a delta object: whole revisions in order, then what was known when it was closed.
//!
//! The records are those of `proto/backup/backup.proto`; they are written and read one at a time, so that a revision of any
//! number of changes takes no more memory than its largest change.

use std::collections::BTreeSet;
use std::io::BufRead;

use bytes::Bytes;
use etcd_format::mvcc::KeyValue;
use etcd_format::wire::{Field, Fields};
use etcd_format::{put_varint, put_varint_field};
use proto::Message;
use proto::backup::{DeltaEnd, ObjectMeta};

use crate::container::{LAYOUT, LEVEL_DELTA, Mark, Writer};
use crate::{Error, Result};

/// No record is larger than this; etcd's largest request is far below.
const MOST_RECORD_BYTES: u64 = 1 << 30;

/// Collects changes into one object, compressed as they come.
#[derive(Debug)]
pub struct Builder {
    writer: Writer,
    first: i64,
    last: i64,
    revisions: u64,
    events: u64,
    leases: BTreeSet<i64>,
    content: Vec<u8>,
    framed: Vec<u8>,
    /// Where the last revision begins, and the number of events before it.
    last_begins: (Mark, u64),
}

impl Builder {
    /// Begins with the revision after `last`.
    pub fn new(last: i64) -> Result<Self> {
        Ok(Self {
            writer: Writer::new(LEVEL_DELTA)?,
            first: last.saturating_add(1),
            last,
            revisions: 0,
            events: 0,
            leases: BTreeSet::new(),
            content: Vec::new(),
            framed: Vec::new(),
            last_begins: (Mark::default(), 0),
        })
    }

    /// Last revision begun.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// First revision.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Number of changes so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Bytes of content so far, before compression.
    pub fn content_bytes(&self) -> u64 {
        self.writer.content_bytes()
    }

    /// Leases that the puts refer to.
    pub fn leases(&self) -> &BTreeSet<i64> {
        &self.leases
    }

    /// Begins a revision, which must follow the last one.
    pub fn revision(&mut self, main: i64, received_unix_ms: i64) -> Result<()> {
        if main != self.last.saturating_add(1) {
            let gap = etcd_format::Error::Gap { have: self.last, next: main };
            return Err(Error::format("events from etcd")(gap));
        }
        self.last_begins = (self.writer.mark(), self.events);
        self.last = main;
        self.revisions += 1;
        self.content.clear();
        put_varint_field(&mut self.content, 1, main as u64);
        put_varint_field(&mut self.content, 2, received_unix_ms as u64);
        self.put_record(1)
    }

    /// Takes the last revision back: it did not arrive whole.
    pub fn cut_last_revision(&mut self) -> Result<()> {
        if self.revisions > 0 {
            let (mark, events) = self.last_begins;
            self.writer.rollback(mark)?;
            self.events = events;
            self.revisions -= 1;
            self.last -= 1;
        }
        Ok(())
    }

    /// Adds a put to the revision begun.
    pub fn put(&mut self, kv: &KeyValue<'_>) -> Result<()> {
        if kv.lease != 0 {
            self.leases.insert(kv.lease);
        }
        self.content.clear();
        kv.encode(&mut self.content);
        self.events += 1;
        self.put_record(2)
    }

    /// Adds a delete to the revision begun.
    pub fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.content.clear();
        self.content.extend_from_slice(key);
        self.events += 1;
        self.put_record(3)
    }

    /// Writes what is in `content` as a record of that kind.
    fn put_record(&mut self, kind: u32) -> Result<()> {
        self.framed.clear();
        put_varint(&mut self.framed, u64::from(kind) << 3 | 2);
        put_varint(&mut self.framed, self.content.len() as u64);
        let tag_bytes = self.framed.len();
        put_varint(&mut self.framed, (tag_bytes + self.content.len()) as u64);
        // The length of the record goes before its tag.
        self.framed.rotate_left(tag_bytes);
        self.writer.write(&self.framed)?;
        self.writer.write(&self.content)
    }

    /// Closes the object. Counts and revisions of `end` and `meta` are filled in here.
    pub fn finish(mut self, end: DeltaEnd, meta: ObjectMeta) -> Result<Vec<Bytes>> {
        let compact_revision = end.compact_revision;
        let end = DeltaEnd { revisions: self.revisions, events: self.events, ..end };
        self.content = end.encode_to_vec();
        self.put_record(4)?;
        let meta = ObjectMeta {
            layout: LAYOUT,
            first_revision: self.first,
            last_revision: self.last,
            compact_revision,
            content_bytes: self.writer.content_bytes(),
            ..meta
        };
        self.writer.finish_with_leading_meta(&meta)
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub enum Record<'a> {
    /// A revision begins.
    Revision {
        /// Main revision.
        main: i64,
        /// When its events were received.
        received_unix_ms: i64,
    },
    /// An encoded `KeyValue`.
    Put(&'a [u8]),
    /// A key.
    Delete(&'a [u8]),
    /// The end, which agreed with what came before.
    End(DeltaEnd),
}

/// Reads records from a decompressed delta.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    name: String,
    offset: u64,
    record: Vec<u8>,
    revisions: u64,
    events: u64,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// `name` is for messages.
    pub fn new(source: R, name: impl Into<String>) -> Self {
        Self { source, name: name.into(), offset: 0, record: Vec::new(), revisions: 0, events: 0, ended: false }
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(format!("{}: {what} (at offset {} of the decompressed content)", self.name, self.offset))
    }

    fn read_error(&self, error: std::io::Error) -> Error {
        match error.downcast::<Error>() {
            Ok(ours) => ours,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.corrupt("content ends inside a record")
            }
            Err(source) => Error::Io { op: "read", path: self.name.clone(), source },
        }
    }

    fn read_length(&mut self) -> Result<Option<u64>> {
        let (mut length, mut at) = (0u64, 0u32);
        loop {
            let byte = match self.source.fill_buf() {
                Ok(rest) => rest.first().copied(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.read_error(error)),
            };
            let Some(byte) = byte else {
                return if at == 0 { Ok(None) } else { Err(self.corrupt("content ends inside a length")) };
            };
            self.source.consume(1);
            let low = u64::from(byte & 0x7f);
            length |= low.checked_shl(7 * at).unwrap_or(0);
            at += 1;
            if at == 10 && byte > 1 {
                return Err(self.corrupt("length of a record is malformed"));
            }
            if byte & 0x80 == 0 {
                self.offset += u64::from(at);
                return Ok(Some(length));
            }
        }
    }

    /// Reads the next `length` bytes into `record`.
    fn read_record(&mut self, length: u64) -> Result<()> {
        self.record.clear();
        // One large value must not stay allocated for the rest of the run.
        self.record.shrink_to(1 << 20);
        let mut left = length;
        while left > 0 {
            let taken = match self.source.fill_buf() {
                Ok(rest) => {
                    let taken = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.record.extend_from_slice(rest.get(..taken).unwrap_or_default());
                    taken
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.read_error(error)),
            };
            if taken == 0 {
                return Err(self.corrupt("content ends inside a record"));
            }
            self.source.consume(taken);
            left -= taken as u64;
        }
        Ok(())
    }

    /// The next record; `None` after the end. An object without its end is an error.
    #[expect(clippy::should_implement_trait, reason = "lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>> {
        let Some(length) = self.read_length()? else {
            return if self.ended { Ok(None) } else { Err(self.corrupt("object has no end record: it was cut short")) };
        };
        if self.ended {
            return Err(self.corrupt("content goes on after its end record"));
        }
        if length > MOST_RECORD_BYTES {
            return Err(self.corrupt(&format!("record of {length} bytes is larger than any record")));
        }
        self.read_record(length)?;
        let start = self.offset;
        self.offset += length;
        let malformed = |source| Error::Format {
            what: format!("{}: record at offset {start} of the decompressed content", self.name),
            source,
        };
        let Some(Field::Bytes(number, content)) = Fields::new(&self.record).next().map_err(malformed)? else {
            return Err(self.corrupt("record has no content"));
        };
        match number {
            1 => {
                let mut fields = Fields::new(content);
                let (mut main, mut received_unix_ms) = (0, 0);
                while let Some(field) = fields.next().map_err(malformed)? {
                    match field {
                        Field::Varint(1, value) => main = value as i64,
                        Field::Varint(2, value) => received_unix_ms = value as i64,
                        _ => {}
                    }
                }
                self.revisions += 1;
                Ok(Some(Record::Revision { main, received_unix_ms }))
            }
            2 => {
                self.events += 1;
                Ok(Some(Record::Put(content)))
            }
            3 => {
                self.events += 1;
                Ok(Some(Record::Delete(content)))
            }
            4 => {
                let end = DeltaEnd::decode(content)
                    .map_err(|error| self.corrupt(&format!("end record cannot be decoded: {error}")))?;
                if (end.revisions, end.events) != (self.revisions, self.events) {
                    let text = format!(
                        "end record counts {} revisions and {} changes, there are {} and {}",
                        end.revisions, end.events, self.revisions, self.events
                    );
                    return Err(self.corrupt(&text));
                }
                self.ended = true;
                Ok(Some(Record::End(end)))
            }
            other => {
                Err(self.corrupt(&format!("record of unknown kind {other}: the object was written by a newer version")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut builder = Builder::new(4).unwrap();
        builder.revision(5, 1000).unwrap();
        builder
            .put(&KeyValue { key: b"a", create_revision: 5, mod_revision: 5, version: 1, value: b"1", lease: 7 })
            .unwrap();
        builder.delete(b"b").unwrap();
        builder.revision(6, 1001).unwrap();
        builder.delete(b"a").unwrap();
        assert!(builder.revision(8, 1002).is_err());
        let end = DeltaEnd { compact_revision: 3, ..DeltaEnd::default() };
        builder.finish(end, ObjectMeta::default()).unwrap().concat()
    }

    fn read(object: &[u8]) -> Result<Vec<String>> {
        let mut reader = Reader::new(BufReader::new(crate::container::Reader::new(object, "test")?), "test");
        let mut records = Vec::new();
        while let Some(record) = reader.next()? {
            records.push(format!("{record:?}"));
        }
        Ok(records)
    }

    #[test]
    fn what_is_written_is_read_and_every_flip_is_noticed_or_harmless() {
        let object = sample();
        let records = read(&object).unwrap();
        assert_eq!(records.len(), 6);
        assert!(
            records[1].starts_with("Put")
                && records[2].starts_with("Delete")
                && records[5].contains("compact_revision: 3")
        );
        for at in 0..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 0x21;
            if let Ok(read) = read(&damaged) {
                assert_eq!(read, records, "byte {at}");
            }
            if let Ok(read) = read(&object[..at]) {
                assert_eq!(read, records, "cut at {at}");
            }
        }
    }

    #[test]
    fn a_revision_that_did_not_arrive_whole_is_taken_back() {
        let mut builder = Builder::new(4).unwrap();
        builder.revision(5, 1000).unwrap();
        builder.delete(b"a").unwrap();
        builder.revision(6, 1000).unwrap();
        for n in 0..100_000u32 {
            builder.delete(&[b"a long name of a key".as_slice(), &n.to_be_bytes()].concat()).unwrap();
        }
        builder.cut_last_revision().unwrap();
        assert_eq!((builder.last(), builder.events()), (5, 1));
        let object = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
        assert_eq!(read(&object).unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn arbitrary_content_never_panics(bytes: Vec<u8>) {
            let mut reader = Reader::new(bytes.as_slice(), "test");
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
