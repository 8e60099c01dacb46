//! etcd's file formats, read and written without etcd.
//!
//! Everything that lies in an etcd member's data directory: the bbolt database ([`bolt`]) and the rows in it ([`mvcc`]),
//! the write-ahead log ([`wal`]), the raft snapshot file ([`snap`]), who the members are ([`membership`]), and the
//! directory as a whole ([`datadir`]).
//!
//! # Invariants
//! - Every decoder treats its input as hostile: it returns an [`Error`] that names the offset, it never panics, and it
//!   allocates no more than the size of the input justifies.
//! - Numbers are read with their byte order spelled out. bbolt files are host-endian and read as little-endian; files of
//!   big-endian hosts are refused by their magic.
//! - No async, no network, no clock, no `unsafe`.

#![forbid(unsafe_code)]

pub mod bolt;
mod cursor;
pub mod datadir;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod membership;
pub mod mvcc;
mod read_at;
pub mod snap;
mod snapshot_scan;
pub mod wal;

pub use cursor::{put_bytes_field, put_varint, put_varint_field};
pub use error::{Error, Result};
pub use read_at::ReadAt;
pub use snapshot_scan::{Scanned, SnapshotScan};

/// Protobuf wire reading with offsets, for callers that stream our own records.
pub mod wire {
    pub use crate::cursor::{Field, Fields, varint};
}
