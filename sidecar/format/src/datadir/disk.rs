//! The operations a restore changes a disk with, behind a trait so that a test can stop it after any of them.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

/// Everything a restore does to the disk.
pub trait Disk: Sync {
    /// Makes a directory, mode 0700; parents must exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a file, mode 0600, that must not exist, for reading and writing.
    fn create_file(&self, path: &Path) -> io::Result<File>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync_file(&self, file: &File) -> io::Result<()>;
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

/// Sequential buffered writing to a file of a [`Disk`], from any offset.
#[derive(Debug)]
pub struct DiskWriter<'d, D: ?Sized> {
    disk: &'d D,
    file: File,
    offset: u64,
    buffer: Vec<u8>,
    writeback: Writeback,
}

impl<'d, D: Disk + ?Sized> DiskWriter<'d, D> {
    const BUFFER: usize = 1 << 20;

    /// Writes from `offset` on.
    pub fn new(disk: &'d D, file: File, offset: u64) -> io::Result<Self> {
        let writeback = Writeback::new(&file)?;
        Ok(Self { disk, file, offset, buffer: Vec::with_capacity(Self::BUFFER), writeback })
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.write_at(&self.file, bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        self.writeback.wrote(bytes.len() as u64);
        Ok(())
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.put(&buffer);
        buffer.clear();
        self.buffer = buffer;
        result
    }

    /// Flushes and gives the file back.
    pub fn into_file(mut self) -> io::Result<File> {
        self.flush()?;
        self.writeback.finish()?;
        Ok(self.file)
    }
}

/// Has the kernel write while we still produce, so that the sync at the end does not find everything still to do.
///
/// The kernel reports a failed write to one sync only, which may be one of these: an error is kept and comes out of
/// [`Writeback::finish`].
#[derive(Debug)]
struct Writeback {
    kick: std::sync::mpsc::SyncSender<()>,
    thread: std::thread::JoinHandle<io::Result<()>>,
    since: u64,
}

impl Writeback {
    const EVERY: u64 = 32 << 20;

    fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (kick, kicked) = std::sync::mpsc::sync_channel(1);
        // Ends when the writer is dropped.
        let thread = std::thread::Builder::new().name("writeback".into()).spawn(move || {
            let mut first = Ok(());
            while kicked.recv().is_ok() {
                first = first.and(file.sync_data());
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

impl<D: Disk + ?Sized> Write for DiskWriter<'_, D> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.buffer.is_empty() && self.buffer.len() + bytes.len() > Self::BUFFER {
            self.drain()?;
        }
        if bytes.len() >= Self::BUFFER {
            self.put(bytes)?;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.drain() }
    }
}
