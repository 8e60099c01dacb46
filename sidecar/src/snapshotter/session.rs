//! One connection's worth of backing up.

mod begin;
mod tasks;

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use etcd_client::WatchStream;
use proto::backup::ObjectMeta;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::tasks::{Done, Due, Noted, Tasks};
use super::auth::AuthWatch;
use super::closing::{Ask, CloseJob, Known, TakenDelta, close_delta, log_delta, ttls_of};
use super::full::{self, TakenFull, log_full};
use super::own::{Own, Whose};
use super::pending::Pending;
use super::requests::{Asked, Request, Requests};
use super::{Kind, Settings, Taken, now_ms};
use crate::catalog::{Chain, History, ObjectName, Timeline};
use crate::container::LAYOUT;
use crate::etcd::{Etcd, Status};
use crate::metrics;
use crate::{Class, Error, Result};

/// How long a run that was asked to end may take to bring its last delta home. Kubernetes grants 30 s in all.
const FLUSH_DEADLINE: Duration = Duration::from_secs(20);
/// Of that, how long it may take to receive what etcd has.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(10);
/// How long what was given up may take to clean up behind itself.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);
/// Users and roles are looked at so often.
const AUTH_PERIOD: Duration = Duration::from_secs(10);
/// TTLs of leases are asked for so often,
const TTL_PERIOD: Duration = Duration::from_millis(500);
/// and of so many at once.
const MOST_EARLY_TTLS: usize = 512;
/// A full snapshot that failed is tried again after so long.
const FULL_RETRY: Duration = Duration::from_secs(15);

/// Where the store's chain ends.
#[derive(Debug, Default)]
pub(super) enum Tip {
    /// At this revision; what follows is to be taken.
    At(i64),
    /// There is none to continue.
    #[default]
    None,
    /// There is one, but nothing shows that this etcd continues it. Says why.
    Unproven(Error),
}

/// What the deltas of a session follow.
enum Found {
    /// This.
    Chain(Chain),
    /// Nothing.
    Gone(String),
    /// What is another's.
    Anothers(String),
}

/// How a session ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// On request, with everything in the store.
    Clean,
    /// By trouble; what was received is in the store.
    Interrupted(Error),
    /// With changes that were received and are not in the store.
    Unsaved(Error),
}

/// The end of a session.
#[derive(Debug)]
pub(super) struct End {
    /// How it came.
    pub ended: Ended,
    /// The last revision that was received.
    pub received: i64,
    /// The last that is in the store.
    pub saved: i64,
}

/// A connection to etcd that is being backed up through.
pub(super) struct Session<'s> {
    settings: &'s Settings,
    etcd: Etcd,
    status: Status,
    timeline: Timeline,
    pub tip: Tip,
    /// When the schedule wants the next full.
    next_full: Option<DateTime<Utc>>,
    /// Why a full is due, and from when on it may be tried.
    due: Option<(Due, Instant)>,
    auth: AuthWatch,
    known: Known,
    pending: Pending,
    /// TTLs of leases that the pending delta has, asked for before it is closed: etcd may be gone by then.
    early_ttls: HashMap<i64, i64>,
    /// Up to where deltas are in the store.
    home: i64,
    asked: Asked,
    /// The full snapshot that deltas follow.
    base: Option<ObjectName>,
    /// The last full that was marked as final in this session.
    last_final: Option<TakenFull>,
    /// The last object of the chain: what `home` stands for.
    newest: Option<ObjectName>,
    /// A delta was lost: those after it would follow nothing.
    lost: bool,
    /// What was received last before this session: what follows needs a backup to stand on.
    began_after: i64,
    /// The end of a hole in what was received, which only a full snapshot of that revision or a later one spans; 0 for none.
    hole_upto: i64,
    /// Whether etcd does not answer any more.
    is_silent: bool,
    /// Why changes that etcd had then were not received.
    unsaved: Option<Error>,
    /// Whether the timeline has a description.
    is_described: bool,
    /// Whether the store is another's for the time being.
    is_anothers: bool,
}

impl Session<'_> {
    /// Finds when the next full is due after one that was begun then.
    fn schedule_after(&mut self, unix_ms: i64) {
        let Some(cron) = &self.settings.full_schedule else { return };
        // A clock that was set back must not stop scheduled fulls until it has caught up.
        let begun = DateTime::from_timestamp_millis(unix_ms.min(now_ms())).unwrap_or_default();
        let next = cron.find_next_occurrence(&begun.with_timezone(&chrono::Local), false);
        self.next_full = next.ok().map(|next| next.with_timezone(&Utc));
    }

    fn meta(&self) -> ObjectMeta {
        ObjectMeta {
            layout: LAYOUT,
            cluster_id: self.status.cluster_id,
            member_id: self.status.member_id,
            etcd_version: self.status.version.clone(),
            started_unix_ms: now_ms(),
            ..ObjectMeta::default()
        }
    }

    async fn full_job(&mut self, is_final: bool) -> full::Job {
        // Before the snapshot: a change in between then shows as one after it.
        self.auth.rebase(&mut self.etcd).await;
        let mut meta = self.meta();
        meta.auth_fingerprint = self.auth.fingerprint().unwrap_or_default();
        meta.auth_state = self.auth.state();
        meta.is_final = is_final;
        let (store, layout, own) = (self.settings.store.clone(), self.settings.layout, self.own());
        let quiet = self.settings.quiet.clone();
        let bytes_per_second = self.settings.full_bytes_per_second;
        full::Job { etcd: self.etcd.clone(), store, layout, own, meta, bytes_per_second, quiet }
    }

    /// Takes the delta that fills, and begins the next one.
    fn close_job(&mut self, ask: Ask) -> Result<CloseJob> {
        Ok(CloseJob {
            etcd: self.etcd.clone(),
            store: self.settings.store.clone(),
            layout: self.settings.layout,
            own: self.own(),
            // Behind a hole that a full snapshot is to span, nothing is followed.
            follows: self.newest.filter(|newest| newest.revisions().is_some_and(|(_, last)| last >= self.home)),
            meta: self.meta(),
            builder: self.pending.close()?,
            ask,
            metrics: self.settings.metrics.clone(),
        })
    }

    /// What is backed up, and where to.
    pub fn own(&self) -> Own {
        Own { timeline: self.timeline, cluster_id: self.status.cluster_id, is_described: self.is_described }
    }

    /// Whether users, roles or auth have changed since the newest full snapshot.
    pub async fn auth_changed(&mut self) -> Result<bool> {
        self.auth.changed(&mut self.etcd).await
    }

    /// Takes a full snapshot.
    pub async fn full_once(&mut self, is_final: bool, stop: &CancellationToken) -> Result<TakenFull> {
        full::take(self.full_job(is_final).await, stop).await
    }

    /// Takes everything after `tip` that etcd has now.
    pub async fn deltas_once(&mut self, tip: i64, stop: &CancellationToken) -> Result<Vec<TakenDelta>> {
        let target = self.status.revision;
        let mut taken = Vec::new();
        if target <= tip {
            return Ok(taken);
        }
        let mut watch = self.etcd.watch(tip.saturating_add(1)).await?;
        loop {
            tokio::task::block_in_place(|| self.pending.absorb())?;
            let done = self.pending.has(target);
            if self.pending.is_closable() && (done || self.pending.is_full()) {
                if done {
                    // The end of a run is worth a hash.
                    self.known.last_hash = None;
                }
                let job = self.close_job(Ask::All)?;
                let (delta, known) = close_delta(job, std::mem::take(&mut self.known), stop.clone()).await;
                self.known = known;
                let delta = delta?;
                self.newest = Some(delta.name);
                taken.push(delta);
            }
            if done {
                return Ok(taken);
            }
            if self.pending.has_more() {
                continue;
            }
            let message = tokio::select! {
                message = self.etcd.next_message(&mut watch, self.pending.last()) => message?,
                () = stop.cancelled() => return Err(Error::Cancelled),
                () = tokio::time::sleep(Duration::from_secs(60)) => {
                    let have = self.pending.last();
                    return Err(Error::precondition(format!("etcd is at revision {target} but sent nothing after {have} for a minute")));
                }
            };
            self.pending.receive(message.events, message.fragment, now_ms());
        }
    }

    /// Backs up until `stop` is cancelled or trouble comes. Then what is pending is brought home, also when etcd is gone: it
    /// may be all that is left of the last seconds. Only a run that is to end gives that up.
    pub async fn run(mut self, stop: &CancellationToken, requests: &mut Requests) -> End {
        let noted = Noted::begin(stop);
        let mut tasks = Tasks::new();
        let _stops = (tasks.stop_full.clone().drop_guard(), tasks.stop_delta.clone().drop_guard());
        let result = self.follow(stop, requests, &mut tasks).await;
        tasks.stop_full.cancel();
        let given_up = async {
            let asked_to_end = noted.wait().await;
            tokio::time::sleep_until(asked_to_end + FLUSH_DEADLINE).await;
        };
        let ask = if result.is_ok() && !self.is_silent { Ask::Last } else { Ask::Nothing };
        let home = tokio::select! {
            home = self.bring_home(ask, &mut tasks) => home,
            () = given_up => {
                let what = format!(
                    "the store did not take the last changes within {FLUSH_DEADLINE:?}: they are not backed up; the next run takes them from etcd"
                );
                Err(Error::Unanswered { what })
            }
        };
        tasks.stop_delta.cancel();
        let drain = async { while tasks.running.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_DEADLINE, drain).await.is_err() {
            tracing::warn!("an upload did not end in time");
        }
        let stands_on_nothing = self.stands_on_nothing();
        if result.is_ok() && stands_on_nothing {
            let what = "no full snapshot was done that the last changes could follow: they are no backup; the next run takes one";
            self.unsaved.get_or_insert(Error::Unanswered { what: what.into() });
        }
        if result.is_ok() && home.is_ok() && self.unsaved.is_none() {
            tracing::info!(backed_up_to = self.pending.last(), "stopped; everything that was received is in the store");
        }
        // Where no full snapshot has come of it, what is there cannot be restored.
        let saved = if matches!(self.tip, Tip::At(_)) { self.home } else { 0 };
        let received = self.pending.last();
        let ended = match (result, home, self.unsaved) {
            (_, Err(error), _) | (Ok(()), Ok(()), Some(error)) => Ended::Unsaved(error),
            (Err(error), Ok(()), _) if self.lost || stands_on_nothing => Ended::Unsaved(error),
            (Err(error), Ok(()), _) => Ended::Interrupted(error),
            (Ok(()), Ok(()), None) => Ended::Clean,
        };
        End { ended, received, saved }
    }

    /// Whether changes were received, or missed, that no backup reaches.
    fn stands_on_nothing(&self) -> bool {
        !matches!(self.tip, Tip::At(_)) && (self.hole_upto > 0 || self.pending.last() > self.began_after)
    }

    async fn follow(&mut self, stop: &CancellationToken, requests: &mut Requests, tasks: &mut Tasks) -> Result<()> {
        let mut watch = self.etcd.watch(self.pending.last().saturating_add(1)).await?;
        let mut rotate = tokio::time::interval(self.settings.delta_period);
        rotate.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut auth_tick = tokio::time::interval(AUTH_PERIOD);
        auth_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ttl_tick = tokio::time::interval(TTL_PERIOD);
        ttl_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rotation_wanted = false;
        loop {
            self.start_full_if_due(tasks).await;
            if let Err(error) = tokio::task::block_in_place(|| self.pending.absorb()) {
                if error.class() != Class::Missing {
                    return Err(error);
                }
                // Releases that drop a tombstone at the compaction revision leave such a hole.
                tracing::error!(%error, "etcd left out revisions; a full snapshot is taken");
                let Some(again) = self.watch_again(stop, tasks).await? else { return Ok(()) };
                watch = again;
            }
            let is_due = rotation_wanted || self.pending.is_full() || self.asked.wants_delta();
            if self.pending.is_closable() && is_due && !tasks.delta {
                self.start_delta(Ask::All, tasks)?;
                rotation_wanted = false;
            }
            // Deltas that follow nothing are no backup.
            if matches!(self.tip, Tip::At(_)) && !self.is_anothers {
                self.asked.answer(self.home);
            }
            if self.pending.has_more() && !self.pending.is_full() {
                continue;
            }
            // Back-pressure: with one delta on its way and the next one full, events stay with etcd.
            let read = self.pending.wants_more();
            tokio::select! {
                message = self.etcd.next_message(&mut watch, self.pending.last()), if read => match message {
                    Ok(message) => self.pending.receive(message.events, message.fragment, now_ms()),
                    Err(Error::Compacted { have, compacted }) => {
                        warn_of_hole(have, compacted);
                        let Some(again) = self.watch_again(stop, tasks).await? else { return Ok(()) };
                        watch = again;
                    }
                    Err(error) => return Err(error),
                },
                _ = rotate.tick() => {
                    rotation_wanted = true;
                    if self.is_all_home(tasks).await? {
                        self.settings.metrics.confirmed();
                    }
                }
                _ = auth_tick.tick(), if !tasks.full && self.due.is_none() => {
                    tokio::select! {
                        checked = self.check_chain() => checked?,
                        // A store that is away answers late.
                        () = stop.cancelled() => continue,
                    }
                    if self.auth.changed(&mut self.etcd).await? {
                        self.due = Some((Due::AuthChanged, Instant::now()));
                    }
                }
                done = tasks.next() => self.done(done?)?,
                Some(request) = requests.recv() => self.ask(request).await?,
                _ = ttl_tick.tick(), if !tasks.ttls => self.start_ttls(tasks),
                () = stop.cancelled() => {
                    self.unsaved = self.catch_up(&mut watch, tasks).await.err();
                    return Ok(());
                }
                // Wakes up to look at the schedule and at retries.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    /// Whether the store has all that etcd has: nothing may have been received because there was nothing, or because it is
    /// on its way.
    async fn is_all_home(&mut self, tasks: &Tasks) -> Result<bool> {
        let is_quiet = matches!(self.tip, Tip::At(_)) && self.pending.is_empty() && !tasks.delta && !self.is_anothers;
        Ok(is_quiet && self.etcd.status().await?.revision <= self.home.max(self.pending.last()))
    }

    /// Takes in what somebody wants now.
    async fn ask(&mut self, request: Request) -> Result<()> {
        match request.kind {
            Kind::Full => self.asked.full(false, request.reply),
            Kind::Final => match self.final_of_now().await? {
                // Who has gone does not want it any more.
                Some(taken) => drop(request.reply.send(Ok(Taken::Full(taken)))),
                None => self.asked.full(true, request.reply),
            },
            Kind::Delta => {
                let target = self.etcd.current_status().await?.revision;
                self.asked.delta(target, request.reply);
                if self.due.is_none() && self.auth.changed(&mut self.etcd).await? {
                    self.due = Some((Due::AuthChanged, Instant::now()));
                }
            }
        }
        Ok(())
    }

    /// The last full that was marked as final, where nothing has changed since: who asks again gets that.
    async fn final_of_now(&mut self) -> Result<Option<TakenFull>> {
        let Some(taken) = self.last_final.clone().filter(|taken| self.newest == Some(taken.name)) else {
            return Ok(None);
        };
        let is_current = self.etcd.current_status().await?.revision <= taken.revision;
        Ok((is_current && !self.auth.changed(&mut self.etcd).await?).then_some(taken))
    }

    /// Asks for the TTLs of leases that the pending delta refers to first.
    fn start_ttls(&self, tasks: &mut Tasks) {
        let is_new = |id: &i64| !self.known.ttls.contains_key(id) && !self.early_ttls.contains_key(id);
        let unknown: Vec<i64> = self.pending.leases().iter().copied().filter(is_new).take(MOST_EARLY_TTLS).collect();
        // While a delta is being closed, what is known is with it.
        if unknown.is_empty() || tasks.delta {
            return;
        }
        tasks.ttls = true;
        let etcd = self.etcd.clone();
        tasks.running.spawn(async move {
            let asked = Error::caught(async { Ok(ttls_of(&etcd, unknown).await.0) }).await;
            // They are asked for again when the delta is closed.
            Done::Ttls(asked.unwrap_or_default())
        });
    }

    /// Notices that somebody emptied the store, or put another in its place: deltas that follow nothing are no backup.
    async fn check_chain(&mut self) -> Result<()> {
        let Some(base) = self.base else { return Ok(()) };
        let store = &self.settings.store;
        let newest = self.newest.unwrap_or(base);
        let found = async {
            if store.exists(&base).await? && (newest == base || store.exists(&newest).await?) {
                return Ok(None);
            }
            // A compaction may have taken their place, and a collection them.
            self.find_chain().await.map(Some)
        };
        let found = found.await;
        // A look that fails says nothing of whose it is.
        if let Ok(found) = &found {
            self.is_anothers = matches!(found, Some(Found::Anothers(_)));
        }
        match found {
            Ok(None) => Ok(()),
            Ok(Some(Found::Chain(chain))) => {
                self.follow_chain(&chain);
                Ok(())
            }
            Ok(Some(Found::Gone(what))) => Err(Error::missing(what)),
            Ok(Some(Found::Anothers(what))) => {
                // What is pending waits for ours to come back: nothing is put into another's.
                let error = Error::missing(format!("{what}: nothing is backed up into it; put ours back"));
                tracing::error!("{error}");
                self.settings.metrics.interrupted(&error);
                Ok(())
            }
            Err::<_, Error>(error) => {
                tracing::debug!(%error, "the store could not be looked at");
                Ok(())
            }
        }
    }

    /// Finds what deltas follow now.
    async fn find_chain(&self) -> Result<Found> {
        let (store, timeline, home) = (&self.settings.store, self.timeline, self.home);
        let catalog = store.catalog().await?;
        match self.own().look(store).await? {
            Whose::Ours => {}
            Whose::Anothers(what) => return Ok(Found::Anothers(what)),
            Whose::OursElsewhere(what) => return Ok(Found::Gone(what)),
        }
        let chain = catalog.timelines.get(&timeline).and_then(History::newest_chain);
        Ok(match chain {
            None => Found::Gone(format!("{}: the full snapshot that deltas follow is gone", store.url())),
            Some(chain) if chain.last < home => {
                let (url, last) = (store.url(), chain.last);
                let what = format!("{url}: revisions up to {home} were in the store, which ends at {last} now");
                Found::Gone(what)
            }
            Some(chain) => Found::Chain(chain),
        })
    }

    fn follow_chain(&mut self, chain: &Chain) {
        self.base = Some(chain.full.name(self.timeline));
        self.newest = chain.deltas.last().map(|delta| delta.name(self.timeline)).or(self.base);
    }

    /// Receives what etcd had when the run was asked to end.
    async fn catch_up(&mut self, watch: &mut WatchStream, tasks: &mut Tasks) -> Result<()> {
        let deadline = Instant::now() + CATCH_UP_DEADLINE;
        let target = match tokio::time::timeout_at(deadline, self.etcd.status()).await {
            Ok(Ok(status)) => status.revision,
            // It ends together with us; what it had last cannot be known.
            Ok(Err(error)) => {
                tracing::warn!(%error, "etcd does not tell its last revision; what was received is backed up");
                self.is_silent = true;
                return Ok(());
            }
            Err(_) => {
                tracing::warn!("etcd does not tell its last revision in time; what was received is backed up");
                self.is_silent = true;
                return Ok(());
            }
        };
        loop {
            tokio::task::block_in_place(|| self.pending.absorb())?;
            if self.pending.has(target) {
                return Ok(());
            }
            if self.pending.is_closable() && self.pending.is_full() && !tasks.delta {
                self.start_delta(Ask::Last, tasks)?;
            }
            if self.pending.has_more() && !self.pending.is_full() {
                continue;
            }
            let read = self.pending.wants_more();
            tokio::select! {
                message = self.etcd.next_message(watch, self.pending.last()), if read => {
                    let message = message?;
                    self.pending.receive(message.events, message.fragment, now_ms());
                }
                done = tasks.next() => self.done(done?)?,
                () = tokio::time::sleep_until(deadline) => {
                    let have = self.pending.last();
                    let what = format!(
                        "etcd is at revision {target}, revisions after {have} are not backed up: there was no time; the next run takes them from etcd"
                    );
                    return Err(Error::Unanswered { what });
                }
            }
        }
    }

    async fn start_full_if_due(&mut self, tasks: &mut Tasks) {
        if tasks.full {
            return;
        }
        if self.due.is_none() && self.next_full.is_some_and(|next| next <= Utc::now()) {
            self.due = Some((Due::Schedule, Instant::now()));
        }
        if self.due.is_none() && self.asked.wants_full() {
            self.due = Some((Due::Asked, Instant::now()));
        }
        let Some((why, _)) = self.due.filter(|(_, from)| *from <= Instant::now()) else { return };
        self.due = None;
        // Asked for again while the same was taken, by who did not wait for that.
        if why == Due::Asked
            && self.asked.wants_final()
            && let Ok(Some(taken)) = self.final_of_now().await
        {
            self.asked.full_begins();
            self.asked.full_ended(&Ok(taken));
            return;
        }
        let is_final = self.asked.full_begins();
        tasks.full = true;
        tracing::info!(why = why.because(), "take a full snapshot");
        let (job, stop) = (self.full_job(is_final).await, tasks.stop_full.clone());
        let started = Instant::now();
        tasks.running.spawn(async move {
            let taken = Error::caught(full::take(job, &stop)).await;
            Done::Full(why, taken, started.elapsed())
        });
    }

    fn start_delta(&mut self, ask: Ask, tasks: &mut Tasks) -> Result<()> {
        let (job, stop) = (self.close_job(ask)?, tasks.stop_delta.clone());
        let mut known = std::mem::take(&mut self.known);
        known.ttls.extend(self.early_ttls.drain());
        tasks.delta = true;
        let started = Instant::now();
        tasks.running.spawn(async move {
            let closed = Error::caught(async { Ok(close_delta(job, known, stop).await) }).await;
            let (taken, known) = closed.unwrap_or_else(|error| (Err(error), Known::default()));
            Done::Delta(taken, Box::new(known), started.elapsed())
        });
        Ok(())
    }

    fn done(&mut self, done: Done) -> Result<()> {
        self.count(&done);
        if let Done::Full(_, ended, _) = &done {
            self.asked.full_ended(ended);
        }
        match done {
            Done::Ttls(ttls) => self.early_ttls.extend(ttls),
            Done::Delta(taken, known, _) => {
                self.known = *known;
                match taken {
                    Ok(taken) => {
                        self.home = taken.name.revisions().map_or(self.home, |(_, last)| last);
                        self.newest = Some(taken.name);
                        self.asked.delta_taken(&taken);
                        log_delta(&taken);
                        if taken.is_too_large_to_replay {
                            self.due.get_or_insert_with(|| (Due::TooLargeToReplay, Instant::now()));
                        }
                    }
                    Err(error) => {
                        self.lost = true;
                        return Err(error);
                    }
                }
            }
            Done::Full(_, Ok(taken), _) => {
                self.auth.taken(taken.auth_revision);
                self.schedule_after(taken.unix_ms);
                log_full(&taken);
                if taken.revision < self.hole_upto {
                    // Begun before: the one that is due spans it.
                    return Ok(());
                }
                self.hole_upto = 0;
                self.tip = Tip::At(taken.revision);
                self.base = Some(taken.name);
                // Deltas may have gone further meanwhile.
                self.newest = self.newest.filter(|_| self.home > taken.revision).or(self.base);
                self.last_final = Some(taken).filter(|taken| taken.is_final);
            }
            Done::Full(why, Err(error), _) => {
                // Refused because auth was turned on since we connected: connect again, as the user that we were given.
                let needs_user = error.class() == Class::Denied && self.etcd.left_out_user();
                if needs_user || matches!(error, Error::Elsewhere { .. }) || !error.class().passes(true) {
                    return Err(error);
                }
                tracing::error!(%error, retry_in = ?FULL_RETRY, "full snapshot failed; deltas go on, it is tried again");
                self.due = Some((self.due.map_or(why, |(why, _)| why), Instant::now() + FULL_RETRY));
            }
        }
        Ok(())
    }

    fn count(&self, done: &Done) {
        let metrics = &self.settings.metrics;
        match done {
            Done::Delta(Ok(taken), _, took) => {
                let (first, last) = taken.name.revisions().unwrap_or_default();
                metrics.put(metrics::Kind::Incr, taken.size, *took);
                // Deltas that follow nothing are no backup.
                if matches!(self.tip, Tip::At(_)) {
                    metrics.saved(metrics::Kind::Incr, (first, last), last, taken.name.unix_ms());
                }
            }
            Done::Full(_, Ok(taken), took) => {
                let (revision, unix_ms) = (taken.revision, taken.unix_ms);
                metrics.put(metrics::Kind::Full, taken.size, *took);
                if revision < self.hole_upto {
                    return;
                }
                metrics.saved(metrics::Kind::Full, (revision, revision), revision.max(self.home), unix_ms);
            }
            Done::Delta(Err(_), _, took) => metrics.not_saved(metrics::Kind::Incr, *took),
            Done::Full(_, Err(_), took) => metrics.not_saved(metrics::Kind::Full, *took),
            Done::Ttls(_) => {}
        }
    }

    /// Waits until the delta on its way is in the store.
    async fn delta_home(&mut self, tasks: &mut Tasks) -> Result<()> {
        while tasks.delta {
            match tasks.next().await? {
                done @ (Done::Delta(..) | Done::Ttls(_) | Done::Full(_, Ok(_), _)) => self.done(done)?,
                // One that was stopped, or that the next session takes.
                Done::Full(_, Err(error), _) => {
                    tracing::debug!(%error, "full snapshot ended");
                    self.due.get_or_insert_with(|| (Due::NoChain, Instant::now()));
                }
            }
        }
        Ok(())
    }

    /// Waits for the delta on its way and uploads the one that fills, as far as it has whole revisions.
    async fn bring_home(&mut self, ask: Ask, tasks: &mut Tasks) -> Result<()> {
        self.delta_home(tasks).await?;
        if self.lost {
            return Ok(());
        }
        loop {
            // A gap ends what can be taken in; what is before it is whole.
            let absorbed = tokio::task::block_in_place(|| self.pending.absorb()).is_ok();
            self.pending.cut_unfinished()?;
            if !self.pending.is_closable() {
                return Ok(());
            }
            tracing::info!(last = self.pending.last(), "flush the pending delta");
            self.start_delta(ask, tasks)?;
            self.delta_home(tasks).await?;
            if !self.pending.has_more() || !absorbed {
                return Ok(());
            }
        }
    }

    /// Brings home what is there and watches from now on: between the two lies a hole that only a full snapshot spans. `None`
    /// when it was asked to stop while the store took its time.
    async fn watch_again(&mut self, stop: &CancellationToken, tasks: &mut Tasks) -> Result<Option<WatchStream>> {
        tokio::select! {
            home = self.bring_home(Ask::All, tasks) => home?,
            () = stop.cancelled() => {
                let what = "etcd compacted changes that are in no backup; the next run takes a full snapshot of what it has";
                self.unsaved = Some(Error::Unanswered { what: what.into() });
                return Ok(None);
            }
        }
        self.status = self.etcd.current_status().await?;
        (self.home, self.hole_upto) = (self.status.revision, self.status.revision);
        self.tip = Tip::None;
        self.due = Some((Due::Compacted, Instant::now()));
        self.pending = Pending::after(self.status.revision, self.settings.delta_max_bytes)?;
        self.etcd.watch(self.status.revision.saturating_add(1)).await.map(Some)
    }
}

fn warn_of_hole(have: i64, compacted: i64) {
    tracing::error!(
        backed_up_to = have,
        compacted,
        "etcd compacted revisions that are in no delta yet; a full snapshot is due, and no point in time between can be restored"
    );
}
