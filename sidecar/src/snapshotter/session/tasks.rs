//! What runs beside the watch of a session.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::closing::{Known, TakenDelta};
use super::super::full::TakenFull;
use crate::{Error, Result};

/// Notes when something was asked to end, whatever is waited for then.
pub(super) struct Noted(JoinSet<Instant>);

impl Noted {
    pub fn begin(stop: &CancellationToken) -> Self {
        let (mut noting, stop) = (JoinSet::new(), stop.clone());
        noting.spawn(async move {
            stop.cancelled().await;
            Instant::now()
        });
        Self(noting)
    }

    pub async fn wait(mut self) -> Instant {
        match self.0.join_next().await {
            Some(Ok(at)) => at,
            _ => std::future::pending().await,
        }
    }
}

/// Why a full snapshot is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    NoChain,
    Schedule,
    AuthChanged,
    Compacted,
    TooLargeToReplay,
    Asked,
}

impl Due {
    pub fn because(self) -> &'static str {
        match self {
            Self::NoChain => "there is none that deltas could follow",
            Self::Schedule => "it is scheduled",
            Self::AuthChanged => "users, roles or auth have changed",
            Self::Compacted => "etcd compacted what was not backed up",
            Self::TooLargeToReplay => "a delta has a revision too large for the predecessor's restore to replay",
            Self::Asked => "somebody asked for it",
        }
    }
}

/// What has ended, and how long it took.
pub(super) enum Done {
    Delta(Result<TakenDelta>, Box<Known>, Duration),
    Full(Due, Result<TakenFull>, Duration),
    Ttls(Vec<(i64, i64)>),
}

/// At most one of each kind.
pub(super) struct Tasks {
    pub running: JoinSet<Done>,
    pub full: bool,
    pub delta: bool,
    pub ttls: bool,
    pub stop_full: CancellationToken,
    pub stop_delta: CancellationToken,
}

impl Tasks {
    pub fn new() -> Self {
        let (stop_full, stop_delta) = (CancellationToken::new(), CancellationToken::new());
        Self { running: JoinSet::new(), full: false, delta: false, ttls: false, stop_full, stop_delta }
    }

    /// The next one that ends; never, when none runs.
    pub async fn next(&mut self) -> Result<Done> {
        let Some(done) = self.running.join_next().await else { return std::future::pending().await };
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                // Which of them it was is not known: none is waited for any more.
                *self = Self::new();
                return Err(Error::task(&error));
            }
        };
        match done {
            Done::Delta(..) => self.delta = false,
            Done::Full(..) => self.full = false,
            Done::Ttls(_) => self.ttls = false,
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_an_error_and_nobody_waits_for_it() {
        let mut tasks = Tasks::new();
        (tasks.delta, tasks.full) = (true, true);
        tasks.running.spawn(async { panic!("as a library might") });
        assert!(tasks.next().await.is_err_and(|error| error.to_string().contains("as a library might")));
        assert!(!tasks.delta && !tasks.full && tasks.running.is_empty());
    }
}
