//! Continuous backup of an etcd member and restore without any etcd: the library behind the `sidecar` program.
//!
//! Reading order: [`catalog`] (what is in a store, and which objects make a chain), [`container`] (what an object is
//! wrapped in) and [`delta`] (what the changes look like in it) are pure, and so is [`gardener`], the same three for what the
//! predecessor wrote; [`object`] opens either. [`etcd`] and [`store`] reach the two worlds outside. [`snapshotter`] moves
//! data from the first to the second, [`restore`] from the second to a data directory; [`verify`] proves that it could.
//! [`compact`], [`copy`] and [`gc`] keep a store in shape without any etcd; what goes is decided by [`retention`], which is
//! pure. `kinship` tells whose a store is. [`initialize`] decides, before etcd starts, what becomes of its data; [`supervise`]
//! does that when it is asked to, and has the member backed up while it leads; [`server`] is how both are asked, [`launch`] who
//! asks and then starts etcd. `rotation` keeps certificates that work when files with others take their place. What is not
//! urgent keeps to a [`pace`]. [`doctor`] says whether a configuration fits the world; [`cli`] is what a person types.
//!
//! What nobody outside calls is public all the same: so it is documented, and built into the documentation.
//!
//! # Invariants
//! - An object is put once and never overwritten; its name says which revisions it holds. Only [`gc`] deletes backups.
//! - Memory is bounded by configuration, not by the size of the database or the rate of events.
//! - Library code returns errors; only `main` ends the process. An error's [`error::Class`] decides the exit code.

pub mod allocator;
pub mod catalog;
pub mod cli;
pub mod client;
pub mod compact;
pub mod container;
pub mod copy;
pub mod delta;
pub mod doctor;
pub mod error;
pub mod etcd;
pub mod gardener;
pub mod gc;
mod human;
pub mod initialize;
mod kinship;
pub mod launch;
pub mod metrics;
pub mod object;
pub mod pace;
pub mod restore;
pub mod retention;
mod room;
mod rotation;
mod scratch;
pub mod server;
mod small_file;
pub mod snapshotter;
pub mod store;
pub mod supervise;
pub mod verify;

pub use error::{Class, Error, Result};
