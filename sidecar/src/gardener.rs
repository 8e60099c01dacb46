//! What gardener/etcd-backup-restore wrote, read as a chain like any other, and written for it to read.
//!
//! ```text
//! v2/<name>                      what it writes today
//! v1/Backup-<unix>/<name>        what it wrote before
//! name = Full|Incr - <start:08> - <last:08> - <unix seconds> [.gz|.zlib|.Z] [.final]
//! ```
//!
//! A full snapshot is etcd's own (the database, then its sha256), a delta a JSON array of events followed by the 32 bytes
//! of its sha256; either is compressed as its name says, or not at all. A full has *at least* the revision of its name:
//! the revision was asked for before the snapshot was taken.

mod codec;
mod events;
mod name;

pub use codec::{Codec, Decoder};
pub use events::{Encoded, Events, encode};
pub use name::{Name, Tree};
