//! Certificates of the API, read again when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::{Error, Result, small_file};

/// Who has not shaken hands by then goes.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Where the certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Whom a client's certificate must be signed by.
    pub client_ca: PathBuf,
}

/// What the files had.
#[derive(PartialEq, Eq)]
struct Content {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

impl Content {
    fn read(files: &Files) -> Result<Self> {
        let read = |path: &Path| small_file::read(path).map_err(Error::io("read the certificate", path.display()));
        Ok(Self { cert: read(&files.cert)?, key: read(&files.key)?, client_ca: read(&files.client_ca)? })
    }

    fn config(&self, files: &Files) -> Result<ServerConfig> {
        let bad = |path: &Path, what: String| Error::invalid(format!("{}: {what}", path.display()));
        let certificates = |pem: &[u8], path: &Path| {
            let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            match read {
                Ok(read) if !read.is_empty() => Ok(read),
                Ok(_) => Err(bad(path, "no certificate is in it".into())),
                Err(error) => Err(bad(path, error.to_string())),
            }
        };
        let chain = certificates(&self.cert, &files.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| bad(&files.key, error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.client_ca, &files.client_ca)? {
            roots.add(certificate).map_err(|error| bad(&files.client_ca, error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        // Probes have none. What needs one asks for it.
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let verifier = verifier.allow_unauthenticated().build();
        let verifier = verifier.map_err(|error| bad(&files.client_ca, error.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| Error::Bug { what: format!("TLS versions: {error}") })?;
        let config = config.with_client_cert_verifier(verifier).with_single_cert(chain, key);
        let mut config = config.map_err(|error| bad(&files.cert, error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Takes connections with the newest usable certificates.
pub(super) struct Acceptor {
    files: Files,
    current: Mutex<(Content, Arc<ServerConfig>)>,
}

impl Acceptor {
    /// Fails when the files cannot be used now.
    pub(super) fn new(files: Files) -> Result<Self> {
        let content = Content::read(&files)?;
        let config = Arc::new(content.config(&files)?);
        Ok(Self { files, current: Mutex::new((content, config)) })
    }

    /// Files are small and connections few: each looks. What cannot be used is reported and leaves what was used before.
    fn newest(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match Content::read(&self.files) {
            Ok(content) if content == current.0 => {}
            Ok(content) => match content.config(&self.files) {
                Ok(config) => {
                    tracing::info!("the API's certificates have changed and are used from now on");
                    *current = (content, Arc::new(config));
                }
                Err(error) => tracing::error!(%error, "the API's new certificates cannot be used; the old ones stay"),
            },
            Err(error) => tracing::error!(%error, "the API's certificates cannot be read; the old ones stay"),
        }
        current.1.clone()
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let accepting = TlsAcceptor::from(self.newest()).accept(stream);
        tokio::time::timeout(HANDSHAKE_DEADLINE, accepting).await?
    }
}
