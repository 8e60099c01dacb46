//! Building trees from sorted rows, front to back, in one sequential write.
//!
//! Memory is one leaf and at most two branch pages a level, whatever the number of rows. The same code writes a whole
//! file and the tail of an existing one: appending re-emits the last leaf and the right spine and leaves every other
//! page where it is.

use std::collections::BTreeMap;
use std::io::Write;

use super::page::{self, Kind};
use super::{BUCKET_HEADER_SIZE, BucketRoot, Db, ELEMENT_SIZE, MAX_PAGE_SIZE, MIN_PAGE_SIZE, Meta, PAGE_HEADER_SIZE};
use crate::{Error, ReadAt, Result};

const MAX_KEY_SIZE: usize = 32768;
const MAX_VALUE_SIZE: usize = i32::MAX as usize - 1;
/// bbolt refuses 0xFFFF elements and more.
const MAX_ELEMENTS: usize = 0xFFFE;

/// Writes buckets of sorted rows. Call [`Builder::start`] (or [`Builder::resume`]) and [`Builder::push`] for one bucket
/// after the other, then [`Builder::finish`], write the metas it returns over pages 0 and 1 and sync; metas last, so
/// that a file cut short never opens.
#[derive(Debug)]
pub struct Builder<W> {
    pages: Pages<W>,
    /// Value of each finished bucket in the root: its header and, when inline, its page.
    buckets: BTreeMap<Vec<u8>, Vec<u8>>,
    open: Option<(Vec<u8>, Tree)>,
    txid: u64,
}

/// What remains to be written once all pages are out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    meta: Meta,
}

impl Finished {
    /// Pages 0 and 1, whole; they lie next to each other at the start of the file.
    pub fn metas(&self) -> [Vec<u8>; 2] {
        [self.meta.encode(0), Meta { txid: self.meta.txid - 1, ..self.meta }.encode(1)]
    }

    /// The meta that takes over when it is written to page `txid % 2`, while the other page keeps the meta before it; for a
    /// database that was appended to in place.
    pub fn next_meta(&self) -> Meta {
        Meta { txid: self.meta.txid - 1, ..self.meta }
    }

    /// Bytes that the file must have.
    pub fn file_size(&self) -> u64 {
        self.meta.file_size()
    }
}

impl<W: Write> Builder<W> {
    /// Starts a new file; `out` takes its bytes from offset 0.
    pub fn create(mut out: W, page_size: u32) -> Result<Self> {
        if !page_size.is_power_of_two() || !(MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
            return Err(Error::invalid(format!(
                "page size {page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}"
            )));
        }
        write(&mut out, &vec![0; page_size as usize * 2])?;
        Ok(Self { pages: Pages { out, page_size, next: 2 }, buckets: BTreeMap::new(), open: None, txid: 2 })
    }

    /// Starts at the end of `db`; `out` takes bytes from offset [`Meta::file_size`]. Buckets not started again stay as
    /// they are.
    pub fn append<R: ReadAt>(db: &Db<R>, out: W) -> Result<Self> {
        let meta = db.meta();
        let mut buckets = BTreeMap::new();
        let mut root = db.root();
        while let Some(row) = root.next()? {
            buckets.insert(row.key.to_vec(), row.value.to_vec());
        }
        let pages = Pages { out, page_size: meta.page_size, next: meta.high_water };
        Ok(Self { pages, buckets, open: None, txid: meta.txid.saturating_add(2) })
    }

    /// Begins a bucket, empty; replaces one of that name.
    pub fn start(&mut self, name: &[u8]) -> Result<()> {
        self.end()?;
        self.open = Some((name.to_vec(), Tree::default()));
        Ok(())
    }

    /// Begins a bucket with the rows that it has in `db`, to push rows above them.
    pub fn resume<R: ReadAt>(&mut self, db: &Db<R>, name: &[u8]) -> Result<()> {
        self.start(name)?;
        let Some(root) = db.bucket(name)? else { return Ok(()) };
        if let Some((_, tree)) = &mut self.open {
            tree.seed(db, &root, &mut self.pages)?;
        }
        Ok(())
    }

    /// Adds a row, whose key must be above all before it in this bucket.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match &mut self.open {
            Some((_, tree)) => tree.push(&mut self.pages, 0, key, value),
            None => Err(Error::invalid("a row was pushed before any bucket was started")),
        }
    }

    fn end(&mut self) -> Result<()> {
        if let Some((name, tree)) = self.open.take() {
            let value = tree.into_bucket_value(&mut self.pages)?;
            self.buckets.insert(name, value);
        }
        Ok(())
    }

    /// Writes the root and flushes.
    pub fn finish(mut self) -> Result<(Finished, W)> {
        self.end()?;
        let mut root = Tree::default();
        for (name, value) in &self.buckets {
            root.push(&mut self.pages, 1, name, value)?;
        }
        let root = root.finish(&mut self.pages)?;
        self.pages.out.flush().map_err(Error::io("write", WHAT))?;
        let meta = Meta {
            page_size: self.pages.page_size,
            root,
            freelist: None,
            high_water: self.pages.next,
            txid: self.txid,
        };
        Ok((Finished { meta }, self.pages.out))
    }
}

/// Whoever writes knows no path; who reads of a full disk must not look for it elsewhere.
const WHAT: &str = "the database in the data directory";

fn write(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(Error::io("write", WHAT))
}

/// Pages handed out and written in ascending order.
#[derive(Debug)]
struct Pages<W> {
    out: W,
    page_size: u32,
    next: u64,
}

impl<W: Write> Pages<W> {
    fn write(&mut self, kind: Kind, elements: &[u8], count: usize, data: &[u8]) -> Result<u64> {
        let id = self.next;
        let used = PAGE_HEADER_SIZE + elements.len() + data.len();
        let span = used.div_ceil(self.page_size as usize);
        let overflow = u32::try_from(span - 1).map_err(|_| Error::invalid("a page needs more than 2^32 pages"))?;
        write(&mut self.out, &page::header(id, kind, count as u16, overflow))?;
        write(&mut self.out, elements)?;
        write(&mut self.out, data)?;
        let padding = span * self.page_size as usize - used;
        let zeros = [0; MIN_PAGE_SIZE as usize];
        for done in (0..padding).step_by(zeros.len()) {
            write(&mut self.out, zeros.get(..padding - done).unwrap_or(&zeros))?;
        }
        self.next += span as u64;
        Ok(id)
    }
}

/// A bucket being built.
#[derive(Debug, Default)]
struct Tree {
    leaf: Leaf,
    /// `levels[0]` is above the leaves.
    levels: Vec<Level>,
    last_key: Vec<u8>,
}

#[derive(Debug, Default)]
struct Leaf {
    rows: Vec<(u32, u32, u32)>,
    data: Vec<u8>,
}

impl Leaf {
    fn size(&self) -> usize {
        PAGE_HEADER_SIZE + self.rows.len() * ELEMENT_SIZE + self.data.len()
    }

    fn elements(&self) -> Vec<u8> {
        let mut elements = Vec::with_capacity(self.rows.len() * ELEMENT_SIZE);
        let mut data_at = 0;
        for (index, (flags, key_size, value_size)) in self.rows.iter().enumerate() {
            let position = ((self.rows.len() - index) * ELEMENT_SIZE) as u32 + data_at;
            for value in [*flags, position, *key_size, *value_size] {
                elements.extend_from_slice(&value.to_le_bytes());
            }
            data_at += key_size + value_size;
        }
        elements
    }
}

#[derive(Debug, Clone)]
struct Child {
    key: Vec<u8>,
    id: u64,
}

/// The branch pages of one level that are not written yet. A full page is held back until the one after it has two
/// children, so that the last page can borrow one.
#[derive(Debug, Default)]
struct Level {
    held: Option<Vec<Child>>,
    open: Vec<Child>,
}

fn branch_size(children: &[Child]) -> usize {
    PAGE_HEADER_SIZE + children.iter().map(|child| ELEMENT_SIZE + child.key.len()).sum::<usize>()
}

fn write_branch<W: Write>(pages: &mut Pages<W>, children: &[Child]) -> Result<Child> {
    let Some(first) = children.first() else { return Err(Error::invalid("a branch page would have no children")) };
    let mut elements = Vec::with_capacity(children.len() * ELEMENT_SIZE);
    let mut data = Vec::new();
    for (index, child) in children.iter().enumerate() {
        let position = ((children.len() - index) * ELEMENT_SIZE + data.len()) as u32;
        elements.extend_from_slice(&position.to_le_bytes());
        elements.extend_from_slice(&(child.key.len() as u32).to_le_bytes());
        elements.extend_from_slice(&child.id.to_le_bytes());
        data.extend_from_slice(&child.key);
    }
    let id = pages.write(Kind::Branch, &elements, children.len(), &data)?;
    Ok(Child { key: first.key.clone(), id })
}

impl Tree {
    /// Takes over the right spine of an existing tree: its last leaf's rows are pushed again, its branch pages are
    /// continued without the child that held them.
    fn seed<R: ReadAt, W: Write>(&mut self, db: &Db<R>, root: &BucketRoot, pages: &mut Pages<W>) -> Result<()> {
        let spine = db.spine(root)?;
        let Some((leaf, branches)) = spine.split_last() else { return Ok(()) };
        for branch in branches.iter().rev() {
            let mut level = Level::default();
            for index in 0..branch.count().saturating_sub(1) {
                let (key, id) = branch.child(index)?;
                level.open.push(Child { key: key.to_vec(), id });
            }
            if level.open.is_empty() {
                return Err(
                    branch.corrupt("branch page with a single child, on which a compaction would panic etcd".into())
                );
            }
            self.levels.push(level);
        }
        for index in 0..leaf.count() {
            let row = leaf.row(index)?;
            if row.is_bucket {
                return Err(leaf.corrupt("bucket inside a bucket".into()));
            }
            self.push(pages, 0, row.key, row.value)?;
        }
        Ok(())
    }

    fn push<W: Write>(&mut self, pages: &mut Pages<W>, flags: u32, key: &[u8], value: &[u8]) -> Result<()> {
        if key.is_empty() || key.len() > MAX_KEY_SIZE || value.len() > MAX_VALUE_SIZE {
            return Err(Error::invalid(format!(
                "a row of {} key bytes and {} value bytes does not fit bbolt",
                key.len(),
                value.len()
            )));
        }
        if key <= self.last_key.as_slice() {
            let (key, last) = (key.escape_ascii(), self.last_key.escape_ascii());
            return Err(Error::invalid(format!("row {key} was pushed after {last}; rows must ascend")));
        }
        let size = ELEMENT_SIZE + key.len() + value.len();
        let page_size = pages.page_size as usize;
        if !self.leaf.rows.is_empty() && (self.leaf.size() + size > page_size || self.leaf.rows.len() >= MAX_ELEMENTS) {
            self.flush_leaf(pages)?;
        }
        self.leaf.rows.push((flags, key.len() as u32, value.len() as u32));
        self.leaf.data.extend_from_slice(key);
        self.leaf.data.extend_from_slice(value);
        self.last_key.clear();
        self.last_key.extend_from_slice(key);
        Ok(())
    }

    fn flush_leaf<W: Write>(&mut self, pages: &mut Pages<W>) -> Result<()> {
        let id = pages.write(Kind::Leaf, &self.leaf.elements(), self.leaf.rows.len(), &self.leaf.data)?;
        let key_size = self.leaf.rows.first().map_or(0, |row| row.1 as usize);
        let key = self.leaf.data.get(..key_size).unwrap_or_default().to_vec();
        self.leaf.rows.clear();
        self.leaf.data.clear();
        // One large value must not stay allocated for the rest of the run.
        self.leaf.data.shrink_to(4 * pages.page_size as usize);
        self.add_child(pages, 0, Child { key, id })
    }

    fn add_child<W: Write>(&mut self, pages: &mut Pages<W>, depth: usize, child: Child) -> Result<()> {
        if depth == self.levels.len() {
            self.levels.push(Level::default());
        }
        let Some(level) = self.levels.get_mut(depth) else { return Ok(()) };
        let full = branch_size(&level.open) + ELEMENT_SIZE + child.key.len() > pages.page_size as usize;
        if level.open.len() < 2 || (!full && level.open.len() < MAX_ELEMENTS) {
            level.open.push(child);
            return Ok(());
        }
        let filled = std::mem::replace(&mut level.open, vec![child]);
        match level.held.replace(filled) {
            Some(held) => {
                let parent = write_branch(pages, &held)?;
                self.add_child(pages, depth + 1, parent)
            }
            None => Ok(()),
        }
    }

    fn is_inline(&self, page_size: u32) -> bool {
        self.levels.is_empty() && self.leaf.size() <= page_size as usize / 4
    }

    fn into_bucket_value<W: Write>(self, pages: &mut Pages<W>) -> Result<Vec<u8>> {
        let mut value = Vec::with_capacity(BUCKET_HEADER_SIZE);
        if self.is_inline(pages.page_size) {
            value.resize(BUCKET_HEADER_SIZE, 0);
            value.extend_from_slice(&page::header(0, Kind::Leaf, self.leaf.rows.len() as u16, 0));
            value.extend_from_slice(&self.leaf.elements());
            value.extend_from_slice(&self.leaf.data);
        } else {
            let root = self.finish(pages)?;
            value.extend_from_slice(&root.to_le_bytes());
            value.extend_from_slice(&0u64.to_le_bytes());
        }
        Ok(value)
    }

    /// Writes what is not written yet and returns the root page.
    fn finish<W: Write>(mut self, pages: &mut Pages<W>) -> Result<u64> {
        if !self.leaf.rows.is_empty() || self.levels.is_empty() {
            self.flush_leaf(pages)?;
        }
        let mut depth = 0;
        loop {
            let Some(level) = self.levels.get_mut(depth).map(std::mem::take) else {
                return Err(Error::invalid("a tree ended without a root"));
            };
            let is_top = self.levels.iter().skip(depth + 1).all(|level| level.open.is_empty() && level.held.is_none());
            let (held, mut open) = (level.held, level.open);
            if let Some(mut held) = held {
                if open.len() < 2 && held.len() > 2 {
                    open.splice(0..0, held.pop());
                }
                if open.len() < 2 {
                    held.append(&mut open);
                    open = held;
                } else {
                    let parent = write_branch(pages, &held)?;
                    self.add_child(pages, depth + 1, parent)?;
                    let parent = write_branch(pages, &open)?;
                    self.add_child(pages, depth + 1, parent)?;
                    depth += 1;
                    continue;
                }
            }
            if is_top {
                return match open.as_slice() {
                    [only] => Ok(only.id),
                    children => Ok(write_branch(pages, children)?.id),
                };
            }
            let parent = write_branch(pages, &open)?;
            self.add_child(pages, depth + 1, parent)?;
            depth += 1;
        }
    }
}
