//! Looking at etcd's snapshot while it streams by: whether it is whole, and which revision exactly it has.
//!
//! The stream is the database file in file order, so a page is seen before anything says whether it is in use. What is
//! kept is therefore small facts about pages that *look* like something: of branch pages their last child, of leaf pages
//! the last revision, and only when that is not below what the live member had before the stream began. Once the stream
//! has ended, the walk from the root down the right edge settles which of these are real.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

use crate::bolt::{ELEMENT_SIZE, Kind, Meta, PageHeader};
use crate::cursor::{u32_le, u64_be, u64_le};
use crate::mvcc::{AUTH_BUCKET, AUTH_REVISION, Compaction, KEY_BUCKET};
use crate::{Error, Result, bolt, mvcc};

/// Pages of the root bucket are kept whole; a root larger than this is not etcd's.
const MOST_ROOT_BYTES: usize = 8 << 20;

/// What a snapshot turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// Its current revision.
    pub revision: i64,
    /// How far it is compacted.
    pub compaction: Compaction,
    /// Auth revision, 0 when auth was never touched.
    pub auth_revision: u64,
    /// Length of the stream, sha256 included.
    pub bytes: u64,
}

/// Takes the bytes of Maintenance.Snapshot in order.
#[derive(Debug)]
pub struct SnapshotScan {
    least_revision: i64,
    /// Bytes of the page under way.
    page: Vec<u8>,
    seen: u64,
    meta: Option<Meta>,
    sha: Sha256,
    trailer: Vec<u8>,
    last_child: HashMap<u64, u64>,
    last_revision: HashMap<u64, i64>,
    /// Last keys that lie on an overflow page still to come: file offset → page, bytes so far.
    pending_keys: BTreeMap<u64, (u64, Vec<u8>)>,
    /// Pages of the root bucket: page → bytes wanted, bytes so far.
    root_pages: BTreeMap<u64, (usize, Vec<u8>)>,
    root_bytes: usize,
}

impl SnapshotScan {
    /// `least_revision` is what the member said its revision was before the stream was opened.
    pub fn new(least_revision: i64) -> Self {
        Self {
            least_revision,
            page: Vec::new(),
            seen: 0,
            meta: None,
            sha: Sha256::new(),
            trailer: Vec::new(),
            last_child: HashMap::new(),
            last_revision: HashMap::new(),
            pending_keys: BTreeMap::new(),
            root_pages: BTreeMap::new(),
            root_bytes: 0,
        }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (want, database_left) = match &self.meta {
                None => (1024 - self.page.len(), u64::MAX),
                Some(meta) => {
                    let left = meta.file_size().saturating_sub(self.seen);
                    ((meta.page_size as usize).saturating_sub(self.page.len()), left)
                }
            };
            if database_left == 0 {
                self.trailer.extend_from_slice(bytes.get(..bytes.len().min(64)).unwrap_or_default());
                if self.trailer.len() > 32 {
                    return Err(Error::corrupt(self.seen, "snapshot stream goes on after its sha256"));
                }
                return Ok(());
            }
            let (head, rest) = bytes.split_at(want.min(bytes.len()));
            self.page.extend_from_slice(head);
            self.sha.update(head);
            self.seen += head.len() as u64;
            bytes = rest;
            match &self.meta {
                None if self.page.len() == 1024 => self.meta = Some(Meta::decode(&self.page, 0)?),
                Some(meta) if self.page.len() == meta.page_size as usize => {
                    let id = self.seen / u64::from(meta.page_size) - 1;
                    let page = std::mem::take(&mut self.page);
                    self.look_at(id, &page);
                    self.page = page;
                    self.page.clear();
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn look_at(&mut self, id: u64, page: &[u8]) {
        let Some(meta) = self.meta else { return };
        let size = page.len() as u64;
        let start = id * size;
        self.continue_pending(id, start, page);
        let Ok(header) = PageHeader::decode(page, start) else { return };
        if id < 2 || header.id != id || header.count == 0 || u64::from(header.overflow) >= meta.high_water - id {
            return;
        }
        let first = bolt::PAGE_HEADER_SIZE;
        let last = first + (usize::from(header.count) - 1) * ELEMENT_SIZE;
        let is_bucket = header.kind == Kind::Leaf && u32_le(page, first) == Some(1);
        if id == meta.root || is_bucket {
            let want = (header.overflow as usize + 1).saturating_mul(page.len());
            self.root_bytes = self.root_bytes.saturating_add(want);
            // The root in force counts however many old ones there are; one that is so large is none of etcd's.
            if self.root_bytes <= MOST_ROOT_BYTES || (id == meta.root && want <= MOST_ROOT_BYTES) {
                self.root_pages.insert(id, (want, page.to_vec()));
            }
        }
        match header.kind {
            Kind::Branch => {
                if let Some(child) = u64_le(page, last + 8) {
                    self.last_child.insert(id, child);
                }
            }
            Kind::Leaf if !is_bucket => {
                let (Some(position), Some(key_size)) = (u32_le(page, last + 4), u32_le(page, last + 8)) else {
                    return;
                };
                if key_size == 17 || key_size == 18 {
                    let key_start = last.saturating_add(position as usize);
                    let have = page.get(key_start..(key_start + 17).min(page.len())).unwrap_or_default();
                    if have.len() == 17 {
                        self.saw_last_key(id, have);
                    } else if key_start < (header.overflow as usize + 1).saturating_mul(page.len()) {
                        self.pending_keys.insert(start + key_start as u64, (id, have.to_vec()));
                    }
                }
            }
            _ => {}
        }
    }

    fn saw_last_key(&mut self, page: u64, key: &[u8]) {
        if key.get(8) != Some(&b'_') {
            return;
        }
        if let Some(main) =
            u64_be(key, 0).and_then(|main| i64::try_from(main).ok()).filter(|main| *main >= self.least_revision)
        {
            self.last_revision.insert(page, main);
        }
    }

    fn continue_pending(&mut self, id: u64, start: u64, page: &[u8]) {
        for (want, bytes) in self.root_pages.values_mut() {
            if bytes.len() < *want {
                bytes.extend_from_slice(page);
            }
        }
        let end = start + page.len() as u64;
        let mut done = Vec::new();
        for (offset, (leaf, bytes)) in &mut self.pending_keys {
            let next = offset + bytes.len() as u64;
            if next >= end {
                break;
            }
            let from = next.saturating_sub(start) as usize;
            let to = (from + 17 - bytes.len()).min(page.len());
            bytes.extend_from_slice(page.get(from..to).unwrap_or_default());
            if bytes.len() == 17 {
                done.push((*offset, *leaf));
            }
        }
        for (offset, leaf) in done {
            if let Some((_, key)) = self.pending_keys.remove(&offset)
                && leaf != id
            {
                self.saw_last_key(leaf, &key);
            }
        }
    }

    /// To be called at the end of the stream.
    pub fn finish(self) -> Result<Scanned> {
        let Some(meta) = self.meta else {
            return Err(Error::Truncated { what: "snapshot stream", offset: 0, need: 1024, have: self.seen });
        };
        let need = meta.file_size() + 32;
        let have = self.seen + self.trailer.len() as u64;
        if have < need {
            return Err(Error::Truncated { what: "snapshot stream", offset: 0, need, have });
        }
        let digest: [u8; 32] = self.sha.finalize().into();
        if self.trailer != digest {
            return Err(Error::corrupt(
                meta.file_size(),
                "sha256 at the end of the snapshot stream does not fit what came before",
            ));
        }
        // The pages of the root bucket, laid out as a database of their own, are read by the ordinary code.
        let root = RootOnly { meta, pages: &self.root_pages };
        let db = bolt::Db::open(&root)?;
        let compaction = Compaction::read(&db)?;
        let auth_revision = mvcc::read_u64(&db, AUTH_BUCKET, AUTH_REVISION).unwrap_or_default().unwrap_or(0);
        let last_row = match db.bucket(KEY_BUCKET)? {
            Some(bolt::BucketRoot::Tree(mut page)) => {
                for _ in 0..64 {
                    match self.last_child.get(&page) {
                        Some(child) => page = *child,
                        None => break,
                    }
                }
                self.last_revision.get(&page).copied().unwrap_or(0)
            }
            Some(inline) => db.last(&inline)?.and_then(|(key, _)| mvcc::RowKey::decode(&key)).map_or(0, |key| key.main),
            None => 0,
        };
        let revision = last_row.max(compaction.revision()).max(1);
        if revision < self.least_revision {
            return Err(Error::corrupt(
                0,
                format!(
                    "snapshot ends at revision {revision}, the member was at {} before it began",
                    self.least_revision
                ),
            ));
        }
        Ok(Scanned { revision, compaction, auth_revision, bytes: have })
    }
}

/// The metas and the pages of the root bucket; reading anything else fails.
#[derive(Debug)]
struct RootOnly<'a> {
    meta: Meta,
    pages: &'a BTreeMap<u64, (usize, Vec<u8>)>,
}

impl crate::ReadAt for RootOnly<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let size = u64::from(self.meta.page_size);
        let metas;
        let (start, bytes) = if offset < 2 * size {
            metas = [self.meta.encode(0), self.meta.encode(1)].concat();
            (0, metas.as_slice())
        } else {
            let (id, (_, bytes)) =
                self.pages.range(..=offset / size).next_back().ok_or(std::io::ErrorKind::UnexpectedEof)?;
            (id * size, bytes.as_slice())
        };
        bytes.read_exact_at(buf, offset - start)
    }

    fn size(&self) -> std::io::Result<u64> {
        Ok(self.meta.file_size())
    }
}
