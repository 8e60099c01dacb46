//! Counts what is asked of a store, and what came of it.

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::error::store_class;

/// What was asked, and the class of the error that it ended with, or `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Operation {
    /// Such as `put`.
    pub operation: &'static str,
    /// `ok`, or such as `denied`.
    pub outcome: String,
}

/// How often what was asked.
pub type Operations = Family<Operation, Counter>;

#[derive(Debug)]
pub(super) struct Counted<T> {
    inner: T,
    operations: Operations,
}

impl<T> Counted<T> {
    pub(super) fn new(inner: T, operations: Operations) -> Self {
        Self { inner, operations }
    }
}

impl<T: std::fmt::Display> std::fmt::Display for Counted<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

fn count<V>(operations: &Operations, operation: &'static str, result: Result<V>) -> Result<V> {
    let outcome = match &result {
        Ok(_) => "ok".to_owned(),
        Err(error) => format!("{:?}", store_class(error)).to_lowercase(),
    };
    operations.get_or_create(&Operation { operation, outcome }).inc();
    result
}

#[async_trait]
impl<T: ObjectStore> ObjectStore for Counted<T> {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        count(&self.operations, "put", self.inner.put_opts(path, payload, options).await)
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let upload = self.inner.put_multipart_opts(path, options).await;
        let upload = count(&self.operations, "begin_upload", upload)?;
        Ok(Box::new(CountedUpload { upload, operations: self.operations.clone() }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let operation = if options.head { "head" } else { "get" };
        count(&self.operations, operation, self.inner.get_opts(path, options).await)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let operations = self.operations.clone();
        self.inner.delete_stream(paths).map(move |path| count(&operations, "delete", path)).boxed()
    }

    /// Counted when the first comes: pages cannot be seen from here.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (operations, mut is_first) = (self.operations.clone(), true);
        let listed = self.inner.list(prefix).map(move |listed| {
            let counts = std::mem::take(&mut is_first) || listed.is_err();
            if counts { count(&operations, "list", listed) } else { listed }
        });
        listed.boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        count(&self.operations, "list", self.inner.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        count(&self.operations, "copy", self.inner.copy_opts(from, to, options).await)
    }
}

#[derive(Debug)]
struct CountedUpload {
    upload: Box<dyn MultipartUpload>,
    operations: Operations,
}

#[async_trait]
impl MultipartUpload for CountedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, operations) = (self.upload.put_part(data), self.operations.clone());
        Box::pin(async move { count(&operations, "put_part", part.await) })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        count(&self.operations, "complete_upload", self.upload.complete().await)
    }

    async fn abort(&mut self) -> Result<()> {
        count(&self.operations, "abort_upload", self.upload.abort().await)
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn what_fails_counts_by_its_class() -> Result<()> {
        let operations = Operations::default();
        let store = Counted::new(InMemory::new(), operations.clone());
        store.put(&Path::from("a"), PutPayload::from_static(b"x")).await?;
        store.get(&Path::from("a")).await?;
        assert!(store.get(&Path::from("b")).await.is_err());
        store.delete(&Path::from("a")).await?;
        let of = |operation, outcome: &str| {
            operations.get_or_create(&Operation { operation, outcome: outcome.into() }).get()
        };
        assert_eq!((of("put", "ok"), of("get", "ok"), of("get", "missing"), of("delete", "ok")), (1, 1, 1, 1));
        Ok(())
    }
}
