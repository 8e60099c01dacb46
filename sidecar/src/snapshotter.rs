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

mod auth;
mod closing;
mod full;
mod timeline;

use std::time::Duration;

use chrono::Utc;
use croner::Cron;
use etcd_client::proto::PbEvent;
use etcd_client::{EventType, WatchResponse, WatchStream};
use etcd_format::mvcc::KeyValue;
use proto::backup::ObjectMeta;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use auth::{Auth, AuthWatch};
use closing::{Ask, CloseJob, Known, Position, close_delta, log_delta};

pub use closing::TakenDelta;
pub use full::TakenFull;
pub use timeline::{Comparison, Decision, Seen, decide};

use crate::catalog::{History, ObjectName, Timeline};
use crate::delta::Builder;
use crate::etcd::{Etcd, EtcdFlags, Status};
use crate::store::Store;
use crate::{Class, Error, Result};

/// How long an ending run may take to bring its last delta home.
const FLUSH_DEADLINE: Duration = Duration::from_secs(25);
/// Uploads that stayed unfinished for so long have no writer any more.
const ABANDONED_AFTER_MS: i64 = 24 * 3600 * 1000;
/// Users and roles are looked at so often.
const AUTH_PERIOD: Duration = Duration::from_secs(10);
/// What a run goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where etcd is.
    pub etcd: EtcdFlags,
    /// Where backups go.
    pub store: Store,
    /// When full snapshots are due; `None` for only when needed.
    pub full_schedule: Option<Cron>,
    /// A delta is closed at least so often, when there is anything in it.
    pub delta_period: Duration,
    /// A delta is closed when its content reaches so many bytes.
    pub delta_max_bytes: u64,
}

/// What `--once` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A full snapshot.
    Full,
    /// Everything since the last backup, as a delta.
    Delta,
}

/// What `--once` took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// A full snapshot.
    Full(TakenFull),
    /// Deltas, more than one when they grew to the largest size.
    Deltas(Vec<TakenDelta>),
    /// Nothing changed since the last backup, which has this revision.
    Nothing(i64),
}

fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

/// Takes one snapshot and returns.
pub async fn once(settings: &Settings, kind: Kind, stop: &CancellationToken) -> Result<Taken> {
    let (etcd, status) = Etcd::connect(&settings.etcd).await?;
    let mut session = Session::begin(settings, etcd, status).await?;
    match kind {
        Kind::Full => {
            let job = session.full_job().await;
            Ok(Taken::Full(full::take(job, stop).await?))
        }
        Kind::Delta => {
            let Some(tip) = session.tip else {
                if let Some(reason) = session.no_tip.take() {
                    return Err(reason);
                }
                let what = "no full snapshot of this cluster is in the store that a delta could follow; take one with --once full";
                return Err(Error::precondition(what));
            };
            let taken = session.deltas_once(tip, stop).await?;
            Ok(if taken.is_empty() { Taken::Nothing(tip) } else { Taken::Deltas(taken) })
        }
    }
}

/// Backs up until `stop` is cancelled. Trouble with etcd or the store is waited out; only what cannot pass ends the run.
pub async fn run(settings: &Settings, stop: &CancellationToken) -> Result<()> {
    let mut delay = Duration::from_millis(500);
    let mut began = false;
    while !stop.is_cancelled() {
        let started = Instant::now();
        let ended = match Etcd::connect(&settings.etcd).await {
            Ok((etcd, status)) => match Session::begin(settings, etcd, status).await {
                Ok(session) => {
                    began = true;
                    session.run(stop).await
                }
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let error = match ended {
            Ok(()) => return Ok(()),
            Err(Error::Cancelled) if stop.is_cancelled() => return Ok(()),
            Err(error) => error,
        };
        let passes = match error.class() {
            Class::Transient => true,
            // Worth waiting out once it has worked; at the start it is a mistake somebody wants to hear of.
            Class::Denied | Class::Missing | Class::Machine | Class::Corrupt => began,
            Class::Precondition | Class::Invalid | Class::Cancelled | Class::Bug => false,
        };
        if !passes {
            return Err(error);
        }
        if started.elapsed() > Duration::from_secs(60) {
            delay = Duration::from_millis(500);
        }
        tracing::warn!(%error, retry_in = ?delay, "backup is interrupted; go on from what the store has");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => {}
        }
        delay = (delay * 2).min(Duration::from_secs(15));
    }
    Ok(())
}

/// Events of a message that are not in the delta yet.
#[derive(Debug)]
struct Incoming {
    events: std::iter::Peekable<std::vec::IntoIter<PbEvent>>,
    received_unix_ms: i64,
    /// Whether the message's last revision goes on in the next message.
    fragment: bool,
}

/// One connection's worth of backing up.
struct Session<'s> {
    settings: &'s Settings,
    etcd: Etcd,
    status: Status,
    timeline: Timeline,
    /// Last revision in the store's chain; `None` when there is no chain to continue.
    tip: Option<i64>,
    /// Why there is none, when the store has one that cannot be trusted to be of this etcd.
    no_tip: Option<Error>,
    /// When the newest full was begun.
    last_full_ms: Option<i64>,
    auth: AuthWatch,
    known: Known,
    /// The delta that fills.
    builder: Builder,
    /// Whether its last revision is whole.
    complete: bool,
    incoming: Option<Incoming>,
    full_running: bool,
    delta_running: bool,
}

/// Why a full snapshot is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    NoChain,
    Schedule,
    AuthChanged,
    Compacted,
}

enum Done {
    Delta(Result<TakenDelta>, Box<Known>),
    Full(Result<TakenFull>),
}

impl<'s> Session<'s> {
    async fn begin(settings: &'s Settings, mut etcd: Etcd, status: Status) -> Result<Self> {
        let store = &settings.store;
        let catalog = store.catalog().await?;
        for (name, _) in &catalog.uploading {
            if matches!(name, ObjectName::Uploading { unix_ms, .. } if *unix_ms < now_ms() - ABANDONED_AFTER_MS) {
                match store.remove_uploading(name).await {
                    Ok(()) => tracing::info!(object = %name, "remove an upload that was never finished"),
                    Err(error) => tracing::warn!(%error, "an upload that was never finished stays"),
                }
            }
        }
        let (seen, damaged) = timeline::look(store, &catalog).await?;
        let later = etcd.status().await?;
        let known = Known { position: Position::between(&status, &later), db_size: status.db_size, ..Known::default() };
        let mut session = Self {
            settings,
            builder: Builder::new(status.revision)?,
            etcd,
            status,
            timeline: 1,
            tip: None,
            no_tip: None,
            last_full_ms: None,
            auth: AuthWatch::default(),
            known,
            complete: true,
            incoming: None,
            full_running: false,
            delta_running: false,
        };
        match decide(seen.as_ref(), &session.status) {
            Decision::Continue { timeline } => {
                session.timeline = timeline;
                if let Some(history) = catalog.timelines.get(&timeline) {
                    session.resume(history, damaged).await?;
                }
            }
            Decision::Begin { timeline, parent, ref reason } => {
                session.begin_timeline(timeline, parent, reason).await?;
            }
        }
        if let Some(tip) = session.tip {
            session.builder = Builder::new(tip)?;
        }
        session.known.last_hash = None;
        tracing::info!(
            endpoint = session.etcd.endpoint(),
            version = session.status.version,
            revision = session.status.revision,
            timeline = session.timeline,
            backed_up_to = session.tip,
            "connected"
        );
        Ok(session)
    }

    async fn begin_timeline(&mut self, timeline: Timeline, parent: Timeline, reason: &str) -> Result<()> {
        if parent == 0 {
            tracing::info!(timeline, "begin the first timeline");
        } else {
            tracing::warn!(timeline, parent, reason, "begin a new timeline; nothing of the one before is touched");
        }
        let json = timeline::describe(timeline, parent, reason, &self.status)?;
        self.settings.store.put_timeline(timeline, json).await?;
        self.timeline = timeline;
        self.last_full_ms = None;
        Ok(())
    }

    /// Finds where to go on in a timeline. Without a chain that can be trusted there is no tip, and a full is taken.
    async fn resume(&mut self, history: &History, damaged: bool) -> Result<()> {
        let Some(chain) = history.newest_chain() else { return Ok(()) };
        // A clock that was set back must not stop scheduled fulls until it has caught up.
        self.last_full_ms = history.fulls.iter().map(|full| full.unix_ms.min(now_ms())).max();
        if let Some(gap) = chain.gap {
            tracing::error!(after = gap.after, before = gap.before, "revisions are missing in the store");
            return Ok(());
        }
        let full =
            ObjectName::Full { timeline: self.timeline, revision: chain.full.revision, unix_ms: chain.full.unix_ms };
        match self.settings.store.meta(&full, chain.full.size).await {
            Ok(meta) => {
                let compared = if damaged {
                    Comparison::Impossible
                } else {
                    timeline::compare(&self.settings.store, &mut self.etcd, self.timeline, &chain, &meta).await?
                };
                if let Comparison::Differs(reason) = &compared {
                    return self.begin_timeline(self.timeline.saturating_add(1), self.timeline, reason).await;
                }
                self.auth = AuthWatch::since(&meta);
                self.known.compact_revision = meta.compact_revision;
                if compared == Comparison::Same {
                    self.tip = Some(chain.last);
                } else if !damaged {
                    self.no_tip = Some(self.unproven(chain.last).await?);
                }
            }
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "the full snapshot that the chain starts from is damaged");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Says that etcd has compacted what would prove that it continues a chain, and returns it as the reason for having none.
    async fn unproven(&mut self, have: i64) -> Result<Error> {
        let compacted = self.etcd.compact_revision(0).await?;
        if compacted > have {
            warn_of_hole(have, compacted);
            return Ok(Error::Compacted { have, compacted });
        }
        let what = format!(
            "etcd has compacted, up to revision {compacted}, what would prove that it continues the backup, which ends at revision {have}"
        );
        tracing::warn!("{what}; a full snapshot is taken");
        Ok(Error::precondition(format!("{what}; take a full snapshot with --once full")))
    }

    fn meta(&self) -> ObjectMeta {
        ObjectMeta {
            layout: 1,
            cluster_id: self.status.cluster_id,
            member_id: self.status.member_id,
            etcd_version: self.status.version.clone(),
            started_unix_ms: now_ms(),
            ..ObjectMeta::default()
        }
    }

    async fn full_job(&mut self) -> full::Job {
        // Before the snapshot: a change in between then shows as one after it.
        self.auth.rebase(&mut self.etcd).await;
        let mut meta = self.meta();
        if let Some(Auth::Fingerprint(fingerprint)) = self.auth.baseline {
            meta.auth_fingerprint = fingerprint;
        }
        full::Job { etcd: self.etcd.clone(), store: self.settings.store.clone(), timeline: self.timeline, meta }
    }

    /// Puts the events of the message at hand into the delta, up to its end or until the delta is full; then what is in it
    /// are whole revisions.
    fn absorb(&mut self) -> Result<()> {
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        let fragment = incoming.fragment;
        while let Some(event) = incoming.events.peek() {
            let Some(kv) = &event.kv else { return Err(Error::corrupt("etcd sent an event without a key")) };
            let (main, last) = (kv.mod_revision, self.builder.last());
            if main > last {
                self.complete = true;
                if self.builder.content_bytes() >= self.settings.delta_max_bytes && self.builder.events() > 0 {
                    return Ok(());
                }
                self.builder.revision(main, incoming.received_unix_ms)?;
                self.complete = false;
            } else if main < last || main < self.builder.first() {
                incoming.events.next();
                continue;
            }
            if event.r#type() == EventType::Put {
                self.builder.put(&KeyValue {
                    key: &kv.key,
                    create_revision: kv.create_revision,
                    mod_revision: kv.mod_revision,
                    version: kv.version,
                    value: &kv.value,
                    lease: kv.lease,
                })?;
            } else {
                self.builder.delete(&kv.key)?;
            }
            incoming.events.next();
        }
        self.incoming = None;
        self.complete = !fragment;
        Ok(())
    }

    fn receive(&mut self, message: WatchResponse) {
        let message = message.0;
        let events = message.events.into_iter().peekable();
        self.incoming = Some(Incoming { events, received_unix_ms: now_ms(), fragment: message.fragment });
    }

    fn is_full(&self) -> bool {
        self.builder.content_bytes() >= self.settings.delta_max_bytes
    }

    async fn deltas_once(&mut self, tip: i64, stop: &CancellationToken) -> Result<Vec<TakenDelta>> {
        let target = self.status.revision;
        let mut taken = Vec::new();
        if target <= tip {
            return Ok(taken);
        }
        let mut watch = self.etcd.watch(tip + 1).await?;
        loop {
            self.absorb()?;
            let done = self.incoming.is_none() && self.complete && self.builder.last() >= target;
            if done || (self.complete && self.is_full()) {
                let job = self.close_job(if done { Ask::Last } else { Ask::All })?;
                let (delta, known) = close_delta(job, std::mem::take(&mut self.known), stop.clone()).await;
                self.known = known;
                taken.push(delta?);
            }
            if done {
                return Ok(taken);
            }
            if self.incoming.is_some() {
                continue;
            }
            let message = tokio::select! {
                message = watch.message() => message.map_err(|source| self.etcd.stream_error("read the watch", source))?,
                () = stop.cancelled() => return Err(Error::Cancelled),
                () = tokio::time::sleep(Duration::from_secs(60)) => {
                    let have = self.builder.last();
                    return Err(Error::precondition(format!("etcd is at revision {target} but sent nothing after {have} for a minute")));
                }
            };
            let Some(message) = message else { return Err(watch_ended(&self.etcd)) };
            if message.canceled() {
                return Err(cancelled_watch(&self.etcd, &message, self.builder.last()));
            }
            self.receive(message);
        }
    }

    /// Takes the delta that fills, and begins the next one.
    fn close_job(&mut self, ask: Ask) -> Result<CloseJob> {
        let next = Builder::new(self.builder.last())?;
        let builder = std::mem::replace(&mut self.builder, next);
        Ok(CloseJob {
            etcd: self.etcd.clone(),
            store: self.settings.store.clone(),
            timeline: self.timeline,
            meta: self.meta(),
            builder,
            ask,
        })
    }

    fn schedule_due(&self, now: chrono::DateTime<Utc>) -> bool {
        let (Some(cron), Some(last)) = (&self.settings.full_schedule, self.last_full_ms) else { return false };
        let last = chrono::DateTime::from_timestamp_millis(last).unwrap_or_default().with_timezone(&chrono::Local);
        cron.find_next_occurrence(&last, false).is_ok_and(|next| next <= now)
    }

    async fn run(mut self, stop: &CancellationToken) -> Result<()> {
        let tasks_stop = CancellationToken::new();
        let _stop_tasks = tasks_stop.clone().drop_guard();
        let mut tasks: JoinSet<Done> = JoinSet::new();
        let result = self.follow(stop, &tasks_stop, &mut tasks).await;
        // A full that is under way is given up and cleaned up; what is pending is brought home, also when etcd is gone: it
        // may be all that is left of the last seconds.
        tasks_stop.cancel();
        let ask = if result.is_ok() { Ask::Last } else { Ask::Nothing };
        let home = tokio::time::timeout(FLUSH_DEADLINE, self.bring_home(ask, &mut tasks)).await.unwrap_or_else(|_| {
            let what = "the store did not take the last delta in time; the next run continues from what it has";
            Err(Error::Unanswered { what: what.to_owned() })
        });
        let drain = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(5), drain).await.is_err() {
            tracing::warn!("an upload did not end in time");
        }
        match (result, home) {
            (Err(error), Err(flush)) => {
                tracing::error!(error = %flush, "pending events could not be saved");
                Err(error)
            }
            (Err(error), Ok(())) => Err(error),
            (Ok(()), home) => home,
        }
    }

    /// Waits for the delta on its way and uploads the one that fills, as far as it has whole revisions.
    async fn bring_home(&mut self, ask: Ask, tasks: &mut JoinSet<Done>) -> Result<()> {
        while self.delta_running {
            match tasks.join_next().await {
                Some(Ok(Done::Delta(taken, known))) => {
                    self.delta_running = false;
                    self.known = *known;
                    log_delta(&taken?);
                }
                Some(_) => {}
                None => self.delta_running = false,
            }
        }
        loop {
            // A gap ends what can be taken in; what is before it is whole.
            let absorbed = self.absorb().is_ok();
            if !self.complete {
                self.builder.cut_last_revision()?;
                self.complete = true;
                self.incoming = None;
            }
            if self.builder.events() == 0 {
                tracing::info!("nothing is pending");
                return Ok(());
            }
            tracing::info!(first = self.builder.first(), last = self.builder.last(), "flush the pending delta");
            let job = self.close_job(ask)?;
            let (taken, known) = close_delta(job, std::mem::take(&mut self.known), CancellationToken::new()).await;
            self.known = known;
            log_delta(&taken?);
            if self.incoming.is_none() || !absorbed {
                return Ok(());
            }
        }
    }

    async fn follow(
        &mut self,
        stop: &CancellationToken,
        tasks_stop: &CancellationToken,
        tasks: &mut JoinSet<Done>,
    ) -> Result<()> {
        let mut watch = self.etcd.watch(self.builder.last() + 1).await?;
        let mut due = if self.tip.is_none() { Some(Due::NoChain) } else { None };
        let mut full_retry: Option<Instant> = None;
        let mut rotate = tokio::time::interval(self.settings.delta_period);
        rotate.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut auth_tick =
            tokio::time::interval(AUTH_PERIOD.min(self.settings.delta_period.max(Duration::from_secs(1))));
        auth_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rotation_wanted = false;
        loop {
            if due.is_none() && !self.full_running && self.schedule_due(Utc::now()) {
                due = Some(Due::Schedule);
            }
            if let Some(why) = due.filter(|_| !self.full_running && full_retry.is_none_or(|at| at <= Instant::now())) {
                due = None;
                self.full_running = true;
                tracing::info!(?why, "take a full snapshot");
                let (job, stop) = (self.full_job().await, tasks_stop.clone());
                tasks.spawn(async move { Done::Full(full::take(job, &stop).await) });
            }
            if let Err(error) = self.absorb() {
                if error.class() != Class::Missing {
                    return Err(error);
                }
                // Releases that drop a tombstone at the compaction revision leave such a hole.
                tracing::error!(%error, "etcd left out revisions; a full snapshot is taken");
                watch = self.restart(stop).await?;
                due = Some(Due::Compacted);
            }
            if self.complete && (rotation_wanted || self.is_full()) && !self.delta_running {
                rotation_wanted = false;
                if self.builder.events() > 0 {
                    let (job, stop) = (self.close_job(Ask::All)?, tasks_stop.clone());
                    let known = std::mem::take(&mut self.known);
                    self.delta_running = true;
                    tasks.spawn(async move {
                        let (taken, known) = close_delta(job, known, stop).await;
                        Done::Delta(taken, Box::new(known))
                    });
                }
            }
            if self.incoming.is_some() && !self.is_full() {
                continue;
            }
            // Back-pressure: with one delta on its way and the next one full, events stay with etcd.
            let read = self.incoming.is_none() && !(self.complete && self.is_full());
            tokio::select! {
                message = watch.message(), if read => {
                    let message = message.map_err(|source| self.etcd.stream_error("read the watch", source))?;
                    let Some(message) = message else { return Err(watch_ended(&self.etcd)) };
                    if !message.canceled() {
                        self.receive(message);
                        continue;
                    }
                    if message.compact_revision() == 0 {
                        return Err(cancelled_watch(&self.etcd, &message, self.builder.last()));
                    }
                    warn_of_hole(self.builder.last(), message.compact_revision());
                    watch = self.restart(stop).await?;
                    due = Some(Due::Compacted);
                }
                _ = rotate.tick() => rotation_wanted = true,
                _ = auth_tick.tick(), if !self.full_running && due.is_none() => {
                    if self.auth.changed(&mut self.etcd).await {
                        due = Some(Due::AuthChanged);
                    }
                }
                Some(done) = tasks.join_next() => match done.map_err(|error| Error::task(&error))? {
                    Done::Delta(taken, known) => {
                        self.delta_running = false;
                        self.known = *known;
                        log_delta(&taken?);
                    }
                    Done::Full(Ok(taken)) => {
                        self.full_running = false;
                        full_retry = None;
                        self.tip = Some(taken.revision);
                        self.last_full_ms = Some(taken.unix_ms);
                        log_full(&taken);
                    }
                    Done::Full(Err(error)) => {
                        self.full_running = false;
                        let passes = matches!(error.class(), Class::Transient | Class::Denied | Class::Missing | Class::Machine | Class::Corrupt);
                        if !passes {
                            return Err(error);
                        }
                        tracing::error!(%error, "full snapshot failed; deltas go on, it is tried again in 15 s");
                        full_retry = Some(Instant::now() + Duration::from_secs(15));
                        let again = if self.tip.is_none() { Due::NoChain } else { Due::Schedule };
                        due = due.or(Some(again));
                    }
                },
                () = stop.cancelled() => return Ok(()),
                // Wakes up to look at the schedule and at retries.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    /// Brings home what is there and watches from now on: between the two lies a hole that only a full snapshot spans.
    async fn restart(&mut self, stop: &CancellationToken) -> Result<WatchStream> {
        self.incoming = None;
        if !self.complete {
            self.builder.cut_last_revision()?;
            self.complete = true;
        }
        if self.builder.events() > 0 {
            let job = self.close_job(Ask::All)?;
            let (taken, known) = close_delta(job, std::mem::take(&mut self.known), stop.clone()).await;
            self.known = known;
            log_delta(&taken?);
        }
        self.status = self.etcd.current_status().await?;
        self.tip = None;
        self.builder = Builder::new(self.status.revision)?;
        self.etcd.watch(self.status.revision + 1).await
    }
}

fn warn_of_hole(have: i64, compacted: i64) {
    tracing::error!(
        backed_up_to = have,
        compacted,
        "etcd compacted revisions that are in no delta yet; a full snapshot is taken, and no point in time between can be restored"
    );
}

fn watch_ended(etcd: &Etcd) -> Error {
    etcd.stream_error("read the watch", tonic::Status::unavailable("the watch ended").into())
}

fn cancelled_watch(etcd: &Etcd, message: &WatchResponse, have: i64) -> Error {
    if message.compact_revision() > 0 {
        return Error::Compacted { have, compacted: message.compact_revision() };
    }
    let why = format!("etcd cancelled the watch: {}", message.cancel_reason());
    etcd.stream_error("watch", tonic::Status::unavailable(why).into())
}

fn log_full(taken: &TakenFull) {
    tracing::info!(
        revision = taken.revision,
        bytes = taken.size,
        db_bytes = taken.db_size,
        "full snapshot is in the store"
    );
}
