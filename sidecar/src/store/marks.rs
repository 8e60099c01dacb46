//! What a plain listing does not tell of the predecessor's objects: which of them its operators have taken out of
//! consideration, and on a versioned bucket of S3 which version of each counts. There the oldest does: what was overwritten
//! or deleted later, by mistake or by malice, is still what was backed up.
//!
//! | provider | excluded is what has |
//! |---|---|
//! | S3, versioned bucket | a delete marker, and on the version that counts the tag `x-etcd-snapshot-exclude=true` |
//! | Azure | that blob index tag |
//! | Google | that custom metadata |
//!
//! None of this is in the protocol that the library of stores has for all, so these are requests of our own. So is whether
//! Azure has ended a copy that it has begun.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, Method, StatusCode};
use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::azure::{AzureAuthorizer, MicrosoftAzure};
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody};
use object_store::gcp::GoogleCloudStorage;
use object_store::path::Path;
use object_store::signer::Signer;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

const EXCLUDE: &str = "x-etcd-snapshot-exclude";
/// Requests for the tags of one object under way at once.
const AT_ONCE: usize = 16;

/// How often it is looked whether the store has copied,
const COPY_PERIOD: Duration = Duration::from_secs(1);
/// and how long.
const MOST_COPYING: Duration = Duration::from_secs(3600);

/// Asks a provider in its own protocol.
#[derive(Debug)]
pub(super) struct Marks {
    pub(super) http: HttpClient,
    pub(super) place: Place,
}

/// Where, and who signs.
#[derive(Debug)]
pub(super) enum Place {
    S3 { store: AmazonS3, region: String },
    Azure { store: MicrosoftAzure, account: String, container: Url },
    Google { store: GoogleCloudStorage, bucket: Url },
}

/// The answer. Names are whole paths.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Marked {
    pub(super) excluded: BTreeSet<String>,
    pub(super) versions: BTreeMap<String, Version>,
}

/// The version of an object that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) id: String,
    pub(super) size: u64,
}

enum Answer {
    Told(HeaderMap, Bytes),
    Refused(StatusCode),
}

impl Marks {
    /// Whether a plain listing leaves out objects that count, so that looking makes sense where it shows none.
    pub(super) fn may_list_more(&self) -> bool {
        matches!(self.place, Place::S3 { .. })
    }

    /// Looks at what begins with `prefix` and is `relevant`. `None` when the provider does not tell, or not us.
    pub(super) async fn look(
        &self,
        prefix: &str,
        relevant: &(dyn Fn(&str) -> bool + Sync),
    ) -> object_store::Result<Option<Marked>> {
        match &self.place {
            Place::S3 { .. } => self.look_at_versions(prefix, relevant).await,
            Place::Azure { container, .. } => {
                let fixed = [("restype", "container"), ("comp", "list"), ("include", "tags"), ("prefix", prefix)];
                self.look_at_pages(container, &fixed, "marker", AzurePage::parse).await
            }
            Place::Google { bucket, .. } => {
                let fixed = [("fields", "items(name,metadata),nextPageToken"), ("prefix", prefix)];
                self.look_at_pages(bucket, &fixed, "pageToken", GooglePage::parse).await
            }
        }
    }

    /// Deletes an object with all its versions, the newest first: what was put over the one that counts never does.
    pub(super) async fn delete(&self, path: &Path) -> object_store::Result<()> {
        let Place::S3 { store, .. } = &self.place else { return Ok(()) };
        let mut found = Vec::new();
        let mut see = |page: VersionsPage| {
            let all = page.delete_marker.into_iter().chain(page.version);
            found.extend(all.filter(|entry| entry.key == path.as_ref()).map(|entry| entry.version_id));
        };
        if !self.each_page(store, path.as_ref(), &mut see).await? {
            return Err(failed("the versions of the object are not told".into()));
        }
        for version in found {
            let mut url = address(store, path).await?;
            url.query_pairs_mut().append_pair("versionId", &version);
            match self.ask(Method::DELETE, &url).await? {
                Answer::Told(..) | Answer::Refused(StatusCode::NOT_FOUND) => {}
                Answer::Refused(StatusCode::FORBIDDEN) => {
                    let source = format!("version {version} must not be deleted").into();
                    return Err(object_store::Error::PermissionDenied { path: path.to_string(), source });
                }
                Answer::Refused(status) => {
                    return Err(failed(format!("{status} to deleting version {version}").into()));
                }
            }
        }
        Ok(())
    }

    /// Waits for a copy within the store, which on Azure may have only begun when it is answered; false when it ended without
    /// success.
    pub(super) async fn copied(&self, to: &Path) -> object_store::Result<bool> {
        let Place::Azure { container, .. } = &self.place else { return Ok(true) };
        let mut url = container.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.extend(to.parts());
        }
        let begun = Instant::now();
        while begun.elapsed() < MOST_COPYING {
            let headers = match self.ask(Method::HEAD, &url).await? {
                Answer::Told(headers, _) => headers,
                Answer::Refused(status) => return Err(failed(format!("{status} to whether it is copied").into())),
            };
            match headers.get("x-ms-copy-status").map(http::HeaderValue::as_bytes) {
                None | Some(b"success") => return Ok(true),
                Some(b"pending") => tokio::time::sleep(COPY_PERIOD).await,
                Some(_) => return Ok(false),
            }
        }
        Err(failed(format!("the store has been copying it for {MOST_COPYING:?}").into()))
    }

    async fn look_at_pages(
        &self,
        url: &Url,
        fixed: &[(&str, &str)],
        next: &str,
        parse: impl Fn(&[u8]) -> object_store::Result<Page>,
    ) -> object_store::Result<Option<Marked>> {
        let (mut marked, mut at) = (Marked::default(), None::<String>);
        loop {
            let mut url = url.clone();
            url.query_pairs_mut().extend_pairs(fixed);
            if let Some(at) = &at {
                url.query_pairs_mut().append_pair(next, at);
            }
            let body = match self.ask(Method::GET, &url).await? {
                Answer::Told(_, body) => body,
                Answer::Refused(status) if at.is_none() && is_not_told(status) => return Ok(None),
                Answer::Refused(status) => return Err(broken_off(status)),
            };
            let page = parse(&body)?;
            marked.excluded.extend(page.excluded);
            match page.next.filter(|next| !next.is_empty()) {
                None => return Ok(Some(marked)),
                // It would be asked for ever.
                Some(next) if at.as_ref() == Some(&next) => return Err(broken_off("the same page again")),
                Some(next) => at = Some(next),
            }
        }
    }

    async fn look_at_versions(
        &self,
        prefix: &str,
        relevant: &(dyn Fn(&str) -> bool + Sync),
    ) -> object_store::Result<Option<Marked>> {
        let Place::S3 { store, .. } = &self.place else { return Ok(None) };
        let mut keys = BTreeMap::new();
        if !self.each_page(store, prefix, &mut |page| page.add_to(&mut keys, relevant)).await? {
            return Ok(None);
        }
        let is_deleted = |key: &Versions| key.is_deleted && !key.oldest.id.is_empty();
        let deleted = keys.iter().filter(|(_, key)| is_deleted(key));
        let deleted: Vec<_> = deleted.map(|(name, key)| (name.clone(), key.oldest.id.clone())).collect();
        let tagged: Vec<Option<String>> = futures::stream::iter(deleted)
            .map(|(name, version)| self.excluded(store, name, version))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        let versions = keys.into_iter().filter(|(_, key)| key.counts()).map(|(name, key)| (name, key.oldest)).collect();
        Ok(Some(Marked { excluded: tagged.into_iter().flatten().collect(), versions }))
    }

    /// Lists the versions of all that begins with `prefix`; `false` when the provider does not tell, or not us.
    async fn each_page(
        &self,
        store: &AmazonS3,
        prefix: &str,
        see: &mut (dyn FnMut(VersionsPage) + Send),
    ) -> object_store::Result<bool> {
        let mut bucket = address(store, &Path::from("x")).await?;
        if let Ok(mut segments) = bucket.path_segments_mut() {
            segments.pop();
        }
        let mut at = None::<(String, String)>;
        loop {
            let mut url = bucket.clone();
            url.query_pairs_mut().append_pair("versions", "").append_pair("prefix", prefix);
            if let Some((key, version)) = &at {
                url.query_pairs_mut().append_pair("key-marker", key);
                if !version.is_empty() {
                    url.query_pairs_mut().append_pair("version-id-marker", version);
                }
            }
            let body = match self.ask(Method::GET, &url).await? {
                Answer::Told(_, body) => body,
                Answer::Refused(status) if at.is_none() && is_not_told(status) => return Ok(false),
                Answer::Refused(status) => return Err(broken_off(status)),
            };
            // A server that does not know the question may answer another.
            if !String::from_utf8_lossy(&body).contains("<ListVersionsResult") {
                return if at.is_none() { Ok(false) } else { Err(broken_off("another answer")) };
            }
            let mut page: VersionsPage = from_xml(&body)?;
            let (is_truncated, key, version) =
                (page.is_truncated, std::mem::take(&mut page.next_key), std::mem::take(&mut page.next_version));
            see(page);
            if !is_truncated {
                return Ok(true);
            }
            // Keys are listed in order: one that goes back would be followed for ever.
            let goes_on = at.as_ref().is_none_or(|(before, of)| *before < key || *before == key && *of != version);
            if key.is_empty() || !goes_on {
                return Err(broken_off("no next page"));
            }
            at = Some((key, version));
        }
    }

    /// The name, when its version is tagged to be left out.
    async fn excluded(&self, store: &AmazonS3, name: String, version: String) -> object_store::Result<Option<String>> {
        let mut url = address(store, &Path::parse(&name)?).await?;
        url.query_pairs_mut().append_pair("tagging", "").append_pair("versionId", &version);
        match self.ask(Method::GET, &url).await? {
            Answer::Told(_, body) => Ok(from_xml::<Tagging>(&body)?.set.excludes().then_some(name)),
            Answer::Refused(StatusCode::NOT_FOUND) => Ok(None),
            Answer::Refused(status) => Err(failed(format!("{status} to the tags of {name}").into())),
        }
    }

    /// The answer to one request, after a few attempts where it fails in a way that passes.
    async fn ask(&self, method: Method, url: &Url) -> object_store::Result<Answer> {
        let mut delay = Duration::from_millis(300);
        loop {
            let mut request = http::Request::new(HttpRequestBody::empty());
            *request.method_mut() = method.clone();
            *request.uri_mut() = url.as_str().parse().map_err(|error| failed(Box::new(error)))?;
            self.sign(&mut request).await?;
            let failure = match self.http.execute(request).await {
                Err(error) => error.into(),
                Ok(response) => match response.status() {
                    status if status.is_success() => {
                        let headers = response.headers().clone();
                        match response.into_body().bytes().await {
                            Ok(body) => return Ok(Answer::Told(headers, body)),
                            Err(error) => error.into(),
                        }
                    }
                    StatusCode::NOT_IMPLEMENTED => return Ok(Answer::Refused(StatusCode::NOT_IMPLEMENTED)),
                    status if status.is_server_error() || [408, 429].contains(&status.as_u16()) => {
                        format!("the store answers {status}").into()
                    }
                    status => return Ok(Answer::Refused(status)),
                },
            };
            if delay > Duration::from_secs(2) {
                return Err(failed(failure));
            }
            tokio::time::sleep(delay).await;
            delay *= 2;
        }
    }

    async fn sign(&self, request: &mut HttpRequest) -> object_store::Result<()> {
        match &self.place {
            Place::S3 { store, region } => {
                let credential = store.credentials().get_credential().await?;
                AwsAuthorizer::new(&credential, "s3", region).try_authorize(request, None)
            }
            Place::Azure { store, account, .. } => {
                let credential = store.credentials().get_credential().await?;
                AzureAuthorizer::new(&credential, account).try_authorize(request)
            }
            Place::Google { store, .. } => {
                let credential = store.credentials().get_credential().await?;
                let value = format!("Bearer {}", credential.bearer);
                let value = http::HeaderValue::from_str(&value).map_err(|error| failed(Box::new(error)))?;
                request.headers_mut().insert(http::header::AUTHORIZATION, value);
                Ok(())
            }
        }
    }
}

/// URL of an object, as the library would address it.
async fn address(store: &AmazonS3, path: &Path) -> object_store::Result<Url> {
    let mut url = store.signed_url(Method::GET, path, Duration::from_secs(60)).await?;
    url.set_query(None);
    Ok(url)
}

/// What is answered by who does not know the question, or does not let us ask it; anything else may pass.
fn is_not_told(status: StatusCode) -> bool {
    [400, 403, 404, 405, 501].contains(&status.as_u16())
}

/// A listing that ends in the middle would hide what is excluded.
fn broken_off(why: impl std::fmt::Display) -> object_store::Error {
    failed(format!("the listing of versions and tags breaks off: {why}").into())
}

fn failed(source: Box<dyn std::error::Error + Send + Sync>) -> object_store::Error {
    object_store::Error::Generic { store: "marks", source }
}

fn from_xml<T: DeserializeOwned>(body: &[u8]) -> object_store::Result<T> {
    let text = std::str::from_utf8(body).map_err(|error| failed(Box::new(error)))?;
    quick_xml::de::from_str(text.trim_start_matches('\u{feff}')).map_err(|error| failed(Box::new(error)))
}

/// One page of a listing.
struct Page {
    excluded: Vec<String>,
    next: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct TagSet {
    tag: Vec<Tag>,
}

impl TagSet {
    fn excludes(&self) -> bool {
        self.tag.iter().any(|tag| tag.key == EXCLUDE && tag.value == "true")
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Tag {
    key: String,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Tagging {
    #[serde(rename = "TagSet")]
    set: TagSet,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AzurePage {
    #[serde(rename = "Blobs")]
    blobs: AzureBlobs,
    #[serde(rename = "NextMarker")]
    next: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AzureBlobs {
    #[serde(rename = "Blob")]
    all: Vec<AzureBlob>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct AzureBlob {
    name: String,
    tags: Tagging,
}

impl AzurePage {
    fn parse(body: &[u8]) -> object_store::Result<Page> {
        let Self { blobs, next } = from_xml(body)?;
        let excluded = blobs.all.into_iter().filter(|blob| blob.tags.set.excludes()).map(|blob| blob.name).collect();
        Ok(Page { excluded, next: Some(next) })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct GooglePage {
    items: Vec<GoogleObject>,
    next_page_token: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GoogleObject {
    name: String,
    metadata: BTreeMap<String, String>,
}

impl GooglePage {
    fn parse(body: &[u8]) -> object_store::Result<Page> {
        let page: Self = serde_json::from_slice(body).map_err(|error| failed(Box::new(error)))?;
        let excludes = |object: &GoogleObject| object.metadata.get(EXCLUDE).is_some_and(|value| value == "true");
        let excluded = page.items.into_iter().filter(excludes).map(|object| object.name).collect();
        Ok(Page { excluded, next: page.next_page_token })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct VersionsPage {
    version: Vec<VersionEntry>,
    delete_marker: Vec<VersionEntry>,
    is_truncated: bool,
    #[serde(rename = "NextKeyMarker")]
    next_key: String,
    #[serde(rename = "NextVersionIdMarker")]
    next_version: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct VersionEntry {
    key: String,
    version_id: String,
    size: u64,
}

/// What there is of one key.
struct Versions {
    oldest: Version,
    count: usize,
    is_deleted: bool,
}

impl Versions {
    /// Whether its oldest version must be asked for by its id. `null` is the id of what was put without versioning.
    fn counts(&self) -> bool {
        self.count > 1 || self.count == 1 && (self.is_deleted || self.oldest.id != "null")
    }
}

impl VersionsPage {
    /// The versions of a key are listed with the newest first, over pages too.
    fn add_to(self, keys: &mut BTreeMap<String, Versions>, relevant: &(dyn Fn(&str) -> bool + Sync)) {
        let none = || Versions { oldest: Version { id: String::new(), size: 0 }, count: 0, is_deleted: false };
        for entry in self.version.iter().filter(|entry| relevant(&entry.key)) {
            let key = keys.entry(entry.key.clone()).or_insert_with(none);
            key.oldest = Version { id: entry.version_id.clone(), size: entry.size };
            key.count += 1;
        }
        for entry in self.delete_marker.iter().filter(|entry| relevant(&entry.key)) {
            keys.entry(entry.key.clone()).or_insert_with(none).is_deleted = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn the_oldest_version_counts_over_pages() -> TestResult {
        let entry = |key: &str, id: &str, size: u64| {
            format!(
                "<Version><Key>{key}</Key><VersionId>{id}</VersionId><Size>{size}</Size><ETag>\"x\"</ETag></Version>"
            )
        };
        let marker = "<DeleteMarker><Key>b</Key><VersionId>m</VersionId></DeleteMarker>";
        let page =
            |content: String| format!("<?xml version=\"1.0\"?><ListVersionsResult>{content}</ListVersionsResult>");
        let first =
            entry("a", "new", 9) + marker + &entry("b", "only", 3) + &entry("c", "null", 1) + &entry("foreign", "x", 1);
        let first = page(first + "<IsTruncated>true</IsTruncated><NextKeyMarker>c</NextKeyMarker>");
        let second = page(entry("a", "old", 7) + "<IsTruncated>false</IsTruncated>");
        let mut keys = BTreeMap::new();
        for body in [&first, &second] {
            from_xml::<VersionsPage>(body.as_bytes())?.add_to(&mut keys, &|key| key != "foreign");
        }
        assert!(!keys.contains_key("foreign"));
        assert_eq!(keys["a"].oldest, Version { id: "old".into(), size: 7 });
        assert!(keys["a"].counts() && keys["b"].counts() && keys["b"].is_deleted && !keys["c"].counts());
        assert!(from_xml::<VersionsPage>(b"<ListVersionsResult><Ver").is_err());
        // Another answer than the one that was asked for tells nothing.
        let other =
            from_xml::<VersionsPage>(b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>")?;
        assert!(other.version.is_empty());
        Ok(())
    }

    #[test]
    fn tags_of_azure_and_metadata_of_google_exclude() -> TestResult {
        let blob = |name: &str, value: &str| {
            format!(
                "<Blob><Name>{name}</Name><Properties/><Tags><TagSet><Tag><Key>{EXCLUDE}</Key><Value>{value}</Value></Tag></TagSet></Tags></Blob>"
            )
        };
        let all = blob("a", "true") + &blob("b", "false") + "<Blob><Name>c</Name></Blob>";
        let body = format!(
            "\u{feff}<EnumerationResults><Blobs>{all}</Blobs><NextMarker>more</NextMarker></EnumerationResults>"
        );
        let page = AzurePage::parse(body.as_bytes())?;
        assert_eq!((page.excluded, page.next.as_deref()), (vec!["a".to_owned()], Some("more")));
        let body = format!(r#"{{"items":[{{"name":"a","metadata":{{"{EXCLUDE}":"true"}}}},{{"name":"b"}}]}}"#);
        let page = GooglePage::parse(body.as_bytes())?;
        assert_eq!((page.excluded, page.next), (vec!["a".to_owned()], None));
        assert!(GooglePage::parse(b"{}")?.excluded.is_empty());
        Ok(())
    }
}
