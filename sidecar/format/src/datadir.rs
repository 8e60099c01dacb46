//! A member's data directory as a whole: what lies where, whether it is sound ([`verify`]), and how a restored one comes
//! to be ([`Staged`]).
//!
//! ```text
//! DIR/member/snap/db                     the database
//! DIR/member/snap/TERM-INDEX.snap        raft snapshot
//! DIR/member/wal/SEQ-INDEX.wal           log segments
//! DIR/member.restoring/…                 ours, while a restore is under way
//! DIR/member.replaced-STAMP/…            ours, what a restore with `--replace` took the place of
//! ```
//!
//! # Invariants
//! - `DIR/member` is at every instant either what it was or the whole restored member: a restore writes beside it and
//!   swaps names last, when everything is synced; [`Behind`] appends behind what is in use and writes a meta page last.

mod append;
mod disk;
mod minor;
mod rewrite;
mod stage;
mod tail;
mod verify;

pub use append::{Appended, Behind, Facts, Held, changes};
pub use disk::{Disk, DiskWriter, RealDisk, Scratch};
pub use minor::Minor;
pub use rewrite::{Rewrite, Rewritten};
pub use stage::{Note, Staged, check_target, origin};
pub use tail::{Base, Change, Restored, Revision, Spec, Tail};
pub use verify::{
    Answered, Finding, Hold, Severity, Summary, Verdict, Verify, WantHash, hold, verify, verify_and_see,
    verify_database,
};

use std::path::{Path, PathBuf};

/// Paths inside a member directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    member: PathBuf,
}

impl Layout {
    /// Of the data directory `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { member: dir.join("member") }
    }

    pub(crate) fn of_member(member: PathBuf) -> Self {
        Self { member }
    }

    /// Everything of the member.
    pub fn member(&self) -> &Path {
        &self.member
    }

    /// Database and raft snapshots.
    pub fn snap(&self) -> PathBuf {
        self.member.join("snap")
    }

    /// Log segments.
    pub fn wal(&self) -> PathBuf {
        self.member.join("wal")
    }

    /// The database.
    pub fn db(&self) -> PathBuf {
        self.member.join("snap").join("db")
    }
}

#[cfg(test)]
mod tests;
