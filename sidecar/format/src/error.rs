//! The one error of this crate.

use std::io;
use std::path::PathBuf;

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with bytes, or with getting at them. Offsets count from the start of the file or message named.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb.
        op: &'static str,
        /// On which file; empty when the bytes have no path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The input ends before something it promises.
    #[error("{what} at offset {offset} needs {need} bytes, {have} are left")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// How many bytes it takes.
        need: u64,
        /// How many there are.
        have: u64,
    },
    /// A stored checksum does not fit the bytes it covers.
    #[error("{what} at offset {offset} has checksum {actual:#010x}, recorded is {expected:#010x}")]
    Checksum {
        /// What is covered.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// The recorded value.
        expected: u64,
        /// The computed value.
        actual: u64,
    },
    /// The bytes contradict the format.
    #[error("{what} (at offset {offset})")]
    Corrupt {
        /// What contradicts what.
        what: String,
        /// Where.
        offset: u64,
    },
    /// A well-formed input of a kind this code does not handle.
    #[error("unsupported: {what}")]
    Unsupported {
        /// What, and what is supported instead.
        what: String,
    },
    /// The state of things forbids what was asked; nothing was changed.
    #[error("{what}")]
    Precondition {
        /// What stands in the way, and what to do about it.
        what: String,
    },
    /// Revisions are missing between two that were given.
    #[error("revision {next} follows revision {have}: the revisions between are missing")]
    Gap {
        /// The last revision there is.
        have: i64,
        /// The next one that was given.
        next: i64,
    },
    /// The caller asked for something that cannot be.
    #[error("{what}")]
    Invalid {
        /// What, and what would be accepted.
        what: String,
    },
}

impl Error {
    pub(crate) fn io(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { op, path, source }
    }

    pub(crate) fn corrupt(offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into(), offset }
    }

    pub(crate) fn precondition(what: impl Into<String>) -> Self {
        Self::Precondition { what: what.into() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// Whether the bytes are at fault, rather than the caller or the operating system.
    pub fn is_corruption(&self) -> bool {
        matches!(self, Self::Truncated { .. } | Self::Checksum { .. } | Self::Corrupt { .. })
    }
}
