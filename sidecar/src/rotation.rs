//! Certificates in files that somebody replaces while they are used: what cannot be used is said, and what was used before stays.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::Utc;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::{Error, Result, small_file};

/// What the files of one end of TLS have.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pems {
    /// Whom the other end must be signed by.
    pub ca: Option<Vec<u8>>,
    /// Our certificate and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Pems {
    /// Reads them. What is no certificate, or no key, is refused here: what has no CA in it would be no CA at all.
    pub(crate) fn read(ca: Option<&PathBuf>, cert: Option<&PathBuf>, key: Option<&PathBuf>) -> Result<Self> {
        let read = |path: &Path| small_file::read(path).map_err(Error::io("read the certificate", path.display()));
        let bundle = |path: &Path| {
            let pem = read(path)?;
            certificates(&pem, path).map(|_| pem)
        };
        let identity = cert.zip(key).map(|(cert, key)| {
            let pem = read(key)?;
            private_key(&pem, key)?;
            Ok::<_, Error>((bundle(cert)?, pem))
        });
        Ok(Self { ca: ca.map(|path| bundle(path)).transpose()?, identity: identity.transpose()? })
    }

    /// TLS towards a server. Its CA, where it is verified, is the system's when none is given.
    pub(crate) fn of_client(&self, handshake_deadline: Duration, verifies: bool) -> ClientTlsConfig {
        let tls = ClientTlsConfig::new().timeout(handshake_deadline);
        let tls = match &self.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(ca)),
            None if verifies => tls.with_native_roots(),
            None => tls,
        };
        match &self.identity {
            Some((cert, key)) => tls.identity(Identity::from_pem(cert, key)),
            None => tls,
        }
    }

    /// Whether our certificate is not valid now. One that cannot be read is not known to be.
    pub(crate) fn is_out_of_time(&self) -> bool {
        let Some((cert, _)) = &self.identity else { return false };
        let first = CertificateDer::pem_slice_iter(cert).next().and_then(Result::ok);
        let parsed = first.as_ref().and_then(|der| x509_parser::parse_x509_certificate(der).ok());
        parsed.is_some_and(|(_, parsed)| {
            let (from, until) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
            !(from..=until).contains(&Utc::now().timestamp())
        })
    }
}

/// The certificates in a file. What the library says of one that is damaged has its bytes, and a key may be among them.
pub(crate) fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |what: &str| Error::invalid(format!("{}: {what}", path.display()));
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(read) if !read.is_empty() => Ok(read),
        Ok(_) => Err(bad("no certificate is in it")),
        Err(_) => Err(bad("it is damaged: a PEM section does not begin or end as it should, or is not base64")),
    }
}

/// The key in a file.
pub(crate) fn private_key(pem: &[u8], path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|_| {
        let what = "no private key that is not encrypted is in it as PEM, with its lines as they were made";
        Error::invalid(format!("{}: {what}", path.display()))
    })
}

/// Who calls often is not told the same more often than this.
const SAID_PERIOD: Duration = Duration::from_secs(60);

/// What was made of the files when they could be used last.
pub(crate) struct Rotating<T>(Arc<Mutex<Kept<T>>>);

struct Kept<T> {
    made: Option<(Pems, T)>,
    /// The last trouble that was logged.
    said: Option<(String, Instant)>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { made: None, said: None }
    }
}

impl<T> Kept<T> {
    fn take(&mut self, what: &str, pems: Pems, made: T) {
        self.said = None;
        if pems.is_out_of_time() {
            self.say(format!("the certificate {what} is not valid now: renew it, or set this machine's clock"));
        }
        self.made = Some((pems, made));
    }

    /// Logs it, unless that was just done: each connection asks, and anybody may open one.
    fn say(&mut self, text: String) {
        if self.said.as_ref().is_none_or(|(before, at)| *before != text || at.elapsed() >= SAID_PERIOD) {
            tracing::error!("{text}");
            self.said = Some((text, Instant::now()));
        }
    }
}

impl<T> Clone for Rotating<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Rotating<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> std::fmt::Debug for Rotating<T> {
    /// Keys are in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotating").finish_non_exhaustive()
    }
}

impl<T: Clone> Rotating<T> {
    /// What `make` makes of the files as they are now. Where they cannot be used, or our certificate in them is not valid now and the
    /// one before is, what was made before. `what` they are for is said in the log.
    pub(crate) fn newest(
        &self,
        what: &str,
        read: impl FnOnce() -> Result<Pems>,
        make: impl FnOnce(&Pems) -> Result<T>,
    ) -> Result<T> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stay = "the ones before stay in use";
        let Some((before, made)) = kept.made.clone() else {
            let pems = read()?;
            let made = make(&pems)?;
            kept.take(what, pems, made.clone());
            return Ok(made);
        };
        let pems = match read() {
            Ok(pems) if pems == before => return Ok(made),
            Ok(pems) if pems.is_out_of_time() && !before.is_out_of_time() => {
                kept.say(format!("the new certificate {what} is not valid now; {stay}"));
                return Ok(made);
            }
            Ok(pems) => pems,
            Err(error) => {
                kept.say(format!("the certificates {what} cannot be read; {stay}: {error}"));
                return Ok(made);
            }
        };
        match make(&pems) {
            Ok(made) => {
                tracing::info!("the certificates {what} have changed and are used from now on");
                kept.take(what, pems, made.clone());
                Ok(made)
            }
            Err(error) => {
                kept.say(format!("the new certificates {what} cannot be used; {stay}: {error}"));
                Ok(made)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_leaves_what_was() -> Result<()> {
        let rotating = Rotating::<Vec<u8>>::default();
        let pems = |ca: &[u8]| Pems { ca: Some(ca.to_vec()), identity: None };
        let make = |pems: &Pems| match pems.ca.as_deref() {
            Some(b"bad") | None => Err(Error::invalid("bad")),
            Some(ca) => Ok(ca.to_vec()),
        };
        let missing = || Pems::read(Some(&PathBuf::from("/nowhere/ca.crt")), None, None);
        assert!(
            rotating.newest("here", missing, make).is_err_and(|error| error.to_string().contains("/nowhere/ca.crt"))
        );
        assert!(rotating.newest("here", || Ok(pems(b"bad")), make).is_err());
        for (read, made) in [("one", "one"), ("bad", "one"), ("two", "two"), ("bad", "two"), ("one", "one")] {
            assert_eq!(rotating.newest("here", || Ok(pems(read.as_bytes())), make)?, made.as_bytes());
        }
        assert_eq!(rotating.clone().newest("here", missing, make)?, b"one");
        Ok(())
    }

    #[test]
    fn nothing_of_a_damaged_key_is_quoted() {
        let path = Path::new("tls.key");
        for pem in [
            "-----BEGIN PRIVATE KEY-----c2VjcmV0-----END PRIVATE KEY-----",
            "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0",
            "secret",
        ] {
            for error in [private_key(pem.as_bytes(), path).err(), certificates(pem.as_bytes(), path).err()] {
                let text = error.map(|error| error.to_string()).unwrap_or_default();
                assert!(text.starts_with("tls.key: ") && !text.contains("c2Vj") && !text.contains("99, 50"), "{text}");
            }
        }
    }
}
