//! One logical page: header, elements, bounds.

use super::{ELEMENT_SIZE, PAGE_HEADER_SIZE};
use crate::cursor::{u16_le, u32_le, u64_le};
use crate::{Error, Result};

/// What a page is for; the header's flags must be exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Branch = 0x01,
    Leaf = 0x02,
    Meta = 0x04,
    Freelist = 0x10,
}

/// The 16 bytes at the start of a logical page.
///
/// | offset | type | field |
/// |---|---|---|
/// | 0 | u64 | id: the page's own position |
/// | 8 | u16 | flags: 1 branch, 2 leaf, 4 meta, 16 freelist |
/// | 10 | u16 | number of elements |
/// | 12 | u32 | overflow: further physical pages that belong to this one |
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub id: u64,
    pub kind: Kind,
    pub count: u16,
    pub overflow: u32,
}

impl Header {
    /// Decodes the header of a page at `offset`; flags that are none of the four kinds are an error.
    pub fn decode(page: &[u8], offset: u64) -> Result<Self> {
        let (Some(id), Some(flags), Some(count), Some(overflow)) =
            (u64_le(page, 0), u16_le(page, 8), u16_le(page, 10), u32_le(page, 12))
        else {
            return Err(Error::Truncated {
                what: "page header",
                offset,
                need: PAGE_HEADER_SIZE as u64,
                have: page.len() as u64,
            });
        };
        let kind = match flags {
            0x01 => Kind::Branch,
            0x02 => Kind::Leaf,
            0x04 => Kind::Meta,
            0x10 => Kind::Freelist,
            other => {
                return Err(Error::corrupt(offset, format!("page has flags {other:#06x}, which no kind of page has")));
            }
        };
        Ok(Self { id, kind, count, overflow })
    }
}

/// Encodes a page header.
pub(crate) fn header(id: u64, kind: Kind, count: u16, overflow: u32) -> [u8; PAGE_HEADER_SIZE] {
    let mut bytes = [0; PAGE_HEADER_SIZE];
    let fields: [&[u8]; 4] =
        [&id.to_le_bytes(), &(kind as u16).to_le_bytes(), &count.to_le_bytes(), &overflow.to_le_bytes()];
    let mut rest = bytes.as_mut_slice();
    for field in fields {
        let (head, tail) = rest.split_at_mut(field.len());
        head.copy_from_slice(field);
        rest = tail;
    }
    bytes
}

/// A key and its value in a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    /// 1 to 32768 bytes.
    pub key: &'a [u8],
    /// The value; of a bucket, its header and, when inline, its page.
    pub value: &'a [u8],
    /// Whether the value is a bucket.
    pub is_bucket: bool,
}

/// A whole logical branch or leaf page, its elements within bounds and in strictly ascending key order.
///
/// | leaf element | branch element |
/// |---|---|
/// | u32 flags (1 = bucket) | u32 position |
/// | u32 position | u32 key size |
/// | u32 key size | u64 child page |
/// | u32 value size | |
///
/// Positions count from the element's own start; a value follows its key.
#[derive(Debug, Default)]
pub(crate) struct Page {
    data: Vec<u8>,
    offset: u64,
    count: usize,
    is_leaf: bool,
}

impl Page {
    /// Takes `data`, the bytes of a logical page that lies at `offset`, and checks all of it.
    pub fn parse(data: Vec<u8>, offset: u64) -> Result<Self> {
        let header = Header::decode(&data, offset)?;
        let is_leaf = match header.kind {
            Kind::Leaf => true,
            Kind::Branch => false,
            other => {
                return Err(Error::corrupt(
                    offset,
                    format!("page is a {other:?} page where a leaf or a branch belongs"),
                ));
            }
        };
        let page = Self { data, offset, count: usize::from(header.count), is_leaf };
        page.check_elements()?;
        Ok(page)
    }

    pub fn is_leaf(&self) -> bool {
        self.is_leaf
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub fn byte_len(&self) -> u64 {
        self.data.len() as u64
    }

    /// Gives the buffer back for reuse.
    pub fn into_buffer(self) -> Vec<u8> {
        self.data
    }

    fn check_elements(&self) -> Result<()> {
        let mut previous: Option<&[u8]> = None;
        for index in 0..self.count {
            let key = if self.is_leaf { self.row(index)?.key } else { self.child(index)?.0 };
            if key.is_empty() && (self.is_leaf || index > 0) {
                return Err(self.corrupt(format!("element {index} has an empty key")));
            }
            if previous.is_some_and(|previous| previous >= key) {
                return Err(self.corrupt(format!("key of element {index} is not above the one before it")));
            }
            previous = Some(key);
        }
        Ok(())
    }

    pub fn corrupt(&self, what: String) -> Error {
        Error::corrupt(self.offset, what)
    }

    fn element(&self, index: usize) -> Result<(usize, &[u8])> {
        let start = PAGE_HEADER_SIZE.saturating_add(index.saturating_mul(ELEMENT_SIZE));
        if index < self.count
            && let Some(element) = self.data.get(start..start.saturating_add(ELEMENT_SIZE))
        {
            return Ok((start, element));
        }
        Err(self.corrupt(format!("element {index} lies outside its page ({} elements)", self.count)))
    }

    fn slice(&self, index: usize, start: usize, length: u32) -> Result<&[u8]> {
        self.data
            .get(start..start.saturating_add(length as usize))
            .filter(|_| start >= PAGE_HEADER_SIZE)
            .ok_or_else(|| self.corrupt(format!("data of element {index} lies outside its page")))
    }

    /// Row `index` of a leaf page.
    pub fn row(&self, index: usize) -> Result<Row<'_>> {
        let (start, element) = self.element(index)?;
        let field = |at| u32_le(element, at).unwrap_or_default();
        let (flags, position, key_size, value_size) = (field(0), field(4), field(8), field(12));
        if flags > 1 {
            return Err(self.corrupt(format!("element {index} has flags {flags:#x}")));
        }
        let key_start = start.saturating_add(position as usize);
        let key = self.slice(index, key_start, key_size)?;
        let value = self.slice(index, key_start.saturating_add(key_size as usize), value_size)?;
        Ok(Row { key, value, is_bucket: flags == 1 })
    }

    /// Key and page of child `index` of a branch page.
    pub fn child(&self, index: usize) -> Result<(&[u8], u64)> {
        let (start, element) = self.element(index)?;
        let position = u32_le(element, 0).unwrap_or_default();
        let key_size = u32_le(element, 4).unwrap_or_default();
        let child = u64_le(element, 8).unwrap_or_default();
        Ok((self.slice(index, start.saturating_add(position as usize), key_size)?, child))
    }

    /// Key of element `index`, leaf or branch.
    pub fn key(&self, index: usize) -> Result<&[u8]> {
        if self.is_leaf { Ok(self.row(index)?.key) } else { Ok(self.child(index)?.0) }
    }

    /// Number of elements whose key satisfies `below`; they come first.
    pub fn partition_point(&self, mut below: impl FnMut(&[u8]) -> bool) -> Result<usize> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if below(self.key(middle)?) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }
}
