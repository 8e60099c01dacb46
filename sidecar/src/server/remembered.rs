//! Calls that change something and may be repeated: a request id is answered once, and then again as it was.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tonic::{Response, Status};

/// How long an answer is remembered.
const KEPT: Duration = Duration::from_secs(600);
/// Ids remembered at once; beyond, the oldest are forgotten.
const MOST: usize = 1024;

/// Whether it can be an id.
pub(super) fn check(id: &str) -> Result<(), Status> {
    if id.len() > 256 {
        return Err(Status::invalid_argument("the request id is longer than 256 bytes"));
    }
    Ok(())
}

/// `None` until it is done.
type Answer<T> = Option<Result<T, Status>>;

#[derive(Debug)]
struct Entry<T> {
    /// When it was done; `None` while it is not.
    done: Option<Instant>,
    /// Of the request, to notice an id that is used for another.
    request: Vec<u8>,
    answer: watch::Receiver<Answer<T>>,
}

/// Answers to one kind of call.
#[derive(Debug)]
pub(super) struct Remembered<T>(Arc<Mutex<HashMap<String, Entry<T>>>>);

impl<T> Default for Remembered<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone + Send + Sync + 'static> Remembered<T> {
    /// Does the work, unless the id was seen before: then its answer, or that which is on its way. What has an id is done to
    /// its end, whoever goes away meanwhile: that is what asking again is for.
    pub(super) async fn once(
        &self,
        id: &str,
        request: Vec<u8>,
        tasks: &TaskTracker,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        if id.is_empty() {
            return work.await.map(Response::new);
        }
        check(id)?;
        let (mut answer, begun) = self.entry(id, request)?;
        if let Some(begun) = begun {
            let ending = Ending { entries: self.0.clone(), id: id.to_owned(), begun };
            tasks.spawn(async move { drop(ending.begun.send_replace(Some(work.await))) });
        }
        let interrupted = || Status::unavailable("it was interrupted; ask again");
        let answered = answer.wait_for(Option::is_some).await.map_err(|_| interrupted())?.clone();
        answered.unwrap_or_else(|| Err(interrupted())).map(Response::new)
    }

    /// The answer to come, and how to give it when nobody has begun to work on it.
    #[expect(clippy::type_complexity, reason = "both ends of a channel")]
    fn entry(
        &self,
        id: &str,
        request: Vec<u8>,
    ) -> Result<(watch::Receiver<Answer<T>>, Option<watch::Sender<Answer<T>>>), Status> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        entries.retain(|_, entry| entry.done.is_none_or(|done| now.saturating_duration_since(done) < KEPT));
        if let Some(entry) = entries.get(id) {
            let is_same = entry.request == request;
            let other = || Status::invalid_argument("the request id was used for another request");
            return is_same.then(|| (entry.answer.clone(), None)).ok_or_else(other);
        }
        if entries.len() >= MOST {
            let done = entries.iter().filter_map(|(id, entry)| Some((entry.done?, id)));
            let oldest = done.min().map(|(_, id)| id.clone());
            let busy = || Status::resource_exhausted("too many calls are under way; ask again");
            entries.remove(&oldest.ok_or_else(busy)?);
        }
        let (done, answer) = watch::channel(None);
        entries.insert(id.to_owned(), Entry { done: None, request, answer: answer.clone() });
        Ok((answer, Some(done)))
    }
}

/// Sees to what is remembered of work when that ends, however it does: what has no good answer may be tried again.
struct Ending<T> {
    entries: Arc<Mutex<HashMap<String, Entry<T>>>>,
    id: String,
    begun: watch::Sender<Answer<T>>,
}

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let is_good = matches!(&*self.begun.borrow(), Some(Ok(_)));
        match entries.get_mut(&self.id) {
            Some(entry) if is_good => entry.done = Some(Instant::now()),
            Some(_) => drop(entries.remove(&self.id)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn nothing_is_done_twice() {
        let (remembered, done, tasks) = (Remembered::default(), Arc::new(AtomicU32::new(0)), TaskTracker::new());
        let work = || {
            let done = done.clone();
            async move {
                tokio::task::yield_now().await;
                Ok::<_, Status>(done.fetch_add(1, Ordering::SeqCst))
            }
        };
        let ask = async |id: &str, request| remembered.once(id, vec![request], &tasks, work()).await;
        let (one, two) = tokio::join!(ask("a", 1), ask("a", 1));
        assert_eq!((one.unwrap().into_inner(), two.unwrap().into_inner()), (0, 0));
        assert_eq!(ask("a", 1).await.unwrap().into_inner(), 0);
        assert_eq!(ask("b", 1).await.unwrap().into_inner(), 1);
        assert_eq!(ask("", 1).await.unwrap().into_inner(), 2);
        let other = ask("a", 2).await;
        assert!(other.is_err_and(|status| status.code() == tonic::Code::InvalidArgument));
        let failed = remembered.once("c", vec![3], &tasks, async { Err(Status::unavailable("x")) }).await;
        assert!(failed.is_err_and(|status| status.message() == "x"));
        assert_eq!(ask("c", 3).await.unwrap().into_inner(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_finds_it_done() {
        let (remembered, done, tasks) = (Remembered::default(), Arc::new(AtomicU32::new(0)), TaskTracker::new());
        let work = || {
            let done = done.clone();
            async move {
                tokio::time::sleep(Duration::from_secs(60)).await;
                Ok::<_, Status>(done.fetch_add(1, Ordering::SeqCst))
            }
        };
        let ask = || remembered.once("a", vec![], &tasks, work());
        assert!(tokio::time::timeout(Duration::from_secs(1), ask()).await.is_err());
        assert_eq!(ask().await.unwrap().into_inner(), 0);
        assert_eq!(ask().await.unwrap().into_inner(), 0);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let (remembered, tasks) = (Remembered::default(), TaskTracker::new());
        for id in 0..2 * MOST {
            remembered.once(&id.to_string(), vec![], &tasks, async move { Ok(id) }).await.unwrap();
            // It is marked as done when its task ends.
            tokio::task::yield_now().await;
        }
        assert_eq!(remembered.0.lock().unwrap().len(), MOST);
    }
}
