//! `sidecar ctl`.

use clap::{Subcommand, ValueEnum};
use proto::sidecar as api;
use proto::sidecar::sidecar_client::SidecarClient;
use serde::Serialize;
use serde_json::Value;
use tonic::Streaming;
use tonic::transport::Channel;

use super::{Output, columns, write_out};
use crate::client::{ApiFlags, failed};
use crate::human::time;
use crate::{Class, Error, Result};

/// Call a sidecar that serves.
///
/// Prints each answer as JSON, a stream as one value a line; with `--output table` a line for each thing in it.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    api: ApiFlags,
    #[command(subcommand)]
    call: Call,
}

/// A request id.
#[derive(Debug, clap::Args)]
struct Once {
    /// An id of your own: repeated with the same, the call is answered as before and nothing is done twice.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "ID")]
    request_id: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Full,
    Delta,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    Names,
    Bytes,
    Decode,
    Replay,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Have the data looked at, and restored where it must be. Exit code 12 when etcd must not start.
    Initialize(Once),
    /// The configuration that etcd is to be started with.
    GetEtcdConfig,
    /// Say how etcd ended.
    ReportExit {
        /// Its exit code.
        code: i32,
        /// How long it ran, in milliseconds.
        #[arg(long, default_value_t = 0, value_name = "N")]
        ran_ms: u64,
        #[command(flatten)]
        once: Once,
    },
    /// Where the sidecar, its member and its backups stand.
    Status,
    /// Take a snapshot now.
    TakeSnapshot {
        kind: Kind,
        /// Mark the full snapshot as the last of a cluster that goes elsewhere.
        #[arg(long = "final")]
        is_final: bool,
        #[command(flatten)]
        once: Once,
    },
    /// What the store has.
    ListSnapshots,
    /// The newest full snapshot and the deltas after it.
    GetLatest,
    /// Check what the store has. Exit code 10 when something is damaged, 11 when something is missing.
    Verify {
        #[arg(long, value_enum, default_value_t = Level::Decode)]
        level: Level,
    },
    /// Merge the newest deltas into a full snapshot.
    Compact {
        /// Keep of each key only its newest value.
        #[arg(long)]
        discard_history: bool,
        #[command(flatten)]
        once: Once,
    },
    /// Defragment the member's database.
    Defragment {
        #[command(flatten)]
        once: Once,
    },
    /// Have everything backed up and hand leadership over.
    PrepareShutdown {
        #[command(flatten)]
        once: Once,
    },
}

/// Prints answers.
#[derive(Clone, Copy)]
struct Printer(Output);

impl Printer {
    fn one(self, value: &impl Serialize) -> Result<()> {
        self.print(value, serde_json::to_string_pretty)
    }

    async fn each<T: Serialize>(self, mut stream: Streaming<T>, mut see: impl FnMut(&T)) -> Result<()> {
        while let Some(message) = stream.message().await.map_err(failed("call"))? {
            see(&message);
            self.print(&message, serde_json::to_string)?;
        }
        Ok(())
    }

    /// A stream of things with the same fields: as a table, they are its columns.
    async fn rows<T: Serialize>(self, mut stream: Streaming<T>) -> Result<()> {
        if self.0 == Output::Json {
            return self.each(stream, |_| {}).await;
        }
        let mut rows = Vec::new();
        while let Some(message) = stream.message().await.map_err(failed("call"))? {
            let (names, values) = fields(&message)?.into_iter().unzip();
            if rows.is_empty() {
                rows.push(names);
            }
            rows.push(values);
        }
        write_out(columns(&rows).as_bytes())
    }

    fn print<T: Serialize>(self, value: &T, json: impl Fn(&T) -> serde_json::Result<String>) -> Result<()> {
        let text = match self.0 {
            Output::Json => json(value),
            Output::Table => {
                let rows: Vec<_> = fields(value)?.into_iter().map(|(name, value)| vec![name, value]).collect();
                Ok(columns(&rows))
            }
        };
        let text = text.map_err(|error| unprintable(&error))?;
        write_out(format!("{}\n", text.trim_end()).as_bytes())
    }
}

fn unprintable(error: &serde_json::Error) -> Error {
    Error::Bug { what: format!("print an answer: {error}") }
}

/// Each thing of an answer that is something: where it is, and what.
fn fields(answer: &impl Serialize) -> Result<Vec<(String, String)>> {
    let mut fields = Vec::new();
    flatten("", &serde_json::to_value(answer).map_err(|error| unprintable(&error))?, &mut fields);
    Ok(fields)
}

fn flatten(at: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    let below = |part: &str| if at.is_empty() { part.to_owned() } else { format!("{at}.{part}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| flatten(&below(name), value, rows)),
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(index, value)| flatten(&below(&index.to_string()), value, rows));
        }
        Value::Null => {}
        Value::String(text) => rows.push((at.to_owned(), text.clone())),
        Value::Number(number) if at.ends_with("nixMs") => {
            rows.push((at.to_owned(), time(number.as_i64().unwrap_or_default())));
        }
        other => rows.push((at.to_owned(), other.to_string())),
    }
}

pub(super) async fn run(args: Args, output: Output) -> Result<u8> {
    let mut client = args.api.connect().await?;
    call(&mut client, args.call, Printer(output)).await
}

async fn call(client: &mut SidecarClient<Channel>, call: Call, printer: Printer) -> Result<u8> {
    let fail = failed("call");
    match call {
        Call::Initialize(Once { request_id }) => {
            let stream = client.initialize(api::InitializeRequest { request_id }).await.map_err(fail)?.into_inner();
            let mut action = api::Action::Unspecified;
            printer.each(stream, |told| action = told.outcome.as_ref().map_or(action, api::Outcome::action)).await?;
            return Ok(if action == api::Action::Refuse { Class::Precondition.exit_code() } else { 0 });
        }
        Call::GetEtcdConfig => {
            let config = client.get_etcd_config(api::GetEtcdConfigRequest {}).await.map_err(fail)?.into_inner();
            write_out(format!("{}\n", config.yaml.trim_end()).as_bytes())?;
        }
        Call::ReportExit { code, ran_ms, once: Once { request_id } } => {
            let ended = api::ReportExitRequest { code, ran_ms, request_id };
            drop(client.report_exit(ended).await.map_err(fail)?);
        }
        Call::Status => printer.one(&client.status(api::StatusRequest {}).await.map_err(fail)?.into_inner())?,
        Call::TakeSnapshot { kind, is_final, once } => {
            let kind = match kind {
                Kind::Full => api::Kind::Full,
                Kind::Delta => api::Kind::Delta,
            };
            let request = api::TakeSnapshotRequest { kind: kind.into(), request_id: once.request_id, is_final };
            let taken = client.take_snapshot(request).await.map_err(fail)?.into_inner();
            if printer.0 == Output::Table && taken.snapshots.is_empty() {
                write_out(b"nothing has changed since the last backup\n")?;
            } else {
                printer.one(&taken)?;
            }
        }
        Call::ListSnapshots => {
            let stream = client.list_snapshots(api::ListSnapshotsRequest {}).await.map_err(fail)?.into_inner();
            printer.rows(stream).await?;
        }
        Call::GetLatest => {
            printer.one(&client.get_latest(api::GetLatestRequest {}).await.map_err(fail)?.into_inner())?;
        }
        Call::Verify { level } => {
            let level = match level {
                Level::Names => api::Level::Names,
                Level::Bytes => api::Level::Bytes,
                Level::Decode => api::Level::Decode,
                Level::Replay => api::Level::Replay,
            };
            let stream = client.verify(api::VerifyRequest { level: level.into() }).await.map_err(fail)?.into_inner();
            let mut worst = 0;
            printer
                .each(stream, |told| {
                    if let Some(api::verify_progress::What::Problem(problem)) = &told.what {
                        let class = if problem.is_gap { Class::Missing } else { Class::Corrupt };
                        worst = if worst == Class::Corrupt.exit_code() { worst } else { class.exit_code() };
                    }
                })
                .await?;
            return Ok(worst);
        }
        Call::Compact { discard_history, once } => {
            let request = api::CompactRequest { request_id: once.request_id, discard_history };
            printer.one(&client.compact(request).await.map_err(fail)?.into_inner())?;
        }
        Call::Defragment { once } => {
            let request = api::DefragmentRequest { request_id: once.request_id };
            printer.one(&client.defragment(request).await.map_err(fail)?.into_inner())?;
        }
        Call::PrepareShutdown { once } => {
            let request = api::PrepareShutdownRequest { request_id: once.request_id };
            printer.one(&client.prepare_shutdown(request).await.map_err(fail)?.into_inner())?;
        }
    }
    Ok(0)
}
