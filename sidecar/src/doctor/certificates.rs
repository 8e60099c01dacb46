//! Whether certificates fit those to whom they are shown: who calls whom at which name, and whom each trusts. Looked at in the
//! files, so that it is known before anybody calls.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::config::SidecarConfig;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use url::Url;

use super::Finding;
use crate::initialize::Member;
use crate::small_file;

/// A certificate that somebody is shown.
struct Shown {
    /// Which, to whom.
    what: &'static str,
    cert: PathBuf,
    /// Whom that one trusts.
    authority: PathBuf,
    part: Part,
}

enum Part {
    /// By who is called, at this host.
    Server(String),
    /// By who calls.
    Client,
}

/// Every pair of files of which one is shown to who has the other. Of what is not here, such as in etcd's container, nothing is
/// said.
pub(super) fn examine(config: &SidecarConfig, member: &Member) -> Vec<Finding> {
    let shown = shown(config, member);
    let mut findings: Vec<_> = shown.iter().filter_map(Shown::examine).collect();
    findings.extend(launcher(config));
    findings
}

fn hosts(urls: &[String]) -> BTreeSet<String> {
    let host = |url: &String| {
        let url = Url::parse(url.trim()).ok().filter(|url| url.scheme() == "https")?;
        // As a name in a certificate has an address of IPv6.
        Some(url.host_str()?.trim_matches(['[', ']']).to_owned())
    };
    urls.iter().filter_map(host).collect()
}

fn shown(config: &SidecarConfig, member: &Member) -> Vec<Shown> {
    let mut all = Vec::new();
    let mut add = |what, cert: Option<&PathBuf>, authority: Option<&PathBuf>, parts: Vec<Part>| {
        if let (Some(cert), Some(authority)) = (cert, authority) {
            let shown = |part| Shown { what, cert: cert.clone(), authority: authority.clone(), part };
            all.extend(parts.into_iter().map(shown));
        }
    };
    let files = member.tls_files();
    let file = |field: &str| files.iter().find(|(of, _)| of == field).map(|(_, path)| path);
    let server = |urls: &[String]| hosts(urls).into_iter().map(Part::Server).collect();
    let (of_clients, for_clients) =
        (file("client-transport-security.trusted-ca-file"), file("client-transport-security.cert-file"));
    let (of_peers, for_peers) =
        (file("peer-transport-security.trusted-ca-file"), file("peer-transport-security.cert-file"));
    let (etcd, tls) = (&config.etcd, config.server.tls.as_ref());
    add("etcd's certificate, to the sidecar", for_clients, etcd.cacert.as_ref(), server(&etcd.endpoints));
    add("etcd.cert, to etcd", etcd.cert.as_ref(), of_clients, vec![Part::Client]);
    add("etcd's certificate, to its peers", for_peers, of_peers, server(member.peer_urls()));
    add("etcd's certificate, to its peers", for_peers, of_peers, vec![Part::Client]);
    // Who does not lead calls the leader's sidecar.
    if let (Some(tls), Some(_), 2..) = (tls, &config.store, member.cluster.members().len()) {
        let peers = config.server.peers.as_ref();
        let (cert, authority) = peers.map_or((&tls.cert, &tls.client_ca), |peers| (&peers.cert, &peers.cacert));
        let own = member.advertised_client_urls();
        let host = own.first().and_then(|url| Url::parse(url).ok()?.host_str().map(str::to_owned));
        let name = host.map(|host| Part::Server(host.trim_matches(['[', ']']).to_owned()));
        add("server.tls.cert, to other sidecars", Some(&tls.cert), Some(authority), name.into_iter().collect());
        add("the certificate shown to other sidecars", Some(cert), Some(&tls.client_ca), vec![Part::Client]);
    }
    all
}

fn chain(path: &Path) -> Option<Vec<CertificateDer<'static>>> {
    let pem = small_file::read(path).ok()?;
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().ok()
}

impl Shown {
    /// What is wrong with it; of files that cannot be read others say that.
    fn examine(&self) -> Option<Finding> {
        let (chain, authorities) = (chain(&self.cert)?, chain(&self.authority)?);
        let (own, intermediates) = chain.split_first()?;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities);
        let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
        let now = UnixTime::now();
        let taken = match &self.part {
            Part::Server(host) => {
                let name = ServerName::try_from(host.as_str()).ok()?;
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build().ok()?;
                verifier.verify_server_cert(own, intermediates, &name, &[], now).map(drop)
            }
            Part::Client => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().ok()?;
                verifier.verify_client_cert(own, intermediates, now).map(drop)
            }
        };
        let error = taken.err()?;
        let (cert, authority) = (self.cert.display(), self.authority.display());
        let at = match &self.part {
            Part::Server(host) => format!(" at {host}"),
            Part::Client => String::new(),
        };
        Some(Finding::bad(self.what, format!("{cert} would be refused{at} by who trusts {authority}: {error}")))
    }
}

/// A launcher beside the sidecar calls it at this machine, whomever it trusts.
fn launcher(config: &SidecarConfig) -> Option<Finding> {
    let cert = &config.server.tls.as_ref()?.cert;
    let own = chain(cert)?.into_iter().next()?;
    let parsed = rustls::server::ParsedCertificate::try_from(&own).ok()?;
    let is_for = |host: &str| {
        ServerName::try_from(host).is_ok_and(|name| rustls::client::verify_server_name(&parsed, &name).is_ok())
    };
    if ["127.0.0.1", "localhost", "::1"].iter().any(|host| is_for(host)) {
        return None;
    }
    let found = format!(
        "{} is neither for 127.0.0.1 nor for localhost: a launcher beside the sidecar must call it by another name",
        cert.display()
    );
    Some(Finding::remark("server.tls.cert", found))
}
