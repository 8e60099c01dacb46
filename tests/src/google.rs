//! Google's hosts, behind an HTTPS proxy that leads to them: the services that give tokens, and its store, which is an emulator
//! that takes no other token than theirs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::certificates::Certificates;
use crate::gcs::FakeGcs;
use crate::proxy::{Message, forward, read_request};
use crate::store::Store;

/// What the machine has.
pub const SUBJECT_TOKEN: &str = "subject-token-of-the-machine";
const EXCHANGED: &str = "exchanged-token";
const IMPERSONATED: &str = "impersonated-token";
const ACCOUNT: &str = "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/b@p.iam.gserviceaccount.com:generateAccessToken";

/// The running hosts; they end when dropped.
pub struct Google {
    dir: PathBuf,
    port: u16,
    ca: PathBuf,
    _gcs: FakeGcs,
    task: JoinHandle<()>,
}

impl Google {
    /// Starts them, with one bucket.
    pub async fn start(dir: &Path, bucket: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let gcs = FakeGcs::start(&dir.join("log"), bucket).await?;
        let names = ["sts.googleapis.com", "iamcredentials.googleapis.com", "storage.googleapis.com"];
        let certificates = Certificates::issue_for(&dir.join("certificates"), &names)?;
        let (certificate, key) = certificates.server();
        let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.with_no_client_auth().with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (port, store) = (listener.local_addr()?.port(), gcs.port());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, acceptor, store).await {
                        eprintln!("google: {error:#}");
                    }
                });
            }
        });
        Ok(Self { dir: dir.to_owned(), port, ca: certificates.ca(), _gcs: gcs, task })
    }

    /// A prefix in its bucket, `bucket/prefix`, with a secret as the predecessor mounts it: the machine's token lies beside.
    pub fn store(&self, place: &str) -> Result<Store> {
        let token = self.dir.join("token");
        std::fs::write(&token, SUBJECT_TOKEN)?;
        let account = serde_json::json!({
            "type": "external_account", "universe_domain": "googleapis.com",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": "https://sts.googleapis.com/v1/token",
            "service_account_impersonation_url": ACCOUNT,
            "credential_source": {"file": token, "format": {"type": "text"}},
        });
        let secret = self.dir.join("serviceaccount.json");
        std::fs::write(&secret, account.to_string())?;
        let environment = [
            ("HTTPS_PROXY", format!("http://127.0.0.1:{}", self.port)),
            ("GOOGLE_APPLICATION_CREDENTIALS", secret.display().to_string()),
            ("GOOGLE_CA_BUNDLE", self.ca.display().to_string()),
        ];
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Ok(Store { url: format!("gs://{place}"), environment })
    }

    /// The file with the machine's token.
    pub fn token(&self) -> PathBuf {
        self.dir.join("token")
    }
}

impl Drop for Google {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, acceptor: TlsAcceptor, store: u16) -> Result<()> {
    let connect = read_request(&mut stream).await?.context("nothing came")?;
    let host = connect.line.strip_prefix("CONNECT ").and_then(|rest| rest.split(':').next());
    let host = host.with_context(|| format!("not a CONNECT: {}", connect.line))?.to_owned();
    stream.write_all(b"HTTP/1.1 200 connected\r\n\r\n").await?;
    let mut stream = acceptor.accept(stream).await?;
    let request = read_request(&mut stream).await?.context("no request came")?;
    let is_head = request.line.starts_with("HEAD ");
    let answer = answer(&host, request, store).await?;
    stream.write_all(&answer.bytes(answer.body.len(), is_head)).await?;
    // The answer says that it is the only one.
    Ok(stream.shutdown().await?)
}

async fn answer(host: &str, mut request: Message, store: u16) -> Result<Message> {
    let bearer = request.header("authorization").unwrap_or_default().to_owned();
    let json = |status, text: String| Ok(Message::answer(status, &[("content-type", "application/json")], text));
    match host {
        "sts.googleapis.com" => {
            let form = String::from_utf8_lossy(&request.body).into_owned();
            ensure!(request.line.starts_with("POST /v1/token ") && form.contains("token-exchange"), "{form}");
            if form.contains(&format!("subject_token={SUBJECT_TOKEN}")) {
                return json(200, format!(r#"{{"access_token":"{EXCHANGED}","expires_in":3600}}"#));
            }
            json(400, r#"{"error":"invalid_grant","error_description":"the subject token is unknown"}"#.into())
        }
        "iamcredentials.googleapis.com" if bearer == format!("Bearer {EXCHANGED}") => {
            json(200, format!(r#"{{"accessToken":"{IMPERSONATED}","expireTime":"2099-01-01T00:00:00Z"}}"#))
        }
        "storage.googleapis.com" if bearer == format!("Bearer {IMPERSONATED}") => {
            request.headers.retain(|(name, _)| name != "host");
            request.headers.push(("host".into(), format!("127.0.0.1:{store}")));
            forward(store, &request).await
        }
        "iamcredentials.googleapis.com" | "storage.googleapis.com" => json(401, "{}".into()),
        other => bail!("nobody is {other}"),
    }
}
