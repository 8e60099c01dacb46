//! The object store: where its URL leads, and the few operations backups need of it.

#[cfg(test)]
mod conformance;
mod environment;
mod examine;
mod federation;
mod gate;
mod marks;
mod open;
mod patience;
mod upload;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use proto::backup::ObjectMeta;

pub use environment::Environment;
use gate::Gate;
pub use gate::{Operation, Operations};
use marks::Marks;
pub use upload::Upload;

use crate::catalog::{Catalog, Description, History, ObjectName, PREDECESSOR, Timeline};
use crate::container::{self, FromTail};
use crate::pace::Pace;
use crate::{Class, Error, Result};

/// What S3 copies in one request at most.
const MOST_COPIED_BYTES: u64 = 5 << 30;
/// Two requests that were sent in the same moment have both been answered by then.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// Bytes of one ranged read.
const RANGE_BYTES: u64 = 2 << 20;
/// A delta is closed long before; those of the predecessor, which is told how large its may be, too.
const MOST_DELTA_BYTES: u64 = 512 << 20;
/// A timeline is described in less.
const MOST_NOTE_BYTES: u64 = 64 << 10;
/// How long reading one may take.
const NOTE_DEADLINE: Duration = Duration::from_secs(60);
/// Enough for the metadata at the end of any but the largest objects.
const TAIL_BYTES: u64 = 64 << 10;

/// Whether the place must exist already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// For reading: a missing directory is an error.
    Existing,
    /// For writing: a missing directory is made.
    Create,
}

/// A prefix of an object store.
#[derive(Clone)]
pub struct Store {
    inner: Gate,
    operations: Operations,
    prefix: Path,
    url: String,
    /// Objects above this many bytes are copied in parts.
    most_copied_bytes: u64,
    /// Of a local store.
    directory: Option<PathBuf>,
    /// Of a provider's store.
    marks: Option<Arc<Marks>>,
    /// Versions of the predecessor's objects that count where that is not the newest, by name, as last listed.
    versions: Arc<Mutex<BTreeMap<String, String>>>,
}

impl std::fmt::Debug for Store {
    /// What leads there may be secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Store {
    fn new(inner: impl ObjectStore, prefix: Path, url: String) -> Self {
        let operations = Operations::default();
        Self {
            inner: Gate::new(inner, operations.clone()),
            operations,
            prefix,
            url,
            most_copied_bytes: MOST_COPIED_BYTES,
            directory: None,
            marks: None,
            versions: Arc::default(),
        }
    }

    /// Wraps any store.
    #[cfg(test)]
    pub fn from_parts(inner: Arc<dyn ObjectStore>, prefix: &str) -> Self {
        Self::new(inner, Path::from(prefix), format!("test:///{prefix}"))
    }

    /// The same store, read and written at a pace. What leads around it, such as copies within the store, has none.
    #[must_use]
    pub fn paced(&self, pace: Arc<Pace>) -> Self {
        Self { inner: self.inner.paced(pace), ..self.clone() }
    }

    /// How often what was asked of it.
    pub fn operations(&self) -> Operations {
        self.operations.clone()
    }

    /// The URL it was opened with, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// URL of an object, for messages.
    pub fn location(&self, name: &impl std::fmt::Display) -> String {
        format!("{}/{name}", self.url)
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), Path::join)
    }

    fn fail(&self, op: &'static str, name: &impl std::fmt::Display) -> impl FnOnce(object_store::Error) -> Error {
        let location = self.location(name);
        move |source| Error::Store { op, location, source }
    }

    /// Lists everything under the prefix.
    pub async fn catalog(&self) -> Result<Catalog> {
        if let Some(directory) = self.directory.clone() {
            let fail = Error::io("list", directory.display().to_string());
            let listed = tokio::task::spawn_blocking(move || list_directory(&directory));
            return Ok(Catalog::new(listed.await.map_err(|error| Error::task(&error))?.map_err(fail)?));
        }
        let fail = |source| Error::Store { op: "list", location: format!("{}/", self.url), source };
        let prefix = (self.prefix != Path::default()).then_some(&self.prefix);
        let listed = self.inner.list(prefix).map_ok(|object| (self.relative(&object.location), object.size));
        let mut objects: BTreeMap<String, u64> = listed.try_collect().await.map_err(fail)?;
        self.mark(&mut objects).await.map_err(fail)?;
        Ok(Catalog::new(objects))
    }

    /// Applies what only the provider itself tells of the predecessor's objects.
    async fn mark(&self, objects: &mut BTreeMap<String, u64>) -> object_store::Result<()> {
        let Some(marks) = &self.marks else { return Ok(()) };
        let is_theirs = |name: &str| matches!(ObjectName::parse(name), Some(ObjectName::Gardener(_)));
        let any = objects.keys().any(|name| is_theirs(name));
        if !any && !marks.may_list_more() {
            return Ok(());
        }
        let name_of = |path: &str| {
            let name = Path::parse(path).ok().map(|path| self.relative(&path));
            name.filter(|name| is_theirs(name))
        };
        // Both of their trees begin with it.
        let marked = match marks.look(self.path("v").as_ref(), &|path| name_of(path).is_some()).await {
            Ok(Some(marked)) => marked,
            Ok(None) if any => {
                let what = "those that are marked x-etcd-snapshot-exclude are not left out (on S3 it takes s3:ListBucketVersions and s3:GetObjectVersionTagging, on Azure reading tags)";
                tracing::warn!("the store does not tell tags and versions of the predecessor's backups: {what}");
                return Ok(());
            }
            Ok(None) => return Ok(()),
            // Who has none of theirs must not fail for their sake.
            Err(error) if !any => {
                tracing::debug!(%error, "whether there are deleted objects of the predecessor's is not known");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let mut versions = BTreeMap::new();
        for (path, version) in marked.versions {
            if let Some(name) = name_of(&path) {
                objects.insert(name.clone(), version.size);
                versions.insert(name, version.id);
            }
        }
        for name in marked.excluded.iter().filter_map(|path| name_of(path)) {
            if objects.remove(&name).is_some() {
                tracing::info!(name, "left out: it has the mark x-etcd-snapshot-exclude");
            }
        }
        // At once, and only when all is known: somebody may read by what the listing before found.
        *self.versions.lock().unwrap_or_else(PoisonError::into_inner) = versions;
        Ok(())
    }

    /// A path as a name under the prefix.
    fn relative(&self, path: &Path) -> String {
        let parts = path.prefix_match(&self.prefix).into_iter().flatten();
        parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/")
    }

    /// The version of an object that counts, where that is not the newest.
    fn version(&self, name: &ObjectName) -> Option<String> {
        let ObjectName::Gardener(name) = name else { return None };
        self.versions.lock().unwrap_or_else(PoisonError::into_inner).get(&name.to_string()).cloned()
    }

    /// Puts a whole object that must not exist. One that exists with the same content counts as ours: the answer to an
    /// earlier attempt was lost.
    pub async fn put_new(&self, name: &ObjectName, content: &[Bytes]) -> Result<()> {
        self.put_new_at(&name.to_string(), content).await
    }

    async fn put_new_at(&self, name: &str, content: &[Bytes]) -> Result<()> {
        let mut delay = Duration::from_millis(300);
        loop {
            // The library does not repeat a put that must create when the answer was lost; this may, it looks what is there.
            match self.try_put_new(name, content).await {
                Err(error) if error.class() == Class::Transient && delay < Duration::from_secs(2) => {
                    tracing::debug!(%error, "put again");
                    tokio::time::sleep(delay).await;
                    delay *= 2;
                }
                done => return done,
            }
        }
    }

    /// A directory that was there and is not, such as what was mounted, must not be made anew below.
    fn check_directory(&self) -> Result<()> {
        match &self.directory {
            Some(directory) if !directory.is_dir() => Err(Error::Unanswered {
                what: format!("the store's directory {} is gone; it is waited for", directory.display()),
            }),
            _ => Ok(()),
        }
    }

    async fn try_put_new(&self, name: &str, content: &[Bytes]) -> Result<()> {
        self.check_directory()?;
        let size: usize = content.iter().map(Bytes::len).sum();
        let payload: PutPayload = content.iter().cloned().collect();
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(&self.path(name), payload, options).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { path, source }) => {
                let there = match self.inner.get(&self.path(name)).await {
                    // Another conditional request for it was under way, perhaps our own earlier one.
                    Err(object_store::Error::NotFound { .. }) => return Err(self.comes_and_goes(&name)),
                    there => there.map_err(self.fail("look at", &name))?,
                };
                if there.meta.size == size as u64 {
                    let there = there.bytes().await.map_err(self.fail("look at", &name))?;
                    let mut rest = there.as_ref();
                    let same = content.iter().all(|piece| {
                        let (head, tail) = rest.split_at(piece.len().min(rest.len()));
                        rest = tail;
                        head == piece
                    });
                    if same {
                        return Ok(());
                    }
                }
                Err(self.fail("put", &name)(object_store::Error::AlreadyExists { path, source }))
            }
            Err(source) => Err(self.fail("put", &name)(source)),
        }
    }

    /// What a store says exists, and does not have.
    fn comes_and_goes(&self, name: &impl std::fmt::Display) -> Error {
        let location = self.location(name);
        Error::Unanswered { what: format!("{location}: the store says that it exists, and it is not there; try again") }
    }

    /// Writes the description of a timeline, which nobody else may have begun: otherwise an error of class
    /// [`Precondition`](crate::Class::Precondition).
    pub async fn put_description(&self, description: &Description) -> Result<()> {
        let json = serde_json::to_string_pretty(description)
            .map_err(|error| Error::Bug { what: format!("describe a timeline: {error}") })?;
        let name = ObjectName::Timeline { timeline: description.timeline }.to_string();
        if self.create_note(&name, json.into()).await? {
            return Ok(());
        }
        Err(Error::precondition(format!("{}: another writer began it meanwhile", self.location(&name))))
    }

    /// Creates a small object; false when somebody else has. One that is there with the same content is ours.
    pub(crate) async fn create_note(&self, name: &str, content: Bytes) -> Result<bool> {
        // A store that ignores the condition would overwrite what somebody put since the last look.
        if let Some(there) = self.note(name).await? {
            return Ok(there == content);
        }
        match self.put_new_at(name, std::slice::from_ref(&content)).await {
            Err(error) if error.class() == Class::Precondition => return Ok(false),
            put => put?,
        }
        // Such a store takes it again. Two who create it in the same moment then both believe that it is theirs; what is
        // there when that has settled decides.
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(&self.path(name), content.clone().into(), options).await {
            Err(object_store::Error::AlreadyExists { .. }) => return Ok(true),
            Ok(_) => tokio::time::sleep(SETTLED_AFTER).await,
            // Where nothing may be overwritten, it is not asked whether something is there. Other trouble passes, or the
            // look that follows has it too.
            Err(_) => {}
        }
        Ok(self.note(name).await?.as_ref() == Some(&content))
    }

    /// Reads a small object; `None` when it is not there.
    pub(crate) async fn note(&self, name: &str) -> Result<Option<Bytes>> {
        let read = async {
            let got = match self.inner.get(&self.path(name)).await {
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                got => got.map_err(self.fail("get", &name))?,
            };
            if got.meta.size > MOST_NOTE_BYTES {
                return Err(Error::corrupt(format!("{}: it is too large for what it is", self.location(&name))));
            }
            got.bytes().await.map(Some).map_err(self.fail("get", &name))
        };
        // Requests have deadlines of their own; what somebody put into a directory, such as a pipe, has none.
        let unanswered = || Error::Unanswered { what: format!("{}: it cannot be read in time", self.location(&name)) };
        tokio::time::timeout(NOTE_DEADLINE, read).await.unwrap_or_else(|_| Err(unanswered()))
    }

    /// Names of the small objects under a name.
    pub(crate) async fn notes(&self, under: &str) -> Result<Vec<String>> {
        let prefix = self.path(under);
        let listed = self.inner.list(Some(&prefix)).map_ok(|object| self.relative(&object.location));
        listed.try_collect().await.map_err(self.fail("list", &under))
    }

    /// Removes a small object that may be gone.
    pub(crate) async fn remove_note(&self, name: &str) -> Result<()> {
        match self.inner.delete(&self.path(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.fail("delete", &name)(source)),
        }
    }

    /// Whether an object is still there.
    pub async fn exists(&self, name: &ObjectName) -> Result<bool> {
        match self.inner.head(&self.path(&name.to_string())).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.fail("look at", name)(source)),
        }
    }

    /// Reads an object as large as memory allows: a delta.
    pub async fn get_whole(&self, name: &ObjectName, size: u64) -> Result<Vec<u8>> {
        if size > MOST_DELTA_BYTES {
            let location = self.location(name);
            return Err(Error::corrupt(format!("{location}: object of {size} bytes is larger than any delta")));
        }
        let mut object = Vec::new();
        for range in Self::ranges(size) {
            object.extend_from_slice(&self.get_range(name, range).await?);
        }
        Ok(object)
    }

    /// Reads where a timeline comes from; `None` when nothing says so.
    pub async fn description(&self, timeline: Timeline) -> Result<Option<Description>> {
        let name = ObjectName::Timeline { timeline };
        let Some(bytes) = self.note(&name.to_string()).await? else { return Ok(None) };
        let description = serde_json::from_slice(&bytes).map_err(|error| {
            Error::corrupt(format!("{}: it does not describe a timeline: {error}", self.location(&name)))
        })?;
        Ok(Some(description))
    }

    /// Id of the cluster that a timeline is of; `None` where nothing says so, as in what was copied out of the predecessor's layout.
    pub async fn cluster_of(&self, timeline: Timeline) -> Result<Option<u64>> {
        if timeline == PREDECESSOR {
            return Ok(None);
        }
        let described = self.description(timeline).await?;
        Ok(described.and_then(|described| u64::from_str_radix(&described.cluster_id, 16).ok()))
    }

    /// The same, as far as a description can be read.
    pub(crate) async fn begun_with(&self, timeline: Timeline) -> Result<Option<u64>> {
        match self.cluster_of(timeline).await {
            Err(error) if error.class() == Class::Corrupt => Ok(None),
            cluster_id => cluster_id,
        }
    }

    /// The same, or else the cluster of the timeline's newest full snapshot, as far as that tells.
    pub(crate) async fn whose(&self, timeline: Timeline, history: &History) -> Result<Option<u64>> {
        let described = self.begun_with(timeline).await?;
        if described.is_some() {
            return Ok(described);
        }
        let Some(full) = history.fulls.last() else { return Ok(None) };
        match self.meta(&full.name(timeline), full.size).await {
            Err(error) if error.class() == Class::Corrupt => Ok(None),
            meta => Ok(meta?.map(|meta| meta.cluster_id).filter(|id| *id != 0)),
        }
    }

    /// Reads the metadata of a full or a delta without the rest of it; the predecessor's have none.
    pub async fn meta(&self, name: &ObjectName, size: u64) -> Result<Option<ObjectMeta>> {
        if matches!(name, ObjectName::Gardener(_)) {
            return Ok(None);
        }
        let path = self.path(&name.to_string());
        let location = self.location(name);
        let range = |range: std::ops::Range<u64>| {
            let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
            let path = &path;
            async move { self.inner.get_opts(path, options).await?.bytes().await }
        };
        if size == 0 {
            return Err(Error::corrupt(format!("{location}: object is empty")));
        }
        let head = range(0..size.min(TAIL_BYTES)).await.map_err(self.fail("get", name))?;
        let mut want = TAIL_BYTES;
        loop {
            let tail = if size <= TAIL_BYTES {
                head.clone()
            } else {
                range(size.saturating_sub(want)..size).await.map_err(self.fail("get", name))?
            };
            match container::meta_from_tail(&location, size, &head, &tail)? {
                FromTail::Meta(meta) => {
                    check_name(&location, name, &meta)?;
                    return Ok(Some(*meta));
                }
                FromTail::Need(more) if more > want && want < size => want = more.min(size),
                FromTail::Need(_) => return Err(Error::corrupt(format!("{location}: seek table contradicts itself"))),
            }
        }
    }

    /// Reads the sizes of an object's frames from its end.
    pub async fn frames(&self, name: &ObjectName, size: u64) -> Result<Vec<(u32, u32)>> {
        let mut want = TAIL_BYTES.min(size);
        loop {
            let tail = self.get_range(name, size - want..size).await?;
            match container::frames_in_tail(&self.location(name), size, &tail)? {
                Ok(frames) => return Ok(frames),
                Err(more) if more > want && want < size => want = more.min(size),
                Err(_) => {
                    return Err(Error::corrupt(format!("{}: seek table contradicts itself", self.location(name))));
                }
            }
        }
    }

    /// Ranged reads under way at once when objects are fetched ahead.
    pub const RANGES_AHEAD: usize = 4;

    /// The ranges in which an object of `size` bytes is fetched.
    pub fn ranges(size: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
        (0..size.div_ceil(RANGE_BYTES)).map(move |index| index * RANGE_BYTES..((index + 1) * RANGE_BYTES).min(size))
    }

    /// Reads a range of an object.
    pub async fn get_range(&self, name: &ObjectName, range: std::ops::Range<u64>) -> Result<Bytes> {
        let want = range.end - range.start;
        let options = GetOptions::new().with_range(Some(range)).with_version(self.version(name));
        let got = self.inner.get_opts(&self.path(&name.to_string()), options).await.map_err(self.fail("get", name))?;
        let bytes = got.bytes().await.map_err(self.fail("get", name))?;
        if bytes.len() as u64 == want {
            return Ok(bytes);
        }
        Err(Error::corrupt(format!("{}: store gave {} of {want} bytes asked for", self.location(name), bytes.len())))
    }

    /// Deletes an object. One that is not there is as good as deleted.
    pub async fn delete(&self, name: &ObjectName) -> Result<()> {
        let path = self.path(&name.to_string());
        let deleted = match (self.version(name), &self.marks) {
            (Some(_), Some(marks)) => marks.delete(&path).await,
            _ => self.inner.delete(&path).await,
        };
        match deleted {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.fail("delete", name)(source)),
        }
    }

    /// Removes what writers that were killed left in a local store: files on their way to their names, which a listing does
    /// not show. On S3 such uploads are not objects; a lifecycle rule of the bucket ends them.
    pub async fn remove_abandoned_files(&self, older_than: Duration) {
        let Some(directory) = self.directory.clone() else { return };
        let removed = tokio::task::spawn_blocking(move || remove_staged_files(&directory, older_than));
        match removed.await.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "remove files of uploads that were never finished"),
            Err(error) => tracing::warn!(%error, "files of uploads that were never finished may stay"),
        }
    }
}

/// An object holds what its name says.
fn check_name(location: &str, name: &ObjectName, meta: &ObjectMeta) -> Result<()> {
    let Some((first, last)) = name.revisions() else { return Ok(()) };
    if (meta.first_revision, meta.last_revision) == (first, last) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "{location}: it is named after revisions {first} to {last}, its metadata says {} to {}; it was renamed",
        meta.first_revision, meta.last_revision
    )))
}

/// The names of all objects in a local store, and of whatever else is there. What is not ours may be unreadable.
fn list_directory(directory: &std::path::Path) -> std::io::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut pending = vec![(directory.to_owned(), String::new())];
    while let Some((place, prefix)) = pending.pop() {
        let top = prefix.split('/').next().unwrap_or_default();
        let ours = prefix.is_empty() || Catalog::is_timeline(top) || ["v1", "v2"].contains(&top);
        let entries = match std::fs::read_dir(&place) {
            Ok(entries) => entries,
            Err(error) if ours => return Err(error),
            Err(error) => {
                tracing::debug!(%error, place = %place.display(), "leave out what cannot be listed");
                continue;
            }
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = format!("{prefix}{}", name.to_string_lossy());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                pending.push((entry.path(), format!("{name}/")));
            } else if kind.is_file() && !is_staged(&name) {
                // One that was removed meanwhile is not there.
                found.extend(entry.metadata().ok().map(|metadata| (name, metadata.len())));
            }
        }
    }
    Ok(found)
}

/// Whether a file is one that `LocalFileSystem` has on its way to its name: it writes a new object as `NAME#NUMBER` first.
fn is_staged(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(object, number)| {
        let object = object.rsplit('/').next().unwrap_or_default();
        !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && (object == "timeline.json"
                || object.starts_with("uploading-")
                || object.starts_with("Full-")
                || object.starts_with("Incr-")
                || std::path::Path::new(object).extension().is_some_and(|extension| extension == "zst"))
    })
}

fn remove_staged_files(directory: &std::path::Path, older_than: Duration) -> std::io::Result<usize> {
    let mut removed = 0;
    for timeline in std::fs::read_dir(directory)? {
        let timeline = timeline?;
        let is_ours = |name: &str| Catalog::is_timeline(name) || name == "v2";
        if !timeline.file_name().to_str().is_some_and(is_ours) || !timeline.file_type()?.is_dir() {
            continue;
        }
        for place in [timeline.path(), timeline.path().join("full"), timeline.path().join("delta")] {
            for entry in std::fs::read_dir(place).into_iter().flatten() {
                let entry = entry?;
                let metadata = entry.metadata()?;
                let age = metadata.modified()?.elapsed().unwrap_or_default();
                if metadata.is_file() && age >= older_than && entry.file_name().to_str().is_some_and(is_staged) {
                    std::fs::remove_file(entry.path())?;
                    removed += 1;
                }
            }
        }
    }
    Ok(removed)
}

impl Store {
    /// Retries `attempt` while the store fails in ways that pass, for ever, until `stop` is cancelled. Denied access counts
    /// as passing: credentials are rotated. `failed` is told of each failure.
    pub async fn persist<T, F>(
        &self,
        what: &str,
        stop: &tokio_util::sync::CancellationToken,
        failed: impl Fn(&Error),
        mut attempt: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut delay = Duration::from_millis(500);
        loop {
            let error = match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) if error.class().passes(true) => error,
                Err(error) => return Err(error),
            };
            if stop.is_cancelled() {
                return Err(error);
            }
            failed(&error);
            tracing::warn!(%error, retry_in = ?delay, "{what} failed; it is kept and tried again");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stop.cancelled() => {}
            }
            delay = (delay * 2).min(Duration::from_secs(30));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_a_killed_writer_left_are_removed_and_no_others() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let full = dir.path().join("t00000001/full");
        std::fs::create_dir_all(&full)?;
        let ours = ["uploading-1795369874592-00000000000000ab#1", "00000000000000000003-1795369874592.db.zst#12"];
        let others = ["00000000000000000003-1795369874592.db.zst", "notes#1", "a.zst#b", "a.zst#"];
        for name in ours.iter().chain(&others) {
            std::fs::write(full.join(name), b"")?;
        }
        assert_eq!(remove_staged_files(dir.path(), Duration::from_secs(3600))?, 0);
        assert_eq!(remove_staged_files(dir.path(), Duration::ZERO)?, ours.len());
        assert_eq!(std::fs::read_dir(full)?.count(), others.len());
        Ok(())
    }
}
