//! Room for work that takes a database's worth of disk.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::{Error, Result};

/// Held by who works in a directory; the kernel lets go of it however that ends.
const LOCK: &str = "lock";

/// A directory of one's own, gone when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one in `work_dir`, named after `prefix`. What killed runs left there under that name goes first.
    pub(crate) fn new(work_dir: &Path, prefix: &str) -> Result<Self> {
        remove_abandoned(work_dir, prefix);
        let dir = tempfile::Builder::new().prefix(prefix).tempdir_in(work_dir);
        let dir = dir.map_err(Error::io("make a directory in", work_dir.display()))?;
        let path = dir.path().join(LOCK);
        let lock = File::create(&path).map_err(Error::io("create", path.display()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| Error::io("lock", path.display())(error.into()))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// One that nobody holds the lock of is nobody's. Between making one and locking it lies a moment, in which it has no lock yet.
fn remove_abandoned(work_dir: &Path, prefix: &str) {
    for entry in std::fs::read_dir(work_dir).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        let Some(lock) = is_ours.then(|| File::open(entry.path().join(LOCK)).ok()).flatten() else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        match std::fs::remove_dir_all(entry.path()) {
            Ok(()) => tracing::info!(dir = %entry.path().display(), "remove what a killed run left"),
            Err(error) => tracing::warn!(%error, dir = %entry.path().display(), "what a killed run left stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_works_in_any_more_goes_and_nothing_else() -> Result<()> {
        let fail = |error| Error::io("make", "it")(error);
        let dir = tempfile::tempdir().map_err(fail)?;
        let (left, other) = (dir.path().join("sidecar-x-1"), dir.path().join("notes"));
        for place in [&left, &other] {
            std::fs::create_dir(place).map_err(fail)?;
            std::fs::write(place.join(LOCK), "").map_err(fail)?;
        }
        let first = Scratch::new(dir.path(), "sidecar-x-")?;
        assert!(!left.exists() && other.exists());
        let second = Scratch::new(dir.path(), "sidecar-x-")?;
        assert!(first.path().exists() && second.path().exists());
        Ok(())
    }
}
