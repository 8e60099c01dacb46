//! Making a data directory out of a snapshot and the changes after it.
//!
//! The order of calls is in the types: [`Staged::create`] → [`Staged::write_base`] → [`Base::into_tail`] → changes →
//! [`Tail::finish`](super::Tail::finish) → [`Staged::write_log`] → (verify) → [`Staged::commit`]. A `Staged` that is dropped before its commit
//! leaves nothing behind.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use proto::disk::{HardState, Metadata};
use sha2::{Digest, Sha256};

use super::disk::{Disk, DiskWriter};
use super::{Base, Layout};
use crate::bolt::{MAX_PAGE_SIZE, Meta};
use crate::membership::NewCluster;
use crate::snap::{self, SnapName};
use crate::wal::{self, SegmentName};
use crate::{Error, Result};

/// Size of the sha256 that etcd appends to a snapshot.
const HASH_SIZE: u64 = 32;
const RESTORING: &str = "member.restoring";
/// Lies in a member that was restored, and says from what. etcd does not look at it.
const ORIGIN: &str = "origin.json";
/// What a note has behind its name while it is written.
const NEW: &str = ".new";
/// Lies in a staged member until it is whole. Without it, what is staged is a member that was replaced and not moved on yet.
const UNFINISHED: &str = "unfinished";
/// Lies beside what is staged and has the inode of its directory: whole or not, what has that inode was not in its place yet.
const INODE: &str = "member.restoring.inode";

/// What whoever looks after a member writes beside it. etcd does not look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// What it has joined.
    Joined,
    /// How its etcd ended.
    LastExit,
}

impl Note {
    fn name(self) -> &'static str {
        match self {
            Self::Joined => "joined.json",
            Self::LastExit => "last-exit.json",
        }
    }

    fn is_one(name: &str) -> bool {
        let name = name.strip_suffix(NEW).unwrap_or(name);
        [Self::Joined, Self::LastExit].iter().any(|note| note.name() == name)
    }

    /// What it says; `None` when there is nothing that can be read.
    pub fn read(self, data_dir: &Path) -> Option<Vec<u8>> {
        read_note(&data_dir.join(self.name()))
    }

    /// Puts it there as a whole, in the place of what was there. Nobody else writes it, and what a kill leaves half written the
    /// next one replaces.
    pub fn write(self, data_dir: &Path, content: &[u8]) -> Result<()> {
        let (path, new) = (data_dir.join(self.name()), data_dir.join(format!("{}{NEW}", self.name())));
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        });
        written.map_err(Error::io("write", &new))?;
        std::fs::rename(&new, &path).map_err(Error::io("put in place", &path))?;
        File::open(data_dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", data_dir))
    }
}

/// A member directory that is being made beside its final place.
#[derive(Debug)]
pub struct Staged<D: Disk> {
    pub(super) disk: D,
    data_dir: PathBuf,
    layout: Layout,
    /// Directories made for this restore, outermost first.
    made: Vec<PathBuf>,
    /// Whether what lies in the staging directory is ours to remove.
    owns_staging: bool,
    /// Held so that no two restores work on one directory.
    lock: Option<File>,
}

impl<D: Disk> Staged<D> {
    /// Prepares to fill `data_dir`. What an earlier restore left unfinished there is removed. A directory with anything
    /// else in it is refused, unless `replace`; its member then moves aside when this one is committed.
    pub fn create(disk: D, data_dir: &Path, replace: bool) -> Result<Self> {
        let mut staged = Self {
            disk,
            data_dir: data_dir.to_owned(),
            layout: Layout::of_member(data_dir.join(RESTORING)),
            made: Vec::new(),
            owns_staging: false,
            lock: None,
        };
        staged.make_data_dir()?;
        staged.lock()?;
        staged.check_empty(replace)?;
        for dir in [staged.layout.member().to_owned(), staged.layout.snap(), staged.layout.wal()] {
            staged.disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
            staged.owns_staging = true;
            if dir == staged.layout.member() {
                let mark = dir.join(UNFINISHED);
                staged.disk.create_file(&mark).map_err(Error::io("create", &mark))?;
                staged.write_note()?;
            }
        }
        Ok(staged)
    }

    /// Removes what a restore that was killed left beside the member. A replaced member that it left under another name is
    /// kept. Fails where another restore is at work.
    pub fn clear_leftovers(disk: D, data_dir: &Path) -> Result<()> {
        let (staging, note) = (data_dir.join(RESTORING), data_dir.join(INODE));
        if !staging.exists() && !note.exists() {
            return Ok(());
        }
        let mut this = Self {
            disk,
            data_dir: data_dir.to_owned(),
            layout: Layout::of_member(staging.clone()),
            made: Vec::new(),
            owns_staging: false,
            lock: None,
        };
        this.lock()?;
        if staging.exists() {
            this.clear_staging(&staging)?;
        }
        if note.exists() { this.disk.remove_file(&note).map_err(Error::io("remove", &note)) } else { Ok(()) }
    }

    fn make_data_dir(&mut self) -> Result<()> {
        let missing: Vec<_> = self
            .data_dir
            .ancestors()
            .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
            .map(Path::to_owned)
            .collect();
        for dir in missing.into_iter().rev() {
            self.disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
            self.made.push(dir);
        }
        Ok(())
    }

    fn lock(&mut self) -> Result<()> {
        use rustix::fs::{FlockOperation, flock};
        let dir = &self.data_dir;
        let file = File::open(dir).map_err(Error::io("open", dir))?;
        // A file system without locks does not stop a restore.
        if flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(Error::precondition(format!("another restore works on {}; wait for it", dir.display())));
        }
        self.lock = Some(file);
        Ok(())
    }

    fn check_empty(&self, replace: bool) -> Result<()> {
        check_target(&self.data_dir, replace)?;
        let staging = self.data_dir.join(RESTORING);
        if staging.exists() { self.clear_staging(&staging) } else { Ok(()) }
    }

    fn write_note(&self) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let (staging, note) = (self.layout.member(), self.data_dir.join(INODE));
        let inode = std::fs::metadata(staging).map_err(Error::io("look at", staging))?.ino();
        if note.exists() {
            self.disk.remove_file(&note).map_err(Error::io("remove", &note))?;
        }
        let file = self.disk.create_file(&note).map_err(Error::io("create", &note))?;
        self.disk.write_at(&file, inode.to_string().as_bytes(), 0).map_err(Error::io("write", &note))
    }

    /// Whether what is staged never was in its place.
    fn is_noted(&self, staging: &Path) -> bool {
        use std::os::unix::fs::MetadataExt;
        let noted = std::fs::read_to_string(self.data_dir.join(INODE)).ok().and_then(|text| text.parse().ok());
        noted.is_some_and(|inode: u64| std::fs::metadata(staging).is_ok_and(|metadata| metadata.ino() == inode))
    }

    /// Removes an unfinished restore; keeps a replaced member that a crash left under that name.
    fn clear_staging(&self, staging: &Path) -> Result<()> {
        let is_ours = staging.join(UNFINISHED).exists() || self.is_noted(staging);
        if !is_ours && staging.join("snap/db").exists() {
            let free =
                (0..1000).map(|n| self.data_dir.join(format!("member.replaced-found-{n}"))).find(|path| !path.exists());
            let Some(aside) = free else { return Ok(()) };
            return self.disk.rename(staging, &aside).map_err(Error::io("move the replaced member to", &aside));
        }
        self.disk.remove_dir_all(staging).map_err(Error::io("remove the unfinished restore", staging))
    }

    /// Where the member is being made.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes the database of a snapshot from `source`, all but its first two pages, and checks its length and sha256.
    ///
    /// `source` gives etcd's snapshot: the database, then the sha256 of it. Without `require_hash` the sha256 may be
    /// missing, as in a copy of a stopped member's `db`. `progress` is told how many bytes were taken.
    pub fn write_base(
        &self,
        source: &mut dyn Read,
        require_hash: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Base<D>> {
        let path = self.layout.db();
        let file = self.disk.create_file(&path).map_err(Error::io("create", &path))?;
        let head = read_head(source)?;
        let meta = newest_meta(&head)?;
        let head_size = 2 * u64::from(meta.page_size);
        if meta.file_size() < head_size {
            return Err(Error::corrupt(
                0,
                format!("snapshot claims to be {} bytes long, less than its two meta pages", meta.file_size()),
            ));
        }
        let mut out = DiskWriter::new(&self.disk, file, head_size).map_err(Error::io("start writing", &path))?;
        let mut sha = Sha256::new();
        sha.update(&head);
        let mut left = meta.file_size() - head_size;
        let mut taken = head_size;
        // Hashing has a thread of its own, as writing has: decompressing is as much work as both.
        let (sha, out) = std::thread::scope(|scope| -> Result<_> {
            let (full, filled) = sync_channel::<Vec<u8>>(2);
            let (empty, emptied) = sync_channel::<Vec<u8>>(4);
            let path = &path;
            let writer = scope.spawn(move || -> Result<_> {
                while let Ok(buffer) = filled.recv() {
                    sha.update(&buffer);
                    io::Write::write_all(&mut out, &buffer).map_err(Error::io("write", path))?;
                    let _ = empty.try_send(buffer);
                }
                Ok((sha, out))
            });
            while left > 0 {
                let mut buffer = emptied.try_recv().unwrap_or_default();
                let want = left.min(1 << 20);
                buffer.resize(want as usize, 0);
                source.read_exact(&mut buffer).map_err(read_error(taken, left))?;
                left -= want;
                taken += want;
                progress(want);
                if full.send(buffer).is_err() {
                    break;
                }
            }
            drop(full);
            writer.join().unwrap_or_else(|_| Err(Error::invalid("the writing thread ended unexpectedly")))
        })?;
        let digest: [u8; 32] = sha.finalize().into();
        check_trailer(source, &digest, meta.file_size(), require_hash)?;
        let file = out.into_file().map_err(Error::io("write", &path))?;
        Ok(Base::new(self.disk.clone(), path, file, head, meta))
    }

    /// Copies the finished database of another member of the same cluster.
    pub fn copy_database(&self, from: &Self) -> Result<()> {
        let (source, path) = (from.layout.db(), self.layout.db());
        let mut input = File::open(&source).map_err(Error::io("open", &source))?;
        let file = self.disk.create_file(&path).map_err(Error::io("create", &path))?;
        let mut out = DiskWriter::new(&self.disk, file, 0).map_err(Error::io("start writing", &path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = input.read(&mut buffer).map_err(Error::io("read", &source))?;
            let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            io::Write::write_all(&mut out, bytes).map_err(Error::io("write", &path))?;
        }
        out.into_file().map(drop).map_err(Error::io("write", &path))
    }

    /// Writes log and raft snapshot of the member `name` of `cluster`.
    pub fn write_log(&self, cluster: &NewCluster, name: &str) -> Result<()> {
        let member = cluster.member(name)?;
        let members = cluster.members();
        let count = members.len() as u64;
        let metadata = Metadata { node_id: Some(member.id.0), cluster_id: Some(cluster.id().0) };
        let vote = members.first().map(|member| member.id.0);
        let state = HardState { term: Some(1), vote, commit: Some(count) };
        let conf_state = cluster.conf_state();
        let segment = wal::first_segment(metadata, &cluster.conf_changes(), state, &conf_state);
        let snapshot = SnapName { term: 1, index: count };
        let files = [
            (self.layout.wal().join(SegmentName { seq: 0, index: 0 }.to_string()), segment),
            (self.layout.snap().join(snapshot.to_string()), snap::encode(members, &conf_state, snapshot)),
        ];
        files.iter().try_for_each(|(path, bytes)| self.write_file(path, bytes))
    }

    /// Leaves word of what the member is restored from, for [`origin`].
    pub fn write_origin(&self, what: &[u8]) -> Result<()> {
        self.write_file(&self.layout.member().join(ORIGIN), what)
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let file = self.disk.create_file(path).map_err(Error::io("create", path))?;
        self.disk.write_at(&file, bytes, 0).map_err(Error::io("write", path))?;
        self.disk.sync_file(&file).map_err(Error::io("sync", path))
    }

    /// Makes the database durable. May run while it is being verified.
    pub fn sync_database(&self) -> Result<()> {
        let path = self.layout.db();
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        self.disk.sync_file(&file).map_err(Error::io("sync", &path))
    }

    /// Puts the members in their places, all or none, and returns where those before them went. `stamp` makes these names
    /// unique, such as a time. [`Staged::sync_database`] must have been called on each.
    pub fn commit(mut members: Vec<Self>, stamp: &str) -> Result<Vec<PathBuf>> {
        members.iter().try_for_each(Self::seal)?;
        let mut replaced: Vec<Option<PathBuf>> = Vec::new();
        for member in &mut members {
            match member.place(stamp) {
                Ok(aside) => replaced.push(aside),
                Err(error) => {
                    // Each is tried, whatever becomes of the others.
                    let failed: Vec<String> = members
                        .iter_mut()
                        .zip(&replaced)
                        .filter_map(|(placed, aside)| placed.take_back(aside.as_deref()).err())
                        .map(|error| error.to_string())
                        .collect();
                    if failed.is_empty() {
                        return Err(error);
                    }
                    return Err(Error::precondition(format!(
                        "{error}; and what was put in place before could not be taken back: {}",
                        failed.join("; ")
                    )));
                }
            }
        }
        for member in &mut members {
            member.made.clear();
            let _ = member.disk.remove_file(&member.data_dir.join(INODE));
        }
        Ok(replaced.into_iter().flatten().collect())
    }

    /// Makes everything in the member durable and marks it as whole.
    fn seal(&self) -> Result<()> {
        let mark = self.layout.member().join(UNFINISHED);
        self.disk.remove_file(&mark).map_err(Error::io("remove", &mark))?;
        for dir in [self.layout.snap(), self.layout.wal(), self.layout.member().to_owned(), self.data_dir.clone()] {
            self.disk.sync_dir(&dir).map_err(Error::io("sync", &dir))?;
        }
        for dir in &self.made {
            let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            self.disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
        }
        Ok(())
    }

    /// Swaps names, and says under which one a member that was there is now. After an error everything is where it was.
    fn place(&mut self, stamp: &str) -> Result<Option<PathBuf>> {
        let (from, to) = (self.layout.member().to_owned(), self.member());
        let mut replaced = None;
        if to.exists() {
            let aside = self.data_dir.join(format!("member.replaced-{stamp}"));
            if aside.exists() {
                return Err(Error::precondition(format!("{} exists already; move it away", aside.display())));
            }
            match self.disk.exchange(&from, &to) {
                // From here on the restored member is in place and what `from` names is the old one.
                Ok(()) => self.disk.rename(&from, &aside).map_err(|error| {
                    let _ = self.disk.exchange(&from, &to);
                    Error::io("move the replaced member to", &aside)(error)
                })?,
                // A file system that cannot swap names: for a moment there is no member, and both lie beside.
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                    self.disk.rename(&to, &aside).map_err(Error::io("move the replaced member to", &aside))?;
                    self.disk.rename(&from, &to).map_err(|error| {
                        let _ = self.disk.rename(&aside, &to);
                        Error::io("move the restored member to", &to)(error)
                    })?;
                }
                Err(error) => return Err(Error::io("swap in the restored member at", &to)(error)),
            }
            replaced = Some(aside);
        } else {
            self.disk.rename(&from, &to).map_err(Error::io("move the restored member to", &to))?;
        }
        self.owns_staging = false;
        if let Err(error) = self.disk.sync_dir(&self.data_dir) {
            self.take_back(replaced.as_deref())?;
            return Err(Error::io("sync", &self.data_dir)(error));
        }
        Ok(replaced)
    }

    /// Undoes [`Staged::place`].
    fn take_back(&mut self, replaced: Option<&Path>) -> Result<()> {
        let (from, to) = (self.layout.member().to_owned(), self.member());
        // Without the mark it would pass for a replaced member, should a crash come before it is removed.
        let mark = to.join(UNFINISHED);
        self.disk.create_file(&mark).map_err(Error::io("create", &mark))?;
        self.disk.rename(&to, &from).map_err(Error::io("take the restored member back to", &from))?;
        self.owns_staging = true;
        if let Some(aside) = replaced {
            self.disk.rename(aside, &to).map_err(Error::io("move the replaced member back to", &to))?;
        }
        self.disk.sync_dir(&self.data_dir).map_err(Error::io("sync", &self.data_dir))
    }

    fn member(&self) -> PathBuf {
        self.data_dir.join("member")
    }
}

/// What [`Staged::write_origin`] left in a data directory; `None` when nothing that can be read.
pub fn origin(data_dir: &Path) -> Option<Vec<u8>> {
    read_note(&data_dir.join("member").join(ORIGIN))
}

fn read_note(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    // Of a pipe that somebody put there nothing would ever come.
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    // It is a line or two, whoever wrote it.
    File::open(path).ok()?.take(64 << 10).read_to_end(&mut bytes).ok().map(|_| bytes)
}

/// Fails where a restore would refuse to put a member: into a directory with something in it, or under a running etcd.
/// Changes nothing.
pub fn check_target(data_dir: &Path, replace: bool) -> Result<()> {
    if !data_dir.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(data_dir).map_err(Error::io("list", data_dir))? {
        let name = entry.map_err(Error::io("list", data_dir))?.file_name();
        match name.to_str() {
            Some(RESTORING | INODE | "lost+found") => {}
            Some(name) if Note::is_one(name) => {}
            Some(name) if name.starts_with("member.replaced-") => {}
            _ if replace => {}
            _ => {
                return Err(Error::precondition(format!(
                    "data directory {} is not empty: it has {}; choose another, or move the old member aside with --replace",
                    data_dir.display(),
                    name.to_string_lossy()
                )));
            }
        }
    }
    if replace { super::verify::hold(data_dir).map(drop) } else { Ok(()) }
}

impl<D: Disk> Drop for Staged<D> {
    fn drop(&mut self) {
        // Best effort: what cannot be removed now is removed by the next restore.
        if self.owns_staging {
            // The note stays as long as there is something that it is about.
            if self.disk.remove_dir_all(self.layout.member()).is_ok() {
                let _ = self.disk.remove_file(&self.data_dir.join(INODE));
            }
        }
        for dir in self.made.iter().rev() {
            let _ = self.disk.remove_dir(dir);
        }
    }
}

/// What the source of a snapshot says passes through as [`Error::Io`]; only its early end is damage.
fn read_error(offset: u64, left: u64) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        if source.kind() == io::ErrorKind::UnexpectedEof && source.get_ref().is_none_or(|inner| !inner.is::<Error>()) {
            Error::corrupt(offset, format!("snapshot ends early: {left} more bytes were to come"))
        } else {
            Error::Io { op: "read", path: "snapshot".into(), source }
        }
    }
}

/// Reads both meta pages.
fn read_head(source: &mut dyn Read) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    source.take(1024).read_to_end(&mut head).map_err(read_error(0, 1024))?;
    let page_size = Meta::decode(&head, 0)?.page_size.min(MAX_PAGE_SIZE);
    let rest = u64::from(page_size) * 2 - head.len() as u64;
    source.take(rest).read_to_end(&mut head).map_err(read_error(1024, rest))?;
    if (head.len() as u64) < u64::from(page_size) * 2 {
        return Err(Error::Truncated {
            what: "meta pages of the snapshot",
            offset: 0,
            need: u64::from(page_size) * 2,
            have: head.len() as u64,
        });
    }
    Ok(head)
}

/// The meta in force. In a snapshot both say the same; in a copy of a member's `db` either may be the newer one.
fn newest_meta(head: &[u8]) -> Result<Meta> {
    let first = Meta::decode(head, 0)?;
    let offset = u64::from(first.page_size);
    let second = head.get(first.page_size as usize..).map(|page| Meta::decode(page, offset));
    Ok(match second {
        Some(Ok(second)) if second.page_size == first.page_size && second.txid > first.txid => second,
        _ => first,
    })
}

/// What follows the database: its sha256, or, in a copy of a live file, pages beyond the high-water mark.
fn check_trailer(source: &mut dyn Read, digest: &[u8; 32], size: u64, require_hash: bool) -> Result<()> {
    let mut trailer = Vec::new();
    source.take(HASH_SIZE + 1).read_to_end(&mut trailer).map_err(read_error(size, HASH_SIZE))?;
    if trailer.len() as u64 == HASH_SIZE {
        if trailer == digest || !require_hash {
            return Ok(());
        }
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        return Err(Error::Checksum {
            what: "snapshot (first 8 bytes of its sha256)",
            offset: 0,
            expected: number(&trailer),
            actual: number(digest),
        });
    }
    if require_hash {
        let have = match trailer.len() {
            0 => "no sha256 follows it".to_owned(),
            33 => "more than a sha256 follows it".to_owned(),
            some => format!("only {some} of 32 bytes of its sha256 follow it"),
        };
        return Err(Error::corrupt(
            size,
            format!("snapshot is not whole: {have}; a copy of a stopped member's db needs --skip-hash-check"),
        ));
    }
    Ok(())
}
