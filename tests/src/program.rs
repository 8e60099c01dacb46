//! The `sidecar` program, run as a user runs it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// A command line.
#[derive(Debug, Clone)]
pub struct Sidecar {
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
    /// What it is run by.
    by: Vec<String>,
}

/// What a run left.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Fails with the output unless the exit code is that one.
    pub fn expect(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == code,
            "exit code {} instead of {code}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// Fails unless standard error has that text.
    pub fn says(self, text: &str) -> Result<Self> {
        ensure!(self.stderr.contains(text), "standard error does not say {text:?}: {}", self.stderr);
        Ok(self)
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {}", self.stdout))
    }
}

/// The built program: beside the test's own binary, or what `SIDECAR_PROGRAM` names, such as the static one.
pub fn path() -> Result<PathBuf> {
    if let Some(other) = std::env::var_os("SIDECAR_PROGRAM") {
        return Ok(other.into());
    }
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("sidecar")).find(|path| path.is_file());
    found.context("the sidecar program is not built: run `cargo build --package sidecar`, or `cargo suite`")
}

impl Sidecar {
    /// With these arguments.
    pub fn new<A: Into<OsString>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Self { arguments, environment: Vec::new(), by: Vec::new() }
    }

    /// On another host, which a network namespace is.
    #[must_use]
    pub fn within(self, network: Option<&str>) -> Self {
        match network {
            Some(network) => self.by(&["ip", "netns", "exec", network]),
            None => self,
        }
    }

    /// As a user who may do nothing in particular.
    #[must_use]
    pub fn as_nobody(self) -> Self {
        self.by(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
    }

    /// By a program that becomes it, so that its pid stays.
    fn by(mut self, program: &[&str]) -> Self {
        self.by.extend(program.iter().map(|word| (*word).to_owned()));
        self
    }

    /// With one more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// With more arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// With an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Its arguments.
    pub fn arguments(&self) -> &[OsString] {
        &self.arguments
    }

    /// What is added to its environment.
    pub fn environment(&self) -> impl Iterator<Item = (String, String)> {
        self.environment.iter().cloned()
    }

    fn command(&self) -> Result<Command> {
        let mut command = match self.by.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(path()?);
                command
            }
            None => Command::new(path()?),
        };
        command.args(&self.arguments).envs(self.environment.iter().cloned()).stdin(Stdio::null()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs to the end.
    pub async fn run(&self) -> Result<Ended> {
        let output = tokio::time::timeout(Duration::from_secs(300), self.command()?.output()).await;
        let output = output.with_context(|| format!("{:?} did not end", self.arguments))??;
        Ok(Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Starts it and goes on.
    pub fn spawn(&self) -> Result<Running> {
        let mut child = self.command()?.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let lines = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().context("no standard error")?;
        let copy = lines.clone();
        let reading = tokio::spawn(async move {
            let mut reader = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = reader.next_line().await {
                if let Ok(mut lines) = copy.lock() {
                    lines.push_str(&line);
                    lines.push('\n');
                }
            }
        });
        Ok(Running { child, lines, reading })
    }
}

/// A sidecar that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Arc<Mutex<String>>,
    reading: JoinHandle<()>,
}

impl Running {
    /// Waits until all that it has logged is read; what it has started may hold that up.
    async fn read_to_end(&mut self) {
        drop(tokio::time::timeout(Duration::from_secs(5), &mut self.reading).await);
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.lines.lock().map(|lines| lines.clone()).unwrap_or_default()
    }

    /// Waits until it logs a text.
    pub async fn logs(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.logs_times(text, 1, limit).await
    }

    /// Waits until it has logged a text so many times.
    pub async fn logs_times(&mut self, text: &str, times: usize, limit: Duration) -> Result<()> {
        let deadline = tokio::time::Instant::now() + limit;
        while self.log().matches(text).count() < times {
            if let Some(status) = self.child.try_wait()? {
                if !self.reading.is_finished() {
                    self.read_to_end().await;
                    continue;
                }
                bail!("sidecar ended with {status} before it logged {text:?}:\n{}", self.log());
            }
            ensure!(
                tokio::time::Instant::now() < deadline,
                "sidecar did not log {text:?} within {limit:?}:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("sidecar has ended")?;
        Ok(kill_process(pid, signal)?)
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(mut self) -> Result<Ended> {
        self.signal(Signal::TERM)?;
        self.wait().await
    }

    /// Waits for its end.
    pub async fn wait(&mut self) -> Result<Ended> {
        let status = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await;
        let status = status.with_context(|| format!("sidecar did not end:\n{}", self.log()))??;
        if !self.reading.is_finished() {
            self.read_to_end().await;
        }
        Ok(Ended { code: status.code().unwrap_or(-1), stdout: String::new(), stderr: self.log() })
    }

    /// `kill -9`.
    pub async fn kill9(mut self) -> Result<()> {
        self.child.kill().await?;
        Ok(())
    }
}
