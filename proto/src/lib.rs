//! The messages this project reads and writes: those etcd keeps on disk, and those of our own backup objects.
//!
//! Only shapes live here, generated from the .proto files beside this crate; what they mean and how they are checked is
//! `etcd-format`'s (disk) and `sidecar`'s (backups). Nothing here does I/O.

/// What etcd writes to `member/wal`, `member/snap` and the small buckets of its database.
///
/// Every field is explicitly optional because writers differ: etcd up to 3.6 writes zeros, 3.7 leaves them out, and a
/// reader must take both. A writer here sets `Some(0)` where all versions accept it.
#[expect(clippy::pedantic, reason = "generated code")]
pub mod disk {
    include!(concat!(env!("OUT_DIR"), "/etcd.disk.rs"));
}

/// The content of our own backup objects, version 1.
#[expect(clippy::pedantic, reason = "generated code")]
pub mod backup {
    include!(concat!(env!("OUT_DIR"), "/steward.backup.v1.rs"));
}

pub use prost::{DecodeError, Message};
