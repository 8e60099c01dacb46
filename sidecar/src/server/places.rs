//! Places for connections of one kind: so many at once. Who has held one longest without showing a certificate makes room for who
//! comes, so nobody can keep others out by doing nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Who is told to leave does so at once, unless the machine is out of breath.
const LEAVES_WITHIN: Duration = Duration::from_millis(100);

/// So many places.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    most: usize,
    /// Who may be told to leave, the oldest first.
    unproven: Mutex<VecDeque<Weak<CancellationToken>>>,
}

/// One that is taken, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    /// Cancelled when another is to have it.
    leave: Option<Arc<CancellationToken>>,
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(most)), most, unproven: Mutex::default() }
    }

    /// A place; `None` when all are held by who may stay.
    pub(super) async fn take(&self) -> Option<Place> {
        let permit = match self.free.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) if self.make_room() => {
                tokio::time::timeout(LEAVES_WITHIN, self.free.clone().acquire_owned()).await.ok()?.ok()?
            }
            Err(_) => return None,
        };
        let leave = Arc::new(CancellationToken::new());
        let mut unproven = self.unproven.lock().unwrap_or_else(PoisonError::into_inner);
        if unproven.len() >= 2 * self.most {
            unproven.retain(|other| other.strong_count() > 0);
        }
        unproven.push_back(Arc::downgrade(&leave));
        Some(Place { _permit: permit, leave: Some(leave) })
    }

    /// A place that nobody else gets, where one is free.
    pub(super) fn take_to_stay(&self) -> Option<Place> {
        let permit = self.free.clone().try_acquire_owned().ok()?;
        Some(Place { _permit: permit, leave: None })
    }

    fn make_room(&self) -> bool {
        let mut unproven = self.unproven.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(oldest) = unproven.pop_front() {
            if let Some(leave) = oldest.upgrade() {
                leave.cancel();
                return true;
            }
        }
        false
    }
}

impl Place {
    /// Nobody else gets it any more.
    pub(super) fn stay(&mut self) {
        self.leave = None;
    }

    /// Ends when another is to have it.
    pub(super) fn left(&self) -> impl Future<Output = ()> + Send + 'static {
        // Who waits for it does not hold the place.
        let leave = self.leave.as_deref().cloned();
        async move {
            match leave {
                Some(leave) => leave.cancelled_owned().await,
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_nobody_makes_room_and_who_may_stay_does_not() {
        let places = Places::new(2);
        let first = places.take().await.unwrap();
        let second = places.take().await.unwrap();
        let leaving = hold(first);
        let (mut second, mut third) = (second, places.take().await.unwrap());
        leaving.await.unwrap();
        second.stay();
        third.stay();
        assert!(places.take().await.is_none());
        drop(third);
        assert!(places.take().await.is_some());
    }

    /// Holds a place until it is to be left, and says when it was.
    fn hold(place: Place) -> tokio::sync::oneshot::Receiver<()> {
        let (left, leaving) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            place.left().await;
            drop(place);
            left.send(())
        });
        leaving
    }
}
