//! How objects are compressed: not at all, gzip, zlib, or LZW as Go's compress/lzw writes it (least significant bit first,
//! 8 bit literals, no header), which is not what Unix compress writes.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use weezl::{BitOrder, LzwStatus};

use crate::{Error, Result};

/// Bytes of a database's beginning up to its magic number's end.
const BOLT_MAGIC: (usize, [u8; 4]) = (16, 0xED0C_DAED_u32.to_le_bytes());

/// How an object is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// Not at all.
    None,
    /// `.gz`.
    Gzip,
    /// `.zlib`.
    Zlib,
    /// `.Z`.
    Lzw,
}

impl Codec {
    pub(super) fn of_suffix(suffix: &str) -> Option<Self> {
        [Self::Gzip, Self::Zlib, Self::Lzw].into_iter().find(|codec| codec.suffix().strip_prefix('.') == Some(suffix))
    }

    /// What names of objects end with.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Gzip => ".gz",
            Self::Zlib => ".zlib",
            Self::Lzw => ".Z",
        }
    }

    /// What the first bytes of an object say; `None` when they are of nothing that is known.
    fn of_content(head: &[u8]) -> Option<Self> {
        let (at, magic) = BOLT_MAGIC;
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [b'[', ..] => Some(Self::None),
            _ if head.get(at..at + magic.len()) == Some(&magic) => Some(Self::None),
            [cmf, flg, ..] if cmf & 0x0f == 8 && cmf >> 4 <= 7 && u16::from_be_bytes([*cmf, *flg]) % 31 == 0 => {
                Some(Self::Zlib)
            }
            // Its first code, of 9 bits, is the one that clears the table: 256.
            [0, second, ..] if second & 1 == 1 => Some(Self::Lzw),
            _ => None,
        }
    }
}

/// Decompresses an object while it is read.
pub struct Decoder<R: Read> {
    inner: Inner<R>,
    name: String,
    codec: Codec,
}

enum Inner<R: Read> {
    Plain(Source<R>),
    Gzip(MultiGzDecoder<Source<R>>),
    Zlib(ZlibDecoder<Source<R>>),
    Lzw(Lzw<R>),
}

type Source<R> = BufReader<io::Chain<io::Cursor<Vec<u8>>, R>>;

impl<R: Read> std::fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("name", &self.name).field("codec", &self.codec).finish()
    }
}

impl<R: Read> Decoder<R> {
    /// What the content says goes before what the name says: objects with the wrong suffix exist. `name` is for messages.
    pub fn new(mut source: R, named: Codec, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let mut head = Vec::new();
        let fail = |error: io::Error| error.downcast().unwrap_or_else(Error::io("read", &name));
        source.by_ref().take(64).read_to_end(&mut head).map_err(fail)?;
        if head.is_empty() {
            return Err(Error::corrupt(format!("{name}: object is empty")));
        }
        let codec = Codec::of_content(&head).unwrap_or(named);
        if codec != named {
            tracing::warn!(object = name, ?named, ?codec, "an object is not compressed as its name says");
        }
        let source = BufReader::with_capacity(256 << 10, io::Cursor::new(head).chain(source));
        let inner = match codec {
            Codec::None => Inner::Plain(source),
            Codec::Gzip => Inner::Gzip(MultiGzDecoder::new(source)),
            Codec::Zlib => Inner::Zlib(ZlibDecoder::new(source)),
            Codec::Lzw => {
                Inner::Lzw(Lzw { source, decoder: weezl::decode::Decoder::new(BitOrder::Lsb, 8), ended: false })
            }
        };
        Ok(Self { inner, name, codec })
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.inner {
            Inner::Plain(source) => return source.read(buf),
            Inner::Gzip(decoder) => decoder.read(buf),
            Inner::Zlib(decoder) => decoder.read(buf).and_then(|read| {
                if read == 0 && !buf.is_empty() {
                    at_end(decoder.get_mut())?;
                }
                Ok(read)
            }),
            Inner::Lzw(decoder) => decoder.read(buf),
        };
        read.map_err(|error| {
            // Failures of the source pass through; what the codec finds wrong is damage of the object.
            if error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync + 'static>::is::<Error>) {
                return error;
            }
            let what =
                if error.kind() == io::ErrorKind::UnexpectedEof { "cut short".to_owned() } else { error.to_string() };
            io::Error::other(Error::corrupt(format!("{}: compressed data is damaged: {what}", self.name)))
        })
    }
}

/// Nothing may follow what was compressed.
fn at_end(source: &mut impl BufRead) -> io::Result<()> {
    if source.fill_buf()?.is_empty() { Ok(()) } else { Err(io::Error::other("something follows its end")) }
}

struct Lzw<R: Read> {
    source: Source<R>,
    decoder: weezl::decode::Decoder,
    ended: bool,
}

impl<R: Read> Read for Lzw<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        while !self.ended {
            let input = self.source.fill_buf()?;
            let no_more = input.is_empty();
            let result = self.decoder.decode_bytes(input, buf);
            self.source.consume(result.consumed_in);
            match result.status {
                Ok(LzwStatus::Done) => self.ended = true,
                Ok(_) if no_more && result.consumed_out == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
            if result.consumed_out > 0 {
                return Ok(result.consumed_out);
            }
        }
        at_end(&mut self.source)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use proptest::prelude::*;

    use super::*;

    fn encode(codec: Codec, content: &[u8]) -> Vec<u8> {
        match codec {
            Codec::None => content.to_vec(),
            Codec::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
            Codec::Zlib => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
            Codec::Lzw => weezl::encode::Encoder::new(BitOrder::Lsb, 8).encode(content).unwrap(),
        }
    }

    fn decode(bytes: &[u8], named: Codec) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Decoder::new(bytes, named, "test").map_err(io::Error::other)?.read_to_end(&mut content)?;
        Ok(content)
    }

    const ALL: [Codec; 4] = [Codec::None, Codec::Gzip, Codec::Zlib, Codec::Lzw];

    #[test]
    fn content_is_decompressed_whatever_the_name_says() {
        let content: Vec<u8> = [b"[".to_vec(), (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect()].concat();
        for codec in ALL {
            let bytes = encode(codec, &content);
            for named in ALL {
                assert!(decode(&bytes, named).unwrap() == content, "{codec:?} named {named:?}");
            }
            if codec != Codec::None {
                assert!(decode(&bytes[..bytes.len() - 3], codec).is_err(), "{codec:?} cut short");
                // A bit or two more than a decoder looks ahead.
                assert!(decode(&[&bytes, [7; 64].as_slice()].concat(), codec).is_err(), "{codec:?} with more behind");
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            for named in ALL {
                let _ = decode(&bytes, named);
            }
        }
    }
}
