//! The harness: real etcds, a real S3 server and the real `sidecar` program, as child processes that end with the test.

pub mod etcd;
pub mod minio;
pub mod program;
pub mod state;
pub mod workload;

use std::collections::HashSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Path of a pinned program. A missing one is an error that says how to get it, never a skipped test.
pub fn program(tool: &str, program: &str) -> Result<PathBuf> {
    let tool = tools::tool(tool).map_err(anyhow::Error::msg)?;
    tool.program(program)
        .with_context(|| format!("{program} of {} {} is missing: run `cargo tools fetch`", tool.name, tool.version))
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

/// Tries until it works, for so long at most.
pub async fn eventually<T, F: Future<Output = Result<T>>>(
    limit: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("not within {limit:?}"))),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}
