//! A CA with a server's and a client's certificate, as files.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// A directory with `ca`, `server` and `client`, each `.crt` and `.key`.
#[derive(Debug, Clone)]
pub struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    /// Makes new ones in a directory, over those that are there, for this machine.
    pub fn issue(dir: &Path) -> Result<Self> {
        Self::issue_for(dir, &["127.0.0.1", "localhost"])
    }

    /// The same for other names.
    pub fn issue_for(dir: &Path, names: &[&str]) -> Result<Self> {
        Self::issue_until(dir, names, 4096)
    }

    /// The same, valid until that year begins.
    pub fn issue_until(dir: &Path, names: &[&str], year: i32) -> Result<Self> {
        Self::issue_with(dir, names, year, &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth])
    }

    /// The same, to be used for these.
    pub fn issue_with(dir: &Path, names: &[&str], year: i32, uses: &[ExtendedKeyUsagePurpose]) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let this = Self { dir: dir.to_owned() };
        let ca_key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        this.write("ca", &params.self_signed(&ca_key)?.pem(), &ca_key)?;
        let issuer = Issuer::new(params, ca_key);
        for name in ["server", "client"] {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            params.extended_key_usages = uses.to_vec();
            this.write(name, &params.signed_by(&key, &issuer)?.pem(), &key)?;
        }
        Ok(this)
    }

    /// Those that lie in a directory.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Puts the CAs of some, together, and the certificates of another into a directory.
    pub fn mixed(dir: &Path, cas: &[&Self], of: &Self) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let this = Self { dir: dir.to_owned() };
        let pems: Vec<String> = cas.iter().map(|ca| std::fs::read_to_string(ca.ca())).collect::<Result<_, _>>()?;
        std::fs::write(this.ca(), pems.concat())?;
        for name in ["server", "client"] {
            let ((cert, key), (to_cert, to_key)) = (of.pair(name), this.pair(name));
            std::fs::copy(cert, to_cert)?;
            std::fs::copy(key, to_key)?;
        }
        Ok(this)
    }

    fn write(&self, name: &str, certificate: &str, key: &KeyPair) -> Result<()> {
        std::fs::write(self.dir.join(format!("{name}.crt")), certificate)?;
        Ok(std::fs::write(self.dir.join(format!("{name}.key")), key.serialize_pem())?)
    }

    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.dir.join(format!("{name}.crt")), self.dir.join(format!("{name}.key")))
    }

    /// The CA's certificate.
    pub fn ca(&self) -> PathBuf {
        self.pair("ca").0
    }

    /// Certificate and key of a server on 127.0.0.1.
    pub fn server(&self) -> (PathBuf, PathBuf) {
        self.pair("server")
    }

    /// What a client connects with, over gRPC.
    pub fn of_client(&self) -> Result<ClientTlsConfig> {
        let (cert, key) = self.client();
        let identity = Identity::from_pem(std::fs::read(cert)?, std::fs::read(key)?);
        Ok(self.of_stranger()?.identity(identity))
    }

    /// The same without a certificate of its own.
    pub fn of_stranger(&self) -> Result<ClientTlsConfig> {
        Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(self.ca())?)))
    }

    /// Certificate and key of a client.
    pub fn client(&self) -> (PathBuf, PathBuf) {
        self.pair("client")
    }
}
