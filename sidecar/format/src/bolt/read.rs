//! Opening a file and walking its trees in key order.

use std::path::PathBuf;

use super::page::{Header, Kind, Page, Row};
use super::{BUCKET_HEADER_SIZE, ELEMENT_SIZE, MAX_PAGE_SIZE, MIN_PAGE_SIZE, Meta, PAGE_HEADER_SIZE};
use crate::cursor::u64_le;
use crate::{Error, ReadAt, Result};

/// Branch pages above a leaf; a real tree of 2^63 rows needs fewer.
const MAX_DEPTH: usize = 48;
/// Neighbouring pages are read together up to this many bytes.
const WINDOW_BYTES: u64 = 256 << 10;
/// A page has been written for its content, with at most one more: this is far from that.
const MOST_EMPTY_PAGES: u64 = 64;
/// A gap of so many pages between two wanted ones is read rather than skipped.
const WINDOW_GAP: u64 = 4;

/// An open bbolt file. All access goes through positioned reads; several threads may walk at once.
#[derive(Debug)]
pub struct Db<R> {
    source: R,
    meta: Meta,
    spoiled: Option<u64>,
}

/// Where a bucket's rows are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BucketRoot {
    /// In a tree of pages.
    Tree(u64),
    /// In the bucket's own value: a page without a place.
    Inline(Vec<u8>),
}

impl<R: ReadAt> Db<R> {
    /// Finds the page size and the newest valid meta, and checks that the file is as long as that meta says.
    pub fn open(source: R) -> Result<Self> {
        let size = source.size().map_err(Error::io("measure the database", PathBuf::new()))?;
        let read_meta = |offset: u64| -> Result<Meta> {
            let mut page = [0; PAGE_HEADER_SIZE + super::META_SIZE];
            let need = page.len() as u64;
            if size.saturating_sub(offset) < need {
                return Err(Error::Truncated { what: "meta page", offset, need, have: size.saturating_sub(offset) });
            }
            source
                .read_exact_at(&mut page, offset)
                .map_err(Error::io("read a meta page of the database", PathBuf::new()))?;
            Meta::decode(&page, offset)
        };
        let first = read_meta(0);
        let second = match &first {
            Ok(meta) => read_meta(u64::from(meta.page_size)),
            Err(_) => (0..15)
                .map(|shift| u64::from(MIN_PAGE_SIZE) << shift)
                .take_while(|offset| *offset <= u64::from(MAX_PAGE_SIZE) && *offset < size)
                .map(|offset| {
                    read_meta(offset).and_then(|meta| {
                        if u64::from(meta.page_size) == offset {
                            Ok(meta)
                        } else {
                            Err(Error::corrupt(offset, "meta page 1 is not at its place"))
                        }
                    })
                })
                .find(Result::is_ok)
                .unwrap_or_else(|| Err(Error::corrupt(0, "neither meta page is valid"))),
        };
        // Without the first, the page size is that of the second, which lies one page behind it.
        let spoiled = match (&first, &second) {
            (Ok(meta), Err(_)) => Some(u64::from(meta.page_size)),
            (Err(_), _) => Some(0),
            (Ok(_), Ok(_)) => None,
        };
        let meta = match (first, second) {
            (Ok(first), Ok(second)) if second.page_size == first.page_size && second.txid > first.txid => second,
            (Ok(first), _) => first,
            (Err(_), Ok(second)) => second,
            (Err(first), Err(_)) => return Err(first),
        };
        if meta.file_size() > size {
            return Err(Error::Truncated { what: "database", offset: 0, need: meta.file_size(), have: size });
        }
        Ok(Self { source, meta, spoiled })
    }

    /// Where a meta page lies that is not valid; the other one is in force.
    pub fn spoiled_meta(&self) -> Option<u64> {
        self.spoiled
    }

    /// The meta in force.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn source(&self) -> &R {
        &self.source
    }

    fn offset(&self, id: u64) -> u64 {
        id.saturating_mul(u64::from(self.meta.page_size))
    }

    fn read(&self, buffer: &mut [u8], id: u64) -> Result<()> {
        self.source.read_exact_at(buffer, self.offset(id)).map_err(Error::io("read the database", PathBuf::new()))
    }

    /// Checks a header against its place and returns how many physical pages the logical page spans.
    fn span(&self, header: Header, id: u64) -> Result<u64> {
        let offset = self.offset(id);
        if header.id != id {
            return Err(Error::corrupt(offset, format!("page {id} says that it is page {}", header.id)));
        }
        let span = 1 + u64::from(header.overflow);
        if id.saturating_add(span) > self.meta.high_water {
            return Err(Error::corrupt(
                offset,
                format!(
                    "page {id} and its {} overflow pages reach past the high-water mark {}",
                    header.overflow, self.meta.high_water
                ),
            ));
        }
        Ok(span)
    }

    /// Refuses a page that says to span far more than its last element needs: no more memory is taken than there is content.
    fn is_filled(&self, header: Header, id: u64, span: u64) -> Result<()> {
        let mut end = PAGE_HEADER_SIZE as u64;
        if header.count > 0 {
            let place = end + (u64::from(header.count) - 1) * ELEMENT_SIZE as u64;
            if place + ELEMENT_SIZE as u64 > span.saturating_mul(u64::from(self.meta.page_size)) {
                let what = format!("page {id} has {} elements, more than fit into it", header.count);
                return Err(Error::corrupt(self.offset(id), what));
            }
            let (mut element, at) = ([0; ELEMENT_SIZE], self.offset(id).saturating_add(place));
            self.source.read_exact_at(&mut element, at).map_err(Error::io("read the database", PathBuf::new()))?;
            // Without what says which bucket or child it is: position, and the sizes of key and value.
            let fields = if header.kind == Kind::Leaf { 4..16 } else { 0..8 };
            let (sizes, _) = element.get(fields).unwrap_or_default().as_chunks();
            end = place + sizes.iter().map(|size| u64::from(u32::from_le_bytes(*size))).sum::<u64>();
        }
        let needed = end.div_ceil(u64::from(self.meta.page_size));
        if span > needed.saturating_add(MOST_EMPTY_PAGES) {
            let overflow = header.overflow;
            let what =
                format!("page {id} says that it has {overflow} overflow pages; its content needs {needed} pages");
            return Err(Error::corrupt(self.offset(id), what));
        }
        Ok(())
    }

    fn page(&self, id: u64, window: &mut Window, wanted_to: u64, mut buffer: Vec<u8>) -> Result<Page> {
        if id < 2 || id >= self.meta.high_water {
            return Err(Error::corrupt(
                self.offset(id),
                format!("reference to page {id}; pages are 2 to {}", self.meta.high_water - 1),
            ));
        }
        let page_size = self.meta.page_size as usize;
        if window.get(id, 1, page_size).is_none() {
            window.fill(self, id, wanted_to)?;
        }
        let head = window.get(id, 1, page_size).unwrap_or_default();
        let header = Header::decode(head, self.offset(id))?;
        let span = self.span(header, id)?;
        buffer.clear();
        if let Some(bytes) = window.get(id, span, page_size) {
            buffer.extend_from_slice(bytes);
        } else {
            self.is_filled(header, id, span)?;
            buffer.resize((span as usize).saturating_mul(page_size), 0);
            self.read(&mut buffer, id)?;
        }
        Page::parse(buffer, self.offset(id))
    }

    /// A bucket of the root, by name.
    pub fn bucket(&self, name: &[u8]) -> Result<Option<BucketRoot>> {
        let mut root = self.root();
        root.seek(name)?;
        match root.next()? {
            Some(row) if row.key == name && row.is_bucket => bucket_root(row).map(Some),
            _ => Ok(None),
        }
    }

    /// A walk over the root bucket, whose rows are the buckets.
    pub fn root(&self) -> Cursor<'_, R> {
        self.cursor(&BucketRoot::Tree(self.meta.root))
    }

    /// A walk over a bucket.
    pub fn cursor(&self, root: &BucketRoot) -> Cursor<'_, R> {
        Cursor {
            db: self,
            root: root.clone(),
            started: false,
            stack: Vec::new(),
            leaf: Page::default(),
            index: 0,
            window: Window::default(),
            visited: None,
        }
    }

    /// All rows of a bucket, for buckets known to be small; nothing when there is no such bucket.
    pub fn rows(&self, name: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut rows = Vec::new();
        if let Some(root) = self.bucket(name)? {
            let mut cursor = self.cursor(&root);
            while let Some(row) = cursor.next()? {
                rows.push((row.key.to_vec(), row.value.to_vec()));
            }
        }
        Ok(rows)
    }

    /// One value of a bucket.
    pub fn get(&self, bucket: &[u8], key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(root) = self.bucket(bucket)? else { return Ok(None) };
        let mut cursor = self.cursor(&root);
        cursor.seek(key)?;
        Ok(cursor.next()?.filter(|row| row.key == key).map(|row| row.value.to_vec()))
    }

    /// The last row of a bucket.
    pub fn last(&self, root: &BucketRoot) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let spine = self.spine(root)?;
        let Some(leaf) = spine.last() else { return Ok(None) };
        let Some(last) = leaf.count().checked_sub(1) else { return Ok(None) };
        let row = leaf.row(last)?;
        Ok(Some((row.key.to_vec(), row.value.to_vec())))
    }

    /// The rightmost page of every level, root first, leaf last.
    pub(crate) fn spine(&self, root: &BucketRoot) -> Result<Vec<Page>> {
        let mut spine = Vec::new();
        let mut next = match root {
            BucketRoot::Inline(bytes) => {
                spine.push(Page::parse(bytes.clone(), 0)?);
                None
            }
            BucketRoot::Tree(id) => Some(*id),
        };
        while let Some(id) = next {
            let page = self.page(id, &mut Window::default(), id + 1, Vec::new())?;
            next = if page.is_leaf() {
                None
            } else {
                let last =
                    page.count().checked_sub(1).ok_or_else(|| page.corrupt("branch page without children".into()))?;
                Some(page.child(last)?.1)
            };
            spine.push(page);
            if spine.len() > MAX_DEPTH {
                return Err(Error::corrupt(self.offset(id), "tree is deeper than any tree can be"));
            }
        }
        Ok(spine)
    }

    /// Walks every bucket but those named in `except`, counting pages in `visited`: structure, order, and that no page is
    /// reached twice. The buckets left out are for the caller to walk with [`Cursor::visiting`].
    pub fn check_small_buckets(&self, except: &[&[u8]], mut visited: Visited) -> Result<Visited> {
        let mut root = self.root().visiting(visited);
        let mut buckets = Vec::new();
        while let Some(row) = root.next()? {
            if !row.is_bucket {
                return Err(Error::corrupt(self.offset(self.meta.root), "root bucket has a row that is not a bucket"));
            }
            buckets.push((row.key.to_vec(), bucket_root(row)?));
        }
        visited = root.into_visited();
        for (name, bucket) in &buckets {
            if except.contains(&name.as_slice()) {
                continue;
            }
            let mut cursor = self.cursor(bucket).visiting(visited);
            while let Some(row) = cursor.next()? {
                if row.is_bucket {
                    return Err(Error::corrupt(0, format!("bucket {} has a bucket inside", name.escape_ascii())));
                }
            }
            visited = cursor.into_visited();
        }
        if let Some(freelist) = self.meta.freelist {
            self.check_freelist(freelist, &mut visited)?;
        }
        Ok(visited)
    }

    /// A kept freelist must be well formed. Whether it is exact is checked by the caller once all buckets are walked.
    fn check_freelist(&self, id: u64, visited: &mut Visited) -> Result<()> {
        let offset = self.offset(id);
        let mut head = [0; PAGE_HEADER_SIZE + 8];
        self.read(&mut head, id)?;
        let header = Header::decode(&head, offset)?;
        if header.kind != Kind::Freelist {
            return Err(Error::corrupt(
                offset,
                format!("page {id} is a {:?} page where the freelist belongs", header.kind),
            ));
        }
        let span = self.span(header, id)?;
        visited.mark(id, span, offset)?;
        // 0xFFFF entries or more do not fit the header's count; then the first entry is the count.
        let (first, count) = match header.count {
            u16::MAX => (PAGE_HEADER_SIZE + 8, u64_le(&head, PAGE_HEADER_SIZE).unwrap_or_default()),
            count => (PAGE_HEADER_SIZE, u64::from(count)),
        };
        let room = (span.saturating_mul(u64::from(self.meta.page_size)).saturating_sub(first as u64)) / 8;
        if count > room {
            return Err(Error::corrupt(offset, format!("freelist of {count} pages in a page with room for {room}")));
        }
        let mut bytes = vec![0; (span as usize).saturating_mul(self.meta.page_size as usize)];
        self.read(&mut bytes, id)?;
        for index in 0..count as usize {
            let page = u64_le(&bytes, first + index * 8).unwrap_or_default();
            if page < 2 || page >= self.meta.high_water {
                return Err(Error::corrupt(
                    offset,
                    format!("freelist names page {page}; pages are 2 to {}", self.meta.high_water - 1),
                ));
            }
            visited.free.push(page);
        }
        Ok(())
    }
}

fn bucket_root(row: Row<'_>) -> Result<BucketRoot> {
    let name = row.key.escape_ascii();
    let have = row.value.len() as u64;
    match u64_le(row.value, 0) {
        Some(0) => match row.value.get(BUCKET_HEADER_SIZE..).filter(|page| page.len() >= PAGE_HEADER_SIZE) {
            Some(page) => Ok(BucketRoot::Inline(page.to_vec())),
            None => {
                Err(Error::corrupt(0, format!("inline bucket {name} is {have} bytes long, too short for its page")))
            }
        },
        Some(id) if have >= BUCKET_HEADER_SIZE as u64 => Ok(BucketRoot::Tree(id)),
        _ => Err(Error::corrupt(0, format!("header of bucket {name} is {have} bytes long, not {BUCKET_HEADER_SIZE}"))),
    }
}

/// Which pages a check has reached. One bit a page.
#[derive(Debug)]
pub struct Visited {
    bits: Vec<u64>,
    free: Vec<u64>,
}

impl Visited {
    /// Nothing reached yet, in a file with this meta.
    pub fn new(meta: &Meta) -> Self {
        Self { bits: vec![0; (meta.high_water / 64 + 1) as usize], free: Vec::new() }
    }

    fn get(&self, id: u64) -> bool {
        self.bits.get((id / 64) as usize).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    fn mark(&mut self, id: u64, span: u64, offset: u64) -> Result<()> {
        for id in id..id.saturating_add(span) {
            if self.get(id) {
                return Err(Error::corrupt(offset, format!("page {id} is reached twice")));
            }
            if let Some(word) = self.bits.get_mut((id / 64) as usize) {
                *word |= 1 << (id % 64);
            }
        }
        Ok(())
    }

    /// Number of pages reached so far.
    pub fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// To be called when every bucket has been walked: a kept freelist must name exactly the pages that nothing reaches.
    pub fn check_free_pages(&self, meta: &Meta) -> Result<()> {
        let Some(freelist) = meta.freelist else { return Ok(()) };
        let offset = freelist.saturating_mul(u64::from(meta.page_size));
        let mut seen = Self::new(meta);
        for id in &self.free {
            if self.get(*id) {
                return Err(Error::corrupt(offset, format!("page {id} is both in use and free")));
            }
            seen.mark(*id, 1, offset)?;
        }
        match (2..meta.high_water).find(|id| !self.get(*id) && !seen.get(*id)) {
            Some(id) => Err(Error::corrupt(offset, format!("page {id} is neither in use nor free"))),
            None => Ok(()),
        }
    }
}

/// A run of neighbouring pages read at once.
#[derive(Debug, Default)]
struct Window {
    first: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn get(&self, id: u64, span: u64, page_size: usize) -> Option<&[u8]> {
        let start = usize::try_from(id.checked_sub(self.first)?).ok()?.checked_mul(page_size)?;
        let length = usize::try_from(span).ok()?.checked_mul(page_size)?;
        self.bytes.get(start..start.checked_add(length)?)
    }

    fn fill<R: ReadAt>(&mut self, db: &Db<R>, id: u64, wanted_to: u64) -> Result<()> {
        let end = wanted_to.clamp(id + 1, db.meta.high_water);
        self.first = id;
        self.bytes.resize(((end - id) as usize).saturating_mul(db.meta.page_size as usize), 0);
        db.read(&mut self.bytes, id).inspect_err(|_| self.bytes.clear())
    }
}

/// A branch page and which child the walk is in.
#[derive(Debug)]
struct Branch {
    page: Page,
    index: usize,
}

/// A walk over one bucket in key order.
#[derive(Debug)]
pub struct Cursor<'d, R> {
    db: &'d Db<R>,
    root: BucketRoot,
    started: bool,
    stack: Vec<Branch>,
    leaf: Page,
    index: usize,
    window: Window,
    visited: Option<Visited>,
}

impl<R: ReadAt> Cursor<'_, R> {
    /// Makes the walk a check: pages reached are marked in `visited`, reaching one twice is an error, and so is a branch
    /// page with a single child. Use it for whole walks, without [`Cursor::seek`].
    #[must_use]
    pub fn visiting(mut self, visited: Visited) -> Self {
        self.visited = Some(visited);
        self
    }

    /// What [`Cursor::visiting`] was given, with this walk's pages added.
    pub fn into_visited(self) -> Visited {
        self.visited.unwrap_or(Visited { bits: Vec::new(), free: Vec::new() })
    }

    /// Where in the file the current leaf lies, for messages about its rows.
    pub fn offset(&self) -> u64 {
        self.leaf.offset()
    }

    /// Places the walk before the first row whose key is `key` or above.
    pub fn seek(&mut self, key: &[u8]) -> Result<()> {
        self.started = true;
        self.stack.clear();
        self.open_root()?;
        while let Some(child) =
            self.child_to_descend(|page| Ok(page.partition_point(|k| k <= key)?.saturating_sub(1)))?
        {
            self.descend(child)?;
        }
        self.index = self.leaf.partition_point(|k| k < key)?;
        Ok(())
    }

    /// The next row, or `None` after the last.
    #[expect(clippy::should_implement_trait, reason = "lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Row<'_>>> {
        while !self.started || self.index >= self.leaf.count() {
            if !self.next_leaf()? {
                return Ok(None);
            }
        }
        self.index += 1;
        self.leaf.row(self.index - 1).map(Some)
    }

    fn next_leaf(&mut self) -> Result<bool> {
        if self.started {
            loop {
                let Some(top) = self.stack.last_mut() else { return Ok(false) };
                top.index += 1;
                if top.index < top.page.count() {
                    break;
                }
                self.stack.pop();
            }
            let Some(top) = self.stack.last() else { return Ok(false) };
            let child = top.page.child(top.index)?.1;
            self.descend(child)?;
        } else {
            self.started = true;
            self.open_root()?;
        }
        while let Some(child) = self.child_to_descend(|_| Ok(0))? {
            self.descend(child)?;
        }
        self.index = 0;
        Ok(true)
    }

    /// After `open_root` or `descend` put a branch page into `leaf`: moves it to the stack at the child `choose` names.
    fn child_to_descend(&mut self, choose: impl Fn(&Page) -> Result<usize>) -> Result<Option<u64>> {
        if self.leaf.is_leaf() {
            return Ok(None);
        }
        let page = std::mem::take(&mut self.leaf);
        match page.count() {
            0 => return Err(page.corrupt("branch page without children".into())),
            1 if self.visited.is_some() => {
                return Err(
                    page.corrupt("branch page with a single child, on which a compaction would panic etcd".into())
                );
            }
            _ => {}
        }
        if self.stack.len() >= MAX_DEPTH {
            return Err(page.corrupt("tree is deeper than any tree can be".into()));
        }
        let index = choose(&page)?;
        let child = page.child(index)?.1;
        self.stack.push(Branch { page, index });
        Ok(Some(child))
    }

    fn open_root(&mut self) -> Result<()> {
        match &self.root {
            BucketRoot::Inline(bytes) => {
                let page = Page::parse(bytes.clone(), 0)?;
                if !page.is_leaf() {
                    return Err(page.corrupt("inline bucket holds a branch page".into()));
                }
                self.leaf = page;
                Ok(())
            }
            BucketRoot::Tree(id) => self.load(*id),
        }
    }

    fn descend(&mut self, child: u64) -> Result<()> {
        self.load(child)?;
        let page = &self.leaf;
        let Some(last) = page.count().checked_sub(1) else {
            return Err(page.corrupt("empty page below a branch page".into()));
        };
        if let Some(parent) = self.stack.last()
            && page.key(0)? < parent.page.key(parent.index)?
        {
            return Err(page.corrupt("first key is below the key its parent has for it".into()));
        }
        let upper = self.stack.iter().rev().find(|branch| branch.index + 1 < branch.page.count());
        if let Some(branch) = upper
            && page.key(last)? >= branch.page.key(branch.index + 1)?
        {
            return Err(page.corrupt("last key is not below the next key of its parent".into()));
        }
        Ok(())
    }

    /// Reads page `id` into `leaf`, together with the neighbours that will be asked for next.
    fn load(&mut self, id: u64) -> Result<()> {
        let mut wanted_to = id.saturating_add(1);
        let in_window = self.window.get(id, 1, self.db.meta.page_size as usize).is_some();
        if let Some(parent) = self.stack.last().filter(|_| !in_window) {
            let most = (WINDOW_BYTES / u64::from(self.db.meta.page_size)).max(1);
            for index in parent.index + 1..parent.page.count() {
                let sibling = parent.page.child(index)?.1;
                if sibling < wanted_to || sibling - wanted_to > WINDOW_GAP || sibling - id >= most {
                    break;
                }
                wanted_to = sibling + 1;
            }
        }
        let buffer = std::mem::take(&mut self.leaf).into_buffer();
        self.leaf = self.db.page(id, &mut self.window, wanted_to, buffer)?;
        if let Some(visited) = &mut self.visited {
            let span = (self.leaf.byte_len() / u64::from(self.db.meta.page_size)).max(1);
            visited.mark(id, span, self.leaf.offset())?;
        }
        Ok(())
    }
}
