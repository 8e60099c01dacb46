//! A member gets from the store what it lacks.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::decision::{Decision, Live};
use super::recovery::Recovery;
use super::{Outcome, Settings, Step, cluster};
use crate::catalog::Timeline;
use crate::restore::{self, Choice, Far, Plan, Progress, Source, Target};
use crate::store::Store;
use crate::{Class, Error, Result};

/// A member that gets from the store what it lacks.
pub(super) struct Refill<'s> {
    pub(super) settings: &'s Settings,
    pub(super) store: &'s Store,
    pub(super) stop: &'s CancellationToken,
    pub(super) see: Arc<dyn Fn(Step) + Send + Sync>,
}

impl Refill<'_> {
    fn watch(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let (see, far) = (self.see.clone(), Mutex::new(Far::default()));
        move |progress| {
            let mut far = far.lock().unwrap_or_else(PoisonError::into_inner);
            far.see(progress);
            see(Step::Restore(far.clone()));
        }
    }

    /// Asked in the last moment before what was restored is put in its place: it took a while. Somebody may have brought the
    /// others back; and a store that ignores conditions may have let another one claim the restore too.
    fn still_alone(&self, claim: Option<(Recovery, Timeline)>) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (others, member) = (self.settings.others.clone(), self.settings.member.clone());
        let (store, runtime) = (self.store.clone(), tokio::runtime::Handle::current());
        move || {
            if let Some((recovery, timeline)) = claim
                && let Some(restorer) = runtime.block_on(recovery.begin(&store, timeline))?
            {
                let what = format!("{restorer} restores the cluster, too; nothing is put in place");
                return Err(Error::Unanswered { what });
            }
            let Some(others) = others else { return Ok(()) };
            match runtime.block_on(cluster::look(&others, &member, None)).0 {
                Live::Nobody => Ok(()),
                live => Err(Error::Unanswered {
                    what: format!(
                        "members of the cluster are back while it was restored ({live:?}); nothing is put in place"
                    ),
                }),
            }
        }
    }

    pub(super) async fn append(self, outcome: Outcome) -> Result<Outcome> {
        match restore::append(self.store, &self.settings.member.data_dir, None, self.stop, self.watch()).await {
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

    /// Restores the member as a cluster of its own, which those of several join; or says which of them does.
    pub(super) async fn restore(
        self,
        replicas: usize,
        recovery: &Recovery,
        outcome: Outcome,
    ) -> Result<std::result::Result<Outcome, String>> {
        let source = restore::choose(self.store, &self.store.catalog().await?, &Choice::default()).await?;
        let claimed = match &source {
            Source::Chain { timeline, .. } if replicas > 1 => Some(*timeline),
            _ => None,
        };
        if let Some(timeline) = claimed
            && let Some(restorer) = recovery.begin(self.store, timeline).await?
        {
            return Ok(Err(restorer));
        }
        let member = &self.settings.member;
        let plan = Plan {
            source,
            targets: vec![Target { name: member.name.clone(), data_dir: member.data_dir.clone() }],
            cluster: member.restored_cluster(Utc::now().timestamp_micros())?,
            minor: None,
            bump_revision: 0,
            replace: true,
        };
        let admit = self.still_alone(claimed.map(|timeline| (recovery.clone(), timeline)));
        let restored = restore::execute(plan, Some(self.store.clone()), self.stop.clone(), self.watch(), admit).await;
        if let (Err(error), Some(timeline)) = (&restored, claimed)
            && !matches!(error.class(), Class::Transient | Class::Cancelled)
        {
            recovery.give_up(self.store, timeline).await;
        }
        let restored = restored?;
        Ok(Ok(Outcome { revision: restored.revision, moved_to: restored.replaced.into_iter().next(), ..outcome }))
    }
}
