//! What a serving sidecar tells Prometheus. `sidecar_…` are ours; `etcdbr_…` have the names and meaning of the predecessor's,
//! so that dashboards and alerts made for it keep working, as have the two `process_…` that those look at.
//!
//! Labels take few values. Histograms reach half an hour: those of the predecessor end at ten seconds.

mod process;

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use process::Process;

use crate::store::Store;
use crate::{Error, Result};

/// So many are remembered; beyond that the oldest still is, which is what counts.
const MOST_WAITING: usize = 4096;

type Seconds = Gauge<f64, AtomicU64>;

/// Which backup, as the predecessor names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Kind {
    /// A full snapshot.
    Full,
    /// A delta.
    Incr,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindEnded {
    kind: Kind,
    succeeded: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    succeeded: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndedAt {
    succeeded: &'static str,
    endpoint: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedWith {
    /// Class of the error; the predecessor has its whole text here, and a series for each.
    error: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Restore {
    restore: &'static str,
    succeeded: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Initialized {
    action: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRole {
    role: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfAlarm {
    alarm: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    /// Class of the error.
    class: String,
}

fn long() -> Histogram {
    Histogram::new([0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0])
}

fn yes(succeeded: bool) -> &'static str {
    if succeeded { "true" } else { "false" }
}

/// Who brings data back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// The backups do.
    Store,
    /// The other members, which one that lost its data joins.
    Members,
}

/// What the member says of itself, as of now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Member {
    /// `leader`, `follower`, `learner`, or `none` when it cannot be reached.
    pub role: &'static str,
    /// Its revision.
    pub revision: i64,
    /// Size of its database in bytes.
    pub db_size: i64,
    /// Of that, what is in use.
    pub db_size_in_use: i64,
    /// Alarms of the cluster, by name.
    pub alarms: Vec<&'static str>,
    /// Whether this sidecar backs up.
    pub backs_up: bool,
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    snapshots: Family<KindEnded, Histogram, fn() -> Histogram>,
    snapshot_bytes: Family<OfKind, Counter>,
    latest_revision: Family<OfKind, Gauge>,
    latest_timestamp: Family<OfKind, Gauge>,
    required: Family<OfKind, Gauge>,
    latest_deltas: Gauge,
    latest_deltas_revisions: Gauge,
    failures: Family<Failed, Counter>,
    validations: Family<Ended, Histogram, fn() -> Histogram>,
    restorations: Family<Restore, Histogram, fn() -> Histogram>,
    initializations: Family<Initialized, Counter>,
    defragmentations: Family<EndedAt, Histogram, fn() -> Histogram>,
    collected: Family<KindEnded, Counter>,
    snapshotter_failures: Family<FailedWith, Gauge>,
    learners: Family<Ended, Counter>,
    learners_added: Family<Ended, Histogram, fn() -> Histogram>,
    members_removed: Family<Ended, Histogram, fn() -> Histogram>,
    members_promoted: Family<Ended, Histogram, fn() -> Histogram>,
    process: Process,
    drills: Family<Ended, Counter>,
    is_learner: Gauge,
    cluster_size: Gauge,
    role: Family<OfRole, Gauge>,
    alarms: Family<OfAlarm, Gauge>,
    revision: Gauge,
    db_size: Gauge,
    db_size_in_use: Gauge,
    phases: Family<Phase, Counter<f64, AtomicU64>>,
    window_begin: Gauge,
    window_end: Gauge,
    lag: Gauge,
    unsaved: Seconds,
    verified_revision: Gauge,
    verified_timestamp: Gauge,
    verified_seconds: Seconds,
    home: Mutex<Home>,
}

/// Up to where the store has everything.
#[derive(Debug, Default)]
struct Home {
    revision: i64,
    /// Revisions that etcd had, and when it was seen to have them first, beyond that.
    waiting: VecDeque<(Instant, i64)>,
    standing: Standing,
    /// Why it is not backed up now; none once something is in the store again.
    trouble: Option<String>,
    /// Whether that is of the member's data, and stays until it is replaced or found to be well.
    is_of_data: bool,
}

impl Home {
    fn be_well(&mut self) {
        (self.trouble, self.is_of_data) = (None, false);
    }

    /// etcd has that revision now.
    fn see(&mut self, revision: i64) {
        while self.waiting.front().is_some_and(|(_, waiting)| *waiting <= self.revision) {
            self.waiting.pop_front();
        }
        let newest = self.waiting.back().map_or(self.revision, |(_, newest)| *newest);
        if revision <= self.revision {
            self.waiting.clear();
        } else if revision > newest && self.waiting.len() < MOST_WAITING {
            self.waiting.push_back((Instant::now(), revision));
        }
    }
}

/// Where the backups of this run stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Revision of the newest full snapshot, and when it was taken in milliseconds since 1970.
    pub full: Option<(i64, i64)>,
    /// Last revision of the newest delta, and when that was taken.
    pub delta: Option<(i64, i64)>,
    /// When all that etcd was known to have was in the store.
    pub confirmed: Option<Instant>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    #[expect(clippy::too_many_lines, reason = "a list of what is counted")]
    fn default() -> Self {
        let mut registry = Registry::default();
        let build: Family<Vec<(&str, &str)>, Gauge> = Family::default();
        build.get_or_create(&vec![("version", env!("CARGO_PKG_VERSION"))]).set(1);
        registry.register("sidecar_build_info", "The version that runs", build);
        macro_rules! registered {
            ($($name:literal, $help:literal => $metric:expr;)*) => {
                ($({
                    let metric = $metric;
                    registry.register($name, $help, metric.clone());
                    metric
                },)*)
            };
        }
        let histogram = || Family::new_with_constructor(long as fn() -> Histogram);
        let (
            snapshots,
            snapshot_bytes,
            latest_revision,
            latest_timestamp,
            required,
            latest_deltas,
            latest_deltas_revisions,
        ) = registered! {
            "etcdbr_snapshot_duration_seconds", "How long a backup took until it was in the store" => Family::<KindEnded, Histogram, _>::clone(&histogram());
            "sidecar_snapshot_bytes", "Bytes put into the store" => Family::<OfKind, Counter>::default();
            "etcdbr_snapshot_latest_revision", "Last revision of the newest backup" => Family::<OfKind, Gauge>::default();
            "etcdbr_snapshot_latest_timestamp", "When the newest backup was taken" => Family::<OfKind, Gauge>::default();
            "etcdbr_snapshot_required", "Whether etcd has changes that are in no backup" => Family::<OfKind, Gauge>::default();
            "etcdbr_snapstore_latest_deltas_total", "Deltas since the newest full snapshot" => Gauge::<i64>::default();
            "etcdbr_snapstore_latest_deltas_revisions_total", "Revisions in them" => Gauge::<i64>::default();
        };
        let (failures, validations, restorations, initializations, defragmentations, collected) = registered! {
            "sidecar_backup_failures", "Interruptions of the backup, by class of error" => Family::<Failed, Counter>::default();
            "etcdbr_validation_duration_seconds", "How long it took to decide what becomes of the data" => Family::new_with_constructor(long as fn() -> Histogram);
            "etcdbr_restoration_duration_seconds", "How long it took to bring data back: from the store (single_node), or to join the others without any (single_member)" => Family::new_with_constructor(long as fn() -> Histogram);
            "sidecar_initializations", "What initializations did" => Family::<Initialized, Counter>::default();
            "etcdbr_defragmentation_duration_seconds", "How long defragmentations took" => Family::new_with_constructor(long as fn() -> Histogram);
            "etcdbr_snapshot_gc", "Backups deleted because newer ones replace them" => Family::<KindEnded, Counter>::default();
        };
        // The predecessor counts it up without `_total` in its name, which this library gives every counter.
        let (snapshotter_failures,) = registered! {
            "etcdbr_snapshotter_failure", "Interruptions of the backup, by class of error" => Family::<FailedWith, Gauge>::default();
        };
        let process = Process::register(&mut registry);
        let (learners, learners_added, members_removed, members_promoted, drills) = registered! {
            "etcdbr_is_learner_count", "How often this member was to become a learner" => Family::<Ended, Counter>::default();
            "etcdbr_add_learner_duration_seconds", "How long it took to add this member as a learner" => Family::new_with_constructor(long as fn() -> Histogram);
            "etcdbr_member_remove_duration_seconds", "How long it took to remove a member" => Family::new_with_constructor(long as fn() -> Histogram);
            "etcdbr_member_promote_duration_seconds", "How long it took to let this member vote" => Family::new_with_constructor(long as fn() -> Histogram);
            "sidecar_verifications", "Restores of the newest chain to see that it can be" => Family::<Ended, Counter>::default();
        };
        let (is_learner, cluster_size, role, alarms, revision, db_size, db_size_in_use) = registered! {
            "etcdbr_is_learner", "Whether the member does not vote yet" => Gauge::<i64>::default();
            "etcdbr_cluster_size", "Members that the cluster is to have" => Gauge::<i64>::default();
            "sidecar_member_role", "1 for what the member is" => Family::<OfRole, Gauge>::default();
            "sidecar_alarms", "Alarms of the cluster" => Family::<OfAlarm, Gauge>::default();
            "sidecar_etcd_revision", "The member's revision" => Gauge::<i64>::default();
            "sidecar_etcd_db_bytes", "Size of the member's database" => Gauge::<i64>::default();
            "sidecar_etcd_db_in_use_bytes", "Of that, what is in use" => Gauge::<i64>::default();
        };
        let (phases, window_begin, window_end) = registered! {
            "sidecar_initialization_phase_seconds", "Time that initializations spent, by what they did" => Family::<Phase, Counter<f64, AtomicU64>>::default();
            "sidecar_recoverable_begin_timestamp", "When the oldest full snapshot was taken that a restore can begin with" => Gauge::<i64>::default();
            "sidecar_recoverable_end_timestamp", "When the newest backup was taken that a restore reaches" => Gauge::<i64>::default();
        };
        let (lag, unsaved, verified_revision, verified_timestamp, verified_seconds) = registered! {
            "sidecar_backup_lag_revisions", "Revisions of etcd that are in no backup" => Gauge::<i64>::default();
            "sidecar_backup_unsaved_seconds", "For how long the oldest of them has been waiting: what would be lost now" => Seconds::default();
            "sidecar_verified_revision", "Last revision of the chain that was restored last to see that it can be" => Gauge::<i64>::default();
            "sidecar_verified_timestamp", "When that was" => Gauge::<i64>::default();
            "sidecar_verified_restore_seconds", "How long that took" => Seconds::default();
        };
        for kind in [Kind::Full, Kind::Incr] {
            latest_revision.get_or_create(&OfKind { kind }).set(0);
            latest_timestamp.get_or_create(&OfKind { kind }).set(0);
            required.get_or_create(&OfKind { kind }).set(0);
            for succeeded in ["true", "false"] {
                drop(snapshots.get_or_create(&KindEnded { kind, succeeded }));
                drop(collected.get_or_create(&KindEnded { kind, succeeded }));
            }
        }
        for succeeded in ["true", "false"] {
            let ended = Ended { succeeded };
            for family in [&validations, &learners_added, &members_removed, &members_promoted] {
                drop(family.get_or_create(&ended));
            }
            drop(learners.get_or_create(&ended));
            drop(drills.get_or_create(&ended));
            for restore in ["single_member", "single_node"] {
                drop(restorations.get_or_create(&Restore { restore, succeeded }));
            }
        }
        Self {
            registry,
            snapshots,
            snapshot_bytes,
            latest_revision,
            latest_timestamp,
            required,
            latest_deltas,
            latest_deltas_revisions,
            failures,
            validations,
            restorations,
            initializations,
            defragmentations,
            collected,
            snapshotter_failures,
            learners,
            learners_added,
            members_removed,
            members_promoted,
            process,
            drills,
            is_learner,
            cluster_size,
            role,
            alarms,
            revision,
            db_size,
            db_size_in_use,
            phases,
            window_begin,
            window_end,
            lag,
            unsaved,
            verified_revision,
            verified_timestamp,
            verified_seconds,
            home: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Of a member of a cluster of so many, reached at an endpoint, and with what is asked of a store.
    pub fn of(endpoint: &str, members: usize, store: Option<&Store>) -> Self {
        let mut this = Self::default();
        this.cluster_size.set(i64::try_from(members).unwrap_or(i64::MAX));
        for succeeded in ["true", "false"] {
            drop(this.defragmentations.get_or_create(&EndedAt { succeeded, endpoint: endpoint.to_owned() }));
        }
        if let Some(store) = store {
            let help = "What was asked of the store, by what came of it";
            this.registry.register("sidecar_store_operations", help, store.operations());
        }
        this
    }

    /// A part of an initialization has ended.
    pub fn phase_ended(&self, phase: &'static str, took: Duration) {
        self.phases.get_or_create(&Phase { phase }).inc_by(took.as_secs_f64());
    }

    /// From when until when a restore reaches, in milliseconds since 1970; zeros where nothing can be restored.
    pub fn recoverable(&self, (first_ms, last_ms): (i64, i64)) {
        self.window_begin.set(first_ms / 1000);
        self.window_end.set(last_ms / 1000);
    }

    /// An object that is in the store.
    pub fn put(&self, kind: Kind, bytes: u64, took: Duration) {
        self.snapshots.get_or_create(&KindEnded { kind, succeeded: "true" }).observe(took.as_secs_f64());
        self.snapshot_bytes.get_or_create(&OfKind { kind }).inc_by(bytes);
    }

    /// A backup that can be restored; with it the store has everything up to `home`.
    pub fn saved(&self, kind: Kind, (first, last): (i64, i64), home_revision: i64, unix_ms: i64) {
        self.latest_revision.get_or_create(&OfKind { kind }).set(last);
        self.latest_timestamp.get_or_create(&OfKind { kind }).set(unix_ms / 1000);
        match kind {
            Kind::Full => {
                // Nothing has been waiting for a delta longer than since it.
                let of_deltas = self.latest_timestamp.get_or_create(&OfKind { kind: Kind::Incr });
                if of_deltas.get() == 0 {
                    of_deltas.set(unix_ms / 1000);
                }
                drop(of_deltas);
                self.latest_deltas.set(0);
                self.latest_deltas_revisions.set(0);
            }
            Kind::Incr => {
                self.latest_deltas.inc();
                self.latest_deltas_revisions.inc_by(last.saturating_sub(first).saturating_add(1));
            }
        }
        let mut home = self.home();
        home.be_well();
        home.revision = home.revision.max(home_revision);
        match kind {
            Kind::Full => home.standing.full = Some((last, unix_ms)),
            Kind::Incr => {
                home.standing.delta = Some((last, unix_ms));
                home.standing.confirmed = Some(Instant::now());
            }
        }
    }

    /// What a store has that is backed up to: the newest full snapshot and the newest delta, each as its last revision and
    /// when it was taken, how many deltas follow that full, and the revision up to which it has everything.
    pub fn found(&self, full: Option<(i64, i64)>, delta: Option<(i64, i64)>, deltas: usize, revision: i64) {
        self.latest_deltas.set(i64::try_from(deltas).unwrap_or(i64::MAX));
        let beyond = full.map_or(0, |(full, _)| revision.saturating_sub(full).max(0));
        self.latest_deltas_revisions.set(beyond);
        for (kind, newest) in [(Kind::Full, full), (Kind::Incr, delta)] {
            self.latest_revision.get_or_create(&OfKind { kind }).set(newest.unwrap_or_default().0);
            // Without a delta nothing has been waiting for one since the full: alerts take 0 for decades of it.
            let (_, unix_ms) = newest.or(full).unwrap_or_default();
            self.latest_timestamp.get_or_create(&OfKind { kind }).set(unix_ms / 1000);
        }
        // Not the higher of the two: what is backed up now may have been restored to an older revision.
        let mut home = self.home();
        (home.revision, home.standing) = (revision, Standing { full, delta, confirmed: None });
        home.waiting.clear();
    }

    /// A backup begins: what is known of an earlier one says nothing of this one.
    pub fn begun(&self) {
        self.home().standing = Standing::default();
    }

    /// What was wrong is another's to see to; but for what is wrong with the member's data.
    pub fn leave_trouble(&self) {
        let mut home = self.home();
        if !home.is_of_data {
            home.trouble = None;
        }
    }

    /// The member's data is another now.
    pub fn data_replaced(&self) {
        self.home().be_well();
    }

    /// All that etcd is known to have is in the store.
    pub fn confirmed(&self) {
        let mut home = self.home();
        home.be_well();
        home.standing.confirmed = Some(Instant::now());
    }

    /// What the last failure was, since something was last put into the store or found to be there.
    pub fn trouble(&self) -> Option<String> {
        self.home().trouble.clone()
    }

    /// Where backups stand.
    pub fn standing(&self) -> Standing {
        self.home().standing
    }

    /// For how long etcd has had something that is in no backup.
    pub fn unsaved_seconds(&self) -> f64 {
        self.home().waiting.front().map_or(0.0, |(since, _)| since.elapsed().as_secs_f64())
    }

    fn home(&self) -> std::sync::MutexGuard<'_, Home> {
        self.home.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A backup that failed.
    pub fn not_saved(&self, kind: Kind, took: Duration) {
        self.snapshots.get_or_create(&KindEnded { kind, succeeded: "false" }).observe(took.as_secs_f64());
    }

    /// Backing up was interrupted.
    pub fn interrupted(&self, error: &Error) {
        let mut home = self.home();
        (home.trouble, home.is_of_data) = (Some(error.to_string()), matches!(error, Error::Diverged { .. }));
        drop(home);
        let class = error.class().name().to_owned();
        self.snapshotter_failures.get_or_create(&FailedWith { error: class.clone() }).inc();
        self.failures.get_or_create(&Failed { class }).inc();
    }

    /// An initialization has ended.
    pub fn initialized(&self, action: &'static str) {
        self.initializations.get_or_create(&Initialized { action }).inc();
    }

    /// It was decided what becomes of the data, or was to be.
    pub fn validated(&self, succeeded: bool, took: Duration) {
        self.validations.get_or_create(&Ended { succeeded: yes(succeeded) }).observe(took.as_secs_f64());
    }

    /// Data was brought back, or was to be.
    pub fn restored(&self, from: From, succeeded: bool, took: Duration) {
        let restore = match from {
            From::Members => "single_member",
            From::Store => "single_node",
        };
        let ended = Restore { restore, succeeded: yes(succeeded) };
        self.restorations.get_or_create(&ended).observe(took.as_secs_f64());
    }

    /// A defragmentation of the member there has ended.
    pub fn defragmented(&self, endpoint: &str, succeeded: bool, took: Duration) {
        let ended = EndedAt { succeeded: yes(succeeded), endpoint: endpoint.to_owned() };
        self.defragmentations.get_or_create(&ended).observe(took.as_secs_f64());
    }

    /// A backup was deleted, or was to be.
    pub fn collected(&self, kind: Kind, succeeded: bool) {
        self.collected.get_or_create(&KindEnded { kind, succeeded: yes(succeeded) }).inc();
    }

    /// The newest chain was restored to see that it can be, or could not be.
    pub fn drilled(&self, succeeded: bool) {
        self.drills.get_or_create(&Ended { succeeded: yes(succeeded) }).inc();
    }

    /// This member was added as a learner, or was to be.
    pub fn learner_added(&self, succeeded: bool, took: Duration) {
        let ended = Ended { succeeded: yes(succeeded) };
        self.learners.get_or_create(&ended).inc();
        self.learners_added.get_or_create(&ended).observe(took.as_secs_f64());
    }

    /// A member was removed, or was to be.
    pub fn member_removed(&self, succeeded: bool, took: Duration) {
        self.members_removed.get_or_create(&Ended { succeeded: yes(succeeded) }).observe(took.as_secs_f64());
    }

    /// This member votes from now on, or was to.
    pub fn member_promoted(&self, succeeded: bool, took: Duration) {
        self.members_promoted.get_or_create(&Ended { succeeded: yes(succeeded) }).observe(took.as_secs_f64());
    }

    /// The newest chain was restored.
    pub fn verified(&self, revision: i64, unix_ms: i64, seconds: f64) {
        self.verified_revision.set(revision);
        self.verified_timestamp.set(unix_ms / 1000);
        self.verified_seconds.set(seconds);
    }

    /// What the member is now.
    pub fn observe(&self, member: &Member) {
        for role in ["leader", "follower", "learner", "none"] {
            self.role.get_or_create(&OfRole { role }).set(i64::from(role == member.role));
        }
        for alarm in ["NOSPACE", "CORRUPT"] {
            self.alarms.get_or_create(&OfAlarm { alarm }).set(i64::from(member.alarms.contains(&alarm)));
        }
        self.is_learner.set(i64::from(member.role == "learner"));
        self.revision.set(member.revision);
        self.db_size.set(member.db_size);
        self.db_size_in_use.set(member.db_size_in_use);
        let mut home = self.home();
        // Only who backs up knows where the backups are.
        let lag = if member.backs_up { member.revision.saturating_sub(home.revision).max(0) } else { 0 };
        home.see(if member.backs_up { member.revision } else { 0 });
        self.lag.set(lag);
        self.unsaved.set(home.waiting.front().map_or(0.0, |(since, _)| since.elapsed().as_secs_f64()));
        self.required.get_or_create(&OfKind { kind: Kind::Incr }).set(i64::from(lag > 0));
        let of_full = home.standing.full.map_or(0, |(revision, _)| revision);
        let is_due = member.backs_up && member.revision > of_full;
        self.required.get_or_create(&OfKind { kind: Kind::Full }).set(i64::from(is_due));
    }

    /// Everything, as Prometheus reads it.
    pub fn text(&self) -> Result<String> {
        self.process.read();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .map_err(|error| Error::Bug { what: format!("encode the metrics: {error}") })?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_told() -> Result<()> {
        let metrics = Metrics::default();
        let of = |revision| Member { role: "leader", revision, backs_up: true, ..Member::default() };
        metrics.put(Kind::Full, 100, Duration::from_secs(1));
        metrics.saved(Kind::Full, (5, 5), 5, 9_000);
        metrics.observe(&of(5));
        assert!(metrics.text()?.contains("sidecar_backup_lag_revisions 0\n"));
        metrics.observe(&of(8));
        let text = metrics.text()?;
        for line in [
            "sidecar_backup_lag_revisions 3\n",
            "etcdbr_snapshot_required{kind=\"Incr\"} 1\n",
            "etcdbr_snapshot_latest_revision{kind=\"Full\"} 5\n",
            "etcdbr_snapshot_latest_timestamp{kind=\"Full\"} 9\n",
            "etcdbr_snapshot_latest_timestamp{kind=\"Incr\"} 9\n",
            "sidecar_member_role{role=\"leader\"} 1\n",
            "etcdbr_snapshot_duration_seconds_count{kind=\"Full\",succeeded=\"true\"} 1\n",
            "etcdbr_snapshot_duration_seconds_count{kind=\"Incr\",succeeded=\"false\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        metrics.observe(&of(9));
        metrics.put(Kind::Incr, 10, Duration::from_secs(1));
        metrics.saved(Kind::Incr, (6, 7), 7, 9_000);
        metrics.observe(&of(9));
        // Some of what has been waiting is home, and some has been waiting as long.
        assert!(metrics.text()?.contains("sidecar_backup_lag_revisions 2\n") && metrics.unsaved_seconds() > 0.0);
        metrics.saved(Kind::Incr, (8, 9), 9, 9_000);
        metrics.observe(&of(9));
        let text = metrics.text()?;
        assert!(
            text.contains("sidecar_backup_lag_revisions 0\n") && text.contains("deltas_revisions_total 4\n"),
            "{text}"
        );
        assert!(metrics.unsaved_seconds() == 0.0);
        // Restored to an older revision, what it writes from there on is in no backup.
        metrics.found(Some((3, 9_000)), None, 0, 3);
        assert!(metrics.text()?.contains("etcdbr_snapshot_latest_timestamp{kind=\"Incr\"} 9\n"));
        metrics.observe(&of(4));
        assert!(metrics.text()?.contains("sidecar_backup_lag_revisions 1\n"));
        assert!(text.contains("sidecar_snapshot_bytes_total{kind=\"Incr\"} 10\n"), "{text}");
        Ok(())
    }

    /// Each name of the predecessor's, its labels, and each series that it has from the start.
    #[test]
    fn dashboards_of_the_predecessor_find_their_series() -> Result<()> {
        let metrics = Metrics::of("http://127.0.0.1:2379", 3, None);
        assert_eq!(metrics.trouble(), None);
        metrics.interrupted(&Error::invalid("x"));
        assert_eq!(metrics.trouble().as_deref(), Some("x"));
        let text = metrics.text()?;
        for series in [
            "etcdbr_snapshot_gc_total{kind=\"Full\",succeeded=\"true\"} 0",
            "etcdbr_snapshot_latest_revision{kind=\"Incr\"} 0",
            "etcdbr_snapshot_latest_timestamp{kind=\"Full\"} 0",
            "etcdbr_snapshot_required{kind=\"Full\"} 0",
            "etcdbr_snapshot_duration_seconds_count{kind=\"Full\",succeeded=\"false\"} 0",
            "etcdbr_validation_duration_seconds_count{succeeded=\"true\"} 0",
            "etcdbr_restoration_duration_seconds_count{restore=\"single_member\",succeeded=\"true\"} 0",
            "etcdbr_defragmentation_duration_seconds_count{succeeded=\"true\",endpoint=\"http://127.0.0.1:2379\"} 0",
            "etcdbr_snapstore_latest_deltas_total 0",
            "etcdbr_snapstore_latest_deltas_revisions_total 0",
            "etcdbr_snapshotter_failure{error=\"invalid\"} 1",
            "etcdbr_cluster_size 3",
            "etcdbr_is_learner 0",
            "etcdbr_is_learner_count_total{succeeded=\"true\"} 0",
            "etcdbr_add_learner_duration_seconds_count{succeeded=\"true\"} 0",
            "etcdbr_member_remove_duration_seconds_count{succeeded=\"true\"} 0",
            "etcdbr_member_promote_duration_seconds_count{succeeded=\"true\"} 0",
            "etcdbr_network_transmitted_bytes ",
            "etcdbr_network_received_bytes ",
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(series)), "{series} is not in {text}");
        }
        Ok(())
    }
}
