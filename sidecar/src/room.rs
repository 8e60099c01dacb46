//! Room on a disk.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::human::bytes as amount;
use crate::{Error, Result};

/// File systems that may take more than they have room for, for they compress.
const BTRFS: u64 = 0x9123_683e;
const ZFS: u64 = 0x2fc1_2fc1;

/// What a disk says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Which disk.
    disk: u64,
    /// Bytes that we may still write; `None` where that cannot be told.
    pub(crate) free: Option<u64>,
}

impl Room {
    /// Where a directory is, or is to be.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        let dir = existing(dir);
        let disk = std::fs::metadata(&dir).map_err(Error::io("look at", dir.display()))?.dev();
        let stat = rustix::fs::statfs(&dir);
        let stat = stat.map_err(|error| Error::io("ask for the room in", dir.display())(error.into()))?;
        // Some of what root may use is kept from others.
        let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
        let is_told = stat.f_blocks > 0 && ![BTRFS, ZFS].contains(&(stat.f_type as u64 & 0xffff_ffff));
        let free = is_told.then(|| blocks.saturating_mul(stat.f_bsize as u64));
        Ok(Self { disk, free })
    }
}

/// The nearest directory that exists.
pub(crate) fn existing(dir: &Path) -> PathBuf {
    let nearest = dir.ancestors().find(|dir| dir.is_dir());
    nearest.map_or_else(|| PathBuf::from(if dir.is_absolute() { "/" } else { "." }), Path::to_owned)
}

/// Fails where so many bytes cannot fit into each of these directories: a disk that is written full before that is found out has
/// others on it.
pub(crate) fn need<'d>(dirs: impl Iterator<Item = &'d Path>, bytes: u64) -> Result<()> {
    let rooms: Vec<_> = dirs.map(|dir| Ok((dir, Room::of(dir)?))).collect::<Result<_>>()?;
    match too_little(&rooms, bytes) {
        None => Ok(()),
        Some((dir, needed, free)) => {
            let (needed, free) = (amount(needed), amount(free));
            let what =
                format!("{needed} needed for the database alone, {free} free; make room, or give another directory");
            let full = std::io::Error::new(std::io::ErrorKind::StorageFull, what);
            Err(Error::io("restore into", dir.display())(full))
        }
    }
}

/// The first directory on a disk that has not the room for all of its own; what these need, and what there is.
fn too_little<'d>(rooms: &[(&'d Path, Room)], bytes: u64) -> Option<(&'d Path, u64, u64)> {
    let mut needed: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, room) in rooms {
        let sum = needed.entry(room.disk).or_default();
        *sum = sum.saturating_add(bytes);
    }
    rooms.iter().find_map(|(dir, room)| {
        let (needed, free) = (*needed.get(&room.disk)?, room.free?);
        (free < needed).then_some((*dir, needed, free))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_said_before() {
        let (a, b, c) = (Path::new("a"), Path::new("b"), Path::new("c"));
        let room = |disk, free| Room { disk, free };
        let rooms = [(a, room(1, Some(10))), (b, room(1, Some(10))), (c, room(2, None))];
        assert_eq!(too_little(&rooms, 5), None);
        assert_eq!(too_little(&rooms, 6), Some((a, 12, 10)));
        assert_eq!(too_little(&rooms[1..], 10), None);
        assert_eq!(too_little(&rooms[2..], u64::MAX), None);
        assert_eq!(too_little(&rooms, u64::MAX), Some((a, u64::MAX, 10)));
        assert!(Room::of(Path::new("not/there/yet")).is_ok());
    }
}
