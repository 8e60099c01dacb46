//! What this project says and reads: its API and configuration, the messages of its backup objects, and those etcd keeps on
//! disk.
//!
//! Only shapes live here, most of them generated from the .proto files beside this crate; what they mean and how they are
//! checked is `etcd-format`'s (disk) and `sidecar`'s (backups, API). Nothing here does I/O.

pub mod config;

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

/// The API of the sidecar, version 1.
#[allow(clippy::pedantic, clippy::or_fun_call, missing_docs, unused_qualifications, reason = "generated code")]
pub mod sidecar {
    tonic::include_proto!("steward.sidecar.v1");

    trait Named: TryFrom<i32> {
        fn name(&self) -> &'static str;
    }

    macro_rules! named {
        ($($name:ident),*) => {
            $(impl Named for $name {
                fn name(&self) -> &'static str {
                    self.as_str_name()
                }
            })*
        };
    }

    named!(Action, Cause, Phase, Role, Kind, Level);

    /// A value of an enumeration by its name, one that is not known by its number.
    fn named<E: Named, S: serde::Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
        match E::try_from(*value) {
            Ok(known) => serializer.serialize_str(known.name()),
            Err(_) => serializer.serialize_i32(*value),
        }
    }

    /// Describes it, for reflection.
    pub const DESCRIPTOR: &[u8] = tonic::include_file_descriptor_set!("sidecar");
}

pub use prost::{DecodeError, Message};
