//! The content of a delta: a JSON array of events, then the 32 bytes of the array's sha256.
//!
//! ```text
//! [{"etcdEvent":{"type":1,"kv":{"key":"<base64>","mod_revision":5,…}},"time":"<RFC 3339>"},…]<sha256>
//! ```
//!
//! Fields that are zero or empty are left out; `type` 1 is a delete. Events are read and written one at a time.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, Read, Write};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use etcd_format::mvcc::KeyValue;
use flate2::Compression;
use flate2::write::GzEncoder;
use proto::backup::DeltaEnd;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::delta::{self, Record};
use crate::{Error, Result};

const HASH_BYTES: usize = 32;
/// No event is larger than this; etcd's largest request is far below.
const MOST_EVENT_BYTES: usize = 64 << 20;
/// What the predecessor's restore can put into one transaction: so many changes,
const MOST_CHANGES: u64 = 10_240;
/// and so many bytes, with room for what a request adds to keys and values.
const MOST_REVISION_BYTES: u64 = 3 << 19;

#[derive(Serialize, Deserialize)]
struct Event<'a> {
    #[serde(borrow, rename = "etcdEvent")]
    event: EtcdEvent<'a>,
    #[serde(borrow)]
    time: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct EtcdEvent<'a> {
    #[serde(default, rename = "type", skip_serializing_if = "is_zero")]
    kind: i64,
    #[serde(borrow)]
    kv: JsonKeyValue<'a>,
}

#[derive(Serialize, Deserialize)]
struct JsonKeyValue<'a> {
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    key: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "is_zero")]
    create_revision: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    mod_revision: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    version: i64,
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    value: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "is_zero")]
    lease: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// Reads all but the last 32 bytes of a source, and checks at its end that those are the sha256 of what it read.
struct Hashed<R> {
    source: R,
    name: String,
    sha: Sha256,
    /// What was read from the source and not given out: the last 32 bytes may be the hash.
    held: Vec<u8>,
    ended: bool,
    checked: bool,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !self.ended && self.held.len() <= HASH_BYTES {
            self.ended = self.source.by_ref().take(64 << 10).read_to_end(&mut self.held)? == 0;
        }
        let give = self.held.len().saturating_sub(HASH_BYTES).min(buf.len());
        if give == 0 && !buf.is_empty() && !self.checked {
            let digest: [u8; HASH_BYTES] = std::mem::take(&mut self.sha).finalize().into();
            if self.held != digest {
                let what = if self.held.len() < HASH_BYTES {
                    "it is too short"
                } else {
                    "its sha256 does not fit its content"
                };
                return Err(io::Error::other(Error::corrupt(format!("{}: {what}", self.name))));
            }
            self.checked = true;
        }
        if give == 0 {
            return Ok(0);
        }
        let (out, _) = buf.split_at_mut(give);
        out.copy_from_slice(self.held.get(..give).unwrap_or_default());
        self.sha.update(&*out);
        self.held.drain(..give);
        Ok(give)
    }
}

/// Reads a decompressed delta as the records of our own: see [`delta::Reader`].
pub struct Events<R> {
    source: BufReader<Hashed<R>>,
    name: String,
    offset: u64,
    event: Vec<u8>,
    key: Vec<u8>,
    value: Vec<u8>,
    row: Vec<u8>,
    last: i64,
    /// The event read, whose revision was given out.
    pending: Option<bool>,
    state: State,
    revisions: u64,
    events: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Begin,
    Events,
    Ended,
}

impl<R> std::fmt::Debug for Events<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("name", &self.name).finish()
    }
}

impl<R: Read> Events<R> {
    /// `name` is for messages.
    pub fn new(source: R, name: impl Into<String>) -> Self {
        let name = name.into();
        let hashed =
            Hashed { source, name: name.clone(), sha: Sha256::new(), held: Vec::new(), ended: false, checked: false };
        Self {
            source: BufReader::with_capacity(64 << 10, hashed),
            name,
            offset: 0,
            event: Vec::new(),
            key: Vec::new(),
            value: Vec::new(),
            row: Vec::new(),
            last: 0,
            pending: None,
            state: State::Begin,
            revisions: 0,
            events: 0,
        }
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(format!("{}: {what} (at offset {} of the decompressed content)", self.name, self.offset))
    }

    fn read_error(&self, error: io::Error) -> Error {
        error.downcast().unwrap_or_else(Error::io("read", &self.name))
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        let byte = self.source.fill_buf().map(|rest| rest.first().copied()).map_err(|error| self.read_error(error))?;
        self.source.consume(usize::from(byte.is_some()));
        self.offset += u64::from(byte.is_some());
        Ok(byte)
    }

    /// Reads the rest of an object whose brace was read.
    fn read_object(&mut self) -> Result<()> {
        self.event.clear();
        // One large value must not stay allocated for the rest of the run.
        self.event.shrink_to(4 << 20);
        self.event.push(b'{');
        let (mut depth, mut in_string, mut escaped) = (1, false, false);
        while depth > 0 {
            let rest = match self.source.fill_buf() {
                Ok(rest) => rest,
                Err(error) => return Err(self.read_error(error)),
            };
            if rest.is_empty() {
                return Err(self.corrupt("content ends inside an event"));
            }
            let end = rest.iter().position(|byte| {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    b'{' if !in_string => depth += 1,
                    b'}' if !in_string => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            let taken = end.map_or(rest.len(), |end| end + 1);
            self.event.extend_from_slice(rest.get(..taken).unwrap_or_default());
            self.source.consume(taken);
            self.offset += taken as u64;
            if self.event.len() > MOST_EVENT_BYTES {
                return Err(self.corrupt("event is larger than any event"));
            }
        }
        Ok(())
    }

    /// Reads the next event; false after the last, when the sha256 has been checked.
    fn read_event(&mut self) -> Result<bool> {
        let begin = self.state == State::Begin;
        match self.byte()? {
            Some(b'[') if begin => {
                self.state = State::Events;
                if self.byte()? != Some(b'{') {
                    return Err(self.corrupt("it has no events"));
                }
            }
            Some(b',') if !begin => {
                if self.byte()? != Some(b'{') {
                    return Err(self.corrupt("an event was to follow"));
                }
            }
            Some(b']') if !begin => {
                return if self.byte()?.is_none() {
                    Ok(false)
                } else {
                    Err(self.corrupt("something follows its events"))
                };
            }
            _ => return Err(self.corrupt("it is not a JSON array of events")),
        }
        self.read_object()?;
        Ok(true)
    }

    /// The next record; `None` after the end.
    #[expect(clippy::should_implement_trait, reason = "lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>> {
        if self.state == State::Ended {
            return Ok(None);
        }
        if let Some(is_delete) = self.pending.take() {
            self.events += 1;
            return Ok(Some(if is_delete { Record::Delete(&self.key) } else { Record::Put(&self.row) }));
        }
        if !self.read_event()? {
            self.state = State::Ended;
            let (revisions, events) = (self.revisions, self.events);
            return Ok(Some(Record::End(DeltaEnd { revisions, events, ..DeltaEnd::default() })));
        }
        let malformed = |what: &dyn std::fmt::Display| {
            let (name, offset) = (&self.name, self.offset);
            Error::corrupt(format!(
                "{name}: event is malformed: {what} (before offset {offset} of the decompressed content)"
            ))
        };
        let Event { event, time } = serde_json::from_slice(&self.event).map_err(|error| malformed(&error))?;
        let received = DateTime::parse_from_rfc3339(&time).map_err(|error| malformed(&error))?;
        self.key.clear();
        self.value.clear();
        self.value.shrink_to(4 << 20);
        BASE64_STANDARD.decode_vec(event.kv.key.as_bytes(), &mut self.key).map_err(|error| malformed(&error))?;
        BASE64_STANDARD.decode_vec(event.kv.value.as_bytes(), &mut self.value).map_err(|error| malformed(&error))?;
        let is_delete = match event.kind {
            0 => false,
            1 => true,
            other => return Err(malformed(&format!("it is of unknown type {other}"))),
        };
        let JsonKeyValue { create_revision, mod_revision, version, lease, .. } = event.kv;
        if mod_revision < self.last || mod_revision < 1 || self.key.is_empty() {
            let last = self.last;
            return Err(malformed(&format!(
                "key of {} bytes at revision {mod_revision} after revision {last}",
                self.key.len()
            )));
        }
        let kv = KeyValue { key: &self.key, create_revision, mod_revision, version, value: &self.value, lease };
        self.row.clear();
        self.row.shrink_to(4 << 20);
        kv.encode(&mut self.row);
        if mod_revision == self.last {
            self.events += 1;
            return Ok(Some(if is_delete { Record::Delete(&self.key) } else { Record::Put(&self.row) }));
        }
        self.last = mod_revision;
        self.revisions += 1;
        self.pending = Some(is_delete);
        Ok(Some(Record::Revision { main: mod_revision, received_unix_ms: received.timestamp_millis() }))
    }
}

/// A delta as the predecessor writes it.
#[derive(Debug)]
pub struct Encoded {
    /// The object, compressed with gzip.
    pub object: Bytes,
    /// Whether it has a revision that the predecessor's restore cannot replay: a full snapshot should follow.
    pub is_too_large_to_replay: bool,
}

/// Writes a delta's records as the predecessor does. What it has no place for, TTLs of leases among it, is left out.
pub fn encode<R: BufRead>(records: &mut delta::Reader<R>) -> Result<Encoded> {
    let fail = Error::io("compress", "a delta");
    let mut out = Tee { sha: Sha256::new(), out: GzEncoder::new(Vec::new(), Compression::default()) };
    let (mut main, mut time, mut separator) = (0, String::new(), b'[');
    let (mut changes, mut bytes, mut is_too_large_to_replay) = (0u64, 0u64, false);
    let written = (|| -> io::Result<Result<()>> {
        loop {
            let record = match records.next() {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(Ok(())),
                Err(error) => return Ok(Err(error)),
            };
            let (kind, kv) = match record {
                Record::Revision { main: next, received_unix_ms } => {
                    main = next;
                    let received = DateTime::from_timestamp_millis(received_unix_ms).unwrap_or_default();
                    time = received.to_rfc3339_opts(SecondsFormat::AutoSi, true);
                    (changes, bytes) = (0, 0);
                    continue;
                }
                Record::End(_) => continue,
                Record::Put(value) => match KeyValue::decode(value) {
                    Ok(kv) => (0, kv),
                    Err(error) => return Ok(Err(Error::format("a delta")(error))),
                },
                Record::Delete(key) => (1, KeyValue { key, mod_revision: main, ..KeyValue::default() }),
            };
            changes += 1;
            bytes += (kv.key.len() + kv.value.len()) as u64 + 32;
            is_too_large_to_replay |= changes > MOST_CHANGES || bytes > MOST_REVISION_BYTES;
            let (key, value) = (BASE64_STANDARD.encode(kv.key).into(), BASE64_STANDARD.encode(kv.value).into());
            let KeyValue { create_revision, mod_revision, version, lease, .. } = kv;
            let kv = JsonKeyValue { key, create_revision, mod_revision, version, value, lease };
            let event = Event { event: EtcdEvent { kind, kv }, time: Cow::Borrowed(&time) };
            out.write_all(&[separator])?;
            serde_json::to_writer(&mut out, &event)?;
            separator = b',';
        }
    })();
    let object = written.and_then(|read| {
        out.write_all(b"]")?;
        let Tee { sha, out: mut gzip } = out;
        gzip.write_all(&sha.finalize())?;
        Ok(read.map(|()| gzip))
    });
    let object = object.map_err(fail)??.finish().map_err(Error::io("compress", "a delta"))?.into();
    Ok(Encoded { object, is_too_large_to_replay })
}

/// Hashes what it passes on.
struct Tee<W> {
    sha: Sha256,
    out: W,
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.out.write(buf)?;
        self.sha.update(buf.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::backup::ObjectMeta;

    use super::super::{Codec, Decoder};
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<String>> {
        let mut events = Events::new(content, "test");
        let mut records = Vec::new();
        while let Some(record) = events.next()? {
            records.push(format!("{record:?}"));
        }
        Ok(records)
    }

    fn with_hash(json: &str) -> Vec<u8> {
        [json.as_bytes(), Sha256::digest(json).as_slice()].concat()
    }

    #[test]
    fn events_as_etcdctl_prints_them_are_read() {
        let content = with_hash(
            r#"[{"etcdEvent":{"kv":{"key":"Zm9v","create_revision":2,"mod_revision":2,"version":1,"value":"YmFy","lease":-7}},"time":"2020-01-02T03:04:05.123456789+01:00"},{"etcdEvent":{"type":1,"kv":{"key":"Zm9v","mod_revision":2}},"time":"2020-01-02T03:04:05Z"}]"#,
        );
        let records = read(&content).unwrap();
        assert!(
            records[0].contains("main: 2") && records[0].contains("received_unix_ms: 1577930645123"),
            "{records:?}"
        );
        assert!(records[1].starts_with("Put") && records[2] == "Delete([102, 111, 111])", "{records:?}");
        assert!(records[3].contains("revisions: 1, events: 2"), "{records:?}");
        for at in 0..content.len() {
            let mut damaged = content.clone();
            damaged[at] ^= 0x02;
            assert!(read(&damaged).is_err(), "byte {at}");
            assert!(read(&content[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_not_a_list_of_events_is_refused() {
        for json in ["[]", "[", "", "{}", "[{}]", r#"[{"etcdEvent":null,"time":"x"}]"#, r#"[{"a":"}]"#] {
            assert!(read(&with_hash(json)).is_err(), "{json}");
        }
        let event = |revision| {
            format!(
                r#"{{"etcdEvent":{{"kv":{{"key":"Zm9v","mod_revision":{revision}}}}},"time":"2020-01-02T03:04:05Z"}}"#
            )
        };
        assert!(read(&with_hash(&format!("[{},{}]", event(5), event(6)))).is_ok());
        assert!(read(&with_hash(&format!("[{},{}]", event(6), event(5)))).is_err());
        assert!(read(&with_hash(&format!("[{},{}", event(5), event(6)))).is_err());
    }

    #[test]
    fn what_is_encoded_is_read_again() {
        let mut builder = delta::Builder::new(4).unwrap();
        builder.revision(5, 1_577_930_645_123).unwrap();
        let kv = KeyValue { key: b"a\"\\", create_revision: 5, mod_revision: 5, version: 1, value: b"{}", lease: -1 };
        builder.put(&kv).unwrap();
        builder.delete(b"b").unwrap();
        builder.revision(6, 1_577_930_645_000).unwrap();
        builder.delete(&[0, 255]).unwrap();
        let ours = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
        let reader = || {
            let container = crate::container::Reader::new(ours.as_slice(), "test").unwrap();
            delta::Reader::new(BufReader::new(container), "test")
        };
        let encoded = encode(&mut reader()).unwrap();
        assert!(!encoded.is_too_large_to_replay);
        let mut content = Vec::new();
        Decoder::new(encoded.object.as_ref(), Codec::Gzip, "test").unwrap().read_to_end(&mut content).unwrap();
        let mut expected = Vec::new();
        let mut records = reader();
        while let Some(record) = records.next().unwrap() {
            expected.push(format!("{record:?}"));
        }
        assert_eq!(read(&content).unwrap(), expected);
    }

    #[test]
    fn revisions_too_large_to_replay_are_told() {
        let mut builder = delta::Builder::new(4).unwrap();
        builder.revision(5, 0).unwrap();
        for n in 0..=MOST_CHANGES {
            builder.delete(&n.to_be_bytes()).unwrap();
        }
        let ours = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
        let container = crate::container::Reader::new(ours.as_slice(), "test").unwrap();
        assert!(encode(&mut delta::Reader::new(BufReader::new(container), "test")).unwrap().is_too_large_to_replay);
    }

    proptest! {
        #[test]
        fn arbitrary_content_never_panics(json: String, bytes: Vec<u8>) {
            let _ = read(&with_hash(&json));
            let _ = read(&bytes);
        }
    }
}
