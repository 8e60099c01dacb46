//! The operations a restore changes a disk with, behind a trait so that a test can stop it after any of them.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Everything a restore does to the disk. A handle: clones are of the same disk.
pub trait Disk: Clone + Send + Sync + 'static {
    /// Makes a directory, mode 0700; parents must exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a file, mode 0600, that must not exist, for reading and writing.
    fn create_file(&self, path: &Path) -> io::Result<File>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync_file(&self, file: &File) -> io::Result<()>;
    /// Has the kernel write what it holds of a file that is still being written.
    fn write_back(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames; the new name must not exist.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Swaps two names in one step.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    /// Removes a directory with all that is in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The disk of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system knows the flag; a directory that is not empty is never replaced anyway.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => std::fs::rename(from, to),
            result => Ok(result?),
        }
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }
}

/// The disk of this machine, for what nobody needs after a crash: nothing is synced.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scratch;

impl Disk for Scratch {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        RealDisk.create_file(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        RealDisk.write_at(file, bytes, offset)
    }

    fn sync_file(&self, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn write_back(&self, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        RealDisk.exchange(a, b)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
}

/// Sequential buffered writing to a file of a [`Disk`], from any offset. Writing has a thread of its own, so that whoever
/// produces the bytes does not wait while the kernel copies them.
#[derive(Debug)]
pub struct DiskWriter {
    buffer: Vec<u8>,
    /// Taken when the writer ends.
    thread: Option<WriterThread>,
}

#[derive(Debug)]
struct WriterThread {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    handle: JoinHandle<io::Result<File>>,
}

impl WriterThread {
    /// Waits for everything to be written. What went wrong comes out here.
    fn end(self) -> io::Result<File> {
        drop(self.full);
        self.handle.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread ended unexpectedly")))
    }
}

impl DiskWriter {
    const BUFFER: usize = 1 << 20;
    /// Buffers on their way to the disk.
    const AHEAD: usize = 2;

    /// Writes from `offset` on.
    pub fn new(disk: &impl Disk, file: File, offset: u64) -> io::Result<Self> {
        let disk = disk.clone();
        let (full, filled) = sync_channel::<Vec<u8>>(Self::AHEAD);
        let (emptied, empty) = sync_channel(Self::AHEAD + 1);
        let mut writeback = Writeback::new(&disk, &file)?;
        let write = move || {
            let mut offset = offset;
            while let Ok(mut buffer) = filled.recv() {
                disk.write_at(&file, &buffer, offset)?;
                offset += buffer.len() as u64;
                writeback.wrote(buffer.len() as u64);
                buffer.clear();
                let _ = emptied.try_send(buffer);
            }
            writeback.finish()?;
            Ok(file)
        };
        let handle = std::thread::Builder::new().name("write".into()).spawn(write)?;
        let buffer = Vec::with_capacity(Self::BUFFER);
        Ok(Self { buffer, thread: Some(WriterThread { full, empty, handle }) })
    }

    fn send(&mut self) -> io::Result<()> {
        let Some(thread) = &self.thread else { return Err(io::Error::other("the writer has failed before")) };
        let next = thread.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(Self::BUFFER));
        if thread.full.send(std::mem::replace(&mut self.buffer, next)).is_ok() {
            return Ok(());
        }
        self.thread.take().map_or(Ok(()), |thread| thread.end().map(drop))?;
        Err(io::Error::other("the writing thread ended early"))
    }

    /// Waits until everything is written and gives the file back.
    pub fn into_file(mut self) -> io::Result<File> {
        self.flush()?;
        match self.thread.take() {
            Some(thread) => thread.end(),
            None => Err(io::Error::other("the writer has failed before")),
        }
    }
}

impl Drop for DiskWriter {
    /// Nothing is written any more once it is gone.
    fn drop(&mut self) {
        let _ = self.thread.take().map(WriterThread::end);
    }
}

impl Write for DiskWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.buffer.is_empty() && self.buffer.len() + bytes.len() > Self::BUFFER {
            self.send()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    /// Hands everything on to be written; that it was is known when [`DiskWriter::into_file`] returns.
    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}

/// Has the kernel write while we still produce, so that the sync at the end does not find everything still to do.
///
/// The kernel reports a failed write to one sync only, which may be one of these: an error is kept and comes out of
/// [`Writeback::finish`].
#[derive(Debug)]
struct Writeback {
    kick: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
    since: u64,
}

impl Writeback {
    const EVERY: u64 = 32 << 20;

    fn new(disk: &impl Disk, file: &File) -> io::Result<Self> {
        let (disk, file) = (disk.clone(), file.try_clone()?);
        let (kick, kicked) = sync_channel::<()>(1);
        // Ends when the writer is dropped.
        let thread = std::thread::Builder::new().name("writeback".into()).spawn(move || {
            let mut first = Ok(());
            while kicked.recv().is_ok() {
                first = first.and(disk.write_back(&file));
            }
            first
        })?;
        Ok(Self { kick, thread, since: 0 })
    }

    fn wrote(&mut self, bytes: u64) {
        self.since += bytes;
        if self.since >= Self::EVERY {
            self.since = 0;
            // Full means that a sync is under way and another is asked for already.
            let _ = self.kick.try_send(());
        }
    }

    fn finish(self) -> io::Result<()> {
        drop(self.kick);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the writeback thread ended unexpectedly")))
    }
}
