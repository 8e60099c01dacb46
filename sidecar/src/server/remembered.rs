//! Calls that change something and may be repeated: a request id is answered once, and then again as it was.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;
use tonic::{Response, Status};

/// How long an answer is remembered.
const KEPT: Duration = Duration::from_secs(600);
/// Ids remembered at once; beyond, the oldest are forgotten.
const MOST: usize = 1024;

#[derive(Debug)]
struct Entry<T> {
    since: Instant,
    /// Of the request, to notice an id that is used for another.
    request: Vec<u8>,
    answer: Arc<OnceCell<Result<T, Status>>>,
}

/// Answers to one kind of call.
#[derive(Debug)]
pub(super) struct Remembered<T>(Mutex<HashMap<String, Entry<T>>>);

impl<T> Default for Remembered<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Remembered<T> {
    /// Does the work, unless the id was seen before: then its answer, or that which is on its way.
    pub(super) async fn once(
        &self,
        id: &str,
        request: Vec<u8>,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        if id.is_empty() {
            return work.await.map(Response::new);
        }
        if id.len() > 256 {
            return Err(Status::invalid_argument("the request id is longer than 256 bytes"));
        }
        let answer = self.entry(id, request)?;
        let answered = answer.get_or_init(|| work).await.clone();
        // What failed may be tried again.
        if answered.is_err() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        }
        answered.map(Response::new)
    }

    fn entry(&self, id: &str, request: Vec<u8>) -> Result<Arc<OnceCell<Result<T, Status>>>, Status> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        entries.retain(|_, entry| now.saturating_duration_since(entry.since) < KEPT);
        if let Some(entry) = entries.get(id) {
            let is_same = entry.request == request;
            let other = || Status::invalid_argument("the request id was used for another request");
            return is_same.then(|| entry.answer.clone()).ok_or_else(other);
        }
        if entries.len() >= MOST
            && let Some(oldest) = entries.iter().min_by_key(|(_, entry)| entry.since).map(|(id, _)| id.clone())
        {
            entries.remove(&oldest);
        }
        let answer = Arc::new(OnceCell::new());
        entries.insert(id.to_owned(), Entry { since: now, request, answer: answer.clone() });
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn nothing_is_done_twice() {
        let (remembered, done) = (Remembered::default(), AtomicU32::new(0));
        let work = || async {
            tokio::task::yield_now().await;
            Ok::<_, Status>(done.fetch_add(1, Ordering::SeqCst))
        };
        let (one, two) = tokio::join!(remembered.once("a", vec![1], work()), remembered.once("a", vec![1], work()));
        assert_eq!((one.unwrap().into_inner(), two.unwrap().into_inner()), (0, 0));
        assert_eq!(remembered.once("a", vec![1], work()).await.unwrap().into_inner(), 0);
        assert_eq!(remembered.once("b", vec![1], work()).await.unwrap().into_inner(), 1);
        assert_eq!(remembered.once("", vec![1], work()).await.unwrap().into_inner(), 2);
        let other = remembered.once("a", vec![2], work()).await;
        assert!(other.is_err_and(|status| status.code() == tonic::Code::InvalidArgument));
        let failed = remembered.once("c", vec![], async { Err(Status::unavailable("x")) }).await;
        assert!(failed.is_err());
        assert_eq!(remembered.once("c", vec![], work()).await.unwrap().into_inner(), 3);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let remembered = Remembered::default();
        for id in 0..2 * MOST {
            remembered.once(&id.to_string(), vec![], async { Ok(id) }).await.unwrap();
        }
        assert_eq!(remembered.0.lock().unwrap().len(), MOST);
    }
}
