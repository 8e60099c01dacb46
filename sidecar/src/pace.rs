//! A pace for what is not urgent: so many bytes a second, in all that keep to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// After a pause so much may pass at once.
const BURST: Duration = Duration::from_millis(250);

/// A pace.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// From when on more may pass.
    free_at: Mutex<Instant>,
    waited_us: AtomicU64,
}

impl Pace {
    /// So many bytes a second, at least one.
    pub fn new(bytes_per_second: u64) -> Self {
        let (free_at, waited_us) = (Mutex::new(Instant::now()), AtomicU64::new(0));
        Self { bytes_per_second: bytes_per_second.max(1), free_at, waited_us }
    }

    /// Waits until so many bytes may pass. Who comes meanwhile waits behind.
    pub(crate) async fn pass(&self, bytes: u64) {
        let mut free_at = self.free_at.lock().await;
        let wait = free_at.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
            self.has_waited(wait);
        }
        *free_at = self.after(*free_at, Instant::now(), bytes);
    }

    /// The same on a thread that may wait.
    pub(crate) fn pass_blocking(&self, bytes: u64) {
        let wait = {
            let mut free_at = self.free_at.blocking_lock();
            let now = Instant::now();
            let wait = free_at.saturating_duration_since(now);
            *free_at = self.after(*free_at, now, bytes);
            wait
        };
        if !wait.is_zero() {
            std::thread::sleep(wait);
            self.has_waited(wait);
        }
    }

    /// From when on more may pass after so many bytes.
    fn after(&self, free_at: Instant, now: Instant, bytes: u64) -> Instant {
        let micros = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second);
        let takes = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX / 2));
        free_at.max(now.checked_sub(BURST).unwrap_or(now)) + takes
    }

    fn has_waited(&self, wait: Duration) {
        self.waited_us.fetch_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// For how long it has kept anybody waiting.
    pub fn waited(&self) -> Duration {
        Duration::from_micros(self.waited_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_together_are_as_fast_as_one() {
        let (pace, started) = (Pace::new(1000), Instant::now());
        futures::future::join_all((0..10).map(|_| pace.pass(500))).await;
        // What the last one takes is the next one's wait.
        let took = started.elapsed();
        assert!((4.2..=4.6).contains(&took.as_secs_f64()), "{took:?}");
        assert!(took.abs_diff(pace.waited()) < Duration::from_millis(20), "{:?}", pace.waited());
        tokio::time::sleep(Duration::from_secs(60)).await;
        let again = Instant::now();
        pace.pass(100).await;
        assert!(again.elapsed() < Duration::from_millis(10));
    }
}
