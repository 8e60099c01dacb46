//! Content that waits on disk, compressed, until its first bytes and its hash are known.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::container::{self, FRAME_BYTES, LEVEL_FULL};
use crate::object::FullWriter;
use crate::{Error, Result};

/// Pieces of a frame's size waiting to be compressed, or decompressed and waiting to be hashed.
const PIECES_AHEAD: usize = 1;

/// What was written to [`Pieces`]: its first and its last piece as they are, what is between them compressed.
pub(super) struct Spool {
    first: Vec<u8>,
    last: Vec<u8>,
    /// Has no name, so that nothing is left of it however the process ends.
    file: File,
    /// Sizes of the frames in the file, compressed and decompressed.
    frames: Vec<(u32, u32)>,
    place: String,
}

impl Spool {
    /// Takes what `produce` writes; compressing goes on beside it.
    pub(super) fn fill<T>(dir: &Path, produce: impl FnOnce(Pieces) -> Result<(T, Pieces)>) -> Result<(T, Self)> {
        let place = dir.display().to_string();
        let file = tempfile::tempfile_in(dir).map_err(Error::io("make a file in", &place))?;
        let (out, pieces) = sync_channel(PIECES_AHEAD);
        let (produced, compressed) = std::thread::scope(|scope| {
            let compressing = scope.spawn(|| {
                // Goes with the thread, so that who writes pieces learns that it has ended.
                let pieces = pieces;
                let (mut out, mut frames) = (BufWriter::new(&file), Vec::new());
                container::compress_frames(LEVEL_FULL, &pieces, &mut |frame, content_bytes| {
                    frames.push((frame.len() as u32, content_bytes));
                    out.write_all(frame).map_err(Error::io("write a compressed database in", &place))
                })?;
                out.flush().map_err(Error::io("write a compressed database in", &place))?;
                Ok(frames)
            });
            let produced = produce(Pieces { first: None, piece: Vec::new(), out });
            let produced = produced.map(|(made, pieces)| (made, pieces.first.unwrap_or_default(), pieces.piece));
            (produced, compressing.join().map_err(|_| Error::Bug { what: "compressing ended unexpectedly".into() }))
        });
        // When compressing failed, what was to be compressed could not be written either; the cause is told.
        let frames = match (compressed?, produced) {
            (Err(error @ Error::Io { .. }), Err(_)) => return Err(error),
            (frames, produced) => produced.and_then(|produced| Ok((frames?, produced)))?,
        };
        let (frames, (made, first, last)) = frames;
        Ok((made, Self { first, last, file, frames, place }))
    }

    /// Gives everything to `writer`, from `start` on, which replaces the first bytes, to the sha256 of it all, which is put
    /// behind it as etcd does. What was compressed is decompressed to hash it, so that what is handed out is known to be
    /// readable.
    pub(super) fn empty(
        self,
        start: &[u8],
        writer: &mut FullWriter,
        out: &mut dyn FnMut(Bytes) -> Result<()>,
    ) -> Result<()> {
        let Self { mut first, mut last, mut file, frames, place } = self;
        if first.is_empty() {
            first = std::mem::take(&mut last);
        }
        first
            .get_mut(..start.len())
            .ok_or_else(|| Error::Bug { what: "a database of less than two pages".into() })?
            .copy_from_slice(start);
        let mut sha = Sha256::new();
        sha.update(&first);
        writer.write(&first)?;
        drop(first);
        file.rewind().map_err(Error::io("read a compressed database in", &place))?;
        let (to_hash, decompressed) = sync_channel(PIECES_AHEAD);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let to_hash = to_hash;
                let mut decompressor = zstd::bulk::Decompressor::new().map_err(Error::io("set up", "zstd"))?;
                for (compressed, size) in frames {
                    let (mut frame, mut content) = (vec![0; compressed as usize], Vec::new());
                    file.read_exact(&mut frame).map_err(Error::io("read a compressed database in", &place))?;
                    container::decompress(&mut decompressor, &frame, size, &mut content)
                        .map_err(|what| Error::corrupt(format!("compressed database in {place}: {what}")))?;
                    if to_hash.send((frame, content)).is_err() {
                        return Ok(());
                    }
                }
                Ok(())
            });
            let taken = decompressed.iter().try_for_each(|(frame, content): (Vec<u8>, Vec<u8>)| {
                sha.update(&content);
                writer.write_frame(&frame, &content)?;
                out(writer.take())
            });
            drop(decompressed);
            let read = reading.join().map_err(|_| Error::Bug { what: "decompressing ended unexpectedly".into() })?;
            taken.and(read)
        })?;
        sha.update(&last);
        writer.write(&last)?;
        writer.write(&sha.finalize())
    }
}

/// Takes what is written in pieces of a frame's size.
#[derive(Debug)]
pub(super) struct Pieces {
    first: Option<Vec<u8>>,
    piece: Vec<u8>,
    out: SyncSender<Vec<u8>>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == FRAME_BYTES {
            let full = std::mem::replace(&mut self.piece, Vec::with_capacity(FRAME_BYTES));
            match &self.first {
                None => self.first = Some(full),
                Some(_) => self.out.send(full).map_err(|_| io::Error::other("compressing has ended"))?,
            }
        }
        let taken = bytes.len().min(FRAME_BYTES - self.piece.len());
        self.piece.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        Ok(taken)
    }

    /// What is not a whole frame yet waits for more.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Layout;
    use proto::backup::ObjectMeta;

    /// Every way in which content can end at a piece or within one.
    #[test]
    fn what_goes_in_comes_out_with_its_start_replaced_and_its_hash_behind() {
        let dir = tempfile::tempdir().unwrap();
        for size in [8, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES, 5 * FRAME_BYTES + 77] {
            let mut content: Vec<u8> = (0..size).map(|n| (n / 7 % 251) as u8).collect();
            let ((), spool) = Spool::fill(dir.path(), |mut pieces| {
                content.chunks(10_007).try_for_each(|chunk| pieces.write_all(chunk)).unwrap();
                Ok(((), pieces))
            })
            .unwrap();
            let mut object = Vec::new();
            let mut writer = FullWriter::new(Layout::Steward, &ObjectMeta::default()).unwrap();
            let mut out = |bytes: Bytes| {
                object.extend_from_slice(&bytes);
                Ok(())
            };
            spool.empty(b"start", &mut writer, &mut out).unwrap();
            object.extend_from_slice(&writer.finish(&ObjectMeta::default()).unwrap());
            let mut found = Vec::new();
            container::Reader::new(object.as_slice(), "test").unwrap().read_to_end(&mut found).unwrap();
            content[..5].copy_from_slice(b"start");
            content.extend_from_slice(&Sha256::digest(&content));
            assert!(found == content, "{size} bytes");
        }
    }

    #[test]
    fn a_disk_that_fails_is_named_as_the_cause() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let error = Spool::fill(&gone, |pieces| Ok(((), pieces))).map(drop).unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
    }
}
