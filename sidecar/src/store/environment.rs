//! Where a store's credentials come from: the standard variables of each provider, or the files of a mounted secret as
//! the predecessor has them. Files are read again for each operation, so a rotated secret is used at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use object_store::aws::{AmazonS3ConfigKey, AwsCredential};
use object_store::azure::{AzureAccessKey, AzureConfigKey, AzureCredential};
use object_store::gcp::{GcpCredential, GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{CredentialProvider, Error as StoreError};

use proto::config::is_content;

use crate::{Class, Error, Result, small_file};

/// Variables that lead to one kind of store: from a source or not, all or none.
const FAMILIES: [&[&str]; 3] = [&["AWS_", "OPENSHIFT_", "ECS_"], &["AZURE_"], &["GOOGLE_", "STORAGE_"]];

/// What variables of files and directories end with.
const PATHS: [&str; 6] = ["_FILE", "_PATH", "_BUNDLE", "_CREDENTIALS", "_CREDENTIALS_JSON", "_SERVICE_ACCOUNT"];
/// What variables of endpoints end with.
const ENDPOINTS: [&str; 4] = ["_ENDPOINT", "_ENDPOINT_URL", "_ENDPOINT_URL_S3", "_EMULATOR_HOST"];
/// What variables end with that are no part of a header or an address.
const SENT_IN_BODIES: [&str; 2] = ["_CLIENT_SECRET", "_SERVICE_ACCOUNT_KEY"];
/// What variables end with that the library does not know.
const OURS: [&str; 8] = [
    "_APPLICATION_CREDENTIALS",
    "_APPLICATION_CREDENTIALS_JSON",
    "_CA_BUNDLE",
    "_ENDPOINT",
    "_ENDPOINT_URL_S3",
    "_EMULATOR_HOST",
    "ECS_ACCESS_KEY_ID",
    "ECS_SECRET_ACCESS_KEY",
];

const NO_WORD: &str =
    "has a line break, a space or another character that no key, name or address has; it is not repeated here";

/// Whether it can be a part of a header or an address.
fn is_word(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The variables that lead to a store.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl std::fmt::Debug for Environment {
    /// Values may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            // What `echo` made ends with a line break.
            let value = value.into_string().ok()?.trim().to_owned();
            Some((name.into_string().ok()?, Some(value).filter(|value| !value.is_empty())?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// For the store that is copied from: with `SOURCE_AWS_…` in place of all `AWS_…` where there is any, and so on.
    #[must_use]
    pub fn for_source(mut self) -> Self {
        for family in FAMILIES {
            let is_of = |name: &str| family.iter().any(|prefix| name.starts_with(prefix));
            let of_source = |(name, value): (&String, &String)| {
                let name = name.strip_prefix("SOURCE_").filter(|name| is_of(name))?;
                Some((name.to_owned(), value.clone()))
            };
            let theirs: Vec<_> = self.0.iter().filter_map(of_source).collect();
            if !theirs.is_empty() {
                self.0.retain(|name, _| !is_of(name));
                self.0.extend(theirs);
            }
        }
        self
    }

    /// Refuses, of what a store of that scheme goes by, what the libraries would panic on, or repeat in an error: a line break in a
    /// key, a key in place of its file.
    pub(super) fn check(&self, scheme: &str) -> Result<()> {
        let (family, is_key): (_, fn(&str) -> bool) = match scheme {
            // Of how the library speaks HTTP nothing comes from the environment, and one value has a space as it is documented.
            "s3" => (FAMILIES[0], |name| {
                use AmazonS3ConfigKey::{Client, CopyIfNotExists};
                name.parse().is_ok_and(|key| !matches!(key, Client(_) | CopyIfNotExists))
            }),
            "az" => (FAMILIES[1], |name| name.parse().is_ok_and(|key| !matches!(key, AzureConfigKey::Client(_)))),
            "gs" => (FAMILIES[2], |name| name.parse().is_ok_and(|key| !matches!(key, GoogleConfigKey::Client(_)))),
            _ => return Ok(()),
        };
        for (name, value) in self.0.iter().filter(|(name, _)| family.iter().any(|start| name.starts_with(start))) {
            let ends_with = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
            if !is_key(&name.to_ascii_lowercase()) && !ends_with(&OURS) {
                continue;
            }
            let (is_path, is_free) = (ends_with(&PATHS), ends_with(&SENT_IN_BODIES));
            if is_path && is_content(value) {
                return Err(Error::invalid(format!("{name} has the content of a file: give its path")));
            }
            if is_path || is_free || is_word(value) {
                continue;
            }
            return Err(Error::invalid(if ends_with(&ENDPOINTS) {
                let what = "must be a URL such as https://host:port, without a space or a line break";
                format!("the store's endpoint, {name}, {what}")
            } else {
                format!("{name} {NO_WORD}")
            }));
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn first_of(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.get(name))
    }

    /// Names in lower case, and values, of the variables that begin so.
    pub(super) fn beginning(&self, prefix: &str) -> impl Iterator<Item = (String, &str)> {
        let found = self.0.iter().filter(move |(name, _)| name.starts_with(prefix));
        found.map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
    }

    /// The secret that one of these variables names, as a directory, or with `_JSON` after it as a file.
    pub(super) fn secret(&self, names: &[&str]) -> Option<Secret> {
        names.iter().find_map(|name| {
            let json = self.get(&format!("{name}_JSON")).map(|path| Secret { path: path.into(), is_dir: false });
            json.or_else(|| self.get(name).map(|path| Secret { path: path.into(), is_dir: true }))
        })
    }
}

/// Fields of a secret that become a part of a header or an address.
const WORDS: [&str; 8] =
    ["accessKeyID", "secretAccessKey", "region", "endpoint", "roleARN", "storageAccount", "storageKey", "domain"];

/// A mounted secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Secret {
    path: PathBuf,
    is_dir: bool,
}

impl Secret {
    /// All it has.
    pub(super) fn read(&self) -> Result<Fields> {
        let fields = if self.is_dir { self.read_dir()? } else { read_json(&self.path)? };
        let is_bad = |name: &&str| fields.get(*name).is_some_and(|value| !is_word(value));
        if let Some(name) = WORDS.into_iter().find(is_bad) {
            return Err(Error::invalid(format!("the secret {}: {name} {NO_WORD}", self.path.display())));
        }
        Ok(Fields { fields, path: self.path.clone(), is_dir: self.is_dir })
    }

    /// One file for each field, or a JSON file with all.
    fn read_dir(&self) -> Result<BTreeMap<String, String>> {
        let mut fields = BTreeMap::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io("list the secret", self.path.display()))? {
            let path = entry.map_err(Error::io("list the secret", self.path.display()))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| !name.starts_with('.'))
            else {
                continue;
            };
            if path.extension().is_some_and(|extension| extension == "json") {
                return read_json(&path);
            }
            if path.is_file() {
                let text = small_file::read_text(&path).map_err(Error::io("read the secret", path.display()))?;
                fields.insert(name.to_owned(), text.trim().to_owned());
            }
        }
        Ok(fields)
    }
}

fn read_json(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = small_file::read(path).map_err(Error::io("read the secret", path.display()))?;
    // What serde says of a value may have it in.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Error::invalid(format!("the secret {} is not JSON (line {line}, column {column})", path.display()))
    })?;
    let fields = value.as_object().into_iter().flatten().map(|(name, value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), |text| text.trim().to_owned());
        (name.clone(), text)
    });
    Ok(fields.collect())
}

/// What a secret had when it was read.
#[derive(Clone)]
pub(super) struct Fields {
    fields: BTreeMap<String, String>,
    path: PathBuf,
    is_dir: bool,
}

impl Fields {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn need(&self, name: &str) -> Result<&str> {
        self.get(name).ok_or_else(|| Error::invalid(format!("the secret {} has no {name}", self.path.display())))
    }

    pub(super) fn is_true(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }

    /// Where the token of a web identity lies.
    pub(super) fn token_path(&self) -> Option<String> {
        let beside = || self.is_dir.then(|| self.path.join("token").display().to_string());
        self.get("tokenPath").map(str::to_owned).or_else(beside)
    }
}

pub(super) fn unusable(error: Error) -> StoreError {
    match error.class() {
        Class::Denied => StoreError::Unauthenticated { path: "credentials".into(), source: error.into() },
        _ => StoreError::Generic { store: "credentials", source: error.into() },
    }
}

/// Keys of S3 from a secret.
#[derive(Debug)]
pub(super) struct S3Keys(pub Secret);

#[async_trait]
impl CredentialProvider for S3Keys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let read = || {
            let fields = self.0.read()?;
            let (key_id, secret_key) = (fields.need("accessKeyID")?, fields.need("secretAccessKey")?);
            Ok(AwsCredential { key_id: key_id.to_owned(), secret_key: secret_key.to_owned(), token: None })
        };
        read().map(Arc::new).map_err(unusable)
    }
}

/// The key of an Azure storage account from a secret.
#[derive(Debug)]
pub(super) struct AzureKey(pub Secret);

#[async_trait]
impl CredentialProvider for AzureKey {
    type Credential = AzureCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AzureCredential>> {
        let key = self.0.read().and_then(|fields| fields.need("storageKey").map(str::to_owned)).map_err(unusable)?;
        Ok(Arc::new(AzureCredential::AccessKey(AzureAccessKey::try_new(&key)?)))
    }
}

/// A service account of Google's, whose file is read again when it changes.
pub(super) struct ServiceAccount {
    path: PathBuf,
    current: Mutex<Option<(String, Arc<GoogleCloudStorage>)>>,
}

impl std::fmt::Debug for ServiceAccount {
    /// The key must not be in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceAccount").field("path", &self.path).finish_non_exhaustive()
    }
}

impl ServiceAccount {
    pub(super) fn new(path: &str) -> Self {
        Self { path: path.into(), current: Mutex::new(None) }
    }
}

#[async_trait]
impl CredentialProvider for ServiceAccount {
    type Credential = GcpCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        let read = small_file::read_text(&self.path);
        let json = read.map_err(Error::io("read the secret", self.path.display())).map_err(unusable)?;
        let signer = {
            let mut current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match &*current {
                Some((before, signer)) if *before == json => signer.clone(),
                _ => {
                    // The library signs; of this store nothing else is used.
                    let builder = GoogleCloudStorageBuilder::new().with_bucket_name("unused");
                    let built = builder.with_service_account_key(json.as_str()).build().map_err(|_| {
                        // What the library says may quote it.
                        let path = self.path.display();
                        unusable(Error::invalid(format!(
                            "the secret {path} is not what Google gives a service account"
                        )))
                    });
                    let signer = Arc::new(built?);
                    *current = Some((json, signer.clone()));
                    signer
                }
            }
        };
        signer.credentials().get_credential().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_source_has_its_own_credentials_or_the_same() {
        let both = environment(&[
            ("AWS_REGION", "a"),
            ("AWS_ACCESS_KEY_ID", "k"),
            ("SOURCE_AWS_REGION", "b"),
            ("AZURE_X", "x"),
        ]);
        let source = both.for_source();
        assert_eq!(source.get("AWS_REGION"), Some("b"));
        // A key of the one must not meet a secret of the other.
        assert_eq!(source.get("AWS_ACCESS_KEY_ID"), None);
        assert_eq!(source.get("AZURE_X"), Some("x"));
    }

    #[test]
    fn secrets_are_read_as_files_and_as_json() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("accessKeyID"), "id\n")?;
        std::fs::write(dir.path().join("secretAccessKey"), "hidden")?;
        std::fs::create_dir(dir.path().join("..data"))?;
        let path = dir.path().display().to_string();
        let found = environment(&[("AWS_APPLICATION_CREDENTIALS", &path)]);
        let secret = found.secret(&["AWS_APPLICATION_CREDENTIALS"]).ok_or("no secret")?;
        assert_eq!(secret.read()?.need("accessKeyID")?, "id");
        assert!(secret.read()?.need("region").is_err_and(|error| error.to_string().contains("has no region")));
        std::fs::write(dir.path().join("all.json"), r#"{"accessKeyID":"other","s3ForcePathStyle":true}"#)?;
        assert_eq!(secret.read()?.need("accessKeyID")?, "other");
        assert!(secret.read()?.is_true("s3ForcePathStyle"));
        let json = environment(&[("AWS_APPLICATION_CREDENTIALS_JSON", &format!("{path}/secretAccessKey"))]);
        let refused = json.secret(&["AWS_APPLICATION_CREDENTIALS"]).ok_or("no secret")?.read();
        assert!(refused.is_err_and(|error| !error.to_string().contains("hidden")));
        assert!(!format!("{found:?}").contains(&path));
        Ok(())
    }
}
