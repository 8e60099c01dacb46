//! What a person types, and what they get to read.

mod check;
mod compact;
mod copy;
mod ctl;
mod doctor;
mod gc;
mod install;
mod launch;
mod list;
mod manual;
mod restore;
mod serve;
mod snapshot;
mod telemetry;
mod verify;

use std::io::Write;

use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{Error, Result};

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   failed: etcd or the store could not be reached, access was denied, the disk is full
  2   usage: a flag makes no sense
  10  corrupt: a backup object or a data directory is damaged
  11  missing: there is nothing to restore, or revisions are missing in between
  12  precondition: something must be done first, such as moving a directory away";

/// Backs up etcd continuously and restores it without etcd.
#[derive(Debug, Parser)]
#[command(name = "sidecar", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// How to print results: as a table, where nothing is said, but for `ctl`, which prints JSON.
    #[arg(short, long, global = true, value_enum)]
    output: Option<Output>,
    /// How to print log lines, on standard error. Their level is set by RUST_LOG, such as RUST_LOG=debug.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs: one JSON value.
    Json,
}

/// How log lines are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    Snapshot(snapshot::Args),
    List(list::Args),
    Restore(restore::Args),
    Check(check::Args),
    Verify(verify::Args),
    Compact(compact::Args),
    Copy(copy::Args),
    Gc(gc::Args),
    Doctor(doctor::Args),
    Serve(serve::Args),
    Launch(launch::Args),
    Ctl(ctl::Args),
    Install(install::Args),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

/// The store that a command works on.
#[derive(Debug, Clone, clap::Args)]
pub struct StoreFlag {
    /// Where backups are: file:///directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix. Credentials,
    /// region, endpoint and CA come from the provider's standard environment (AWS_ACCESS_KEY_ID, AWS_REGION,
    /// AWS_ENDPOINT_URL, AWS_CA_BUNDLE, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, …), from the machine's
    /// own identity, or from the files of a secret that AWS_APPLICATION_CREDENTIALS, AZURE_APPLICATION_CREDENTIALS or
    /// GOOGLE_APPLICATION_CREDENTIALS names; files are read again when they change.
    #[arg(long, env = "SIDECAR_STORE", value_name = "URL")]
    pub store: String,
}

impl Cli {
    /// Runs the command; returns the exit code. An error is printed.
    pub async fn run(self) -> u8 {
        let spans = match telemetry::begin(self.log_format) {
            Ok(spans) => spans,
            Err(error) => return fail(&error),
        };
        let code = self.carry_out().await;
        spans.end();
        code
    }

    async fn carry_out(self) -> u8 {
        let stop = CancellationToken::new();
        let insist = CancellationToken::new();
        // Whose child must not outlive it sees to its end.
        let insisting = matches!(self.command, Command::Launch(_)).then(|| insist.clone());
        let output = self.output.unwrap_or_default();
        let signals = tokio::spawn(cancel_on_signal(stop.clone(), insisting));
        let result = match self.command {
            Command::Snapshot(args) => snapshot::run(args, output, stop).await,
            Command::List(args) => until(&stop, list::run(args, output)).await,
            Command::Restore(args) => restore::run(args, output, stop).await,
            Command::Verify(args) => verify::run(args, output, stop).await,
            Command::Compact(args) => compact::run(args, output, stop).await,
            Command::Copy(args) => copy::run(args, output, stop).await,
            Command::Gc(args) => gc::run(args, output, stop).await,
            Command::Doctor(args) => until(&stop, doctor::run(args, output)).await,
            Command::Serve(args) => serve::run(args, stop).await,
            Command::Launch(args) => launch::run(args, stop, insist).await,
            Command::Ctl(args) => until(&stop, ctl::run(args, self.output.unwrap_or(Output::Json))).await,
            Command::Install(args) => install::run(&args),
            Command::Completions(args) => manual::completions(&args),
            Command::Man(args) => manual::man(&args),
            Command::Check(args) => until(&stop, check::run(args, output)).await,
        };
        signals.abort();
        match result {
            Ok(code) => code,
            Err(error) => fail(&error),
        }
    }
}

/// Says what went wrong; the exit code.
fn fail(error: &Error) -> u8 {
    let _ = writeln!(std::io::stderr(), "error: {error}");
    error.class().exit_code()
}

/// Gives up what changes nothing when somebody asks to stop.
async fn until<T>(stop: &CancellationToken, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = work => done,
        () = stop.cancelled() => Err(Error::Cancelled),
    }
}

/// Who asks again sooner does not insist.
const LEAST_INSISTING: std::time::Duration = std::time::Duration::from_millis(500);

/// SIGTERM and SIGINT ask to stop; the second one ends the process at once.
async fn cancel_on_signal(stop: CancellationToken, insist: Option<CancellationToken>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    let mut first: Option<std::time::Instant> = None;
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        // Some send it to a process and to its group, which are one wish.
        if first.is_some_and(|first| first.elapsed() < LEAST_INSISTING) {
            continue;
        }
        if !stop.is_cancelled() {
            first = Some(std::time::Instant::now());
        }
        if let (true, Some(insist)) = (stop.is_cancelled(), &insist) {
            insist.cancel();
        } else if stop.is_cancelled() {
            #[expect(clippy::exit, reason = "somebody insists")]
            std::process::exit(1);
        }
        stop.cancel();
    }
}

/// Prints a result: as one JSON value, or as `table` writes it.
fn print<T: Serialize>(output: Output, value: &T, table: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match output {
        Output::Json => serde_json::to_string_pretty(value)
            .map_err(|error| Error::Bug { what: format!("print a result: {error}") })?,
        Output::Table => table(value),
    };
    write_out(format!("{}\n", text.trim_end()).as_bytes())
}

fn write_out(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // Whoever read has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::io("write to", "standard output")),
    }
}

/// Columns lined up, the first row as the head.
fn columns(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (index, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(index) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn parse_time(text: &str) -> Result<i64, String> {
    chrono::DateTime::parse_from_rfc3339(text)
        .map(|time| time.timestamp_millis())
        .map_err(|error| format!("it must be like 2026-11-22T18:00:00Z: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
