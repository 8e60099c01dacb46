//! Certificates of the API, read again when they change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::rotation::{Pems, Rotating, certificates, private_key};
use crate::{Error, Result};

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

impl Files {
    fn read(&self) -> Result<Pems> {
        Pems::read(Some(&self.client_ca), Some(&self.cert), Some(&self.key))
    }

    fn config(&self, pems: &Pems) -> Result<Arc<ServerConfig>> {
        let (Some(ca), Some((cert, key))) = (&pems.ca, &pems.identity) else {
            return Err(Error::Bug { what: "certificates of the API were not read".into() });
        };
        let bad = |path: &Path, what: String| Error::invalid(format!("{}: {what}", path.display()));
        let (chain, key) = (certificates(cert, &self.cert)?, private_key(key, &self.key)?);
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca, &self.client_ca)? {
            roots.add(certificate).map_err(|error| bad(&self.client_ca, error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        // Probes have none. What needs one asks for it.
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let verifier = verifier.allow_unauthenticated().build();
        let verifier = verifier.map_err(|error| bad(&self.client_ca, error.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| Error::Bug { what: format!("TLS versions: {error}") })?;
        let config = config.with_client_cert_verifier(verifier).with_single_cert(chain, key);
        let mut config = config.map_err(|error| bad(&self.cert, error.to_string()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Takes connections with the newest usable certificates.
pub(super) struct Acceptor {
    files: Files,
    rotating: Rotating<Arc<ServerConfig>>,
}

impl Acceptor {
    /// Fails when the files cannot be used now.
    pub(super) fn new(files: Files) -> Result<Self> {
        let this = Self { files, rotating: Rotating::default() };
        this.newest()?;
        Ok(this)
    }

    /// Files are small and connections few: each looks.
    fn newest(&self) -> Result<Arc<ServerConfig>> {
        self.rotating.newest("of the API", || self.files.read(), |pems| self.files.config(pems))
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let config = self.newest().map_err(std::io::Error::other)?;
        tokio::time::timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await?
    }
}
