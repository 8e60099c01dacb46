//! What every store must do, over memory and a directory, with one operation of each run going wrong. The same is shown of
//! servers by the tests of whole programs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult, UploadPart,
};

use super::Store;
use crate::catalog::{Description, ObjectName};
use crate::{Class, Result};

/// How an operation goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It is not done, and fails.
    Fails,
    /// It is done, and fails nevertheless.
    FailsLate,
    /// It takes long.
    Slow,
    /// Of what is read a half is missing, and that is an error.
    Short,
    /// Of what is read a half is missing, and nothing says so.
    Truncated,
}

/// A store whose n-th operation goes wrong.
#[derive(Debug, Clone)]
struct Faulty {
    inner: Arc<dyn ObjectStore>,
    fault: Fault,
    at: usize,
    seen: Arc<AtomicUsize>,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} whose operation {} goes wrong", self.inner, self.at)
    }
}

fn broken() -> StoreError {
    StoreError::Generic { store: "faulty", source: "connection reset".into() }
}

impl Faulty {
    /// What becomes of the next operation.
    fn next(&self) -> Option<Fault> {
        (self.seen.fetch_add(1, Ordering::SeqCst) == self.at).then_some(self.fault)
    }

    async fn run<T>(&self, operation: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        run(self.next(), operation).await
    }
}

async fn run<T>(fault: Option<Fault>, operation: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
    match fault {
        Some(Fault::Fails) => Err(broken()),
        Some(Fault::FailsLate) => operation.await.and(Err(broken())),
        Some(Fault::Slow) => {
            tokio::time::sleep(Duration::from_millis(50)).await;
            operation.await
        }
        Some(Fault::Short | Fault::Truncated) | None => operation.await,
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> StoreResult<PutResult> {
        self.run(self.inner.put_opts(path, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        let upload = self.run(self.inner.put_multipart_opts(path, options)).await?;
        Ok(Box::new(FaultyUpload { upload, store: self.clone() }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> StoreResult<GetResult> {
        let fault = self.next();
        let mut got = run(fault, self.inner.get_opts(path, options)).await?;
        if matches!(fault, Some(Fault::Short | Fault::Truncated)) {
            let (meta, range, attributes, extensions) =
                (got.meta.clone(), got.range.clone(), got.attributes.clone(), got.extensions.clone());
            let bytes = got.bytes().await?;
            let half = bytes.slice(..bytes.len() / 2);
            let end = (fault == Some(Fault::Short)).then(|| Err(broken()));
            let payload = GetResultPayload::Stream(futures::stream::iter(std::iter::once(Ok(half)).chain(end)).boxed());
            got = GetResult { payload, meta, range, attributes, extensions };
        }
        Ok(got)
    }

    fn delete_stream(&self, paths: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        let store = self.clone();
        let deleted = self.inner.delete_stream(paths);
        deleted.then(move |path| run(store.next(), async move { path })).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        let fault = self.next();
        let listed = self.inner.list(prefix);
        match fault {
            Some(Fault::Fails | Fault::FailsLate) => futures::stream::iter([Err(broken())]).boxed(),
            // A page, and no more.
            Some(Fault::Short) => listed.take(1).chain(futures::stream::iter([Err(broken())])).boxed(),
            Some(Fault::Slow | Fault::Truncated) | None => listed,
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.run(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.run(self.inner.copy_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    upload: Box<dyn MultipartUpload>,
    store: Faulty,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.upload.put_part(data);
        Box::pin(run(self.store.next(), part))
    }

    async fn complete(&mut self) -> StoreResult<PutResult> {
        run(self.store.next(), self.upload.complete()).await
    }

    async fn abort(&mut self) -> StoreResult<()> {
        run(self.store.next(), self.upload.abort()).await
    }
}

const FULL: ObjectName = ObjectName::Full { timeline: 1, revision: 9, unix_ms: 5 };
const DELTA: ObjectName = ObjectName::Delta { timeline: 1, first: 10, last: 12, unix_ms: 6 };

fn description() -> Description {
    Description {
        layout: 1,
        timeline: 1,
        parent: 0,
        fork_revision: 0,
        reason: "first".into(),
        cluster_id: "cafe".into(),
        created: "2026-11-23T00:00:00Z".into(),
    }
}

async fn upload(store: &Store, attempt: u64, content: &Bytes) -> Result<()> {
    let mut upload = store.upload(ObjectName::Uploading { timeline: 1, unix_ms: 5, random: attempt });
    let finished = async {
        upload.write(content.clone()).await?;
        upload.finish(&FULL).await
    };
    let finished = finished.await;
    if finished.is_err() {
        upload.abort().await;
    }
    finished.map(drop)
}

/// A backup in small: a timeline is described, a full uploaded in parts, a delta put, all listed and read. One operation goes
/// wrong; what fails is done again, as its callers do, and in the end all is there and nothing else.
async fn keeps(inner: Arc<dyn ObjectStore>, fault: Fault, at: usize) -> Result<usize> {
    let faulty = Faulty { inner, fault, at, seen: Arc::default() };
    let store = Store::from_parts(Arc::new(faulty.clone()), "some/prefix");
    let full: Bytes = (0..(17 << 20)).map(|n: u32| (n / 1000) as u8).collect();
    let delta = [Bytes::from_static(b"one"), Bytes::from_static(b"two")];
    let mut failed = 0;
    macro_rules! again {
        ($operation:expr) => {
            match $operation.await {
                Err(error) => {
                    // What nothing says is missing looks damaged.
                    let expected = if fault == Fault::Truncated { Class::Corrupt } else { Class::Transient };
                    assert_eq!(error.class(), expected, "{fault:?} at {at}: {error}");
                    failed += 1;
                    $operation.await?
                }
                Ok(done) => done,
            }
        };
    }
    again!(store.put_description(&description()));
    again!(upload(&store, failed, &full));
    again!(store.put_new(&DELTA, &delta));
    let catalog = again!(store.catalog());
    assert_eq!(catalog.timelines[&1].fulls.len() + catalog.timelines[&1].deltas.len(), 2, "{fault:?} at {at}");
    assert_eq!(again!(store.get_whole(&FULL, full.len() as u64)), full, "{fault:?} at {at}");
    assert_eq!(again!(store.get_range(&DELTA, 1..5))[..], b"netw"[..], "{fault:?} at {at}");
    assert_eq!(again!(store.description(1)), Some(description()));
    // What is another's stays so.
    assert_eq!(
        store.put_new(&DELTA, &[Bytes::from_static(b"others")]).await.map_err(|error| error.class()),
        Err(Class::Precondition)
    );
    for (name, _) in &catalog.uploading {
        again!(store.delete(name));
    }
    again!(store.delete(&FULL));
    let catalog = again!(store.catalog());
    assert!(catalog.uploading.is_empty() && catalog.foreign.is_empty(), "{fault:?} at {at}: {catalog:?}");
    assert!(catalog.timelines[&1].fulls.is_empty() && catalog.timelines[&1].deltas.len() == 1, "{fault:?} at {at}");
    assert!(failed <= 1, "{fault:?} at {at}: one fault, {failed} failures");
    Ok(faulty.seen.load(Ordering::SeqCst))
}

async fn every_operation_goes_wrong(make: impl Fn() -> Arc<dyn ObjectStore>, fault: Fault) -> Result<()> {
    let mut at = 0;
    while keeps(make(), fault, at).await? > at {
        at += 1;
    }
    assert!(at > 15, "only {at} operations");
    Ok(())
}

macro_rules! conformance {
    ($($in_memory:ident, $in_a_directory:ident: $fault:expr;)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $in_memory() -> Result<()> {
                every_operation_goes_wrong(|| Arc::new(InMemory::new()), $fault).await
            }

            #[tokio::test]
            async fn $in_a_directory() -> Result<()> {
                let dir = tempfile::tempdir().map_err(crate::Error::io("create", "a directory"))?;
                let number = AtomicUsize::new(0);
                let make = || -> Arc<dyn ObjectStore> {
                    let dir = dir.path().join(number.fetch_add(1, Ordering::SeqCst).to_string());
                    let made = std::fs::create_dir(&dir).map_err(|error| error.to_string());
                    let store = made.and_then(|()| LocalFileSystem::new_with_prefix(&dir).map_err(|error| error.to_string()));
                    store.map_or_else(|error| panic!("{error}"), |store| Arc::new(store) as Arc<dyn ObjectStore>)
                };
                every_operation_goes_wrong(make, $fault).await
            }
        )*
    };
}

conformance! {
    memory_that_fails, a_directory_that_fails: Fault::Fails;
    memory_that_fails_late, a_directory_that_fails_late: Fault::FailsLate;
    memory_that_is_slow, a_directory_that_is_slow: Fault::Slow;
    memory_that_is_cut_short, a_directory_that_is_cut_short: Fault::Short;
    memory_that_is_truncated, a_directory_that_is_truncated: Fault::Truncated;
}
