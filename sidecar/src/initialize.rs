//! Before etcd starts: looks at the data directory and the store, decides what the one needs of the other, and does it.
//!
//! # Invariants
//! - Always the full check, and never under a running etcd.
//! - What is there is deleted by nobody: what is replaced moves aside. Sound data is never replaced.
//! - Nothing begins anew where a store cannot be asked whether there is a backup.

mod decision;
mod member;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::Utc;
use etcd_format::datadir::{self, Severity, Verdict, Verify};
use tokio_util::sync::CancellationToken;

pub use decision::{Backups, Data, Decision, Facts, Sound, decide};
pub use member::Member;

use crate::catalog::PREDECESSOR;
use crate::restore::{self, Choice, Plan, Progress, Target};
use crate::store::Store;
use crate::{Class, Error, Result};

/// Entries without a revision, such as grants of leases, that etcd may have written between the last event of a delta and the
/// moment that its position was asked for.
const SLACK: i128 = 16;

/// What an initialization goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose data it is.
    pub member: Member,
    /// Where backups are; none for only the check.
    pub store: Option<Store>,
    /// See [`Facts::may_start_empty`].
    pub may_start_empty: bool,
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
}

/// Told to whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The data is being checked.
    Check,
    /// Why it is, and what is done.
    Decided(Decision, String),
    /// What is being restored or appended.
    Restore(Progress),
}

/// Looks, decides and acts.
pub async fn initialize(
    settings: &Settings,
    stop: &CancellationToken,
    see: Arc<dyn Fn(Step) + Send + Sync>,
) -> Result<Outcome> {
    let dir = &settings.member.data_dir;
    see(Step::Check);
    let verdict = match check(dir).await {
        Err(error) if error.class() == Class::Precondition && dir.is_dir() => {
            let (done, reason) = (Decision::Refuse { may_pass: true }, format!("nothing is touched: {error}"));
            return Ok(Outcome { done, reason, revision: 0, moved_to: None, in_use: true });
        }
        verdict => verdict?,
    };
    let facts = observe(settings, verdict.as_ref()).await;
    let revision = if let Data::Sound(sound) = &facts.data { sound.revision } else { 0 };
    let (decision, reason) = decide(&facts);
    tracing::info!(?decision, reason, "decided what becomes of the data");
    see(Step::Decided(decision, reason.clone()));
    let outcome = Outcome { done: decision, reason, revision, moved_to: None, in_use: false };
    let from = settings.store.as_ref().map(|store| Refill { member: &settings.member, store, stop, see });
    match (decision, from) {
        (Decision::Append, Some(from)) => from.append(outcome).await,
        (Decision::Restore, Some(from)) => from.restore(outcome).await,
        (Decision::Append | Decision::Restore, None) => Err(Error::Bug { what: "a restore without a store".into() }),
        // Where nothing was, nothing is moved: what is there by now somebody else has made.
        (Decision::Bootstrap, _) if facts.data == Data::Absent => Ok(outcome),
        (Decision::Bootstrap, _) => Ok(Outcome { moved_to: move_aside(dir)?, ..outcome }),
        (Decision::Keep | Decision::Refuse { .. }, _) => Ok(outcome),
    }
}

async fn check(dir: &Path) -> Result<Option<Verdict>> {
    if !dir.try_exists().map_err(Error::io("look at", dir.display()))? {
        return Ok(None);
    }
    let (checked, place) = (dir.to_owned(), dir.display().to_string());
    let verdict = tokio::task::spawn_blocking(move || datadir::verify(&checked, &Verify::default()));
    verdict.await.map_err(|error| Error::task(&error))?.map_err(Error::format(format!("check {place}")))
}

async fn observe(settings: &Settings, verdict: Option<&Verdict>) -> Facts {
    let mut data = verdict.map_or(Data::Absent, data_of);
    let backups = match &settings.store {
        None => Backups::NotConfigured,
        Some(store) => match look_at(store, &mut data, verdict).await {
            Ok(backups) => backups,
            Err(error) => Backups::Unknown { why: error.to_string() },
        },
    };
    let replicas = settings.member.cluster.members().len();
    Facts { data, backups, replicas, may_start_empty: settings.may_start_empty }
}

/// What a check found, in the terms of the decision.
fn data_of(verdict: &Verdict) -> Data {
    let of = |wanted| verdict.findings.iter().filter(move |finding| finding.severity == wanted);
    let evidence = |wanted| {
        let texts: Vec<_> =
            of(wanted).take(3).map(|finding| format!("{} in {}", finding.what, finding.path.display())).collect();
        texts.join("; ")
    };
    // A key whose lease has no record never expires, and etcd runs on it: that is no reason to put older data in its place.
    let leases = verdict.summary.as_ref().map_or(0, |summary| summary.dangling_leases.len());
    let is_damaged = of(Severity::Corrupt).count() > leases;
    match (&verdict.summary, verdict.severity()) {
        (_, Some(Severity::Corrupt)) if is_damaged => Data::Damaged { evidence: evidence(Severity::Corrupt) },
        (None, _) => Data::Damaged { evidence: "its database could not be read".into() },
        (Some(summary), severity) => {
            // Not only what is known to be committed: a cluster of one commits what it finds when it starts.
            let log_end = verdict.log_end.unwrap_or(0);
            Data::Sound(Sound {
                cluster_id: verdict.member.map_or(0, |(_, cluster)| cluster.0),
                revision: summary.revision,
                unapplied: log_end.saturating_sub(summary.consistent_index),
                torn: severity == Some(Severity::Repairable),
                restored_since: false,
                voters: verdict.voters.unwrap_or(1),
            })
        }
    }
}

async fn look_at(store: &Store, data: &mut Data, verdict: Option<&Verdict>) -> Result<Backups> {
    let catalog = store.catalog().await?;
    let Some((timeline, history)) = catalog.newest_restorable() else {
        // Somebody backed something up here.
        let has_deltas = catalog.timelines.values().any(|history| !history.deltas.is_empty());
        let why = "the store has deltas and no full snapshot".to_owned();
        return Ok(if has_deltas { Backups::Unknown { why } } else { Backups::Empty });
    };
    let Some(chain) = history.newest_chain() else { return Ok(Backups::Empty) };
    if let (Data::Sound(sound), Some((term, _))) = (data, verdict.and_then(|verdict| verdict.raft))
        && sound.revision < chain.last
    {
        let index = verdict.and_then(|verdict| verdict.summary.as_ref()).map_or(0, |summary| summary.consistent_index);
        let is_its_log = restore::is_of_its_log(store, timeline, history, sound.revision, (index, term), SLACK).await?;
        sound.restored_since = is_its_log == Some(false);
    }
    let described = if timeline == PREDECESSOR { None } else { store.description(timeline).await? };
    let cluster_id = described.and_then(|described| u64::from_str_radix(&described.cluster_id, 16).ok());
    Ok(Backups::Upto { last: chain.last, cluster_id })
}

/// A member that gets from the store what it lacks.
struct Refill<'s> {
    member: &'s Member,
    store: &'s Store,
    stop: &'s CancellationToken,
    see: Arc<dyn Fn(Step) + Send + Sync>,
}

impl Refill<'_> {
    fn watch(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let see = self.see.clone();
        move |progress| see(Step::Restore(progress))
    }

    async fn append(self, outcome: Outcome) -> Result<Outcome> {
        match restore::append(self.store, &self.member.data_dir, None, self.stop, self.watch()).await {
            Ok(appended) => Ok(Outcome { revision: appended.revision, ..outcome }),
            // What the backups do not show to be theirs may be all there is of it: a person decides which of the two counts.
            Err(error) if matches!(error.class(), Class::Precondition | Class::Missing | Class::Corrupt) => {
                let advice = "move the member directory away to have it restored";
                let reason = format!("{}; it cannot be appended to: {error}; {advice}", outcome.reason);
                Ok(Outcome { done: Decision::Refuse { may_pass: false }, reason, ..outcome })
            }
            Err(error) => Err(error),
        }
    }

    async fn restore(self, outcome: Outcome) -> Result<Outcome> {
        let source = restore::choose(self.store, &self.store.catalog().await?, &Choice::default()).await?;
        let member = self.member;
        let plan = Plan {
            source,
            targets: vec![Target { name: member.name.clone(), data_dir: member.data_dir.clone() }],
            cluster: member.cluster.clone(),
            minor: None,
            bump_revision: 0,
            replace: true,
        };
        let restored = restore::execute(plan, Some(self.store.clone()), self.stop.clone(), self.watch()).await?;
        Ok(Outcome { revision: restored.revision, moved_to: restored.replaced.into_iter().next(), ..outcome })
    }
}

/// Moves a member aside, in its data directory.
fn move_aside(dir: &Path) -> Result<Option<PathBuf>> {
    // An etcd that has started since must not lose it.
    datadir::check_target(dir, true).map_err(Error::format(dir.display().to_string()))?;
    let member = dir.join("member");
    let aside = dir.join(format!("member.replaced-{}", Utc::now().format("%Y%m%dT%H%M%S%.3fZ")));
    std::fs::rename(&member, &aside).map_err(Error::io("move aside", member.display()))?;
    Ok(Some(aside))
}
