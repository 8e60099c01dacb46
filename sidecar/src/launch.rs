//! Starts etcd, once its sidecar says that it may: the process of the etcd container.
//!
//! Without a sidecar nothing starts: etcd on data that nobody has checked may be the end of a cluster.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use proto::sidecar as api;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::client::{ApiFlags, failed, request_id};
use crate::{Error, Result, small_file};

/// An etcd that fails within this has not come to serve for long.
const SOON: Duration = Duration::from_secs(10);
/// So many times in a row it may; whoever runs us tries again when it sees fit.
const MOST_FAILURES: u32 = 3;
/// The exit code of an etcd that somebody, or the lack of memory, killed.
const KILLED: u8 = 128 + 9;
/// Between two attempts, at most.
const MOST_DELAY: Duration = Duration::from_secs(10);
/// How long etcd has to end when asked to. Kubernetes grants 30 s in all.
const STOP_DEADLINE: Duration = Duration::from_secs(27);
/// How long the sidecar is told how etcd ended, so that the container ends in time.
const REPORT_DEADLINE: Duration = Duration::from_secs(2);
/// How often it is logged how far an initialization is.
const PROGRESS_PERIOD: Duration = Duration::from_secs(5);
/// For calls that are answered at once.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// How a launch is done.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How the sidecar is reached.
    pub api: ApiFlags,
    /// The program.
    pub etcd: PathBuf,
    /// Where its configuration is written.
    pub config: PathBuf,
}

/// Initializes, runs etcd to its end, and returns its exit code. An etcd that fails soon after its start is sent back to
/// initialization a few times: its data is looked at again. When `insist` is cancelled after `stop`, etcd is killed.
pub async fn launch(settings: &Settings, stop: &CancellationToken, insist: &CancellationToken) -> Result<u8> {
    may_write(&settings.config, None)?;
    for failures in 1.. {
        let (code, ran) = once(settings, stop, insist).await?;
        // Killed, it does not say anything about its data: whoever killed it, or the lack of memory, is to be seen outside.
        if code == 0 || code == KILLED || stop.is_cancelled() || ran > SOON || failures >= MOST_FAILURES {
            return Ok(code);
        }
        tracing::warn!(code, failures, "etcd failed soon after its start: its data is looked at again");
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => return Ok(code),
        }
    }
    Err(Error::Bug { what: "etcd was started too often".into() })
}

/// Initializes and runs etcd; its exit code, and how long it ran.
async fn once(settings: &Settings, stop: &CancellationToken, insist: &CancellationToken) -> Result<(u8, Duration)> {
    let yaml = tokio::select! {
        yaml = prepare(settings) => yaml?,
        () = stop.cancelled() => return Err(Error::Cancelled),
    };
    may_write(&settings.config, Some(&yaml))?;
    write_config(&settings.config, &yaml)?;
    let started = Instant::now();
    let mut etcd = Command::new(&settings.etcd)
        .arg("--config-file")
        .arg(&settings.config)
        .stdin(Stdio::null())
        .spawn()
        .map_err(Error::io("start", settings.etcd.display()))?;
    tracing::info!(pid = etcd.id(), etcd = %settings.etcd.display(), "etcd is started");
    let code = run_to_end(&mut etcd, stop, insist).await?;
    let ran = started.elapsed();
    let ran_ms = u64::try_from(ran.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(code, ran_ms, "etcd has ended");
    let report = async {
        let ended = api::ReportExitRequest { code: code.into(), ran_ms, request_id: request_id() };
        settings.api.connect().await?.report_exit(ended).await.map_err(failed("report how etcd ended"))
    };
    match tokio::time::timeout(REPORT_DEADLINE, report).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the sidecar does not know how etcd ended"),
        Err(_) => tracing::warn!("the sidecar does not know how etcd ended: it does not answer"),
    }
    Ok((code, ran))
}

/// Waits for the sidecar and for what it does, for as long as that takes; what etcd is to be started with.
async fn prepare(settings: &Settings) -> Result<String> {
    // Where the connection breaks, what was done for it is not done again.
    let (mut delay, id) = (Duration::from_millis(200), request_id());
    loop {
        let error = match ask(settings, &id).await {
            Ok(yaml) => return Ok(yaml),
            Err(error) if error.class().passes(false) => error,
            Err(error) => return Err(error),
        };
        tracing::warn!(%error, retry_in = ?delay, "etcd cannot start yet");
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(MOST_DELAY);
    }
}

async fn ask(settings: &Settings, id: &str) -> Result<String> {
    let mut client = settings.api.connect().await?;
    let request = api::InitializeRequest { request_id: id.to_owned() };
    let mut told = client.initialize(request).await.map_err(not_yet("initialize"))?.into_inner();
    let (mut outcome, mut told_of, mut told_at) = (None, String::new(), Instant::now());
    while let Some(progress) = told.message().await.map_err(not_yet("initialize"))? {
        // Numbers move all the time; what is new otherwise is of interest.
        let moves = progress.done > 0 || progress.total > 0;
        if !moves || progress.phase != told_of || told_at.elapsed() > PROGRESS_PERIOD {
            tracing::info!(phase = progress.phase, "{}", progress.text);
            (told_of, told_at) = (progress.phase, Instant::now());
        }
        outcome = progress.outcome.or(outcome);
    }
    let outcome = outcome.ok_or_else(|| Error::Unanswered { what: "the sidecar ended in the middle".into() })?;
    if outcome.action() == api::Action::Refuse {
        return Err(if outcome.may_pass {
            Error::Unanswered { what: outcome.reason }
        } else {
            Error::precondition(format!("etcd must not start: {}", outcome.reason))
        });
    }
    tracing::info!(action = ?outcome.action(), revision = outcome.revision, "{}", outcome.reason);
    let mut request = tonic::Request::new(api::GetEtcdConfigRequest {});
    request.set_timeout(CALL_DEADLINE);
    // Somebody may have begun another initialization since.
    Ok(client.get_etcd_config(request).await.map_err(not_yet("get etcd's configuration"))?.into_inner().yaml)
}

/// Only an outcome says that etcd must not start: what keeps an initialization from one, such as a restore by hand that is at
/// work there, passes.
fn not_yet(what: &str) -> impl Fn(tonic::Status) -> Error + '_ {
    move |status| match failed(what)(status) {
        Error::Precondition { what } => Error::Unanswered { what },
        error => error,
    }
}

/// Refuses to write over what somebody else wrote: a person, for what the sidecar gives is JSON, or the launcher of another
/// member, whose etcd may be about to read it.
fn may_write(path: &Path, yaml: Option<&str>) -> Result<()> {
    let is_there = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_file() => true,
        Ok(_) => {
            let what = format!(
                "{} is no file: say with --config where the configuration for etcd is to be written",
                path.display()
            );
            return Err(Error::precondition(what));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io("look at", path.display())(error)),
    };
    let there =
        if is_there { small_file::read(path).map_err(Error::io("read", path.display()))? } else { return Ok(()) };
    let place = "say with --config where the configuration for etcd is to be written";
    let data_dir = |json: &[u8]| {
        let parsed = serde_json::from_slice::<serde_json::Value>(json).ok()?;
        Some(parsed.get("data-dir")?.as_str()?.to_owned())
    };
    if !there.trim_ascii().is_empty() && data_dir(&there).is_none() {
        return Err(Error::precondition(format!("{} is there and was not written by launch; {place}", path.display())));
    }
    match (data_dir(&there), yaml.and_then(|yaml| data_dir(yaml.as_bytes()))) {
        (Some(theirs), Some(ours)) if theirs != ours => Err(Error::precondition(format!(
            "{} is of a member whose data is in {theirs}, not in {ours}; {place}, or delete it",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Beside it first: an etcd never sees half of it.
fn write_config(path: &Path, yaml: &str) -> Result<()> {
    let fail = |error| Error::io("write", path.display())(error);
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    std::io::Write::write_all(&mut file, yaml.as_bytes()).map_err(fail)?;
    file.persist(path).map_err(|error| fail(error.error)).map(drop)
}

/// Waits for etcd; asks it to end when we are, and insists when it does not.
async fn run_to_end(etcd: &mut Child, stop: &CancellationToken, insist: &CancellationToken) -> Result<u8> {
    let fail = Error::io("wait for", "etcd");
    let status = tokio::select! {
        status = etcd.wait() => status.map_err(fail)?,
        () = stop.cancelled() => {
            if let Some(pid) = etcd.id().and_then(|id| rustix::process::Pid::from_raw(id as i32)) {
                tracing::info!("ask etcd to end");
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let ended = tokio::select! {
                ended = tokio::time::timeout(STOP_DEADLINE, etcd.wait()) => ended.map_err(|_| "it does not end in time"),
                () = insist.cancelled() => Err("we were asked to end once more"),
            };
            match ended {
                Ok(status) => status.map_err(fail)?,
                Err(why) => {
                    tracing::warn!(why, "etcd is killed");
                    etcd.start_kill().map_err(Error::io("kill", "etcd"))?;
                    etcd.wait().await.map_err(fail)?
                }
            }
        }
    };
    // As a shell has it.
    let killed = status.signal().map(|signal| 128 + signal);
    let code = status.code().or(killed).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_replaces_another_as_a_whole() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("create", "a directory"))?;
        let path = dir.path().join("etcd.yaml");
        for text in ["name: a much longer one than the other", "name: b"] {
            write_config(&path, text)?;
            assert_eq!(std::fs::read_to_string(&path).map_err(Error::io("read", "it"))?, text);
        }
        assert!(
            write_config(&dir.path().join("nowhere/etcd.yaml"), "")
                .is_err_and(|error| error.to_string().contains("nowhere"))
        );
        Ok(())
    }
}
