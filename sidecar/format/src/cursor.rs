//! The only places where untrusted slices are cut: fixed-width integers and protobuf fields.

use crate::{Error, Result};

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u16_le(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

pub(crate) fn u32_le(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_le(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

pub(crate) fn u64_be(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// Reads a varint at the start of `bytes`; returns it and how many bytes it took. `None` when `bytes` ends inside it or
/// when it does not fit 64 bits.
pub fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        let low = u64::from(byte & 0x7f);
        if index == 9 && low > 1 {
            return None;
        }
        value |= low << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, index + 1));
        }
    }
    None
}

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a varint field, also when it is zero.
pub fn put_varint_field(out: &mut Vec<u8>, number: u32, value: u64) {
    put_varint(out, u64::from(number) << 3);
    put_varint(out, value);
}

/// Appends a length-delimited field, also when it is empty.
pub fn put_bytes_field(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    put_varint(out, (u64::from(number) << 3) | 2);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// One protobuf field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field<'a> {
    /// Wire type 0.
    Varint(u32, u64),
    /// Wire type 2.
    Bytes(u32, &'a [u8]),
}

/// Iterates over the fields of a protobuf message that uses only varints and length-delimited fields, which is all that
/// etcd's row values and our records use. Groups and fixed-width fields are errors.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    /// Starts at the beginning of a message.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn varint(&mut self) -> Result<u64> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (value, used) =
            varint(rest).ok_or_else(|| Error::corrupt(self.at as u64, "malformed varint in a protobuf message"))?;
        self.at += used;
        Ok(value)
    }

    /// The next field, or `None` at the end of the message.
    #[expect(clippy::should_implement_trait, reason = "fallible, and `?` reads better on Result<Option>")]
    pub fn next(&mut self) -> Result<Option<Field<'a>>> {
        if self.at >= self.bytes.len() {
            return Ok(None);
        }
        let start = self.at as u64;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|n| *n != 0 && *n < 1 << 29);
        let number = number.ok_or_else(|| Error::corrupt(start, "protobuf field number out of range"))?;
        match tag & 7 {
            0 => Ok(Some(Field::Varint(number, self.varint()?))),
            2 => {
                let length = self.varint()?;
                let offset = self.at as u64;
                let have = (self.bytes.len() - self.at) as u64;
                let value = usize::try_from(length)
                    .ok()
                    .and_then(|length| self.bytes.get(self.at..self.at.checked_add(length)?))
                    .ok_or(Error::Truncated { what: "protobuf field", offset, need: length, have })?;
                self.at += value.len();
                Ok(Some(Field::Bytes(number, value)))
            }
            other => Err(Error::corrupt(start, format!("protobuf wire type {other} where none is expected"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varint_round_trips(value: u64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(varint(&out), Some((value, out.len())));
            prop_assert_eq!(varint(&out[..out.len() - 1]), None);
        }

        #[test]
        fn fields_never_panic(bytes: Vec<u8>) {
            let mut fields = Fields::new(&bytes);
            while let Ok(Some(_)) = fields.next() {}
        }
    }

    #[test]
    fn varint_of_more_than_64_bits_is_refused() {
        assert_eq!(varint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]), None);
    }
}
