//! What is asked of a store passes here: it is counted with what came of it, and kept to a pace where there is one.

use std::sync::Arc;

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
use tracing::Instrument;

use crate::error::store_class;
use crate::pace::Pace;

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

/// The way to a store.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    inner: Arc<dyn ObjectStore>,
    operations: Operations,
    pace: Option<Arc<Pace>>,
}

impl Gate {
    pub(super) fn new(inner: impl ObjectStore, operations: Operations) -> Self {
        Self { inner: Arc::new(inner), operations, pace: None }
    }

    /// The same, at a pace.
    pub(super) fn paced(&self, pace: Arc<Pace>) -> Self {
        Self { pace: Some(pace), ..self.clone() }
    }

    async fn pass(&self, bytes: u64) {
        if let Some(pace) = &self.pace {
            pace.pass(bytes).await;
        }
    }
}

impl std::fmt::Display for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

/// Waits for the answer, and counts it.
async fn counted<V>(
    operations: &Operations,
    operation: &'static str,
    asked: impl Future<Output = Result<V>>,
) -> Result<V> {
    count(operations, operation, asked.instrument(tracing::info_span!("store", operation)).await)
}

fn count<V>(operations: &Operations, operation: &'static str, result: Result<V>) -> Result<V> {
    let outcome = match &result {
        Ok(_) => "ok".to_owned(),
        Err(error) => store_class(error).name().to_owned(),
    };
    operations.get_or_create(&Operation { operation, outcome }).inc();
    result
}

#[async_trait]
impl ObjectStore for Gate {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.pass(payload.content_length() as u64).await;
        counted(&self.operations, "put", self.inner.put_opts(path, payload, options)).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let upload = self.inner.put_multipart_opts(path, options);
        let upload = counted(&self.operations, "begin_upload", upload).await?;
        Ok(Box::new(GatedUpload { upload, gate: self.clone() }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let operation = if options.head { "head" } else { "get" };
        let got = counted(&self.operations, operation, self.inner.get_opts(path, options)).await?;
        if operation == "get" {
            self.pass(got.range.end.saturating_sub(got.range.start)).await;
        }
        Ok(got)
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
        counted(&self.operations, "list", self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        counted(&self.operations, "copy", self.inner.copy_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct GatedUpload {
    upload: Box<dyn MultipartUpload>,
    gate: Gate,
}

#[async_trait]
impl MultipartUpload for GatedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (bytes, gate) = (data.content_length() as u64, self.gate.clone());
        let part = self.upload.put_part(data);
        Box::pin(async move {
            gate.pass(bytes).await;
            counted(&gate.operations, "put_part", part).await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        counted(&self.gate.operations, "complete_upload", self.upload.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        counted(&self.gate.operations, "abort_upload", self.upload.abort()).await
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
        let store = Gate::new(InMemory::new(), operations.clone());
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
