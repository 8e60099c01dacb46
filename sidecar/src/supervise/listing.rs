//! What the store has, for whoever looks: the page, the status and metrics. Nobody acts upon it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::Error;
use crate::catalog::Catalog;
use crate::store::Store;

/// How old it may be.
const FRESH: Duration = Duration::from_secs(30);
/// Who waits for a first one waits no longer.
const PATIENCE: Duration = Duration::from_secs(3);

/// A listing, or why there is none.
pub type Listed = Result<Arc<Catalog>, String>;

/// The last listing of a store. One is made at a time, however many look, and it is made to its end.
#[derive(Debug, Default)]
pub(super) struct Listing {
    state: Mutex<State>,
    made: Notify,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Last>,
    is_running: bool,
    /// Counts what has made earlier listings old.
    generation: u64,
}

#[derive(Debug)]
struct Last {
    at: Instant,
    /// When it was begun.
    generation: u64,
    listed: Listed,
}

impl Listing {
    /// The last one; an older one than it might be when the next takes its time.
    pub(super) async fn newest(self: &Arc<Self>, store: &Store) -> Listed {
        let made = self.made.notified();
        if let Some(last) = self.last_or_begin(store) {
            return last;
        }
        let _ = tokio::time::timeout(PATIENCE, made).await;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let none = || Err("the store has not answered yet".to_owned());
        state.last.as_ref().map_or_else(none, |last| last.listed.clone())
    }

    /// The next who looks gets a new one, if that does not take too long.
    pub(super) fn outdated(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).generation += 1;
    }

    fn last_or_begin(self: &Arc<Self>, store: &Store) -> Option<Listed> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = state.generation;
        let is_fresh = |last: &Last| last.at.elapsed() < FRESH && last.generation == generation;
        let fresh = state.last.as_ref().filter(|last| is_fresh(last)).map(|last| last.listed.clone());
        if fresh.is_none() && !state.is_running {
            state.is_running = true;
            let (this, store) = (self.clone(), store.clone());
            tokio::spawn(async move {
                let listed = Error::caught(store.catalog()).await.map(Arc::new).map_err(|error| error.to_string());
                let mut state = this.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.last = Some(Last { at: Instant::now(), generation, listed });
                state.is_running = false;
                drop(state);
                this.made.notify_waiters();
            });
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn who_looks_first_waits_and_the_next_get_the_same() {
        let store = Store::from_parts(Arc::new(InMemory::new()), "some/prefix");
        let listing = Arc::new(Listing::default());
        let (first, second) = tokio::join!(listing.newest(&store), listing.newest(&store));
        let third = listing.newest(&store).await;
        let is_same =
            |listed: &Listed| matches!((&first, listed), (Ok(first), Ok(listed)) if Arc::ptr_eq(first, listed));
        assert!(is_same(&second) && is_same(&third));
        listing.outdated();
        let fourth = listing.newest(&store).await;
        assert!(fourth.is_ok() && !is_same(&fourth));
    }
}
