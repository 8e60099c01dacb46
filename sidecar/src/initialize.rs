//! Before etcd starts: looks at the data directory and the store, decides what the one needs of the other, and does it.
//!
//! # Invariants
//! - Always the full check, and never under a running etcd.
//! - What is replaced moves aside, and of what lies there a few stay. Sound data is never replaced.
//! - Nothing begins anew where a store cannot be asked whether there is a backup.

mod aside;
mod cluster;
mod decision;
mod member;
mod observe;
mod recovery;
mod refill;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::Utc;
use etcd_format::datadir;
use tokio_util::sync::CancellationToken;

pub use decision::{Backups, Cause, Damaged, Data, Decision, Differs, Facts, Live, Part, Place, Sound, decide};
pub use member::{DEFAULT_TOKEN, Member};
pub use observe::look_into;

use cluster::Serving;
use observe::{Checked, observe};
use recovery::Recovery;
use refill::Refill;

use crate::etcd::EtcdFlags;
use crate::kinship::Joined;
use crate::metrics::Metrics;
use crate::restore::Far;
use crate::store::Store;
use crate::{Error, Result};

/// What an initialization goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose data it is.
    pub member: Member,
    /// Where backups are; none for only the check.
    pub store: Option<Store>,
    /// How the other members are reached; none in a cluster of one.
    pub others: Option<EtcdFlags>,
    /// See [`Facts::may_start_empty`].
    pub may_start_empty: bool,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What was done.
    pub done: Decision,
    /// Why.
    pub reason: String,
    /// Revision of the data; 0 when there is none.
    pub revision: i64,
    /// Where what was there lies now.
    pub moved_to: Option<PathBuf>,
    /// Whether nothing was looked at because an etcd runs on the data.
    pub in_use: bool,
    /// The members of the cluster that it joins, as its etcd wants them.
    pub joins: Option<String>,
    /// What was found.
    pub cause: Option<Cause>,
    /// What etcd is to have once it has applied its log, where the data was kept for that.
    pub owes: Option<Owed>,
}

/// What is to come of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// The last revision of the backups.
    pub revision: i64,
    /// Raft index of the log's last entry.
    pub log_end: u64,
}

impl Outcome {
    /// Nothing is touched, because something runs on the data.
    pub fn in_use(why: &dyn std::fmt::Display) -> Self {
        let (done, reason) = (Decision::Refuse { may_pass: true }, format!("nothing is touched: {why}"));
        Self { done, reason, revision: 0, moved_to: None, in_use: true, joins: None, cause: None, owes: None }
    }
}

/// Told to whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The data is being checked.
    Check,
    /// It is, and the other members and the store are asked.
    Ask,
    /// Why it is, and what is done.
    Decided(Decision, String),
    /// What is waited for.
    Wait(String),
    /// How far it is being restored or appended.
    Restore(Far),
}

impl Step {
    /// A word for what is being done.
    pub fn phase(&self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Ask => "ask",
            Self::Decided(..) => "decided",
            Self::Wait(_) => "wait",
            Self::Restore(far) => far.phase,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Check => f.write_str("the data is being checked"),
            Self::Ask => f.write_str("the data is checked; the other members and the store are asked"),
            Self::Decided(decision, why) => write!(f, "{}: {why}", decision.name()),
            Self::Wait(why) => f.write_str(why),
            Self::Restore(far) => far.fmt(f),
        }
    }
}

/// Looks, decides and acts.
#[tracing::instrument(skip_all, fields(member = settings.member.name))]
pub async fn initialize(
    settings: &Settings,
    stop: &CancellationToken,
    see: Arc<dyn Fn(Step) + Send + Sync>,
) -> Result<Outcome> {
    let names = settings.member.cluster.members().iter().map(|member| member.name.clone());
    let mut recovery = Recovery::new(&settings.member.name, names);
    let ended = until_decided(settings, stop, &see, &mut recovery).await;
    if let Some(store) = &settings.store {
        recovery.end(store).await;
    }
    ended
}

async fn until_decided(
    settings: &Settings,
    stop: &CancellationToken,
    see: &Arc<dyn Fn(Step) + Send + Sync>,
    recovery: &mut Recovery,
) -> Result<Outcome> {
    let dir = &settings.member.data_dir;
    let mut checked: Option<Checked> = None;
    let (mut told, mut waits_for) = (String::new(), String::new());
    loop {
        // Damage does not heal; but somebody may put something else in its place.
        let there = identity(dir);
        if checked.as_ref().is_none_or(|checked| checked.there != there) {
            if waits_for.is_empty() {
                see(Step::Check);
            }
            // From here on no etcd starts on it until it is known what becomes of it.
            let held = datadir::hold(dir).and_then(|held| {
                datadir::Staged::clear_leftovers(datadir::RealDisk, dir)?;
                Ok(held)
            });
            let held = match held {
                Err(error @ etcd_format::Error::Precondition { .. }) => return Ok(Outcome::in_use(&error)),
                held => held.map_err(Error::format(dir.display().to_string()))?,
            };
            checked = Some(Checked::of(settings, there, held).await?);
            if waits_for.is_empty() {
                // Members without a quorum, or a store that is slow, take their time to say so.
                see(Step::Ask);
            }
        }
        let Some(now) = &mut checked else { return Err(Error::Bug { what: "nothing was checked".into() }) };
        let (facts, serving, is_recent) = observe(settings, now, recovery).await;
        let revision = if let Data::Sound(sound) = &facts.data { sound.revision } else { 0 };
        let (decision, reason) = decide(&facts);
        if !matches!(decision, Decision::Wait | Decision::Join) && !is_recent {
            // Nothing of the store's is done by an old listing.
            now.listed = None;
            continue;
        }
        if reason != told {
            tracing::info!(?decision, reason, "decided what becomes of the data");
            see(Step::Decided(decision, reason.clone()));
            (told, waits_for) = (reason.clone(), String::new());
        }
        let outcome = Outcome {
            done: decision,
            reason,
            revision,
            moved_to: None,
            in_use: false,
            joins: None,
            cause: Some(Cause::of(&facts)),
            owes: owed(&facts, decision, now.verdict.as_ref().map_or(0, |verdict| verdict.log_end)),
        };
        if decision == Decision::Append {
            // It locks the database itself, against others of its kind too.
            drop(std::mem::take(&mut now.held));
        }
        let wait = match act(settings, Seen { facts: &facts, there }, serving, recovery, outcome, stop, see).await? {
            Acted::Done(outcome) => {
                // Where nothing was got from elsewhere, what was there may be all there is.
                if matches!(outcome.done, Decision::Restore | Decision::Join) && outcome.moved_to.is_some() {
                    aside::tidy(dir, Utc::now()).await;
                }
                return Ok(outcome);
            }
            Acted::Wait(why) => why,
        };
        if wait != waits_for {
            see(Step::Wait(wait.clone()));
            waits_for = wait;
        }
        tokio::select! {
            () = tokio::time::sleep(recovery::PERIOD) => {}
            () = stop.cancelled() => return Err(Error::Cancelled),
        }
    }
}

/// The revision that etcd is to have when it has applied its log, where that alone reaches the backups: a transaction whose
/// condition does not hold is an entry without a revision.
fn owed(facts: &Facts, decision: Decision, log_end: u64) -> Option<Owed> {
    match (&facts.data, &facts.backups) {
        (Data::Sound(sound), Backups::Upto { last, .. })
            if decision == Decision::Keep
                && facts.replicas <= 1
                && sound.voters <= 1
                && !sound.restored_since
                && sound.revision < *last =>
        {
            Some(Owed { revision: *last, log_end })
        }
        _ => None,
    }
}

enum Acted {
    Done(Outcome),
    /// It cannot be done yet, and why.
    Wait(String),
}

/// What is there as it was looked at.
struct Seen<'s> {
    facts: &'s Facts,
    /// Which directory the member was.
    there: Option<(u64, u64)>,
}

async fn act(
    settings: &Settings,
    seen: Seen<'_>,
    serving: Option<Serving>,
    recovery: &Recovery,
    outcome: Outcome,
    stop: &CancellationToken,
    see: &Arc<dyn Fn(Step) + Send + Sync>,
) -> Result<Acted> {
    let (dir, facts) = (&settings.member.data_dir, seen.facts);
    let from = settings.store.as_ref().map(|store| Refill { settings, store, stop, see: see.clone() });
    // Where nothing was, nothing is moved: what is there by now somebody else has made.
    let aside = || if seen.there.is_none() { Ok(None) } else { aside::move_member(dir).map(Some) };
    let done = match (outcome.done, from) {
        (Decision::Append, Some(from)) => from.append(outcome).await?,
        (Decision::Restore, Some(from)) => match from.restore(facts.replicas, recovery, outcome).await? {
            Ok(outcome) => outcome,
            Err(restorer) => {
                return Ok(Acted::Wait(format!(
                    "the cluster is restored by member {restorer}; when that serves, this one joins it"
                )));
            }
        },
        (Decision::Append | Decision::Restore, None) => {
            return Err(Error::Bug { what: "a restore without a store".into() });
        }
        (Decision::Join, _) => {
            let serving = serving.ok_or_else(|| Error::Bug { what: "a cluster to join that does not serve".into() })?;
            match serving.join(&settings.member, &settings.metrics).await {
                // Such as when another learner is on its way, or too few members are up to change anything.
                Err(error) => return Ok(Acted::Wait(format!("{}; not yet: {error}", outcome.reason))),
                Ok(cluster) => {
                    let joined = match (facts.live, &settings.store) {
                        (Live::Serves { cluster_id, .. }, Some(store)) => Some(Joined::now(cluster_id, store).await),
                        _ => None,
                    };
                    let moved_to = aside()?;
                    joined.map_or(Ok(()), |joined| joined.write(dir))?;
                    Outcome { moved_to, joins: Some(cluster), ..outcome }
                }
            }
        }
        (Decision::Bootstrap, _) => {
            if let (Backups::Begun, Live::Nobody, Some(store)) = (&facts.backups, facts.live, &settings.store) {
                recovery.let_begin(store).await?;
            }
            Outcome { moved_to: aside()?, ..outcome }
        }
        (Decision::Keep | Decision::Refuse { .. }, _) => outcome,
        (Decision::Wait, _) => return Ok(Acted::Wait(outcome.reason)),
    };
    Ok(Acted::Done(done))
}

/// Which directory the member is; `None` when there is none.
fn identity(dir: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(dir.join("member")).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
