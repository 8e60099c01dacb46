//! Names of objects. Pure.

use super::Codec;

/// Where an object lies below the prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tree {
    /// `v1/Backup-<unix>/`.
    V1 {
        /// When the directory was begun, in Unix seconds.
        backup: i64,
    },
    /// `v2/`.
    V2,
}

/// Where a name has its mark of a final snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Final {
    No,
    Last,
    BeforeCodec,
}

/// The name of a full snapshot or a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    tree: Tree,
    full: bool,
    first: i64,
    last: i64,
    unix: i64,
    codec: Codec,
    marked_final: Final,
}

impl Name {
    /// A full snapshot, compressed with gzip, in the tree that is written today.
    pub fn full(revision: i64, unix: i64) -> Self {
        Self { full: true, first: 0, ..Self::delta(0, revision, unix) }
    }

    /// A delta, compressed with gzip, in the tree that is written today.
    pub fn delta(first: i64, last: i64, unix: i64) -> Self {
        let (tree, codec, marked_final) = (Tree::V2, Codec::Gzip, Final::No);
        Self { tree, full: false, first, last, unix, codec, marked_final }
    }

    /// The same, marked as the last of its cluster's.
    #[must_use]
    pub fn marked_final(self) -> Self {
        Self { marked_final: Final::Last, ..self }
    }

    /// Whether it is a full snapshot.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// First revision; of a full snapshot 0.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Last revision; a full snapshot has at least that.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// When it was written, in Unix milliseconds.
    pub fn unix_ms(&self) -> i64 {
        self.unix.saturating_mul(1000)
    }

    /// How it is compressed, according to its name.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Whether it was marked as the last of its cluster's.
    pub fn is_final(&self) -> bool {
        self.marked_final != Final::No
    }

    /// `None` when the name, relative to the store's prefix, is not one of these. Parts of objects (`<name>/0000000001`) are
    /// none.
    pub fn parse(name: &str) -> Option<Self> {
        let (tree, rest) = if let Some(rest) = name.strip_prefix("v2/") {
            (Tree::V2, rest)
        } else {
            let (backup, rest) = name.strip_prefix("v1/Backup-")?.split_once('/')?;
            (Tree::V1 { backup: number(backup)? }, rest)
        };
        let mut parts = rest.split('-');
        let (kind, first, last, tail) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || first.len() < 8 || last.len() < 8 {
            return None;
        }
        let mut suffixes = tail.split('.');
        let unix = number(suffixes.next()?)?;
        let suffixes: Vec<&str> = suffixes.collect();
        let (codec, marked_final) = match suffixes.as_slice() {
            [] => (Codec::None, Final::No),
            ["final"] => (Codec::None, Final::Last),
            [codec] => (Codec::of_suffix(codec)?, Final::No),
            [codec, "final"] => (Codec::of_suffix(codec)?, Final::Last),
            ["final", codec] => (Codec::of_suffix(codec)?, Final::BeforeCodec),
            _ => return None,
        };
        let parsed =
            Self { tree, full: kind == "Full", first: number(first)?, last: number(last)?, unix, codec, marked_final };
        let sound = parsed.full && parsed.first == 0 || !parsed.full && (1..=parsed.last).contains(&parsed.first);
        // Only the one spelling: what this prints is what it came from.
        (sound && parsed.to_string() == name).then_some(parsed)
    }
}

fn number(text: &str) -> Option<i64> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.tree {
            Tree::V1 { backup } => write!(f, "v1/Backup-{backup}/")?,
            Tree::V2 => f.write_str("v2/")?,
        }
        let kind = if self.full { "Full" } else { "Incr" };
        write!(f, "{kind}-{:08}-{:08}-{}", self.first, self.last, self.unix)?;
        let codec = self.codec.suffix();
        match self.marked_final {
            Final::No => f.write_str(codec),
            Final::Last => write!(f, "{codec}.final"),
            Final::BeforeCodec => write!(f, ".final{codec}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let full = ["v2/Full-00000000-00000005-1700000000.gz", "v2/Full-00000000-00000005-1700000000.final"];
        let more = ["v2/Full-00000000-00001234-1700003600.gz.final", "v2/Full-00000000-1234567890-1700003600.final.gz"];
        for name in full.into_iter().chain(more) {
            let parsed = Name::parse(name).unwrap();
            assert!(parsed.is_full() && parsed.to_string() == name, "{name}");
        }
        for name in ["v1/Backup-1700000000/Incr-00000006-00000042-1700000020.Z", "v2/Incr-100000000-100000001-1.zlib"] {
            let parsed = Name::parse(name).unwrap();
            assert!(!parsed.is_full() && parsed.to_string() == name, "{name}");
        }
        assert_eq!(Name::full(5, 7).to_string(), "v2/Full-00000000-00000005-7.gz");
        assert_eq!(Name::full(5, 7).marked_final().to_string(), "v2/Full-00000000-00000005-7.gz.final");
    }

    #[test]
    fn what_is_not_a_snapshot_is_not_taken_for_one() {
        for name in [
            "v2/Full-00000000-00000005-1700000000.gz/0000000001",
            "v1/Full-00000000-00000005-1700000000",
            "v2/x/Full-00000000-00000005-1700000000",
            "v2/Full-00000001-00000005-1700000000",
            "v2/Incr-00000007-00000005-1700000000",
            "v2/Incr-00000000-00000005-1700000000",
            "v2/Full-0-5-1700000000",
            "v2/Full-00000000-00000005-1700000000.bz2",
            "v2/Full-00000000-00000005-1700000000.gz.final.gz",
            "v2/Part-00000001-00000005-1700000000",
            "Full-00000000-00000005-1700000000",
            "",
        ] {
            assert_eq!(Name::parse(name), None, "{name}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_names_never_panic(name: String) {
            let _ = Name::parse(&format!("v2/{name}"));
        }
    }
}
