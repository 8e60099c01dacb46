//! What every backup object is wrapped in: the zstd *seekable* format, with our metadata in skippable frames.
//!
//! ```text
//! skippable frame 0x184D2A57   ObjectMeta (protobuf)
//! zstd frames                  2 MiB of content each, with content size and checksum
//! skippable frame 0x184D2A57   ObjectMeta, what was not known at the start; only in full snapshots
//! skippable frame 0x184D2A5E   seek table: u32 compressed, u32 decompressed size of each frame before it;
//!                              then u32 number of frames, u8 0, u32 0x8F92EAB1
//! ```
//!
//! `zstd -d` skips what is skippable, so its output is exactly the content.

use std::io::{self, Read};

use bytes::Bytes;
use proto::Message;
use proto::backup::ObjectMeta;

use crate::{Error, Result};

/// What objects are written as; a reader refuses what is newer.
pub const LAYOUT: u32 = 1;
/// Content in one frame.
pub const FRAME_BYTES: usize = 2 << 20;
/// Fast enough to keep up with etcd's snapshot stream on one core; higher levels gain little on its pages.
pub const LEVEL_FULL: i32 = 1;
/// Deltas are small and wait for the clock anyway.
pub const LEVEL_DELTA: i32 = 3;

const META_MAGIC: u32 = 0x184D_2A57;
const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const FOOTER_BYTES: u64 = 9;
const MOST_META_BYTES: u32 = 64 << 10;
/// Seek table of an object of 1 TB of content.
const MOST_TABLE_BYTES: u64 = 4 << 20;
/// log2 of the largest window a reader allocates; our frames need 21.
const WINDOW_LOG_MAX: u32 = 23;

/// A place in the content; see [`Writer::mark`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Mark {
    output: usize,
    frames: usize,
    chunk: usize,
    content_bytes: u64,
}

/// Compresses content into frames.
pub struct Writer {
    compressor: zstd::bulk::Compressor<'static>,
    chunk: Vec<u8>,
    output: Vec<u8>,
    frames: Vec<(u32, u32)>,
    content_bytes: u64,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("content_bytes", &self.content_bytes).finish()
    }
}

impl Writer {
    /// At a compression level.
    pub fn new(level: i32) -> Result<Self> {
        let mut compressor = zstd::bulk::Compressor::new(level).map_err(Error::io("set up", "zstd"))?;
        compressor.include_checksum(true).map_err(Error::io("set up", "zstd"))?;
        Ok(Self { compressor, chunk: Vec::new(), output: Vec::new(), frames: Vec::new(), content_bytes: 0 })
    }

    /// Adds a metadata frame here.
    pub fn put_meta(&mut self, meta: &ObjectMeta) -> Result<()> {
        self.end_frame()?;
        let frame = skippable(META_MAGIC, &meta.encode_to_vec());
        self.frames.push((frame.len() as u32, 0));
        self.output.extend_from_slice(&frame);
        Ok(())
    }

    /// Adds content.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.content_bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(bytes.len().min(FRAME_BYTES - self.chunk.len()));
            self.chunk.extend_from_slice(head);
            bytes = rest;
            if self.chunk.len() == FRAME_BYTES {
                self.end_frame()?;
            }
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let start = self.output.len();
        self.output.resize(start + zstd::zstd_safe::compress_bound(self.chunk.len()), 0);
        let room = self.output.get_mut(start..).unwrap_or_default();
        let size = self.compressor.compress_to_buffer(&self.chunk, room).map_err(Error::io("compress", "a frame"))?;
        self.output.truncate(start + size);
        self.frames.push((size as u32, self.chunk.len() as u32));
        self.chunk.clear();
        Ok(())
    }

    /// Remembers where the content ends now.
    pub fn mark(&self) -> Mark {
        Mark {
            output: self.output.len(),
            frames: self.frames.len(),
            chunk: self.chunk.len(),
            content_bytes: self.content_bytes,
        }
    }

    /// Takes back all content after a mark. Nothing may have been taken since.
    pub fn rollback(&mut self, mark: Mark) -> Result<()> {
        if let Some((compressed, decompressed)) = self.frames.get(mark.frames).copied() {
            // The mark lies inside a frame that is closed by now: its beginning becomes the open chunk again.
            let frame = self.output.get(mark.output..mark.output + compressed as usize).unwrap_or_default();
            let capacity = decompressed as usize;
            self.chunk = zstd::bulk::decompress(frame, capacity).map_err(Error::io("take back", "a frame"))?;
            self.output.truncate(mark.output);
            self.frames.truncate(mark.frames);
        }
        self.chunk.truncate(mark.chunk);
        self.content_bytes = mark.content_bytes;
        Ok(())
    }

    /// Content bytes written so far.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Compressed bytes that are ready to be taken.
    pub fn ready(&self) -> usize {
        self.output.len()
    }

    /// Takes the compressed bytes.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.output).into()
    }

    /// Ends the object; what remains to be written is returned.
    pub fn finish(mut self) -> Result<Bytes> {
        self.end_frame()?;
        let table = seek_table(&self.frames);
        self.output.extend_from_slice(&table);
        Ok(self.output.into())
    }

    /// Ends an object whose bytes were never taken, with a metadata frame before all others.
    pub fn finish_with_leading_meta(mut self, meta: &ObjectMeta) -> Result<Vec<Bytes>> {
        self.end_frame()?;
        let head = skippable(META_MAGIC, &meta.encode_to_vec());
        self.frames.insert(0, (head.len() as u32, 0));
        Ok(vec![head.into(), self.output.into(), seek_table(&self.frames).into()])
    }
}

fn skippable(magic: u32, content: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(8 + content.len());
    frame.extend_from_slice(&magic.to_le_bytes());
    frame.extend_from_slice(&(content.len() as u32).to_le_bytes());
    frame.extend_from_slice(content);
    frame
}

fn seek_table(frames: &[(u32, u32)]) -> Vec<u8> {
    let mut table = Vec::with_capacity(frames.len() * 8 + FOOTER_BYTES as usize);
    for (compressed, decompressed) in frames {
        table.extend_from_slice(&compressed.to_le_bytes());
        table.extend_from_slice(&decompressed.to_le_bytes());
    }
    table.extend_from_slice(&(frames.len() as u32).to_le_bytes());
    table.push(0);
    table.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
    skippable(SEEK_TABLE_MAGIC, &table)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

/// Whether a file with these first bytes is a container, or any zstd file.
pub fn is_compressed(head: &[u8]) -> bool {
    u32_at(head, 0).is_some_and(|magic| magic == 0xFD2F_B528 || (0x184D_2A50..=0x184D_2A5F).contains(&magic))
}

/// What [`meta_from_tail`] needs or found.
#[derive(Debug, Clone, PartialEq)]
pub enum FromTail {
    /// So many bytes of the object's end must be given.
    Need(u64),
    /// The metadata of all its frames, merged.
    Meta(Box<ObjectMeta>),
}

/// Reads the metadata of an object of `size` bytes from its beginning and its end.
pub fn meta_from_tail(name: &str, size: u64, head: &[u8], tail: &[u8]) -> Result<FromTail> {
    let damaged = |what: &str| Error::corrupt(format!("{name}: {what}"));
    let footer = tail.len().checked_sub(FOOTER_BYTES as usize).ok_or_else(|| damaged("object is too short"))?;
    if u32_at(tail, footer + 5) != Some(SEEKABLE_MAGIC) {
        return Err(damaged("object does not end with a seek table: it was cut short, or is not one of ours"));
    }
    let count = u64::from(u32_at(tail, footer).unwrap_or_default());
    let table_bytes = count * 8 + FOOTER_BYTES + 8;
    if table_bytes > size.min(MOST_TABLE_BYTES) {
        return Err(damaged("seek table is larger than that of any object"));
    }
    let table_start = (tail.len() as u64).checked_sub(table_bytes);
    let Some(table_start) = table_start else { return Ok(FromTail::Need(table_bytes + u64::from(MOST_META_BYTES))) };
    let mut meta = leading_meta(name, head)?.map(|(meta, _)| meta).unwrap_or_default();
    let last_entry = (table_start + 8 + count.saturating_sub(1) * 8) as usize;
    if count > 1 && u32_at(tail, last_entry + 4) == Some(0) {
        let length = u64::from(u32_at(tail, last_entry).unwrap_or_default());
        if length > u64::from(MOST_META_BYTES) + 8 {
            return Err(damaged("metadata frame is damaged"));
        }
        let Some(start) = table_start.checked_sub(length) else { return Ok(FromTail::Need(table_bytes + length)) };
        let frame = tail.get(start as usize..table_start as usize).unwrap_or_default();
        let content = frame.get(8..).filter(|_| u32_at(frame, 0) == Some(META_MAGIC));
        let content = content.ok_or_else(|| damaged("metadata frame is damaged"))?;
        meta.merge(content).map_err(|error| damaged(&format!("metadata cannot be decoded: {error}")))?;
    }
    check_layout(name, &meta)?;
    Ok(FromTail::Meta(Box::new(meta)))
}

fn check_layout(name: &str, meta: &ObjectMeta) -> Result<()> {
    if meta.layout <= LAYOUT {
        return Ok(());
    }
    let layout = meta.layout;
    Err(Error::precondition(format!(
        "{name}: object has layout {layout}, a newer version of sidecar wrote it; use that"
    )))
}

/// The metadata frame at the start of an object, and how long it is; `None` when there is none.
pub fn leading_meta(name: &str, head: &[u8]) -> Result<Option<(ObjectMeta, usize)>> {
    if u32_at(head, 0) != Some(META_MAGIC) {
        return Ok(None);
    }
    let length = u32_at(head, 4).filter(|length| *length <= MOST_META_BYTES);
    let content = length.and_then(|length| head.get(8..8 + length as usize));
    let content = content.ok_or_else(|| Error::corrupt(format!("{name}: metadata frame is damaged")))?;
    let meta = ObjectMeta::decode(content)
        .map_err(|error| Error::corrupt(format!("{name}: metadata cannot be decoded: {error}")))?;
    Ok(Some((meta, 8 + content.len())))
}

/// Decompresses an object while it is read. What it returns is checked by the frames' checksums.
pub struct Reader<R: Read> {
    decoder: zstd::stream::read::Decoder<'static, io::BufReader<io::Chain<io::Cursor<Vec<u8>>, R>>>,
    name: String,
    meta: Option<ObjectMeta>,
}

impl<R: Read> std::fmt::Debug for Reader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("name", &self.name).finish()
    }
}

impl<R: Read> Reader<R> {
    /// `name` is for messages.
    pub fn new(mut source: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let fail = |error: io::Error| error.downcast().unwrap_or_else(Error::io("read", &name));
        let mut head = Vec::new();
        source.by_ref().take(8).read_to_end(&mut head).map_err(fail)?;
        if head.is_empty() {
            return Err(Error::corrupt(format!("{name}: object is empty")));
        }
        let mut meta = None;
        if u32_at(&head, 0) == Some(META_MAGIC) {
            let length = u32_at(&head, 4).unwrap_or_default().min(MOST_META_BYTES + 1);
            source.by_ref().take(u64::from(length)).read_to_end(&mut head).map_err(fail)?;
            meta = leading_meta(&name, &head)?.map(|(meta, _)| meta);
            meta.as_ref().map_or(Ok(()), |meta| check_layout(&name, meta))?;
            head.clear();
        }
        let source = io::BufReader::with_capacity(256 << 10, io::Cursor::new(head).chain(source));
        let mut decoder = zstd::stream::read::Decoder::with_buffer(source).map_err(Error::io("set up", "zstd"))?;
        decoder.window_log_max(WINDOW_LOG_MAX).map_err(Error::io("set up", "zstd"))?;
        Ok(Self { decoder, name, meta })
    }

    /// The metadata that precedes the content.
    pub fn meta(&self) -> Option<&ObjectMeta> {
        self.meta.as_ref()
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf).map_err(|error| {
            // Failures of the source pass through; what zstd finds wrong is damage of the object.
            if error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync + 'static>::is::<Error>) {
                return error;
            }
            let what =
                if error.kind() == io::ErrorKind::UnexpectedEof { "cut short".to_owned() } else { error.to_string() };
            io::Error::other(Error::corrupt(format!("{}: compressed data is damaged: {what}", self.name)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn object(content: &[u8]) -> Vec<u8> {
        let mut writer = Writer::new(1).unwrap();
        writer.put_meta(&ObjectMeta { layout: 1, cluster_id: 7, ..ObjectMeta::default() }).unwrap();
        writer.write(content).unwrap();
        writer.put_meta(&ObjectMeta { last_revision: 9, ..ObjectMeta::default() }).unwrap();
        writer.finish().unwrap().to_vec()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Reader::new(bytes, "test").map_err(io::Error::other)?.read_to_end(&mut content)?;
        Ok(content)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn content_and_metadata_round_trip(content in prop::collection::vec(any::<u8>(), 0..3000), repeat in 1..2000usize) {
            let content = content.repeat(repeat);
            let bytes = object(&content);
            prop_assert_eq!(read(&bytes).unwrap(), content);
            let meta = meta_from_tail("test", bytes.len() as u64, &bytes, &bytes).unwrap();
            let expected = ObjectMeta { layout: 1, cluster_id: 7, last_revision: 9, ..ObjectMeta::default() };
            prop_assert_eq!(meta, FromTail::Meta(Box::new(expected)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = read(&bytes);
            let _ = meta_from_tail("test", bytes.len() as u64, &bytes, &bytes);
        }
    }

    #[test]
    fn what_comes_after_a_mark_can_be_taken_back() {
        for (before, after) in
            [(10, 10), (10, FRAME_BYTES), (FRAME_BYTES, 1), (FRAME_BYTES - 1, 3 * FRAME_BYTES), (0, 5)]
        {
            let mut writer = Writer::new(1).unwrap();
            let kept: Vec<u8> = (0..before).map(|n| n as u8).collect();
            writer.write(&kept).unwrap();
            let mark = writer.mark();
            writer.write(&vec![7; after]).unwrap();
            writer.rollback(mark).unwrap();
            writer.write(b"end").unwrap();
            let bytes = writer.finish().unwrap();
            assert_eq!(read(&bytes).unwrap(), [kept, b"end".to_vec()].concat());
        }
    }

    #[test]
    fn every_flipped_byte_is_noticed_or_changes_nothing() {
        let content: Vec<u8> = (0..2000u32).flat_map(u32::to_le_bytes).collect();
        let bytes = object(&content);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x04;
            if let Ok(read) = read(&damaged) {
                assert!(read == content || read.is_empty(), "byte {at}: {} bytes", read.len());
            }
        }
    }
}
