//! What every backup object is wrapped in: the zstd *seekable* format, with our metadata in skippable frames.
//!
//! ```text
//! skippable frame 0x184D2A57   ObjectMeta (protobuf)
//! zstd frames                  2 MiB of content each, in deltas up to 12 MiB, with content size and checksum
//! skippable frame 0x184D2A57   ObjectMeta, what was not known at the start; only in full snapshots
//! skippable frame 0x184D2A5E   seek table: u32 compressed, u32 decompressed size of each frame before it;
//!                              then u32 number of frames, u8 0, u32 0x8F92EAB1
//! ```
//!
//! `zstd -d` skips what is skippable, so its output is exactly the content.

mod checked;

use std::io::{self, Read};
use std::num::NonZero;
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::Bytes;
use proto::Message;
use proto::backup::ObjectMeta;

pub use checked::{CheckedReader, decompress};

use crate::{Error, Result};

/// What objects are written as; a reader refuses what is newer.
pub const LAYOUT: u32 = 1;
/// Content in one frame of a full snapshot.
pub const FRAME_BYTES: usize = 2 << 20;
/// Content in one frame of a delta: the more, the more earlier values of a key there are to refer to.
const DELTA_FRAME_BYTES: usize = 12 << 20;
/// Fast enough to keep up with etcd's snapshot stream on one core; higher levels gain little on its pages.
pub const LEVEL_FULL: i32 = 1;

const META_MAGIC: u32 = 0x184D_2A57;
const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const FOOTER_BYTES: u64 = 9;
const MOST_META_BYTES: u32 = 64 << 10;
/// Seek table of an object of 1 TB of content.
const MOST_TABLE_BYTES: u64 = 4 << 20;
/// log2 of the largest window a reader allocates; the frames of deltas need it.
const WINDOW_LOG_MAX: u32 = 24;

/// A place in the content; see [`Writer::mark`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Mark {
    output: usize,
    frames: usize,
    content_bytes: u64,
}

/// Compresses content into frames.
pub struct Writer {
    /// Kept from frame to frame where they come fast. One for deltas takes many MiB, which are not held while changes come
    /// in.
    compressor: Option<zstd::bulk::Compressor<'static>>,
    frame_bytes: usize,
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

fn compressor(level: i32) -> Result<zstd::bulk::Compressor<'static>> {
    let mut compressor = zstd::bulk::Compressor::new(level).map_err(Error::io("set up", "zstd"))?;
    compressor.include_checksum(true).map_err(Error::io("set up", "zstd"))?;
    Ok(compressor)
}

/// How hard a frame of a delta is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Effort {
    /// At about 180 MB/s, where changes come fast.
    #[default]
    Quick,
    /// At about 10 MB/s, to a tenth less.
    Thorough,
}

/// The tables are a fraction of those of the level that has the same strategy: changes of a key lie next to each other, so what
/// is worth finding is near, and memory is what a sidecar has least of.
fn delta_compressor(effort: Effort) -> Result<zstd::bulk::Compressor<'static>> {
    use zstd::zstd_safe::CParameter::{ChainLog, HashLog, MinMatch, SearchLog, Strategy, TargetLength, WindowLog};
    use zstd::zstd_safe::Strategy::{ZSTD_btopt, ZSTD_lazy2};
    let mut compressor = compressor(7)?;
    let tables = [WindowLog(WINDOW_LOG_MAX), HashLog(18), ChainLog(19)];
    let search = match effort {
        Effort::Quick => &[Strategy(ZSTD_lazy2), SearchLog(4)][..],
        Effort::Thorough => &[Strategy(ZSTD_btopt), SearchLog(5), MinMatch(3), TargetLength(256)],
    };
    for parameter in tables.iter().chain(search) {
        compressor.set_parameter(*parameter).map_err(Error::io("set up", "zstd"))?;
    }
    Ok(compressor)
}

/// How many frames are compressed or decompressed side by side.
fn lanes() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(4)
}

/// Compresses pieces of content, each of at most [`FRAME_BYTES`] into a frame of its own, several side by side; hands out the
/// frames in order, with the size of their content.
pub fn compress_frames(
    level: i32,
    pieces: &Receiver<Vec<u8>>,
    out: &mut dyn FnMut(&[u8], u32) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let mut lanes_open = Vec::new();
        for _ in 0..lanes() {
            let (todo, pieces) = sync_channel::<Vec<u8>>(1);
            let (done, frames) = sync_channel(1);
            scope.spawn(move || {
                let mut compressor = compressor(level);
                while let Ok(piece) = pieces.recv() {
                    let frame = match &mut compressor {
                        Ok(compressor) => compressor.compress(&piece).map_err(Error::io("compress", "a frame")),
                        Err(_) => Err(Error::Bug { what: "zstd cannot be set up".into() }),
                    };
                    if done.send(frame.map(|frame| (frame, piece.len() as u32))).is_err() {
                        return;
                    }
                }
            });
            lanes_open.push((todo, frames));
        }
        let ended = || Error::Bug { what: "a compressing thread ended unexpectedly".into() };
        let (mut given, mut taken) = (0usize, 0usize);
        loop {
            let piece = pieces.recv().ok();
            // Each lane has a piece and one more to go on with; the oldest is awaited when all do, and at the end.
            while taken < given && (piece.is_none() || given - taken >= 2 * lanes_open.len()) {
                let (_, frames) = lanes_open.get(taken % lanes_open.len()).ok_or_else(ended)?;
                let (frame, content_bytes) = frames.recv().map_err(|_| ended())??;
                out(&frame, content_bytes)?;
                taken += 1;
            }
            let Some(piece) = piece else { return Ok(()) };
            let (todo, _) = lanes_open.get(given % lanes_open.len()).ok_or_else(ended)?;
            todo.send(piece).map_err(|_| ended())?;
            given += 1;
        }
    })
}

impl Writer {
    /// Of a full snapshot.
    pub fn for_full() -> Result<Self> {
        Ok(Self { compressor: Some(compressor(LEVEL_FULL)?), frame_bytes: FRAME_BYTES, ..Self::for_delta() })
    }

    /// Of a delta.
    pub fn for_delta() -> Self {
        let (chunk, output, frames) = (Vec::new(), Vec::new(), Vec::new());
        Self { compressor: None, frame_bytes: DELTA_FRAME_BYTES, chunk, output, frames, content_bytes: 0 }
    }

    /// Adds a metadata frame here.
    pub fn put_meta(&mut self, meta: &ObjectMeta) -> Result<()> {
        self.end_frame()?;
        let frame = skippable(META_MAGIC, &encode_meta(meta));
        self.frames.push((frame.len() as u32, 0));
        self.output.extend_from_slice(&frame);
        Ok(())
    }

    /// Adds content.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.content_bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_at(bytes.len().min(self.frame_bytes - self.chunk.len()));
            self.chunk.extend_from_slice(head);
            bytes = rest;
            if self.chunk.len() == self.frame_bytes {
                self.end_frame()?;
            }
        }
        Ok(())
    }

    /// Ends the frame begun.
    pub fn end_frame(&mut self) -> Result<()> {
        self.end_frame_with(Effort::Quick)
    }

    /// Ends the frame begun, of a delta.
    pub fn end_frame_with(&mut self, effort: Effort) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        // Room for the worst case is reserved, but only what is needed is touched.
        let mut frame = Vec::with_capacity(zstd::zstd_safe::compress_bound(self.chunk.len()));
        let compressed = match &mut self.compressor {
            Some(compressor) => compressor.compress_to_buffer(&self.chunk, &mut frame),
            None => delta_compressor(effort)?.compress_to_buffer(&self.chunk, &mut frame),
        };
        compressed.map_err(Error::io("compress", "a frame"))?;
        self.frames.push((frame.len() as u32, self.chunk.len() as u32));
        self.output.extend_from_slice(&frame);
        self.chunk.clear();
        if self.compressor.is_none() {
            self.chunk.shrink_to(0);
        }
        Ok(())
    }

    /// Adds content that was compressed elsewhere, by [`compress_frames`].
    pub fn put_frame(&mut self, frame: &[u8], content_bytes: u32) -> Result<()> {
        self.end_frame()?;
        self.content_bytes += u64::from(content_bytes);
        self.frames.push((frame.len() as u32, content_bytes));
        self.output.extend_from_slice(frame);
        Ok(())
    }

    /// Remembers where the content ends now, between two frames.
    pub fn mark(&self) -> Mark {
        Mark { output: self.output.len(), frames: self.frames.len(), content_bytes: self.content_bytes }
    }

    /// Takes back all content after a mark. Nothing may have been taken since.
    pub fn rollback(&mut self, mark: Mark) {
        self.output.truncate(mark.output);
        self.frames.truncate(mark.frames);
        self.chunk.clear();
        self.content_bytes = mark.content_bytes;
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
        let head = skippable(META_MAGIC, &encode_meta(meta));
        self.frames.insert(0, (head.len() as u32, 0));
        Ok(vec![head.into(), self.output.into(), seek_table(&self.frames).into()])
    }
}

/// Tag of the last field of [`ObjectMeta`], its checksum, as a protobuf writer puts it: field 100, fixed 32 bits.
const CHECKSUM_TAG: [u8; 2] = [0xa5, 0x06];

fn encode_meta(meta: &ObjectMeta) -> Vec<u8> {
    let mut bytes = ObjectMeta { checksum: 0, ..meta.clone() }.encode_to_vec();
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&CHECKSUM_TAG);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A hash is of a revision that was not compacted away.
fn check_hash(name: &str, meta: &ObjectMeta) -> Result<()> {
    match meta.hash_kv {
        Some(hash) if hash.compact_revision > hash.revision || hash.revision < 0 => Err(Error::corrupt(format!(
            "{name}: metadata is damaged: it has a hash at revision {} and compaction {}",
            hash.revision, hash.compact_revision
        ))),
        _ => Ok(()),
    }
}

/// Checks the checksum of encoded metadata.
fn check_meta(name: &str, content: &[u8]) -> Result<()> {
    let whole = content.len().checked_sub(CHECKSUM_TAG.len() + 4).and_then(|at| content.split_at_checked(at));
    let sound = whole.is_some_and(|(before, field)| {
        field.starts_with(&CHECKSUM_TAG) && u32_at(field, CHECKSUM_TAG.len()) == Some(crc32c::crc32c(before))
    });
    if sound { Ok(()) } else { Err(Error::corrupt(format!("{name}: metadata is damaged: its checksum does not fit"))) }
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

/// The seek table at the end of an object: where it starts in `tail`, and the sizes of the frames before it.
enum Table {
    /// So many bytes of the object's end must be given.
    Need(u64),
    /// Found.
    At { start: u64, count: u64 },
}

fn table_in_tail(name: &str, size: u64, tail: &[u8]) -> Result<Table> {
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
    let start = (tail.len() as u64).checked_sub(table_bytes);
    Ok(match start {
        Some(start) => Table::At { start, count },
        None => Table::Need(table_bytes + u64::from(MOST_META_BYTES)),
    })
}

/// Reads the metadata of an object of `size` bytes from its beginning and its end.
pub fn meta_from_tail(name: &str, size: u64, head: &[u8], tail: &[u8]) -> Result<FromTail> {
    let damaged = |what: &str| Error::corrupt(format!("{name}: {what}"));
    let (table_start, count) = match table_in_tail(name, size, tail)? {
        Table::Need(more) => return Ok(FromTail::Need(more)),
        Table::At { start, count } => (start, count),
    };
    let table_bytes = tail.len() as u64 - table_start;
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
        check_meta(name, content)?;
        meta.merge(content).map_err(|error| damaged(&format!("metadata cannot be decoded: {error}")))?;
    }
    check_layout(name, &meta)?;
    Ok(FromTail::Meta(Box::new(meta)))
}

fn check_layout(name: &str, meta: &ObjectMeta) -> Result<()> {
    if meta.layout <= LAYOUT {
        return check_hash(name, meta);
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
    check_meta(name, content)?;
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

/// Sizes of the frames of an object before its seek table, compressed and decompressed; `Err` of how many bytes of its end
/// must be given when `tail` is too short.
pub fn frames_in_tail(name: &str, size: u64, tail: &[u8]) -> Result<Result<Vec<(u32, u32)>, u64>> {
    let (start, count) = match table_in_tail(name, size, tail)? {
        Table::Need(more) => return Ok(Err(more)),
        Table::At { start, count } => (start as usize + 8, count as usize),
    };
    let entry = |index: usize| Some((u32_at(tail, start + index * 8)?, u32_at(tail, start + index * 8 + 4)?));
    let frames: Option<Vec<_>> = (0..count).map(entry).collect();
    Ok(Ok(frames.ok_or_else(|| Error::corrupt(format!("{name}: seek table is cut short")))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn object(content: &[u8]) -> Vec<u8> {
        let mut writer = Writer::for_full().unwrap();
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

    fn checked(bytes: &[u8]) -> Result<Vec<u8>> {
        let frames = frames_in_tail("test", bytes.len() as u64, bytes)?;
        let frames = frames.map_err(|need| Error::corrupt(format!("{need} bytes of it are needed")))?;
        let mut content = Vec::new();
        let mut reader = CheckedReader::new(bytes, "test", frames)?;
        reader.read_to_end(&mut content).map_err(|error| error.downcast::<Error>().unwrap_or(Error::Cancelled))?;
        Ok(content)
    }

    #[test]
    fn every_flipped_bit_is_found_or_changes_nothing() {
        let content: Vec<u8> = (0..3000u32).flat_map(u32::to_be_bytes).collect();
        let bytes = object(&content);
        let meta = meta_from_tail("test", bytes.len() as u64, &bytes, &bytes).unwrap();
        assert_eq!(checked(&bytes).unwrap(), content);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                let found = checked(&damaged);
                if bit == at % 8 {
                    let all = frames_in_tail("test", damaged.len() as u64, &damaged).and_then(|frames| {
                        let frames = frames.map_err(|_| Error::Cancelled)?;
                        CheckedReader::new(damaged.as_slice(), "test", frames)?.check_all()
                    });
                    assert_eq!(all.ok(), found.as_ref().ok().map(|found| found.len() as u64), "byte {at}, bit {bit}");
                }
                if let Ok(found) = found {
                    assert_eq!(found, content, "byte {at}, bit {bit}");
                    let found = meta_from_tail("test", damaged.len() as u64, &damaged, &damaged).unwrap();
                    assert_eq!(found, meta, "byte {at}, bit {bit}");
                }
            }
            assert!(checked(&bytes[..at]).is_err(), "cut at {at}");
        }
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
            let FromTail::Meta(meta) = meta else { panic!("no metadata") };
            prop_assert_eq!(ObjectMeta { checksum: 0, ..*meta }, expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = checked(&bytes);
            let _ = read(&bytes);
            let _ = meta_from_tail("test", bytes.len() as u64, &bytes, &bytes);
        }
    }

    #[test]
    fn what_comes_after_a_mark_can_be_taken_back() {
        for (before, after) in
            [(10, 10), (10, FRAME_BYTES), (FRAME_BYTES, 1), (FRAME_BYTES - 1, 3 * FRAME_BYTES), (0, 5)]
        {
            let mut writer = Writer::for_delta();
            let kept: Vec<u8> = (0..before).map(|n| n as u8).collect();
            writer.write(&kept).unwrap();
            writer.end_frame().unwrap();
            let mark = writer.mark();
            writer.write(&vec![7; after]).unwrap();
            writer.rollback(mark);
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
