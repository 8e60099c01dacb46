//! What an earlier run found whole, so that the next one goes on from there.
//!
//! One line for each: the level, the size and the URL of an object, or `replay`, the revision reached, and the URL of the full
//! snapshot that a chain begins with. What was found damaged is looked at again.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::Level;
use crate::{Error, Result};

/// A file of what was found whole; without one nothing is remembered.
#[derive(Debug, Default)]
pub struct Journal {
    known: HashSet<String>,
    file: Option<(File, PathBuf)>,
}

impl Journal {
    /// Reads what there is, and goes on after it.
    pub fn open(path: &Path) -> Result<Self> {
        let is_other = |path: &Path| Error::invalid(format!("{} is there and is no journal of ours", path.display()));
        if path.metadata().is_ok_and(|there| !there.is_file()) {
            return Err(is_other(path));
        }
        let file = File::options().create(true).read(true).append(true).open(path);
        let mut file = file.map_err(Error::io("open the journal", path.display()))?;
        let mut head = Vec::new();
        Read::by_ref(&mut file)
            .take(8)
            .read_to_end(&mut head)
            .map_err(Error::io("read the journal", path.display()))?;
        let is_ours = |kind: &str| head.starts_with(kind.as_bytes()) || kind.as_bytes().starts_with(&head);
        if !["bytes ", "decode ", "replay "].into_iter().any(is_ours) {
            return Err(is_other(path));
        }
        let mut text = String::from_utf8(head).map_err(|_| is_other(path))?;
        file.read_to_string(&mut text).map_err(Error::io("read the journal", path.display()))?;
        if !text.is_empty() && !text.ends_with('\n') {
            // What a kill cut must not become the beginning of the next line.
            file.write_all(b"\n").map_err(Error::io("write to the journal", path.display()))?;
        }
        let known = text.lines().map(str::to_owned).collect();
        Ok(Self { known, file: Some((file, path.to_owned())) })
    }

    fn object(level: Level, url: &str, size: u64) -> String {
        let level = if level >= Level::Decode { "decode" } else { "bytes" };
        format!("{level} {size} {url}")
    }

    fn chain(url: &str, last: i64) -> String {
        format!("replay {last} {url}")
    }

    /// Whether an object was read at that level or a higher one.
    pub(super) fn has_object(&self, level: Level, url: &str, size: u64) -> bool {
        let at = |level| self.known.contains(&Self::object(level, url, size));
        at(Level::Decode) || level < Level::Decode && at(Level::Bytes)
    }

    /// Whether a chain was replayed.
    pub(super) fn has_chain(&self, url: &str, last: i64) -> bool {
        self.known.contains(&Self::chain(url, last))
    }

    /// An object is whole.
    pub(super) fn add_object(&mut self, level: Level, url: &str, size: u64) -> Result<()> {
        self.add(&Self::object(level, url, size))
    }

    /// A chain was replayed.
    pub(super) fn add_chain(&mut self, url: &str, last: i64) -> Result<()> {
        self.add(&Self::chain(url, last))
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io("write to the journal", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_whole_is_remembered_at_its_level() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("make", "a directory"))?;
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path)?;
        journal.add_object(Level::Bytes, "s3://a/b", 5)?;
        journal.add_object(Level::Replay, "s3://a/c", 6)?;
        journal.add_chain("s3://a/c", 9)?;
        let again = Journal::open(&path)?;
        assert!(again.has_object(Level::Bytes, "s3://a/b", 5) && !again.has_object(Level::Decode, "s3://a/b", 5));
        assert!(again.has_object(Level::Bytes, "s3://a/c", 6) && again.has_object(Level::Decode, "s3://a/c", 6));
        assert!(!again.has_object(Level::Bytes, "s3://a/b", 6));
        assert!(again.has_chain("s3://a/c", 9) && !again.has_chain("s3://a/c", 10));
        let other = dir.path().join("passwd");
        std::fs::write(&other, "root:x:0:0").map_err(Error::io("write", "it"))?;
        for path in [other.as_path(), dir.path(), Path::new("/dev/zero")] {
            assert!(
                Journal::open(path).is_err_and(|error| error.class() == crate::Class::Invalid),
                "{}",
                path.display()
            );
        }
        assert_eq!(std::fs::read(&other).map_err(Error::io("read", "it"))?, b"root:x:0:0");
        Ok(())
    }
}
