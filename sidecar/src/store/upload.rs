//! Objects whose name is not known before their last byte.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use object_store::{CopyMode, CopyOptions, MultipartUpload, ObjectStore, ObjectStoreExt};
use tokio::task::JoinSet;

use super::Store;
use crate::catalog::ObjectName;
use crate::error::store_class;
use crate::{Class, Error, Result};

/// Parts of a multipart upload. At 10,000 parts, S3's limit, an object may have 80 GB.
const PART_BYTES: usize = 8 << 20;
/// Names tried for one object.
const MOST_NAMES: i64 = 100;
/// How long after a request, whose answer was not waited for, an object may appear that it made;
const LATE: Duration = Duration::from_secs(60);
/// after one that was answered, or cut off,
const SOON: Duration = Duration::from_secs(2);
/// and how often it is looked.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// How long cleaning up behind an upload that was given up may take.
const ABORT_DEADLINE: Duration = Duration::from_secs(5);

/// The parts of an object on their way.
struct Parts {
    upload: Box<dyn MultipartUpload>,
    sending: JoinSet<object_store::Result<()>>,
}

impl Parts {
    async fn begin(store: &Store, name: &str) -> object_store::Result<Self> {
        Ok(Self { upload: store.inner.put_multipart(&store.path(name)).await?, sending: JoinSet::new() })
    }

    /// Sends a part; waits while two others are on their way. They go on also while nobody waits.
    async fn send(&mut self, part: Bytes) -> object_store::Result<()> {
        self.sending.spawn(self.upload.put_part(part.into()));
        self.wait_until(2).await
    }

    async fn wait_until(&mut self, left: usize) -> object_store::Result<()> {
        while self.sending.len() > left {
            self.sending.join_next().await.transpose()?.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    async fn complete(&mut self) -> object_store::Result<()> {
        self.wait_until(0).await?;
        self.upload.complete().await.map(drop)
    }

    async fn abort(mut self) {
        drop(self.sending);
        let _ = self.upload.abort().await;
    }
}

/// An object being uploaded. Up to one part it waits in memory and is put at once under its name; beyond that its parts
/// go to a staging name, and its name is given by a copy within the store when it is whole.
///
/// Must be ended with [`Upload::finish`] or [`Upload::abort`].
pub struct Upload {
    store: Store,
    staging: ObjectName,
    held: BytesMut,
    parts: Option<Parts>,
    sent: u64,
    /// Every part is at the staging name; what is missing is the name.
    whole: bool,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("staging", &self.staging).field("sent", &self.sent).finish()
    }
}

impl Upload {
    /// Adds bytes; waits while two parts are on their way.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.held.extend_from_slice(&bytes);
        while self.held.len() > PART_BYTES {
            let part = self.held.split_to(PART_BYTES).freeze();
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Bytes) -> Result<()> {
        let staging = self.staging.to_string();
        let parts = match &mut self.parts {
            Some(parts) => parts,
            none => {
                // A directory that vanished would be made anew by the first part.
                self.store.check_directory()?;
                let begun = Parts::begin(&self.store, &staging).await;
                none.insert(begun.map_err(self.store.fail("begin upload of", &staging))?)
            }
        };
        self.sent += part.len() as u64;
        parts.send(part).await.map_err(self.store.fail("upload a part of", &staging))
    }

    /// Ends the bytes, before the object has its name: where in the store they are, and how many. `None` for a small one,
    /// which was not sent yet.
    pub async fn stage(&mut self) -> Result<Option<(ObjectName, u64)>> {
        if self.parts.is_none() && !self.whole {
            return Ok(None);
        }
        self.complete_parts().await?;
        Ok(Some((self.staging, self.sent)))
    }

    /// Gives the object its name; returns its size.
    ///
    /// After an error of class [`Precondition`](crate::Class::Precondition) it may be given another.
    pub async fn finish(&mut self, name: &ObjectName) -> Result<u64> {
        if self.parts.is_none() && !self.whole {
            let size = self.held.len() as u64;
            self.store.put_new(name, &[self.held.clone().freeze()]).await?;
            return Ok(size);
        }
        self.complete(name).await?;
        Ok(self.sent)
    }

    /// Gives the object the first of the names for 0, 1, 2, … that is free: another writer may have begun one of the same
    /// revision in the same moment, which is legal. Returns name and size.
    pub async fn finish_as(&mut self, name: impl Fn(i64) -> ObjectName) -> Result<(ObjectName, u64)> {
        let mut attempt = 0;
        loop {
            let name = name(attempt);
            match self.finish(&name).await {
                Ok(size) => return Ok((name, size)),
                Err(error) if error.class() == Class::Precondition && attempt < MOST_NAMES => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    async fn complete_parts(&mut self) -> Result<()> {
        let last = self.held.split().freeze();
        if !last.is_empty() {
            self.send(last).await?;
        }
        let staging = self.staging.to_string();
        if let Some(parts) = &mut self.parts {
            // It stays at hand until it is done, so that one who gives up here can abort it.
            let completed = parts.complete().await;
            self.store.see_to_it(&staging, self.sent, completed, "complete upload of").await?;
            self.parts = None;
            self.whole = true;
        }
        Ok(())
    }

    async fn complete(&mut self, name: &ObjectName) -> Result<()> {
        self.complete_parts().await?;
        // All of it is in the store; to read it from etcd again for the sake of a name would cost more.
        match self.store.give_name(&self.staging, name, self.sent).await {
            Err(error) if error.class() == Class::Transient => {
                tracing::info!(%error, "the upload gets its name at the second attempt");
                self.store.give_name(&self.staging, name, self.sent).await?;
            }
            named => named?,
        }
        // A staging copy that stays is removed by a later run.
        if let Err(error) = self.store.delete(&self.staging).await {
            tracing::warn!(%error, "leave the staging copy of an upload for a later run to remove");
        }
        Ok(())
    }

    /// Gives up and removes what was sent, as far as the store lets it.
    pub async fn abort(mut self) {
        let begun = self.sent > 0;
        let clean = async {
            if let Some(parts) = self.parts.take() {
                parts.abort().await;
            }
            let _ = self.store.delete(&self.staging).await;
        };
        // What cannot be removed now is removed by a later run.
        if begun && tokio::time::timeout(ABORT_DEADLINE, clean).await.is_err() {
            tracing::warn!(object = %self.staging, "leave an unfinished upload for a later run to remove");
        }
    }
}

impl Store {
    /// Begins an object whose name is not known before its last byte.
    pub fn upload(&self, staging: ObjectName) -> Upload {
        Upload { store: self.clone(), staging, held: BytesMut::new(), parts: None, sent: 0, whole: false }
    }

    /// Copies what is whole at a staging name to its own.
    async fn give_name(&self, staging: &ObjectName, name: &ObjectName, size: u64) -> Result<()> {
        if size > self.most_copied_bytes {
            return self.copy_in_parts(staging, name, size).await;
        }
        let (from, to) = (self.path(&staging.to_string()), self.path(&name.to_string()));
        match self.inner.copy_opts(&from, &to, CopyOptions::new().with_mode(CopyMode::Create)).await {
            // No conditional copy here. The name has the millisecond in it, so nobody else means the same one.
            Err(object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. }) => {
                self.inner.copy(&from, &to).await.map_err(self.fail("name", name))?;
            }
            copied => self.see_to_it(&name.to_string(), size, copied, "name").await?,
        }
        let Some(marks) = &self.marks else { return Ok(()) };
        if marks.copied(&to).await.map_err(self.fail("name", name))? {
            return Ok(());
        }
        // What it began has the name.
        self.delete(name).await?;
        Err(Error::Unanswered { what: format!("{}: the store began to copy it and gave up", self.location(name)) })
    }

    /// What made an object may have failed by its answer alone, which was lost or late: a server that is asked again says that
    /// the object exists, or knows of no such upload. What is there then, of this size, is ours: its name has the millisecond
    /// in it. Otherwise what it failed with, as an error of class [`Transient`](Class::Transient) where nothing was refused
    /// and making it again may help.
    async fn see_to_it(
        &self,
        name: &str,
        size: u64,
        made: object_store::Result<()>,
        doing: &'static str,
    ) -> Result<()> {
        let Err(source) = made else { return Ok(()) };
        let exists = matches!(source, object_store::Error::AlreadyExists { .. });
        let late = match store_class(&source) {
            Class::Transient if crate::error::chain(&source).contains("timed out") => LATE,
            Class::Transient => SOON,
            _ if exists => LATE,
            _ => Duration::ZERO,
        };
        let asked = Instant::now();
        loop {
            match self.inner.head(&self.path(name)).await {
                Ok(there) if there.size == size => {
                    tracing::debug!(object = name, error = %source, "it is there nevertheless");
                    return Ok(());
                }
                Err(object_store::Error::NotFound { .. }) if asked.elapsed() < late => {
                    tokio::time::sleep(LOOK_PERIOD).await;
                }
                Err(object_store::Error::NotFound { .. }) if exists => return Err(self.comes_and_goes(&name)),
                Err(object_store::Error::NotFound { .. }) | Ok(_) => return Err(self.fail(doing, &name)(source)),
                Err(error) => return Err(self.fail("look at", &name)(error)),
            }
        }
    }

    /// Copies through this process what is too large for the store to copy by itself.
    async fn copy_in_parts(&self, from: &ObjectName, to: &ObjectName, size: u64) -> Result<()> {
        let name = to.to_string();
        // There is no conditional upload in parts; who has the name already is at least seen.
        if let Ok(there) = self.inner.head(&self.path(&name)).await
            && there.size != size
        {
            let source = object_store::Error::AlreadyExists { path: name.clone(), source: "another size".into() };
            return Err(self.fail("name", &name)(source));
        }
        let mut parts = Parts::begin(self, &name).await.map_err(self.fail("begin upload of", &name))?;
        let copied = async {
            let mut at = 0;
            while at < size {
                let end = size.min(at + PART_BYTES as u64);
                let part = self.get_range(from, at..end).await?;
                parts.send(part).await.map_err(self.fail("upload a part of", &name))?;
                at = end;
            }
            let completed = parts.complete().await;
            self.see_to_it(&name, size, completed, "complete upload of").await
        };
        let copied = copied.await;
        if copied.is_err() {
            parts.abort().await;
        }
        copied
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::super::MOST_COPIED_BYTES;
    use super::*;

    #[tokio::test]
    async fn what_is_too_large_to_copy_at_once_is_copied_in_parts() -> Result<()> {
        let staging = ObjectName::Uploading { timeline: 1, unix_ms: 5, random: 7 };
        let name = ObjectName::Full { timeline: 1, revision: 9, unix_ms: 5 };
        let content: Bytes = (0..2 * PART_BYTES + 12_345).map(|n| (n / 1000) as u8).collect();
        for most_copied_bytes in [MOST_COPIED_BYTES, content.len() as u64 - 1] {
            let store = Store { most_copied_bytes, ..Store::from_parts(Arc::new(InMemory::new()), "some/prefix") };
            let mut upload = store.upload(staging);
            upload.write(content.clone()).await?;
            assert_eq!(upload.finish(&name).await?, content.len() as u64);
            assert_eq!(store.get_range(&name, 0..content.len() as u64).await?, content);
            let catalog = store.catalog().await?;
            assert!(catalog.uploading.is_empty(), "{:?}", catalog.uploading);
        }
        Ok(())
    }
}
