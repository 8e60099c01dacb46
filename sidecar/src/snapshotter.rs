//! Moves what etcd has into the store: a full snapshot when one is due, and deltas all the while.
//!
//! One task watches every key from the revision after the last one backed up. What it receives goes, compressed, into a
//! delta in memory; the delta is closed by period or size and uploaded while the next one fills. A full snapshot runs
//! beside that and stops nothing.
//!
//! # Invariants
//! - The cursor comes from the store's listing or from etcd, never from an earlier run's memory.
//! - A delta ends only where etcd's message ended a revision.
//! - At most two deltas are in memory. While the store does not take one and the next is full, the watch is not read:
//!   etcd keeps the events. Should it compact them away, a full snapshot follows and the gap is reported.
//! - What was received is given up only when the run was asked to end and the store did not take it in time, and that is an
//!   error.

mod auth;
mod closing;
mod comparison;
mod full;
mod own;
mod pending;
mod requests;
mod session;
mod timeline;

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use croner::Cron;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use session::{End, Ended, Session, Tip};

pub use closing::TakenDelta;
pub use full::TakenFull;
pub use requests::{Request, Requests, nobody};

use crate::catalog::{Layout, Timeline};
use crate::etcd::{Etcd, EtcdFlags};
use crate::metrics::Metrics;
use crate::store::Store;
use crate::{Error, Result};

/// How often a delta may be closed.
pub const DELTA_PERIODS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(86_400);
/// How large one may grow. Two are in memory at most; the upper bound keeps that bounded too.
pub const DELTA_BYTES: RangeInclusive<u64> = 1024..=128 << 20;

/// What a run goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where etcd is.
    pub etcd: EtcdFlags,
    /// Where other members of its cluster may be reached too, beside the client URLs that they are listed with.
    pub others: Vec<String>,
    /// Where backups go.
    pub store: Store,
    /// What they look like there.
    pub layout: Layout,
    /// The member's data directory, whose notes say what its cluster comes from: into a store that has the backups of another
    /// nothing is put without that. Not known to somebody who says by hand that it is to be put there.
    pub data_dir: Option<PathBuf>,
    /// When full snapshots are due; `None` for only when needed.
    pub full_schedule: Option<Cron>,
    /// A delta is closed at least so often, when there is anything in it.
    pub delta_period: Duration,
    /// A delta is closed when its content reaches so many bytes.
    pub delta_max_bytes: u64,
    /// How many bytes of a full snapshot are read from etcd in a second at most; none for as fast as it gives them.
    pub full_bytes_per_second: Option<u64>,
    /// Held while a full snapshot is read, so that nobody defragments meanwhile.
    pub quiet: Arc<tokio::sync::Mutex<()>>,
    /// Who is told what was taken.
    pub metrics: Arc<Metrics>,
}

/// What is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A full snapshot.
    Full,
    /// A full snapshot that is marked as the last of its cluster.
    Final,
    /// Everything since the last backup, as a delta.
    Delta,
}

/// What was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// A full snapshot; also when deltas were asked for and auth has changed.
    Full(TakenFull),
    /// Deltas, more than one when they grew to the largest size.
    Deltas(Vec<TakenDelta>),
    /// Nothing changed since the last backup, which has this revision.
    Nothing(i64),
}

fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

async fn begin<'s>(
    settings: &'s Settings,
    stop: &CancellationToken,
    known: Option<(u64, Timeline)>,
) -> Result<Session<'s>> {
    let begin = async {
        let (etcd, status) = Etcd::connect(&settings.etcd).await?;
        Session::begin(settings, etcd, status, known).await
    };
    tokio::select! {
        session = begin => session,
        () = stop.cancelled() => Err(Error::Cancelled),
    }
}

/// Takes one snapshot and returns.
pub async fn once(settings: &Settings, kind: Kind, stop: &CancellationToken) -> Result<Taken> {
    let mut session = begin(settings, stop, None).await?;
    match kind {
        Kind::Full => Ok(Taken::Full(session.full_once(false, stop).await?)),
        Kind::Final => Ok(Taken::Full(session.full_once(true, stop).await?)),
        Kind::Delta => match std::mem::take(&mut session.tip) {
            Tip::At(tip) => {
                let taken = session.deltas_once(tip, stop).await?;
                if taken.iter().any(|delta| delta.is_too_large_to_replay) {
                    tracing::warn!(
                        "a revision is too large for the predecessor's restore to replay; a full snapshot is taken as well"
                    );
                    return Ok(Taken::Full(session.full_once(false, stop).await?));
                }
                if session.auth_changed().await? {
                    tracing::warn!(
                        "users, roles or auth have changed, which no delta holds; a full snapshot is taken as well"
                    );
                    return Ok(Taken::Full(session.full_once(false, stop).await?));
                }
                Ok(if taken.is_empty() { Taken::Nothing(tip) } else { Taken::Deltas(taken) })
            }
            Tip::Unproven(reason) => Err(reason),
            Tip::None => Err(Error::precondition(
                "no full snapshot of this cluster is in the store that a delta could follow; take one with --once full",
            )),
        },
    }
}

/// An interruption that may be over before somebody who has asked for a snapshot would ask again.
const SOON: Duration = Duration::from_secs(3);

/// Backs up until `stop` is cancelled. Trouble with etcd or the store is waited out; only what cannot pass ends the run.
/// Meanwhile it takes what is asked for.
pub async fn run(settings: &Settings, stop: &CancellationToken, requests: &mut Requests) -> Result<()> {
    let mut delay = Duration::from_millis(500);
    // The cluster that is backed up, and the timeline.
    let mut known = None;
    // Up to where something was received that is in no store, and why: the next session takes it from etcd, if there is one.
    let mut unsaved: Option<(i64, String)> = None;
    loop {
        let started = Instant::now();
        let ended = match begin(settings, stop, known).await {
            Ok(session) => {
                let own = session.own();
                known = Some((own.cluster_id, own.timeline));
                let End { ended, received, saved } = session.run(stop, requests).await;
                unsaved = match &ended {
                    Ended::Unsaved(error) => Some((received, error.to_string())),
                    Ended::Clean | Ended::Interrupted(_) => unsaved.filter(|(upto, _)| saved < *upto),
                };
                ended
            }
            Err(error) => Ended::Interrupted(error),
        };
        let error = match ended {
            Ended::Clean => return all_saved(unsaved),
            Ended::Interrupted(_) if stop.is_cancelled() => return all_saved(unsaved),
            Ended::Unsaved(error) if stop.is_cancelled() => return Err(error),
            Ended::Interrupted(error) | Ended::Unsaved(error) => error,
        };
        // At the start, most trouble is a mistake that somebody wants to hear of.
        if !error.class().passes(known.is_some()) {
            return Err(error);
        }
        if started.elapsed() > Duration::from_secs(60) {
            delay = Duration::from_millis(500);
        }
        settings.metrics.interrupted(&error);
        tracing::warn!(%error, retry_in = ?delay, "backup is interrupted; go on from what the store has");
        // Who has asked meanwhile does not wait for what takes longer.
        if delay > SOON {
            while let Ok(request) = requests.try_recv() {
                let what = format!("nothing is backed up now: {error}");
                drop(request.reply.send(Err(Error::Unanswered { what })));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => return all_saved(unsaved),
        }
        delay = (delay * 2).min(Duration::from_secs(15));
    }
}

fn all_saved(unsaved: Option<(i64, String)>) -> Result<()> {
    let lost = |why: &str| Error::Unanswered {
        what: format!(
            "the last changes are not backed up, there was no time; the next run takes them from etcd: {why}"
        ),
    };
    unsaved.map_or(Ok(()), |(_, why)| Err(lost(&why)))
}
