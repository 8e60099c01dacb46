//! Room on a disk.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Bytes that may still be written where a directory is, or is to be.
pub(crate) fn free(dir: &Path) -> Result<u64> {
    let dir = existing(dir);
    let stat =
        rustix::fs::statvfs(&dir).map_err(|error| Error::io("ask for the room in", dir.display())(error.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The nearest directory that exists.
pub(crate) fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.is_dir()).map_or_else(|| PathBuf::from("/"), Path::to_owned)
}

/// For a person.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// What compresses what it is given may take more than it has room for.
const COMPRESSING: [i64; 2] = [0x9123_683e, 0x2fc1_2fc1];

/// Fails where so many bytes cannot fit into each of these directories: a disk that is written full before that is found out has
/// others on it.
pub(crate) fn need<'d>(dirs: impl Iterator<Item = &'d Path>, bytes: u64) -> Result<()> {
    let mut disks: BTreeMap<u64, (&Path, u64)> = BTreeMap::new();
    for dir in dirs {
        let there = existing(dir);
        let metadata = std::fs::metadata(&there).map_err(Error::io("look at", there.display()))?;
        disks.entry(metadata.dev()).or_insert((dir, 0)).1 += bytes;
    }
    for (dir, bytes) in disks.into_values() {
        let there = existing(dir);
        let stat = rustix::fs::statfs(&there);
        let stat = stat.map_err(|error| Error::io("ask for the room in", there.display())(error.into()))?;
        // Some of what root may use is kept from others.
        let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
        let free = blocks.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or(0));
        let is_told = stat.f_blocks > 0 && !COMPRESSING.contains(&(stat.f_type as i64));
        if is_told && free < bytes {
            let (needed, free) = (mib(bytes), mib(free));
            let what =
                format!("{needed} needed for the database alone, {free} free; make room, or give another directory");
            let full = std::io::Error::new(std::io::ErrorKind::StorageFull, what);
            return Err(Error::io("restore into", dir.display())(full));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_said_before() {
        let dir = std::env::temp_dir().join("not/there/yet");
        let need = |bytes| need([dir.as_path(), dir.as_path()].into_iter(), bytes);
        assert!(need(1).is_ok());
        let refused = need(u64::MAX / 2).map_err(|error| error.to_string());
        assert!(refused.is_err_and(|error| error.contains("not/there/yet") && error.contains("MiB free")));
    }
}
