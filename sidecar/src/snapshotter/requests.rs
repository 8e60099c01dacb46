//! What others ask of a backup that runs.

use tokio::sync::{mpsc, oneshot};

use super::closing::TakenDelta;
use super::full::TakenFull;
use super::{Kind, Taken};
use crate::{Error, Result};

/// A snapshot that somebody wants now. The answer comes when it is in the store; none when the backup is interrupted.
#[derive(Debug)]
pub struct Request {
    /// Which.
    pub kind: Kind,
    /// Who waits for it.
    pub reply: oneshot::Sender<Result<Taken>>,
}

/// Where a run gets them from. That of one that nobody asks anything is [`nobody`].
pub type Requests = mpsc::Receiver<Request>;

/// So many wait for the same kind at once.
const MOST: usize = 64;

fn too_many() -> Error {
    Error::Unanswered { what: format!("{MOST} others wait for a snapshot already; ask again") }
}

/// Nobody asks.
pub fn nobody() -> Requests {
    mpsc::channel(1).1
}

#[derive(Debug)]
struct Waiting {
    /// Up to where it must be in the store.
    target: i64,
    taken: Vec<TakenDelta>,
    reply: oneshot::Sender<Result<Taken>>,
}

/// Who waits for what.
#[derive(Debug, Default)]
pub(super) struct Asked {
    deltas: Vec<Waiting>,
    /// For a full that has not begun; one that runs may lack what the asker has in mind.
    fulls: Vec<oneshot::Sender<Result<Taken>>>,
    /// Whether one of these wants it to be the last.
    wants_final: bool,
    full_under_way: Vec<oneshot::Sender<Result<Taken>>>,
}

impl Asked {
    pub(super) fn delta(&mut self, target: i64, reply: oneshot::Sender<Result<Taken>>) {
        // Who has gone does not want it any more.
        self.deltas.retain(|waiting| !waiting.reply.is_closed());
        if self.deltas.len() >= MOST {
            drop(reply.send(Err(too_many())));
            return;
        }
        self.deltas.push(Waiting { target, taken: Vec::new(), reply });
    }

    pub(super) fn full(&mut self, is_final: bool, reply: oneshot::Sender<Result<Taken>>) {
        self.fulls.retain(|reply| !reply.is_closed());
        if self.fulls.len() >= MOST {
            drop(reply.send(Err(too_many())));
            return;
        }
        self.wants_final |= is_final;
        self.fulls.push(reply);
    }

    /// Whether somebody waits for a delta.
    pub(super) fn wants_delta(&self) -> bool {
        !self.deltas.is_empty()
    }

    /// Whether somebody waits for a full that has not begun.
    pub(super) fn wants_full(&self) -> bool {
        !self.fulls.is_empty()
    }

    /// Whether one that has not begun is to be marked as the last.
    pub(super) fn wants_final(&self) -> bool {
        self.wants_final
    }

    /// Says whether it is to be marked as the last. Should it fail, who asked is told, and the next one that is tried is not.
    pub(super) fn full_begins(&mut self) -> bool {
        self.full_under_way.append(&mut self.fulls);
        std::mem::take(&mut self.wants_final)
    }

    pub(super) fn full_ended(&mut self, ended: &Result<TakenFull>) {
        for reply in self.full_under_way.drain(..) {
            // Who has gone does not want it any more.
            let _ = reply.send(match ended {
                Ok(taken) => Ok(Taken::Full(taken.clone())),
                Err(error) => Err(Error::Unanswered { what: format!("the full snapshot failed: {error}") }),
            });
        }
    }

    pub(super) fn delta_taken(&mut self, taken: &TakenDelta) {
        self.deltas.iter_mut().for_each(|waiting| waiting.taken.push(taken.clone()));
    }

    /// Answers those who have what they want, given up to where the store has everything.
    pub(super) fn answer(&mut self, home: i64) {
        for waiting in self.deltas.extract_if(.., |waiting| waiting.target <= home) {
            let Waiting { taken, reply, .. } = waiting;
            let _ = reply.send(Ok(if taken.is_empty() { Taken::Nothing(home) } else { Taken::Deltas(taken) }));
        }
    }
}
