//! bbolt database files: reading ([`Db`], [`Cursor`]), checking ([`Visited`], [`Db::check_small_buckets`]) and writing
//! ([`Builder`], for a whole file or for the tail of an existing one).
//!
//! A file is an array of pages of one size. Pages 0 and 1 are metas, every other page begins a *logical page* of
//! `1 + overflow` physical ones; only the first has a header. The format has been version 2 for all of etcd's life.
//!
//! # Invariants
//! - Reading checks what it walks over: page identity, element bounds, key order, the bounds a parent promises. What it
//!   returns is therefore in strictly ascending key order.
//! - [`Builder`] never emits a branch page with a single child: bbolt's own check accepts one, and a later compaction
//!   panics on it.
//! - Nothing here understands etcd's rows; that is [`crate::mvcc`].

mod page;
mod read;
mod write;

pub use page::Row;
pub(crate) use page::{Header as PageHeader, Kind};
pub use read::{BucketRoot, Cursor, Db, Visited};
pub use write::{Builder, Finished};

use crate::cursor::{u32_le, u64_le};
use crate::{Error, Result};

/// Size of the header at the start of every logical page.
pub(crate) const PAGE_HEADER_SIZE: usize = 16;
/// Size of one element of a leaf page, and of one of a branch page.
pub(crate) const ELEMENT_SIZE: usize = 16;
/// Size of the header of a bucket's value.
pub(crate) const BUCKET_HEADER_SIZE: usize = 16;
/// `freelist` in a meta whose free pages are found by walking the tree; etcd always writes this.
pub(crate) const NO_FREELIST: u64 = u64::MAX;
/// Smallest page size bbolt probes for.
pub const MIN_PAGE_SIZE: u32 = 1024;
/// Largest page size bbolt probes for.
pub const MAX_PAGE_SIZE: u32 = 16 << 20;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const META_SIZE: usize = 64;
const META_CHECKED: usize = 56;

/// A meta page: where everything else is.
///
/// | offset after the page header | type | field |
/// |---|---|---|
/// | 0 | u32 | magic 0xED0CDAED |
/// | 4 | u32 | version 2 |
/// | 8 | u32 | page size |
/// | 12 | u32 | flags, 0 |
/// | 16 | u64 | page of the root bucket |
/// | 24 | u64 | sequence of the root bucket, 0 |
/// | 32 | u64 | page of the freelist, or all ones when it is not kept |
/// | 40 | u64 | high-water mark: the first page never allocated |
/// | 48 | u64 | transaction id |
/// | 56 | u64 | FNV-1a of the 56 bytes before |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Bytes in a page.
    pub page_size: u32,
    /// Page of the root bucket.
    pub root: u64,
    /// Page of the freelist; `None` when it is not kept.
    pub freelist: Option<u64>,
    /// First page never allocated; the file is `high_water * page_size` bytes long, or longer.
    pub high_water: u64,
    /// Transaction that wrote this meta.
    pub txid: u64,
}

impl Meta {
    /// Decodes a meta from the start of its page, page header included. `offset` is where the page lies, for the error.
    pub fn decode(page: &[u8], offset: u64) -> Result<Self> {
        let have = page.len() as u64;
        let meta = page.get(PAGE_HEADER_SIZE..PAGE_HEADER_SIZE + META_SIZE).ok_or(Error::Truncated {
            what: "meta page",
            offset,
            need: (PAGE_HEADER_SIZE + META_SIZE) as u64,
            have,
        })?;
        let u32_at = |at| u32_le(meta, at).unwrap_or_default();
        let u64_at = |at| u64_le(meta, at).unwrap_or_default();
        if u32_at(0) != MAGIC {
            return Err(Error::corrupt(offset, format!("meta page has magic {:#010x}, not {MAGIC:#010x}", u32_at(0))));
        }
        let (expected, actual) = (u64_at(META_CHECKED), fnv1a(meta.get(..META_CHECKED).unwrap_or_default()));
        if expected != actual {
            return Err(Error::Checksum { what: "meta page", offset, expected, actual });
        }
        if u32_at(4) != VERSION {
            return Err(Error::Unsupported {
                what: format!("bbolt file version {}; this reads version {VERSION}", u32_at(4)),
            });
        }
        let page_size = u32_at(8);
        if !page_size.is_power_of_two() || !(MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
            return Err(Error::corrupt(offset, format!("meta page has page size {page_size}")));
        }
        let this = Self {
            page_size,
            root: u64_at(16),
            freelist: Some(u64_at(32)).filter(|freelist| *freelist != NO_FREELIST),
            high_water: u64_at(40),
            txid: u64_at(48),
        };
        if this.root < 2 || this.root >= this.high_water {
            return Err(Error::corrupt(
                offset,
                format!("root page {} is not below the high-water mark {}", this.root, this.high_water),
            ));
        }
        if this.freelist.is_some_and(|freelist| freelist < 2 || freelist >= this.high_water) {
            return Err(Error::corrupt(
                offset,
                format!("freelist page is not below the high-water mark {}", this.high_water),
            ));
        }
        if this.high_water.checked_mul(u64::from(page_size)).is_none() {
            return Err(Error::corrupt(offset, format!("high-water mark {} is absurd", this.high_water)));
        }
        Ok(this)
    }

    /// Bytes that the file must have.
    pub fn file_size(&self) -> u64 {
        self.high_water.saturating_mul(u64::from(self.page_size))
    }

    /// Encodes the meta as the whole page `index` (0 or 1).
    pub fn encode(&self, index: u64) -> Vec<u8> {
        let mut meta = Vec::with_capacity(META_SIZE);
        for value in [MAGIC, VERSION, self.page_size, 0] {
            meta.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.root, 0, self.freelist.unwrap_or(NO_FREELIST), self.high_water, self.txid] {
            meta.extend_from_slice(&value.to_le_bytes());
        }
        let checksum = fnv1a(&meta);
        meta.extend_from_slice(&checksum.to_le_bytes());
        let mut page = page::header(index, page::Kind::Meta, 0, 0).to_vec();
        page.extend_from_slice(&meta);
        page.resize(self.page_size as usize, 0);
        page
    }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests;
