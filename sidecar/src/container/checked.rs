//! Reading an object against its seek table.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{SyncSender, sync_channel};

use super::{DELTA_FRAME_BYTES, META_MAGIC, check_meta, lanes, seek_table, u32_at};
use crate::{Error, Result};

/// Decompresses an object and checks every byte of it against its seek table: each frame is where the table has it and as
/// long, metadata fits its checksum, and nothing else is there.
pub struct CheckedReader<R> {
    source: R,
    name: String,
    frames: Vec<(u32, u32)>,
    next: usize,
    decompressor: zstd::bulk::Decompressor<'static>,
    compressed: Vec<u8>,
    content: Vec<u8>,
    at: usize,
    content_bytes: u64,
}

impl<R> std::fmt::Debug for CheckedReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckedReader").field("name", &self.name).finish()
    }
}

impl<R: Read> CheckedReader<R> {
    /// `frames` are those of [`super::frames_in_tail`]; `name` is for messages.
    pub fn new(source: R, name: impl Into<String>, frames: Vec<(u32, u32)>) -> Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new().map_err(Error::io("set up", "zstd"))?;
        let (compressed, content) = (Vec::new(), Vec::new());
        Ok(Self {
            source,
            name: name.into(),
            frames,
            next: 0,
            decompressor,
            compressed,
            content,
            at: 0,
            content_bytes: 0,
        })
    }

    /// Bytes of content so far.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(format!("{}: frame {}: {what}", self.name, self.next))
    }

    fn take(&mut self, bytes: u64) -> Result<()> {
        self.compressed.clear();
        let read = self.source.by_ref().take(bytes).read_to_end(&mut self.compressed);
        let read = read.map_err(|error| error.downcast().unwrap_or_else(Error::io("read", &self.name)))?;
        if read as u64 == bytes { Ok(()) } else { Err(self.corrupt("object ends in it")) }
    }

    /// Reads the next frame of content and returns its size decompressed; `None` after the last, when the rest has been
    /// checked.
    fn next_compressed(&mut self) -> Result<Option<u32>> {
        while let Some((compressed, decompressed)) = self.frames.get(self.next).copied() {
            let most = zstd::zstd_safe::compress_bound(DELTA_FRAME_BYTES);
            if compressed as usize > most || decompressed as usize > DELTA_FRAME_BYTES {
                return Err(self.corrupt("seek table has it larger than any frame"));
            }
            self.take(u64::from(compressed))?;
            if decompressed > 0 {
                return Ok(Some(decompressed));
            }
            let content = self.compressed.get(8..).filter(|_| u32_at(&self.compressed, 0) == Some(META_MAGIC));
            let content = content.ok_or_else(|| self.corrupt("it is not the metadata that belongs there"))?;
            if u32_at(&self.compressed, 4) != u32::try_from(content.len()).ok() {
                return Err(self.corrupt("length of the metadata differs from the seek table"));
            }
            check_meta(&self.name, content)?;
            self.next += 1;
        }
        let table = seek_table(&self.frames);
        self.take(table.len() as u64)?;
        if self.compressed != table {
            return Err(self.corrupt("what follows the last one is not the seek table"));
        }
        match self.source.read(&mut [0]) {
            Ok(0) => Ok(None),
            Ok(_) => Err(self.corrupt("something follows the seek table")),
            Err(error) => Err(error.downcast().unwrap_or_else(Error::io("read", &self.name))),
        }
    }

    /// Reads the next frame of content; false after the last.
    fn next_frame(&mut self) -> Result<bool> {
        self.content.clear();
        self.at = 0;
        let Some(decompressed) = self.next_compressed()? else { return Ok(false) };
        let mut content = std::mem::take(&mut self.content);
        decompress(&mut self.decompressor, &self.compressed, decompressed, &mut content)
            .map_err(|what| self.corrupt(&what))?;
        self.content = content;
        self.content_bytes += u64::from(decompressed);
        self.next += 1;
        Ok(true)
    }

    /// Reads everything for its checksums alone, several frames side by side, and returns how many bytes of content there
    /// are.
    pub fn check_all(mut self) -> Result<u64> {
        let workers = self.frames.len().clamp(1, lanes());
        std::thread::scope(|scope| {
            let mut lanes = Vec::new();
            for _ in 0..workers {
                let (todo, frames) = sync_channel::<(usize, Vec<u8>, u32)>(1);
                let decompressing = scope.spawn(move || {
                    let mut decompressor = zstd::bulk::Decompressor::new()
                        .map_err(|error| (0, format!("zstd cannot be set up: {error}")))?;
                    let mut content = Vec::new();
                    while let Ok((index, frame, size)) = frames.recv() {
                        decompress(&mut decompressor, &frame, size, &mut content).map_err(|what| (index, what))?;
                    }
                    Ok::<(), (usize, String)>(())
                });
                lanes.push((todo, decompressing));
            }
            let read = self.deal_out(&lanes.iter().map(|(todo, _)| todo.clone()).collect::<Vec<_>>());
            let mut damaged: Option<(usize, String)> = None;
            for (todo, decompressing) in lanes {
                drop(todo);
                let ended = |_| Error::Bug { what: "a decompressing thread ended unexpectedly".into() };
                if let Err(found) = decompressing.join().map_err(ended)? {
                    damaged = damaged.filter(|first| first.0 <= found.0).or(Some(found));
                }
            }
            // The frame that is damaged comes before whatever ended the reading.
            match damaged {
                Some((index, what)) => Err(Self { next: index, ..self }.corrupt(&what)),
                None => read,
            }
        })
    }

    /// Gives frames to threads in turn until one ends.
    fn deal_out(&mut self, lanes: &[SyncSender<(usize, Vec<u8>, u32)>]) -> Result<u64> {
        for lane in lanes.iter().cycle() {
            let Some(decompressed) = self.next_compressed()? else { break };
            self.content_bytes += u64::from(decompressed);
            if lane.send((self.next, std::mem::take(&mut self.compressed), decompressed)).is_err() {
                break;
            }
            self.next += 1;
        }
        Ok(self.content_bytes)
    }
}

/// Decompresses a frame that must have that size; what is wrong otherwise.
pub fn decompress(
    decompressor: &mut zstd::bulk::Decompressor<'_>,
    frame: &[u8],
    size: u32,
    content: &mut Vec<u8>,
) -> Result<(), String> {
    content.resize(size as usize, 0);
    match decompressor.decompress_to_buffer(frame, content.as_mut_slice()) {
        Ok(got) if got == size as usize => Ok(()),
        Ok(got) => Err(format!("compressed data is damaged: it has {got} bytes of content")),
        Err(error) => Err(format!("compressed data is damaged: {error}")),
    }
}

impl<R: Read> Read for CheckedReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(buf)?;
        self.consume(length);
        Ok(length)
    }
}

impl<R: Read> BufRead for CheckedReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.content.len() && self.next <= self.frames.len() {
            let more = self.next_frame().map_err(io::Error::other)?;
            if !more {
                self.next = self.frames.len() + 1;
            }
        }
        Ok(self.content.get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}
