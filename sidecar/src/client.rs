//! Calling a sidecar.

use std::path::PathBuf;
use std::time::Duration;

use proto::sidecar::sidecar_client::SidecarClient;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::rotation::{Pems, Rotating};
use crate::{Error, Result};

/// For a connection, and again for the handshake on it.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Flags that say how to reach a sidecar.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ApiFlags {
    /// The sidecar's API.
    #[arg(long, env = "SIDECAR_URL", default_value = "https://127.0.0.1:8080", value_name = "URL")]
    pub sidecar: String,
    /// CA bundle to verify its certificate with; the system's when not given.
    #[arg(long, env = "SIDECAR_CACERT", value_name = "FILE")]
    pub cacert: Option<PathBuf>,
    /// Client certificate.
    #[arg(long, env = "SIDECAR_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Key of the client certificate.
    #[arg(long, env = "SIDECAR_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// What the files had when they could be used.
    #[arg(skip)]
    pub(crate) rotating: Rotating<ClientTlsConfig>,
}

impl ApiFlags {
    fn endpoint(&self) -> Result<Endpoint> {
        if !proto::config::is_plain_address(&self.sidecar) {
            // It is not shown: it may have credentials in it.
            let what = "the sidecar's URL must be https://host:port, or http://host:port where it serves without TLS; who asks is told by a certificate";
            return Err(Error::invalid(what));
        }
        let bad = |error: tonic::transport::Error| {
            Error::invalid(format!("the sidecar at {}: {}", self.sidecar, crate::error::chain(&error)))
        };
        let endpoint = Endpoint::from_shared(self.sidecar.clone()).map_err(bad)?.connect_timeout(CONNECT_DEADLINE);
        let endpoint = endpoint.http2_keep_alive_interval(Duration::from_secs(10)).keep_alive_while_idle(true);
        if !self.sidecar.starts_with("https://") {
            return Ok(endpoint);
        }
        let read = || Pems::read(self.cacert.as_ref(), self.cert.as_ref(), self.key.as_ref());
        let make = |pems: &Pems| {
            // A connection's own deadline is over when the handshake begins.
            let tls = pems.of_client(CONNECT_DEADLINE, true);
            endpoint.clone().tls_config(tls.clone()).map(|_| tls).map_err(bad)
        };
        let tls = self.rotating.newest("to call sidecars with", read, make)?;
        endpoint.tls_config(tls).map_err(bad)
    }

    /// Connects anew: files are read again, so rotated certificates are used.
    pub async fn connect(&self) -> Result<SidecarClient<Channel>> {
        let channel = self.endpoint()?.connect().await.map_err(|error| Error::Unanswered {
            what: format!(
                "connect to the sidecar at {}: {}{}",
                self.sidecar,
                crate::error::chain(&error),
                hint(&error)
            ),
        })?;
        Ok(SidecarClient::new(channel))
    }
}

/// What to do about a connection that fails for a reason which does not tell.
fn hint(error: &dyn std::error::Error) -> &'static str {
    let text = crate::error::chain(error);
    if text.contains("UnknownIssuer") {
        "; name the CA that has signed its certificate with --cacert"
    } else if text.contains("frame with invalid size") {
        "; it may be served over TLS: try https://"
    } else {
        ""
    }
}

/// One that nobody else has.
pub fn request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// What an answer of the sidecar's means.
pub fn failed(what: &str) -> impl Fn(tonic::Status) -> Error + '_ {
    move |status| {
        // What a connection broke by says what to do, such as that a certificate was refused.
        let cause =
            std::error::Error::source(&status).map(|cause| format!(": {}{}", crate::error::chain(cause), hint(cause)));
        let cause = cause.unwrap_or_default();
        let text = format!("{what}: the sidecar answers {:?}: {}{cause}", status.code(), status.message());
        match status.code() {
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => Error::Denied { what: text },
            tonic::Code::DataLoss => Error::corrupt(text),
            tonic::Code::FailedPrecondition => Error::precondition(text),
            tonic::Code::InvalidArgument => Error::invalid(text),
            tonic::Code::NotFound => Error::missing(text),
            _ => Error::Unanswered { what: text },
        }
    }
}
