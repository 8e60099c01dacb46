//! Room on a disk.

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

/// Fails where so many bytes cannot fit: a disk that is written full before that is found out has others on it.
pub(crate) fn need(dir: &Path, bytes: u64) -> Result<()> {
    let free = free(dir)?;
    if free >= bytes {
        return Ok(());
    }
    let what = format!(
        "{} needed for the database alone, {} free; make room, or give another directory",
        mib(bytes),
        mib(free)
    );
    let full = std::io::Error::new(std::io::ErrorKind::StorageFull, what);
    Err(Error::io("restore into", dir.display())(full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_said_before() {
        let dir = std::env::temp_dir().join("not/there/yet");
        assert!(need(&dir, 1).is_ok());
        let refused = need(&dir, u64::MAX).map_err(|error| error.to_string());
        assert!(refused.is_err_and(|error| error.contains("not/there/yet") && error.contains("MiB free")));
    }
}
