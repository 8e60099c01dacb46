//! The fuzz targets on stable: over the golden files, over every seed in `fuzz/seeds`, and over mutations of both.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop where it finds the fault")]

use std::path::{Path, PathBuf};

use etcd_format::bolt::Db;
use etcd_format::fuzzing::TARGETS;

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

/// Inputs for a target: its seeds, and of the golden files those of its kind.
fn inputs(target: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seeds = Vec::new();
    files(&root.join("fuzz/seeds").join(target), &mut seeds);
    let mut inputs: Vec<Vec<u8>> = seeds.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let mut golden = Vec::new();
    files(&root.join("tests/golden"), &mut golden);
    for path in golden {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let wanted = match target {
            "database" => name == "db.zst",
            "snapshot_stream" => name == "snapshot.db.zst",
            "log" => name.ends_with(".wal.zst"),
            "snap" => name.ends_with(".snap.zst"),
            _ => false,
        };
        if wanted {
            let mut bytes = zstd::stream::decode_all(std::fs::File::open(path).unwrap()).unwrap();
            // Preallocated zeros at the end teach nothing.
            let used = Db::open(&bytes).map_or(20_000, |db| db.meta().file_size() as usize + 32);
            bytes.truncate(used);
            inputs.push(bytes);
        }
    }
    inputs
}

#[test]
fn no_decoder_panics_on_seeds_or_on_what_becomes_of_them() {
    for (name, decode) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "{name} has no seeds");
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        };
        for input in &inputs {
            decode(input);
            for _ in 0..300 {
                let mut bytes = input.clone();
                for _ in 0..=random(4) {
                    match random(4) {
                        0 => bytes.truncate(random(bytes.len() + 1)),
                        1 if !bytes.is_empty() => {
                            let at = random(bytes.len());
                            bytes[at] = random(256) as u8;
                        }
                        2 if bytes.len() > 16 => {
                            // Numbers near the limits, where arithmetic goes wrong.
                            let at = random(bytes.len() - 8);
                            let value = [u64::MAX, u64::MAX - 1, i64::MAX as u64, 1 << 31, 0xffff, 0][random(6)];
                            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
                        }
                        _ if !bytes.is_empty() => {
                            let (from, to) = (random(bytes.len()), random(bytes.len()));
                            let length = random(200).min(bytes.len() - from.max(to));
                            bytes.copy_within(from..from + length, to);
                        }
                        _ => {}
                    }
                }
                decode(&bytes);
            }
        }
    }
}
