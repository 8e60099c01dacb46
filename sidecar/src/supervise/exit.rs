//! How the last etcd ended, kept beside its data: a pod that is made anew still knows.

use std::path::Path;

use etcd_format::datadir::Note;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How an etcd ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastExit {
    /// Exit code; 128 and the signal's number when it was killed.
    pub code: i32,
    /// How many milliseconds it ran.
    pub ran_ms: u64,
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: i64,
}

impl LastExit {
    /// `None` where nobody has said, or what was said cannot be read.
    pub(super) fn read(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&Note::LastExit.read(data_dir)?).ok()
    }

    /// Replaces what was said before. Nothing is made where there is no data.
    pub(super) fn write(&self, data_dir: &Path) -> Result<()> {
        if !data_dir.is_dir() {
            return Ok(());
        }
        let json = serde_json::to_vec(self)
            .map_err(|error| Error::Bug { what: format!("describe how etcd ended: {error}") })?;
        Note::LastExit.write(data_dir, &json).map_err(Error::format("say how etcd ended"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_is_kept() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        assert_eq!(LastExit::read(dir.path()), None);
        for code in [1, 137] {
            let exit = LastExit { code, ran_ms: 5, unix_ms: 7 };
            exit.write(dir.path())?;
            assert_eq!(LastExit::read(dir.path()), Some(exit));
        }
        Note::LastExit.write(dir.path(), b"{")?;
        assert_eq!(LastExit::read(dir.path()), None);
        let nowhere = dir.path().join("nowhere");
        LastExit { code: 0, ran_ms: 0, unix_ms: 0 }.write(&nowhere)?;
        assert!(!nowhere.exists());
        Ok(())
    }
}
