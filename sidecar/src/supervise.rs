//! What a serving sidecar is doing: initializations, one at a time, and backups while its member leads.
//!
//! One task follows the member's role. While it leads, and there is a store, a second one backs up; it is told to end when the
//! member no longer leads, and the next leader's goes on from what the store has.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::etcd::{Etcd, EtcdFlags, Role, Status};
use crate::initialize::{self, Decision, Outcome, Step, initialize};
use crate::snapshotter::{self, Kind, Taken};
use crate::{Class, Error, Result};

/// How often the member is asked what it is.
const ROLE_PERIOD: Duration = Duration::from_secs(2);
/// How long backing up may take to bring its last delta home when it ends; it sees to it itself.
const DRAIN_DEADLINE: Duration = Duration::from_secs(25);

/// What a sidecar goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Before etcd starts.
    pub initialize: initialize::Settings,
    /// How the member is reached.
    pub etcd: EtcdFlags,
    /// How backups are taken; none without a store.
    pub backup: Option<snapshotter::Settings>,
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
    /// Why backing up last ended, when that was trouble.
    pub error: Option<String>,
}

/// A backup that runs. Until it has ended no other begins: it may have a delta to bring home.
struct Backup {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A serving sidecar.
pub struct Supervisor {
    settings: Settings,
    phase: watch::Sender<Phase>,
    observed: watch::Sender<Observed>,
    /// Held while it is decided whether an initialization begins.
    beginning: Mutex<()>,
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
        let (phase, observed) = (watch::Sender::default(), watch::Sender::default());
        let this =
            Arc::new(Self { settings, phase, observed, beginning: Mutex::default(), tasks: TaskTracker::new(), stop });
        let following = this.clone();
        this.tasks.spawn(async move { following.follow().await });
        this
    }

    /// Waits for everything to end, after `stop`.
    pub async fn drained(&self) {
        self.tasks.close();
        if tokio::time::timeout(DRAIN_DEADLINE + Duration::from_secs(3), self.tasks.wait()).await.is_err() {
            tracing::warn!("some of what was under way did not end in time");
        }
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

    /// Begins an initialization unless one runs; how far it is.
    pub fn initialize(self: &Arc<Self>) -> watch::Receiver<Phase> {
        let _one = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        let is_running = matches!(&*self.phase.borrow(), Phase::Running(_));
        if !is_running {
            self.phase.send_replace(Phase::Running(Step::Check));
            let this = self.clone();
            self.tasks.spawn(async move { this.run_initialization().await });
        }
        self.phase.subscribe()
    }

    async fn run_initialization(self: Arc<Self>) {
        let phase = self.phase.clone();
        let see = Arc::new(move |step| drop(phase.send_replace(Phase::Running(step))));
        let ended = match initialize(&self.settings.initialize, &self.stop, see).await {
            Ok(outcome) if matches!(outcome.done, Decision::Refuse { .. }) => Phase::Refused(outcome),
            Ok(outcome) => Phase::Ready(outcome),
            Err(error) => {
                tracing::error!(%error, "the initialization failed");
                Phase::Failed(Arc::new(error))
            }
        };
        self.phase.send_replace(ended);
    }

    /// Takes a snapshot now. Only the leader's sidecar does.
    pub async fn take(&self, kind: Kind) -> Result<Taken> {
        let Some(settings) = &self.settings.backup else {
            return Err(Error::precondition("no store is configured: there are no backups"));
        };
        // What it was when it was last looked at may be over.
        let (_, status) = Etcd::connect(&self.settings.etcd).await?;
        if status.role != Role::Leader {
            return Err(Error::precondition("this member does not lead its cluster; ask the leader's sidecar"));
        }
        snapshotter::once(settings, kind, &self.stop).await
    }

    /// Asks the member what it is, and has it backed up while it leads.
    async fn follow(self: Arc<Self>) {
        let mut etcd = None;
        let mut backup: Option<Backup> = None;
        let mut tick = tokio::time::interval(ROLE_PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.stop.cancelled() => break,
            }
            let status = self.ask(&mut etcd).await;
            let role = status.as_ref().map(|status| status.role);
            self.observed.send_modify(|observed| {
                if observed.role != role {
                    tracing::info!(?role, "the member's role");
                }
                observed.role = role;
                observed.status = status.or_else(|| observed.status.take());
            });
            let leads = role == Some(Role::Leader);
            backup = backup.filter(|backup| !backup.task.is_finished());
            match &backup {
                None if leads => backup = self.begin_backup(),
                // An etcd that cannot be reached for a while still leads, for all that is known; the backup waits for it.
                Some(backup) if role.is_some() && !leads && !backup.stop.is_cancelled() => {
                    tracing::info!("the member no longer leads: its backup ends");
                    backup.stop.cancel();
                }
                _ => {}
            }
        }
    }

    async fn ask(&self, etcd: &mut Option<Etcd>) -> Option<Status> {
        let asked = match etcd {
            Some(connected) => connected.status().await,
            None => match Etcd::connect(&self.settings.etcd).await {
                Ok((connected, status)) => {
                    *etcd = Some(connected);
                    Ok(status)
                }
                Err(error) => Err(error),
            },
        };
        match asked {
            Ok(status) => Some(status),
            Err(error) => {
                tracing::debug!(%error, "the member cannot be reached");
                *etcd = None;
                None
            }
        }
    }

    fn begin_backup(self: &Arc<Self>) -> Option<Backup> {
        let settings = self.settings.backup.clone()?;
        let stop = self.stop.child_token();
        self.observed.send_modify(|observed| observed.backing_up = true);
        let (this, stopped) = (self.clone(), stop.clone());
        let task = self.tasks.spawn(async move {
            let ended = snapshotter::run(&settings, &stopped).await;
            if let Err(error) = &ended {
                tracing::error!(%error, "backing up ended; it is tried again");
            }
            // What makes no sense now may make some when somebody has looked; not in a tight loop.
            if ended.is_err() {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(15)) => {}
                    () = stopped.cancelled() => {}
                }
            }
            this.observed.send_modify(|observed| {
                observed.backing_up = false;
                observed.error =
                    ended.err().filter(|error| error.class() != Class::Cancelled).map(|error| error.to_string());
            });
        });
        Some(Backup { stop, task })
    }
}
