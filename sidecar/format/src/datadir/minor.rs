//! The minor versions of etcd and what tells their data apart.

use crate::bolt::Db;
use crate::mvcc::{CONF_STATE, META_BUCKET, STORAGE_VERSION, TERM};
use crate::{Error, ReadAt, Result};

/// A minor version of etcd whose data this code knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Minor {
    /// 3.4
    V3_4,
    /// 3.5
    V3_5,
    /// 3.6
    V3_6,
    /// 3.7
    V3_7,
}

impl Minor {
    /// All, oldest first.
    pub const ALL: [Self; 4] = [Self::V3_4, Self::V3_5, Self::V3_6, Self::V3_7];

    /// Parses `3.6` as well as `3.6.16`.
    pub fn parse(version: &str) -> Result<Self> {
        let mut parts = version.trim_start_matches('v').split('.');
        let minor = (parts.next(), parts.next());
        Self::ALL.into_iter().find(|known| minor == (Some("3"), known.as_str().strip_prefix("3."))).ok_or_else(|| {
            Error::invalid(format!("etcd version {version:?} is not supported; supported are 3.4, 3.5, 3.6 and 3.7"))
        })
    }

    /// Such as `3.6`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V3_4 => "3.4",
            Self::V3_5 => "3.5",
            Self::V3_6 => "3.6",
            Self::V3_7 => "3.7",
        }
    }

    /// The oldest minor that has what this database has, by the keys of its meta bucket.
    pub fn of_schema<R: ReadAt>(db: &Db<R>) -> Result<Self> {
        if let Some(version) = db.get(META_BUCKET, STORAGE_VERSION)? {
            return Self::parse(&String::from_utf8_lossy(&version));
        }
        let since_3_5 = db.get(META_BUCKET, TERM)?.is_some() || db.get(META_BUCKET, CONF_STATE)?.is_some();
        Ok(if since_3_5 { Self::V3_5 } else { Self::V3_4 })
    }
}

impl std::fmt::Display for Minor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
