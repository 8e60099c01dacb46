//! The harness: real etcds, a real S3 server and the real `sidecar` program, as child processes that end with the test.

pub mod azurite;
pub mod certificates;
pub mod direct;
pub mod etcd;
pub mod faults;
pub mod garage;
pub mod gardener;
pub mod gcs;
pub mod google;
pub mod kubernetes;
pub mod listing;
pub mod machine;
pub mod minio;
pub mod network;
pub mod node;
pub mod pod;
pub mod program;
pub mod proxy;
pub mod state;
pub mod store;
pub mod workload;

use std::collections::HashSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Path of a pinned program. A missing one is an error that says how to get it, never a skipped test.
pub fn program(tool: &str, program: &str) -> Result<PathBuf> {
    let tool = tools::tool(tool).map_err(anyhow::Error::msg)?;
    tool.program(program)
        .with_context(|| format!("{program} of {} {} is missing: run `cargo tools fetch`", tool.name, tool.version))
}

/// Path of a library that a Debian package has put into its place.
pub fn library(name: &str) -> Result<PathBuf> {
    let places = std::fs::read_dir("/usr/lib").context("list /usr/lib")?;
    let found = places.filter_map(|place| Some(place.ok()?.path().join(name))).find(|path| path.is_file());
    found.with_context(|| format!("{name} is missing: run `cargo tools fetch`"))
}

/// A port that nothing listens on and that no other test of this process got.
pub fn free_port() -> Result<u16> {
    static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
    for _ in 0..1000 {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut given = GIVEN.lock().map_err(|_| anyhow::anyhow!("a test panicked while it asked for a port"))?;
        if given.insert(port) {
            return Ok(port);
        }
    }
    bail!("no free port")
}

/// Bytes that do not compress.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    rand::fill(&mut noise);
    noise
}

/// Tries until it works, for so long at most.
pub async fn eventually<T, F: Future<Output = Result<T>>>(
    limit: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        // An attempt may hang itself.
        let tried = tokio::time::timeout(limit + Duration::from_secs(60), attempt()).await;
        match tried.unwrap_or_else(|_| Err(anyhow::anyhow!("an attempt does not end"))) {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("not within {limit:?}"))),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Makes a test of each `name: function(minor)`.
#[macro_export]
macro_rules! on_every_minor {
    ($($name:ident: $test:ident($minor:literal);)*) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $name() -> Result<()> {
            $test($minor).await
        })*
    };
}

/// Runs a program to its end; fails with its output unless it succeeds.
pub async fn succeed(command: &mut tokio::process::Command) -> Result<String> {
    let output = command.stdin(std::process::Stdio::null()).output().await?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    anyhow::ensure!(output.status.success(), "{command:?} failed with {}: {text}", output.status);
    Ok(text)
}

/// URL of a directory as a store.
pub fn file_url(dir: &std::path::Path) -> String {
    format!("file://{}", dir.display())
}

/// Every object file under a directory, sorted; timeline descriptions left out.
pub fn objects(dir: &std::path::Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "zst") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Copies a directory, in the place of what is there.
pub async fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    succeed(tokio::process::Command::new("cp").arg("-r").arg(from).arg(to)).await.map(drop)
}

/// Puts each of two directories in the place of the other, with no moment in which one of them is not there.
pub fn exchange(one: &std::path::Path, other: &std::path::Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).context("exchange two directories")
}

/// Flips a byte of each page of a member's database, but for its meta pages.
pub fn damage(data_dir: &std::path::Path) -> Result<()> {
    let path = data_dir.join("member/snap/db");
    let mut bytes = std::fs::read(&path)?;
    bytes.iter_mut().skip(4096 * 2).step_by(4096).for_each(|byte| *byte ^= 0xff);
    Ok(std::fs::write(path, bytes)?)
}

/// In a value: nothing of the database's own structure says so.
pub const VALUE: &[u8] = b"as it was when it was written";

/// Flips a bit of that value, wherever it is.
pub fn flip(data: &std::path::Path) -> Result<()> {
    let path = data.join("member/snap/db");
    let mut bytes = std::fs::read(&path)?;
    let places: Vec<_> = bytes.windows(VALUE.len()).enumerate().filter(|(_, window)| *window == VALUE).collect();
    let places: Vec<_> = places.into_iter().map(|(at, _)| at).collect();
    ensure!(!places.is_empty(), "the value is nowhere");
    for at in places {
        bytes[at] ^= 1;
    }
    Ok(std::fs::write(path, bytes)?)
}
