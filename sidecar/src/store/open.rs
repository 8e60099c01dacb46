//! Where the URL of a store leads.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3CopyIfNotExists};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::HttpConnector;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::environment::{AzureKey, Environment, Fields, S3Keys, ServiceAccount};
use super::federation::Federation;
use super::marks::{self, Marks};
use super::patience::Patient;
use super::{Open, Store};
use crate::{Error, Result, small_file};

/// The variable that every library of Google's knows.
const CREDENTIALS: &str = "GOOGLE_APPLICATION_CREDENTIALS";
const SUPPORTED: &str =
    "supported are file:///directory, s3://bucket/prefix, gs://bucket/prefix and az://container/prefix";

impl Store {
    /// Opens `file:///directory`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`, with what the
    /// environment of the process says of it.
    pub fn open(url: &str, open: Open) -> Result<Self> {
        Self::open_in(&Environment::of_process(), url, open)
    }

    /// The same in another environment.
    pub fn open_in(environment: &Environment, url: &str, open: Open) -> Result<Self> {
        let parsed = Self::check_url(url)?;
        environment.check(parsed.scheme())?;
        let place = Place { environment, parsed: &parsed, url: url.trim_end_matches('/').to_owned() };
        match parsed.scheme() {
            "file" => place.directory(open),
            "s3" => place.s3(),
            "gs" => place.gcs(),
            _ => place.azure(),
        }
    }

    /// Refuses what is no URL of a store, wherever that may be.
    pub fn check_url(url: &str) -> Result<Url> {
        // What cannot be parsed is not shown: it may have credentials in it.
        let parsed = Url::parse(url)
            .map_err(|error| Error::invalid(format!("the store is not a URL ({error}); {SUPPORTED}")))?;
        // With another number of slashes what stands before an @ is read as a part of the path.
        let is_known = ["file", "s3", "gs", "az"].contains(&parsed.scheme());
        if is_known && !proto::config::is_plain_store(url)
            || parsed.query().is_some()
            || parsed.fragment().is_some()
            || !parsed.username().is_empty()
            || parsed.password().is_some()
        {
            return Err(Error::invalid(
                "the store's URL must have a bucket and a prefix, or three slashes and a directory, and no credentials, query or fragment: credentials come from the environment",
            ));
        }
        if is_known {
            return Ok(parsed);
        }
        Err(Error::invalid(format!("the store's URL has scheme {:?}; {SUPPORTED}", parsed.scheme())))
    }
}

/// A URL that is being opened.
struct Place<'p> {
    environment: &'p Environment,
    parsed: &'p Url,
    url: String,
}

impl Place<'_> {
    fn fail(&self) -> impl Fn(object_store::Error) -> Error {
        let url = self.url.clone();
        move |source| Error::Store { op: "open", location: url.clone(), source }
    }

    fn bucket(&self) -> Result<&str> {
        let named = self.parsed.host_str().filter(|bucket| !bucket.is_empty());
        named.ok_or_else(|| Error::invalid(format!("store {} names no bucket; {SUPPORTED}", self.url)))
    }

    fn prefix(&self) -> Result<Path> {
        Path::from_url_path(self.parsed.path()).map_err(|error| self.fail()(error.into()))
    }

    fn directory(self, open: Open) -> Result<Store> {
        let url = &self.url;
        let directory: PathBuf = self.parsed.to_file_path().map_err(|()| {
            Error::invalid(format!(
                "store {url} does not name a local directory; it must have three slashes: file:///directory"
            ))
        })?;
        match (directory.is_dir(), open) {
            (true, _) => {}
            (false, Open::Existing) => {
                return Err(Error::missing(format!(
                    "store {url}: there is no such directory; make it, or mount it: one that is missing is not taken for empty"
                )));
            }
            (false, Open::Create) => {
                std::fs::create_dir_all(&directory).map_err(Error::io("create", directory.display()))?;
            }
        }
        let store = LocalFileSystem::new_with_prefix(&directory).map_err(self.fail())?;
        // A backup that a power cut takes back is none.
        Ok(Store { directory: Some(directory), ..Store::new(store.with_fsync(true), Path::default(), self.url) })
    }

    fn s3(self) -> Result<Store> {
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(self.bucket()?)
            .with_retry(retries())
            .with_http_connector(Patient::default())
            .with_copy_if_not_exists(S3CopyIfNotExists::Multipart);
        for (name, value) in self.environment.beginning("AWS_") {
            if let Ok(key) = name.parse() {
                builder = builder.with_config(key, value);
            }
        }
        let standard = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "ECS_ENDPOINT"];
        let mut endpoint = self.environment.first_of(&standard).map(str::to_owned);
        let secret = self.environment.secret(&["AWS_APPLICATION_CREDENTIALS", "OPENSHIFT_APPLICATION_CREDENTIALS"]);
        let mut fields = None;
        if let Some(secret) = secret {
            let read = secret.read()?;
            if read.get("sseCustomerKey").is_some() {
                return Err(Error::invalid(
                    "the secret has an sseCustomerKey: encryption with a key of the customer's is not supported",
                ));
            }
            if let Some(region) = read.get("region") {
                builder = builder.with_region(region);
            }
            endpoint = endpoint.or_else(|| read.get("endpoint").map(str::to_owned));
            builder = if let (Some(role), Some(token)) = (read.get("roleARN"), read.token_path()) {
                let builder = builder.with_config(AmazonS3ConfigKey::RoleArn, role);
                builder.with_config(AmazonS3ConfigKey::WebIdentityTokenFile, token)
            } else {
                read.need("accessKeyID").and_then(|_| read.need("secretAccessKey"))?;
                builder.with_credentials(Arc::new(S3Keys(secret)))
            };
            fields = Some(read);
        } else if let Some(key) = self.environment.get("ECS_ACCESS_KEY_ID") {
            let region = self.environment.get("AWS_REGION").unwrap_or("US-Standard");
            builder = builder.with_access_key_id(key).with_region(region);
            builder = builder.with_secret_access_key(self.environment.get("ECS_SECRET_ACCESS_KEY").unwrap_or_default());
        }
        let options =
            self.client_options(endpoint.as_deref(), self.environment.get("AWS_CA_BUNDLE"), fields.as_ref())?;
        builder = builder.with_client_options(options.clone());
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let is_signed = !is_on(builder.get_config_value(&AmazonS3ConfigKey::SkipSignature));
        let region = builder.get_config_value(&AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
        let store = builder.build().map_err(self.fail())?;
        let marks = is_signed.then(|| marks::Place::S3 { store: store.clone(), region });
        self.with_marks(store, marks, &options)
    }

    fn gcs(self) -> Result<Store> {
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(self.bucket()?)
            .with_retry(retries())
            .with_http_connector(Patient::default());
        for (name, value) in self.environment.beginning("GOOGLE_") {
            // The file is read by us, and again when it changes.
            if name != "google_application_credentials"
                && let Ok(key) = name.parse()
            {
                builder = builder.with_config(key, value);
            }
        }
        // As Google's own libraries do for an emulator.
        let emulator = self
            .environment
            .get("STORAGE_EMULATOR_HOST")
            .map(|host| if host.contains("://") { host.to_owned() } else { format!("http://{host}") });
        let ca = self.environment.first_of(&["GOOGLE_CA_BUNDLE", "SSL_CERT_FILE"]);
        let options = self.client_options(emulator.as_deref(), ca, None)?;
        builder = builder.with_client_options(options.clone());
        if let Some(path) = self.environment.get(CREDENTIALS).filter(|_| emulator.is_none()) {
            builder = match kind_of_account(path)?.as_str() {
                "service_account" => builder.with_credentials(Arc::new(ServiceAccount::new(path))),
                "external_account" => {
                    let http = Patient::default().connect(&options).map_err(self.fail())?;
                    builder.with_credentials(Arc::new(Federation::new(path, http)?))
                }
                "authorized_user" => builder.with_application_credentials(path),
                _ => {
                    let known = "service_account, external_account or authorized_user";
                    return Err(Error::invalid(format!("the secret {path} is of no type that is supported: {known}")));
                }
            };
        }
        if let Some(url) = &emulator {
            builder = builder.with_base_url(url).with_bearer_token("none");
        }
        let is_signed = !is_on(builder.get_config_value(&GoogleConfigKey::SkipSignature));
        let base = builder.get_config_value(&GoogleConfigKey::BaseUrl);
        // What the library says of a key may have it in.
        let named =
            ["GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY", CREDENTIALS];
        let named = named.into_iter().find(|name| self.environment.get(name).is_some());
        let store = builder.build().map_err(|error| match named {
            Some(name) => Error::invalid(format!("open {}: {name} does not lead to what Google gives", self.url)),
            None => self.fail()(error),
        })?;
        let base = base.unwrap_or_else(|| "https://storage.googleapis.com".to_owned());
        let bucket = Url::parse(&format!("{}/storage/v1/b/{}/o", base.trim_end_matches('/'), self.bucket()?)).ok();
        let marks = bucket.filter(|_| is_signed).map(|bucket| marks::Place::Google { store: store.clone(), bucket });
        self.with_marks(store, marks, &options)
    }

    fn azure(self) -> Result<Store> {
        let mut builder = MicrosoftAzureBuilder::new()
            .with_container_name(self.bucket()?)
            .with_retry(retries())
            .with_http_connector(Patient::default());
        for (name, value) in self.environment.beginning("AZURE_") {
            if let Ok(key) = name.parse() {
                builder = builder.with_config(key, value);
            }
        }
        let mut endpoint = self.environment.first_of(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]).map(str::to_owned);
        if let Some(secret) = self.environment.secret(&["AZURE_APPLICATION_CREDENTIALS"]) {
            let fields = secret.read()?;
            let account = fields.need("storageAccount")?;
            fields.need("storageKey")?;
            builder = builder.with_account(account);
            let domain = fields.get("domain").map(|domain| format!("https://{account}.{domain}"));
            endpoint = endpoint.or(domain);
            builder = builder.with_credentials(Arc::new(AzureKey(secret)));
        }
        let ca = self.environment.first_of(&["AZURE_CA_BUNDLE", "SSL_CERT_FILE"]);
        let options = self.client_options(endpoint.as_deref(), ca, None)?;
        builder = builder.with_client_options(options.clone());
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        // Of these two the library makes addresses of its own.
        let elsewhere = [AzureConfigKey::UseEmulator, AzureConfigKey::UseFabricEndpoint];
        let is_elsewhere = elsewhere.iter().any(|key| is_on(builder.get_config_value(key)));
        let is_signed = !is_on(builder.get_config_value(&AzureConfigKey::SkipSignature)) && !is_elsewhere;
        let account = builder.get_config_value(&AzureConfigKey::AccountName).unwrap_or_default();
        let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
        let endpoint = endpoint.unwrap_or_else(|| format!("https://{account}.blob.core.windows.net"));
        let store = builder.build().map_err(self.fail())?;
        let container = Url::parse(&format!("{}/{}", endpoint.trim_end_matches('/'), self.bucket()?)).ok();
        let marks = container.filter(|_| is_signed).map(|container| marks::Place::Azure {
            store: store.clone(),
            account,
            container,
        });
        let is_asked = marks.is_some();
        let store = self.with_marks(store, marks, &options)?;
        // Where it cannot be asked whether it has copied, it is not asked to.
        Ok(if is_asked { store } else { Store { most_copied_bytes: 0, ..store } })
    }

    /// A provider's store, which is also asked in the provider's own protocol.
    fn with_marks(
        self,
        store: impl ObjectStore,
        place: Option<marks::Place>,
        options: &ClientOptions,
    ) -> Result<Store> {
        let http = Patient::default().connect(options).map_err(self.fail())?;
        let marks = place.map(|place| Arc::new(Marks { http, place }));
        Ok(Store { marks, ..Store::new(store, self.prefix()?, self.url) })
    }

    /// Deadlines, and whom to trust. An endpoint that says http is taken at its word.
    fn client_options(
        &self,
        endpoint: Option<&str>,
        ca_bundle: Option<&str>,
        secret: Option<&Fields>,
    ) -> Result<ClientOptions> {
        // The library panics on what is not a URL.
        let parsed = endpoint.map(|endpoint| {
            let is_plain = endpoint.bytes().all(|byte| byte.is_ascii_graphic());
            let parsed = Url::parse(endpoint)
                .ok()
                .filter(|url| is_plain && ["http", "https"].contains(&url.scheme()) && url.has_host());
            // It is not shown: it may have credentials in it.
            parsed.ok_or_else(|| {
                let what =
                    "the store's endpoint, from the environment or the secret, must be a URL such as https://host:port";
                Error::invalid(what)
            })
        });
        let parsed = parsed.transpose()?;
        if parsed.is_some_and(|endpoint| !endpoint.username().is_empty() || endpoint.password().is_some()) {
            return Err(Error::invalid(
                "the store's endpoint URL must not have credentials; give them in their own variables",
            ));
        }
        let mut options =
            ClientOptions::new().with_timeout(Duration::from_secs(60)).with_connect_timeout(Duration::from_secs(5));
        if endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")) {
            options = options.with_allow_http(true);
        }
        let mut trusted = Vec::new();
        if let Some(path) = ca_bundle {
            trusted.push(small_file::read(path).map_err(Error::io("read the CA bundle", path))?);
        }
        if let Some(secret) = secret {
            trusted.extend(secret.get("trustedCaCert").map(|pem| pem.as_bytes().to_vec()));
            if secret.is_true("insecureSkipVerify") {
                tracing::warn!("the secret says insecureSkipVerify: the store's certificate is not checked");
                options = options.with_allow_invalid_certificates(true);
            }
        }
        for pem in trusted {
            for certificate in Certificate::from_pem_bundle(&pem).map_err(self.fail())? {
                options = options.with_root_certificate(certificate);
            }
        }
        if !*SYSTEM_HAS_ROOTS {
            for root in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
                options = options.with_root_certificate(Certificate::from_der(root).map_err(self.fail())?);
            }
        }
        Ok(options)
    }
}

/// An image that has the static program alone has none, and without any the library refuses to speak to whomever; Mozilla's stand in.
static SYSTEM_HAS_ROOTS: LazyLock<bool> = LazyLock::new(|| !rustls_native_certs::load_native_certs().certs.is_empty());

/// A switch, as the library reads them.
fn is_on(value: Option<String>) -> bool {
    value.is_some_and(|value| ["1", "true", "on", "yes", "y"].contains(&value.to_ascii_lowercase().as_str()))
}

/// What kind of account a credentials file of Google's is of.
fn kind_of_account(path: &str) -> Result<String> {
    let text = small_file::read(path).map_err(Error::io("read the secret", path))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|_| Error::invalid(format!("the secret {path} is not JSON")))?;
    Ok(value["type"].as_str().unwrap_or_default().to_owned())
}

/// The loop above this retries for ever; a single command should answer within a minute or so.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries: 6,
        retry_timeout: Duration::from_secs(45),
    }
}
