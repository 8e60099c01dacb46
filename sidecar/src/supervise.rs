//! What a serving sidecar is doing: initializations, one at a time, and backups while its member leads.
//!
//! One task follows the member's role. While it leads, and there is a store, a second one backs up; it is told to end when the
//! member no longer leads, and the next leader's goes on from what the store has. It also ends before an initialization that
//! may touch the data.

mod clock;
mod defragment;
mod exit;
mod leases;
mod listing;
mod membership;
mod upkeep;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clock::PhaseClock;
use etcd_format::datadir;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use defragment::Sizes;
pub use exit::LastExit;
pub use leases::Leases;
pub use listing::Listed;
use listing::Listing;
pub use upkeep::{Defragmentation, Upkeep, Verified};

use crate::etcd::{Alarm, Etcd, EtcdFlags, Role, Status};
use crate::initialize::{self, Decision, Outcome, Step, initialize};
use crate::metrics::{self, Metrics};
use crate::pace::Pace;
use crate::snapshotter::{self, Kind, Request, Taken};
use crate::store::Store;
use crate::verify::{Journal, Level, Look, Report, verify};
use crate::{Error, Result};

/// How often the member is asked what it is.
const ROLE_PERIOD: Duration = Duration::from_secs(2);
/// An etcd that may run and cannot be reached for so long is worth a word.
const UNREACHED_AFTER: Duration = Duration::from_secs(20);
/// How long backing up may take to bring its last delta home when it ends; it sees to it itself.
const DRAIN_DEADLINE: Duration = Duration::from_secs(25);

/// Requests for snapshots at once.
const MOST_REQUESTS: usize = 16;
/// How long somebody who wants one waits at most.
const MOST_TAKING: Duration = Duration::from_secs(600);

/// What a sidecar goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Before etcd starts.
    pub initialize: initialize::Settings,
    /// How the member is reached.
    pub etcd: EtcdFlags,
    /// How backups are taken; none without a store.
    pub backup: Option<snapshotter::Settings>,
    /// Held while something reads etcd's database at length, or defragments it.
    pub quiet: Arc<tokio::sync::Mutex<()>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What is done from time to time.
    pub upkeep: Upkeep,
    /// After how long a member is removed that is not configured and cannot be reached; none ever without.
    pub remove_members_after: Option<Duration>,
    /// What Kubernetes is told.
    pub leases: Option<Leases>,
    /// Where verifying and merging on request work.
    pub work_dir: PathBuf,
    /// How much what is not urgent reads from the store and writes to it in a second; none for as much as it can.
    pub background_bytes_per_second: Option<u64>,
}

/// How far the initialization is.
#[derive(Debug, Clone, Default)]
pub enum Phase {
    /// Nobody has asked for one.
    #[default]
    New,
    /// It runs; its last step.
    Running(Step),
    /// etcd may run.
    Ready(Outcome),
    /// etcd must not.
    Refused(Outcome),
    /// It could not be carried out.
    Failed(Arc<Error>),
}

/// What the member is.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Its role; `None` when it cannot be reached.
    pub role: Option<Role>,
    /// What it last said of itself.
    pub status: Option<Status>,
    /// Whether this sidecar is backing up.
    pub backing_up: bool,
    /// The newest chain that was restored to see that it can be.
    pub verified: Option<Verified>,
    /// How the last etcd ended.
    pub last_exit: Option<LastExit>,
    /// That it cannot be reached.
    pub unreached: Option<Unreached>,
    /// That another cluster backs up into the store as well.
    pub shared: Option<String>,
}

/// A member that should be there and is not.
#[derive(Debug, Clone)]
pub struct Unreached {
    /// Since when.
    pub since: Instant,
    /// Why.
    pub why: String,
    /// Whether it was said.
    is_told: bool,
}

impl Unreached {
    /// One that has had the time to come up.
    fn is_late(&self) -> bool {
        self.since.elapsed() > UNREACHED_AFTER
    }
}

impl Observed {
    /// That its cluster has no leader, where it is reached and says so.
    fn leaderless(&self) -> Option<String> {
        let status = self.status.as_ref().filter(|status| self.role.is_some() && status.leader_id == 0)?;
        Some(format!("the cluster of member {:x} has no leader: too few of its members run", status.member_id))
    }

    /// Alarms of the cluster, with the member that each is of.
    pub fn alarms(&self) -> &[(u64, Alarm)] {
        self.status.as_ref().map_or(&[], |status| status.alarms.as_slice())
    }
}

/// Whether etcd has what its log was to bring.
#[derive(Debug, Default)]
struct Owing {
    /// Its log was applied when it was last looked.
    is_applied: bool,
    /// It has it.
    is_paid: bool,
    /// It has not.
    missing: Option<String>,
}

/// A serving sidecar.
pub struct Supervisor {
    settings: Settings,
    phase: watch::Sender<Phase>,
    observed: watch::Sender<Observed>,
    /// Request id of the last initialization. Held while it is decided whether another begins.
    beginning: Mutex<String>,
    /// Held by a backup until it has ended, for it may have a delta to bring home, and by an initialization.
    data: Arc<tokio::sync::Mutex<()>>,
    /// Ends the backup that runs.
    backup: Mutex<CancellationToken>,
    /// Leads to the backup that runs.
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    owed: Mutex<Owing>,
    /// Why the backup that was asked to end left something behind.
    unsaved: Mutex<Option<Error>>,
    listing: Arc<Listing>,
    /// Held by what costs disk and processor: one at a time.
    heavy: tokio::sync::Mutex<()>,
    /// Held while databases are defragmented, from here one at a time.
    defragmenting: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Begins to follow the member; ends when `stop` is cancelled.
    pub fn start(settings: Settings, stop: CancellationToken) -> Arc<Self> {
        let last_exit = LastExit::read(&settings.initialize.member.data_dir);
        let (phase, observed) =
            (watch::Sender::default(), watch::Sender::new(Observed { last_exit, ..Observed::default() }));
        let (beginning, data, backup, tasks) = (Mutex::default(), Arc::default(), Mutex::default(), TaskTracker::new());
        let this = Arc::new(Self {
            settings,
            phase,
            observed,
            beginning,
            data,
            backup,
            requests: Mutex::default(),
            owed: Mutex::default(),
            unsaved: Mutex::default(),
            listing: Arc::default(),
            heavy: tokio::sync::Mutex::default(),
            defragmenting: tokio::sync::Mutex::default(),
            tasks,
            stop,
        });
        let following = this.clone();
        this.tasks.spawn(async move { following.follow().await });
        upkeep::start(&this);
        leases::start(&this);
        this
    }

    /// Waits for everything to end, after `stop`. Fails when changes that were received are in no store.
    pub async fn drained(&self) -> Result<()> {
        self.tasks.close();
        if tokio::time::timeout(DRAIN_DEADLINE, self.tasks.wait()).await.is_err() {
            tracing::warn!("some of what was under way did not end in time");
            if self.observed.borrow().backing_up {
                let what = "the backup did not end in time: the last changes may not be in the store".to_owned();
                return Err(Error::Unanswered { what });
            }
        }
        self.unsaved.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// What it goes by.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How far the initialization is.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// What the member is.
    pub fn observed(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// What goes on beside calls, and is waited for when the sidecar ends.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Takes note of how etcd ended.
    pub fn etcd_ended(&self, code: i32, ran_ms: u64) {
        tracing::info!(code, ran_ms, "etcd has ended");
        let exit = LastExit { code, ran_ms, unix_ms: chrono::Utc::now().timestamp_millis() };
        if let Err(error) = exit.write(&self.settings.initialize.member.data_dir) {
            tracing::warn!(%error, "how etcd ended is not kept");
        }
        self.observed.send_modify(|observed| observed.last_exit = Some(exit));
    }

    /// What etcd is to be started with; `None` while it must not be.
    pub fn etcd_config(&self) -> Option<String> {
        // etcd may run from here on, and what was found of its data is no answer any more.
        self.beginning.lock().unwrap_or_else(PoisonError::into_inner).clear();
        match &*self.phase.borrow() {
            Phase::Ready(outcome) => Some(self.settings.initialize.member.etcd_config(outcome.joins.as_deref())),
            _ => None,
        }
    }

    /// Begins an initialization, unless one runs or the last one was asked for with the same id and lets etcd start; how far it
    /// is. While an etcd has the data nothing is touched, and what is known of it still holds: only who asks hears that.
    pub fn initialize(self: &Arc<Self>, id: &str) -> watch::Receiver<Phase> {
        let mut last = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        let is_begun = match &*self.phase.borrow() {
            Phase::Running(_) => true,
            Phase::Ready(_) => !id.is_empty() && *last == id,
            Phase::New | Phase::Refused(_) | Phase::Failed(_) => false,
        };
        if !is_begun {
            if let Err(error) = datadir::hold(&self.settings.initialize.member.data_dir) {
                return watch::channel(Phase::Refused(Outcome::in_use(&error))).1;
            }
            id.clone_into(&mut last);
            self.phase.send_replace(Phase::Running(Step::Check));
            let this = self.clone();
            self.tasks.spawn(async move { this.run_initialization().await });
        }
        self.phase.subscribe()
    }

    async fn run_initialization(self: Arc<Self>) {
        *self.owed.lock().unwrap_or_else(PoisonError::into_inner) = Owing::default();

        // What was received from the last etcd comes home first: a restore must not miss it.
        let _data = loop {
            // One may have begun meanwhile.
            self.backup.lock().unwrap_or_else(PoisonError::into_inner).cancel();
            if let Ok(held) = tokio::time::timeout(Duration::from_secs(1), self.data.lock()).await {
                break held;
            }
            let why = "the last backup brings home what it has received";
            self.phase.send_replace(Phase::Running(Step::Wait(why.to_owned())));
        };
        self.settings.metrics.leave_trouble();
        let phase = self.phase.clone();
        let clock = Arc::new(PhaseClock::start(self.settings.metrics.clone()));
        let ticking = clock.clone();
        let see = Arc::new(move |step: Step| {
            ticking.enter(step.phase());
            if let Step::Decided(decision, _) = &step {
                ticking.decide(*decision);
            }
            drop(phase.send_replace(Phase::Running(step)));
        });
        if let Some(exit) = self.observed.borrow().last_exit {
            tracing::info!(code = exit.code, ran_ms = exit.ran_ms, unix_ms = exit.unix_ms, "how the last etcd ended");
        }
        let initialized = Error::caught(initialize(&self.settings.initialize, &self.stop, see)).await;
        clock.enter("end");
        if matches!(&initialized, Ok(Outcome { done: Decision::Restore | Decision::Join | Decision::Bootstrap, .. })) {
            self.settings.metrics.data_replaced();
        }
        clock.count(&initialized);
        let ended = match initialized {
            Ok(outcome) if matches!(outcome.done, Decision::Refuse { .. }) => Phase::Refused(outcome),
            Ok(outcome) => Phase::Ready(outcome),
            Err(error) => {
                tracing::error!(%error, "the initialization failed");
                Phase::Failed(Arc::new(error))
            }
        };
        self.phase.send_replace(ended);
    }

    /// Whether there is a store, and another member's sidecar backs up to it.
    pub fn follows(&self) -> bool {
        self.settings.backup.is_some() && matches!(self.observed.borrow().role, Some(Role::Follower | Role::Learner))
    }

    /// Takes a snapshot now. Only the leader's sidecar does.
    pub async fn take(&self, kind: Kind) -> Result<Taken> {
        self.store()?;
        let sender = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (reply, answer) = oneshot::channel();
        let interrupted = || {
            let why = self.trouble().unwrap_or_else(|| "the backup was interrupted; ask again".to_owned());
            Error::Unanswered { what: format!("nothing is backed up now: {why}") }
        };
        let sender = sender.filter(|_| self.observed.borrow().role == Some(Role::Leader));
        let trouble = self.trouble();
        let sender = sender.ok_or_else(|| why_not_taken(&self.observed.borrow(), trouble))?;
        let taking = async {
            sender.send(Request { kind, reply }).await.map_err(|_| interrupted())?;
            answer.await.map_err(|_| interrupted())?
        };
        match tokio::time::timeout(MOST_TAKING, taking).await {
            Ok(taken) => {
                self.listing.outdated();
                taken
            }
            Err(_) => {
                Err(Error::Unanswered { what: format!("it is not in the store after {MOST_TAKING:?}; it goes on") })
            }
        }
    }

    /// What is counted, as Prometheus reads it.
    pub async fn metrics(&self) -> Result<String> {
        // Who does not back up leaves it to who does.
        let is_ours = self.observed.borrow().backing_up;
        let listed = if is_ours { self.listed().await } else { None };
        let catalog = listed.and_then(Result::ok);
        let runs = catalog.and_then(|catalog| Some(catalog.newest_restorable()?.1.restorable())).unwrap_or_default();
        let window = runs.last().map_or((0, 0), |run| (run.first_unix_ms, run.last_unix_ms));
        self.settings.metrics.recoverable(window);
        self.measure();
        self.settings.metrics.text()
    }

    /// Whether it is this sidecar that is to back up, whether it can or not.
    fn backs_up(&self, observed: &Observed) -> bool {
        let leads = observed.role == Some(Role::Leader) && self.settings.backup.is_some();
        observed.backing_up || leads
    }

    fn measure(&self) {
        let observed = self.observed();
        let status = observed.status.as_ref();
        let role = match observed.role {
            Some(Role::Leader) => "leader",
            Some(Role::Follower) => "follower",
            Some(Role::Learner) => "learner",
            None => "none",
        };
        self.settings.metrics.observe(&metrics::Member {
            role,
            revision: status.map_or(0, |status| status.revision),
            db_size: status.map_or(0, |status| status.db_size),
            db_size_in_use: status.map_or(0, |status| status.db_size_in_use),
            alarms: observed.alarms().iter().map(|(_, alarm)| alarm.name()).collect(),
            backs_up: self.backs_up(&observed),
        });
    }

    /// The store, where there is one.
    pub fn store(&self) -> Result<&Store> {
        let store = self.settings.initialize.store.as_ref();
        store.ok_or_else(|| Error::precondition("no store is configured: there are no backups"))
    }

    /// What the store has, as of a little while ago: to look at, not to act upon. `None` without a store.
    pub async fn listed(&self) -> Option<Listed> {
        let store = self.settings.initialize.store.as_ref()?;
        Some(self.listing.newest(store).await)
    }

    /// Why backing up does not get on, or what is wrong with what etcd has.
    pub fn trouble(&self) -> Option<String> {
        let missing = self.owed.lock().unwrap_or_else(PoisonError::into_inner).missing.clone();
        missing
            .or_else(|| self.settings.metrics.trouble())
            .or_else(|| self.observed.borrow().shared.clone())
            .or_else(|| self.unreached_for_long())
            .or_else(|| self.observed.borrow().leaderless())
    }

    /// Why etcd cannot be reached, when it should be there and has not been for a while.
    pub fn unreached_for_long(&self) -> Option<String> {
        let observed = self.observed.borrow();
        let unreached = observed.unreached.as_ref().filter(|unreached| unreached.is_late())?;
        Some(format!("etcd cannot be reached: {}", unreached.why))
    }

    /// For how long etcd has had something that is in no backup; only the sidecar that is to back up knows.
    pub fn unsaved_seconds(&self) -> Option<f64> {
        self.backs_up(&self.observed.borrow()).then(|| self.settings.metrics.unsaved_seconds())
    }

    /// The pace of what is not urgent, where it has one.
    fn pace(&self) -> Option<Arc<Pace>> {
        self.settings.background_bytes_per_second.map(|most| Arc::new(Pace::new(most)))
    }

    /// A store for what is not urgent.
    fn in_the_background(&self, store: &Store) -> Store {
        self.pace().map_or_else(|| store.clone(), |pace| store.paced(pace))
    }

    /// Checks everything in the store.
    pub async fn verify(&self, level: Level) -> Result<Report> {
        let store = self.store()?;
        let _one = self.heavy.lock().await;
        let stop = self.stop.child_token();
        let _gone = stop.clone().drop_guard();
        let look = Look { timeline: None, level, work_dir: &self.settings.work_dir };
        verify(&self.in_the_background(store), look, &mut Journal::default(), &stop).await
    }

    /// Defragments this member.
    pub async fn defragment(&self) -> Result<Sizes> {
        let _one = self.defragmenting.lock().await;
        let started = Instant::now();
        let sizes = defragment::own(&self.settings.etcd, &self.settings.quiet).await;
        let endpoint = self.settings.etcd.endpoints.first().map_or("", String::as_str);
        self.settings.metrics.defragmented(endpoint, sizes.is_ok(), started.elapsed());
        sizes
    }

    /// Has everything backed up and hands leadership over; to whom. Nothing where this member does not lead.
    pub async fn prepare_shutdown(&self) -> Result<(Option<Taken>, Option<u64>)> {
        let (mut etcd, status) = Etcd::connect(&self.settings.etcd).await?;
        if status.role != Role::Leader {
            return Ok((None, None));
        }
        let taken = if self.settings.backup.is_some() { Some(self.take(Kind::Delta).await?) } else { None };
        Ok((taken, defragment::hand_over(&mut etcd, &status).await?))
    }

    /// Asks the member what it is, has it backed up while it leads, and sees to its place in the cluster.
    async fn follow(self: Arc<Self>) {
        let mut etcd = None;
        let mut membership = membership::Keeper::default();
        let mut tick = tokio::time::interval(ROLE_PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.stop.cancelled() => break,
            }
            let asked = self.ask(&mut etcd).await;
            self.see_whether_reached(asked.as_ref().err());
            let status = asked.ok();
            let role = status.as_ref().map(|status| status.role);
            if let (Some(etcd), Some(status)) = (&mut etcd, &status) {
                membership.see_to(&self.settings.initialize, etcd, status).await;
            }
            self.observed.send_modify(|observed| {
                if observed.role != role {
                    tracing::info!(?role, "the member's role");
                }
                for (id, alarm) in status.iter().flat_map(|status| &status.alarms) {
                    if !observed.alarms().contains(&(*id, *alarm)) {
                        tracing::error!(member = format!("{id:x}"), alarm = alarm.name(), "the cluster has an alarm");
                    }
                }
                observed.role = role;
                observed.status = status.clone().or_else(|| observed.status.take());
            });
            self.measure();
            match (role, &status) {
                (Some(Role::Leader), Some(status)) => {
                    if self.may_back_up(status) {
                        self.begin_backup();
                    }
                }
                // An etcd that cannot be reached for a while still leads, for all that is known; the backup waits for it.
                (None | Some(Role::Leader), _) => {}
                (Some(Role::Follower | Role::Learner), _) => {
                    if !self.observed.borrow().backing_up {
                        self.settings.metrics.leave_trouble();
                    }
                    let backup = self.backup.lock().unwrap_or_else(PoisonError::into_inner);
                    if self.observed.borrow().backing_up && !backup.is_cancelled() {
                        tracing::info!("the member no longer leads: its backup ends");
                        backup.cancel();
                    }
                }
            }
        }
    }

    /// Data that was kept because its log was to reach the backups must have reached them once etcd leads and has applied all
    /// of its log. Until that is known nothing is backed up, nor when it has not: a history of its own would begin in the store,
    /// and what is missing would no longer be the newest there.
    fn may_back_up(&self, status: &Status) -> bool {
        let owes = match &*self.phase.borrow() {
            Phase::Ready(outcome) => outcome.owes,
            _ => None,
        };
        let Some(owes) = owes else { return true };
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        if owed.is_paid {
            return true;
        }
        // A new leader's own entry comes after all that was in the log. The revision was told before the index was.
        let is_applied = status.role == Role::Leader && status.raft_applied_index > owes.log_end;
        let looked_before = std::mem::replace(&mut owed.is_applied, is_applied);
        if is_applied && looked_before && owed.missing.is_none() {
            if status.revision >= owes.revision {
                owed.is_paid = true;
            } else {
                let what = format!(
                    "etcd has revision {}, the backups reach {}: not all that its log had were revisions. Nothing is backed up; stop etcd and have it initialized again, and what is missing is appended, or move its member directory away",
                    status.revision, owes.revision
                );
                tracing::error!("{what}");
                owed.missing = Some(what);
            }
        }
        owed.is_paid
    }

    /// Takes note of an etcd that is to run and is not there, and says so once it has had the time to start.
    fn see_whether_reached(&self, error: Option<&Error>) {
        let is_to_run = match &*self.phase.borrow() {
            Phase::Ready(_) => true,
            // A sidecar that was restarted beside an etcd.
            Phase::New => self.settings.initialize.member.data_dir.join("member").exists(),
            Phase::Running(_) | Phase::Refused(_) | Phase::Failed(_) => false,
        };
        self.observed.send_modify(|observed| {
            let before = observed.unreached.take();
            let Some(error) = error.filter(|_| is_to_run) else { return };
            let (since, is_told) =
                before.map_or_else(|| (Instant::now(), false), |before| (before.since, before.is_told));
            let mut unreached = Unreached { since, why: error.to_string(), is_told };
            if unreached.is_late() && !is_told {
                tracing::warn!(%error, "etcd may run, and cannot be reached: nothing is backed up from here");
                unreached.is_told = true;
            }
            observed.unreached = Some(unreached);
        });
    }

    async fn ask(&self, etcd: &mut Option<Etcd>) -> Result<Status> {
        let mut last = None;
        if let Some(connected) = etcd {
            match connected.status().await {
                Ok(status) => return Ok(status),
                Err(error) => tracing::debug!(%error, "the member cannot be reached"),
            }
        }
        *etcd = None;
        for endpoint in &self.settings.etcd.endpoints {
            match Etcd::reach(&self.settings.etcd, endpoint.trim()).await {
                Ok((connected, status)) => {
                    *etcd = Some(connected);
                    return Ok(status);
                }
                Err(error) => {
                    tracing::debug!(%error, "the member cannot be reached");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::invalid("etcd.endpoints names no endpoint")))
    }

    /// Unless one runs, or the data is being initialized.
    fn begin_backup(self: &Arc<Self>) {
        let Some(settings) = self.settings.backup.clone() else { return };
        let Ok(held) = self.data.clone().try_lock_owned() else { return };
        let stop = self.stop.child_token();
        *self.backup.lock().unwrap_or_else(PoisonError::into_inner) = stop.clone();
        settings.metrics.begun();
        let running = BackingUp::begin(self.clone());
        let (sender, mut requests) = mpsc::channel(MOST_REQUESTS);
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let this = self.clone();
        self.tasks.spawn(async move {
            let ended = Error::caught(snapshotter::run(&settings, &stop, &mut requests)).await;
            drop(requests);
            drop(running);
            if ended.is_ok() {
                // Another's, if anybody's, is the trouble from here on.
                settings.metrics.leave_trouble();
            }
            if let Err(error) = ended {
                // Before it is logged: who reads that may ask, or end us, at once.
                let is_stopped = this.stop.is_cancelled();
                settings.metrics.interrupted(&error);
                tracing::error!(%error, "backing up ended; it is tried again");
                if is_stopped {
                    *this.unsaved.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
                let pause = if let Error::Diverged { intact, .. } = error {
                    hand_over_to(&settings.etcd, intact).await;
                    // To compare again costs each member a walk over its database.
                    Duration::from_secs(60)
                } else {
                    Duration::from_secs(15)
                };
                // Somebody may mend it meanwhile.
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => {}
                }
            }
            drop(held);
        });
    }
}

/// Why a member whose sidecar is not backing up takes no snapshot.
fn why_not_taken(observed: &Observed, trouble: Option<String>) -> Error {
    match (&observed.unreached, &observed.status) {
        (Some(unreached), _) => Error::precondition(format!("etcd cannot be reached: {}", unreached.why)),
        (None, Some(Status { leader_id, member_id, .. })) if leader_id == member_id => {
            let why = trouble.unwrap_or_else(|| "its backup has yet to begin; ask again".to_owned());
            Error::Unanswered { what: format!("this member leads, and nothing is backed up: {why}") }
        }
        (None, Some(Status { leader_id: leader @ 1.., .. })) => Error::precondition(format!(
            "this member does not lead its cluster, member {leader:x} does: ask the sidecar of that"
        )),
        (None, _) => Error::precondition("no leader of the cluster is known; ask again when there is one"),
    }
}

/// Lets a member lead whose data is as it should be: from there it can be backed up.
async fn hand_over_to(flags: &EtcdFlags, intact: u64) {
    let to = format!("{intact:x}");
    let moved = async { Etcd::connect(flags).await?.0.move_leader(intact).await };
    match moved.await {
        Ok(()) => tracing::warn!(to, "leadership is handed over to a member whose data is as it should be"),
        Err(error) => tracing::error!(%error, to, "leadership is not handed over"),
    }
}

/// That a backup runs is said for as long as this lives, however it ends.
struct BackingUp(Arc<Supervisor>);

impl BackingUp {
    fn begin(supervisor: Arc<Supervisor>) -> Self {
        supervisor.observed.send_modify(|observed| observed.backing_up = true);
        Self(supervisor)
    }
}

impl Drop for BackingUp {
    fn drop(&mut self) {
        self.0.observed.send_modify(|observed| observed.backing_up = false);
    }
}
