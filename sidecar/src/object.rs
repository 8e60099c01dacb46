//! Objects of whichever layout: opening and making them.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use proto::backup::ObjectMeta;

use crate::catalog::{Layout, ObjectName};
use crate::container;
use crate::delta::{self, Record};
use crate::gardener;
use crate::{Error, Result};

/// The decompressed content of a full snapshot or a delta.
#[derive(Debug)]
pub enum Content<R: Read> {
    /// One of ours.
    Container(Box<container::Reader<R>>),
    /// One of the predecessor's.
    Gardener(Box<gardener::Decoder<R>>),
}

impl<R: Read> Content<R> {
    /// `location` is for messages.
    pub fn open(name: &ObjectName, source: R, location: &str) -> Result<Self> {
        Ok(match name {
            ObjectName::Gardener(name) => {
                Self::Gardener(Box::new(gardener::Decoder::new(source, name.codec(), location)?))
            }
            _ => Self::Container(Box::new(container::Reader::new(source, location)?)),
        })
    }

    /// The metadata that precedes the content.
    pub fn meta(&self) -> Option<&ObjectMeta> {
        match self {
            Self::Container(reader) => reader.meta(),
            Self::Gardener(_) => None,
        }
    }
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Container(reader) => reader.read(buf),
            Self::Gardener(decoder) => decoder.read(buf),
        }
    }
}

/// The records of a decompressed delta.
#[derive(Debug)]
pub enum Records<R> {
    /// One of ours.
    Container(delta::Reader<R>),
    /// One of the predecessor's.
    Gardener(Box<gardener::Events<R>>),
}

impl<R: BufRead> Records<R> {
    /// `location` is for messages.
    pub fn new(name: &ObjectName, content: R, location: &str) -> Self {
        match name {
            ObjectName::Gardener(_) => Self::Gardener(Box::new(gardener::Events::new(content, location))),
            _ => Self::Container(delta::Reader::new(content, location)),
        }
    }

    /// The next record; `None` after the end.
    #[expect(clippy::should_implement_trait, reason = "lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>> {
        match self {
            Self::Container(reader) => reader.next(),
            Self::Gardener(events) => events.next(),
        }
    }
}

/// A delta in memory, opened.
pub fn delta_in_memory<'o>(
    name: &ObjectName,
    object: &'o [u8],
    location: &str,
) -> Result<Records<BufReader<Content<&'o [u8]>>>> {
    Ok(Records::new(name, BufReader::new(Content::open(name, object, location)?), location))
}

/// A digest of the changes of each revision, to compare two histories by.
#[derive(Debug, Default)]
pub struct RevisionDigests(BTreeMap<i64, u64>);

impl RevisionDigests {
    /// Of what a delta in memory has of some revisions.
    pub fn of_delta(name: &ObjectName, object: &[u8], location: &str, first: i64, last: i64) -> Result<Self> {
        let mut records = delta_in_memory(name, object, location)?;
        let (mut digests, mut at) = (Self::default(), 0);
        while let Some(record) = records.next()? {
            match record {
                Record::Revision { main, .. } => at = main,
                Record::Put(value) if (first..=last).contains(&at) => digests.add(at, true, value),
                Record::Delete(key) if (first..=last).contains(&at) => digests.add(at, false, key),
                Record::Put(_) | Record::Delete(_) | Record::End(_) => {}
            }
        }
        Ok(digests)
    }

    /// Adds the next change of a revision: a put's value as etcd stores it, or a deleted key.
    pub fn add(&mut self, revision: i64, is_put: bool, bytes: &[u8]) {
        let before = self.0.entry(revision).or_insert(0);
        let mut hasher = std::hash::DefaultHasher::new();
        (*before, is_put, bytes).hash(&mut hasher);
        *before = hasher.finish();
    }

    /// By revision.
    pub fn into_map(self) -> BTreeMap<i64, u64> {
        self.0
    }
}

/// What is wrong with a full snapshot whose content is of another revision than its name says, if anything.
pub fn check_full_revision(name: &ObjectName, location: &str, found: i64) -> Result<()> {
    let named = name.revisions().map_or(0, |(_, last)| last);
    // The predecessor asked for the revision before it took the snapshot.
    let fits = if matches!(name, ObjectName::Gardener(_)) { found >= named } else { found == named };
    if fits {
        return Ok(());
    }
    Err(Error::corrupt(format!("{location}: its name says revision {named}, its content is of revision {found}")))
}

/// Compresses a full snapshot.
pub enum FullWriter {
    /// As one of ours.
    Container(Box<container::Writer>),
    /// As one of the predecessor's.
    Gardener(GzEncoder<Vec<u8>>),
}

impl std::fmt::Debug for FullWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Container(writer) => writer.fmt(f),
            Self::Gardener(_) => f.write_str("GzEncoder"),
        }
    }
}

impl FullWriter {
    /// Begins with what is known of it.
    pub fn new(layout: Layout, meta: &ObjectMeta) -> Result<Self> {
        if layout == Layout::GardenerV2 {
            return Ok(Self::Gardener(GzEncoder::new(Vec::new(), Compression::fast())));
        }
        let mut writer = container::Writer::for_full()?;
        writer.put_meta(meta)?;
        Ok(Self::Container(Box::new(writer)))
    }

    /// Adds content.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Container(writer) => writer.write(bytes),
            Self::Gardener(encoder) => encoder.write_all(bytes).map_err(Error::io("compress", "a full snapshot")),
        }
    }

    /// Adds content that is compressed already, as a frame of one of ours.
    pub fn write_frame(&mut self, frame: &[u8], content: &[u8]) -> Result<()> {
        match self {
            Self::Container(writer) => writer.put_frame(frame, content.len() as u32),
            Self::Gardener(_) => self.write(content),
        }
    }

    /// Compressed bytes that are ready to be taken.
    pub fn ready(&self) -> usize {
        match self {
            Self::Container(writer) => writer.ready(),
            Self::Gardener(encoder) => encoder.get_ref().len(),
        }
    }

    /// Takes the compressed bytes.
    pub fn take(&mut self) -> Bytes {
        match self {
            Self::Container(writer) => writer.take(),
            Self::Gardener(encoder) => std::mem::take(encoder.get_mut()).into(),
        }
    }

    /// Ends the object, with what is known of it only now; what remains to be written is returned.
    pub fn finish(self, trailer: &ObjectMeta) -> Result<Bytes> {
        match self {
            Self::Container(mut writer) => {
                writer.put_meta(trailer)?;
                writer.finish()
            }
            Self::Gardener(encoder) => {
                encoder.finish().map(Into::into).map_err(Error::io("compress", "a full snapshot"))
            }
        }
    }
}
