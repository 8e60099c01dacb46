//! What an initialization spends its time with, and what Gardener's dashboards make of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::Result;
use crate::initialize::{Decision, Outcome};
use crate::metrics::{self, Metrics};

/// Measures what an initialization spends its time with.
pub(super) struct PhaseClock {
    metrics: Arc<Metrics>,
    started: Instant,
    current: Mutex<(&'static str, Instant)>,
    decided: Mutex<Option<Decided>>,
}

/// What an initialization decided.
#[derive(Debug, Clone, Copy)]
struct Decided {
    first: Instant,
    last: Decision,
    at: Instant,
}

impl PhaseClock {
    pub(super) fn start(metrics: Arc<Metrics>) -> Self {
        let started = Instant::now();
        Self { metrics, started, current: Mutex::new(("check", started)), decided: Mutex::default() }
    }

    pub(super) fn enter(&self, phase: &'static str) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != phase {
            self.metrics.phase_ended(current.0, current.1.elapsed());
            *current = (phase, Instant::now());
        }
    }

    pub(super) fn decide(&self, decision: Decision) {
        let (mut decided, at) = (self.decided.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let first = decided.map_or(at, |decided| decided.first);
        *decided = Some(Decided { first, last: decision, at });
    }

    /// Counts an initialization that has ended.
    pub(super) fn count(&self, ended: &Result<Outcome>) {
        self.metrics.initialized(ended.as_ref().map_or("fail", |outcome| outcome.done.name()));
        let decided = *self.decided.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Decided { first, last, at }) = decided else {
            return self.metrics.validated(false, self.started.elapsed());
        };
        self.metrics.validated(!matches!(last, Decision::Refuse { .. }), first.duration_since(self.started));
        let from = match last {
            Decision::Restore | Decision::Append => metrics::From::Store,
            Decision::Join => metrics::From::Members,
            Decision::Keep | Decision::Bootstrap | Decision::Wait | Decision::Refuse { .. } => return,
        };
        let is_back = matches!(ended, Ok(outcome) if !matches!(outcome.done, Decision::Refuse { .. }));
        self.metrics.restored(from, is_back, at.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_is_brought_back_and_what_fails_to_be_is_counted() -> Result<()> {
        let failed = || Err(Error::invalid("x"));
        let done = |done| Ok(Outcome { done, in_use: false, ..Outcome::in_use(&"x") });
        let refuse = Decision::Refuse { may_pass: false };
        for (decided, ended, validated, restored) in [
            (&[][..], failed(), "false", None),
            (&[refuse], done(refuse), "false", None),
            (&[Decision::Keep], done(Decision::Keep), "true", None),
            (&[Decision::Wait, Decision::Restore], done(Decision::Restore), "true", Some(("single_node", "true"))),
            (&[Decision::Restore], failed(), "true", Some(("single_node", "false"))),
            (&[Decision::Append], done(refuse), "true", Some(("single_node", "false"))),
            (&[Decision::Join], done(Decision::Join), "true", Some(("single_member", "true"))),
        ] {
            let metrics = Arc::new(Metrics::default());
            let clock = PhaseClock::start(metrics.clone());
            for decision in decided {
                clock.decide(*decision);
            }
            clock.count(&ended);
            let text = metrics.text()?;
            let of = |name: &str| {
                let counted = |line: &&str| line.starts_with(name) && line.contains("_count{") && line.ends_with(" 1");
                text.lines().filter(counted).map(str::to_owned).collect::<Vec<_>>()
            };
            let validations = of("etcdbr_validation_duration_seconds");
            assert!(validations.len() == 1 && validations[0].contains(validated), "{decided:?}: {validations:?}");
            let restorations = of("etcdbr_restoration_duration_seconds");
            let expected = restored.map(|(kind, succeeded)| {
                format!("etcdbr_restoration_duration_seconds_count{{restore=\"{kind}\",succeeded=\"{succeeded}\"}} 1")
            });
            assert_eq!(restorations, expected.into_iter().collect::<Vec<_>>(), "{decided:?}");
        }
        Ok(())
    }
}
