//! System calls of the sidecar that go wrong: strace has the n-th of a kind fail, or kills the process when it comes to it.

use std::collections::HashMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use crate::program::{self, Sidecar};

/// What happens to a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hit {
    /// `kill -9` instead of it.
    Kill,
    /// It fails: the disk cannot.
    Error,
    /// It fails: the disk is full.
    Full,
}

impl Hit {
    fn inject(self) -> &'static str {
        match self {
            Self::Kill => "signal=KILL",
            Self::Error => "error=EIO",
            Self::Full => "error=ENOSPC",
        }
    }
}

/// Everything that changes a disk, by kind, and what reads it.
pub const CALLS: [&str; 10] = [
    "openat",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "linkat",
    "rename,renameat,renameat2",
    "unlink,unlinkat,rmdir",
    "mkdir,mkdirat",
    "pread64",
];

/// How a run under a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code; -1 when it was killed.
    With(i32),
    /// The fault never came to pass.
    Untouched,
    /// It hit what wakes a thread or sends to a peer, which is no disk.
    Elsewhere,
}

/// Runs a command whose n-th call of a kind is hit.
pub async fn run(command: &Sidecar, calls: &str, nth: usize, hit: Hit) -> Result<Ended> {
    run_while(command, calls, nth, hit, std::future::pending()).await
}

/// The same of one that serves: `drive` asks it for something, and when that has ended it is asked to end.
pub async fn run_while(
    command: &Sidecar,
    calls: &str,
    nth: usize,
    hit: Hit,
    drive: impl Future<Output = ()>,
) -> Result<Ended> {
    let log = tempfile::NamedTempFile::new()?;
    let path = crate::program("strace", "strace")?;
    let libraries = path.with_file_name("lib");
    let mut strace = Command::new(&path);
    if libraries.is_dir() {
        strace.env("LD_LIBRARY_PATH", libraries);
    }
    strace
        .args(["-f", "-y", "-qq", "-o"])
        .arg(log.path())
        .args(["-e", &format!("trace={calls}"), "-e", &format!("inject={calls}:{}:when={nth}", hit.inject())])
        .arg(program::path()?)
        .args(command.arguments())
        .envs(command.environment())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = strace.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(120);
    let tracer = child.id().unwrap_or_default();
    let traced = || {
        let children = std::fs::read_to_string(format!("/proc/{tracer}/task/{tracer}/children")).unwrap_or_default();
        children.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?))
    };
    let mut drive = std::pin::pin!(drive);
    let mut is_driven = false;
    let code = loop {
        tokio::select! {
            // strace ends itself by the signal that ended the program.
            status = child.wait() => break status?.code().unwrap_or(-1),
            () = &mut drive, if !is_driven => {
                is_driven = true;
                let _ = traced().map(|pid| kill_process(pid, Signal::TERM));
            }
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
        let text = std::fs::read_to_string(log.path())?;
        if is_elsewhere(&text) {
            // A thread that is never woken waits for ever.
            break -1;
        }
        ensure!(Instant::now() < deadline, "{command:?} did not end after {hit:?} of {calls} {nth}:\n{text}");
    };
    if child.id().is_some() {
        // Without its tracer the program would go on.
        let _ = traced().map(|pid| kill_process(pid, Signal::KILL));
        let _ = child.kill().await;
    }
    let text = std::fs::read_to_string(log.path())?;
    let came = match hit {
        Hit::Kill => text.contains("+++ killed by SIGKILL +++"),
        Hit::Error | Hit::Full => text.contains("(INJECTED)"),
    };
    Ok(match came {
        _ if is_elsewhere(&text) => Ended::Elsewhere,
        true => Ended::With(code),
        false => Ended::Untouched,
    })
}

/// Whether a call was hit that is none of a disk's. Each line begins with the thread that calls; a call that another thread's
/// comes between is on two lines, of which only the first says what it is about.
fn is_elsewhere(log: &str) -> bool {
    let mut unfinished = HashMap::new();
    for line in log.lines() {
        let (thread, call) = line.split_once(' ').unwrap_or_default();
        if call.ends_with("<unfinished ...>") {
            unfinished.insert(thread, call);
            continue;
        }
        let begun = unfinished.remove(thread).unwrap_or_default();
        let about = ["anon_inode:", "socket:", "pipe:", "/dev/null"];
        if call.contains("(INJECTED)") && about.iter().any(|about| call.contains(about) || begun.contains(about)) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::is_elsewhere;

    #[test]
    fn a_call_on_two_lines_is_one() {
        let wakes = "11 write(4<anon_inode:[eventfd]>, \"\\1\", 8 <unfinished ...>";
        let disk = "12 write(9</store/x>, \"x\", 1) = -1 EIO (Input/output error) (INJECTED)";
        let resumed = "11 <... write resumed>) = -1 EIO (Input/output error) (INJECTED)";
        assert!(!is_elsewhere(&[wakes, disk].join("\n")));
        assert!(is_elsewhere(&[wakes, disk, resumed].join("\n")));
        assert!(!is_elsewhere(&[wakes, "11 <... write resumed>) = 8", disk].join("\n")));
    }
}
