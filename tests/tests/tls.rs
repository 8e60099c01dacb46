//! etcd behind TLS with client certificates: what works, and what is said when it does not.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tests::etcd::{MINORS, Member};
use tests::file_url;
use tests::program::Sidecar;

/// Writes `NAME.crt` and `NAME.key` for a CA, a server and a client.
fn certificates(dir: &Path) -> Result<()> {
    let write = |name: &str, certificate: &str, key: &KeyPair| -> Result<()> {
        std::fs::write(dir.join(format!("{name}.crt")), certificate)?;
        Ok(std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?)
    };
    let ca_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca", &params.self_signed(&ca_key)?.pem(), &ca_key)?;
    let issuer = Issuer::new(params, ca_key);
    for name in ["server", "client"] {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()])?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        write(name, &params.signed_by(&key, &issuer)?.pem(), &key)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_used_and_checked() -> Result<()> {
    for minor in MINORS {
        let dir = tempfile::tempdir()?;
        certificates(dir.path())?;
        let file = |name: &str| dir.path().join(name).display().to_string();
        let member = Member::single(minor, &dir.path().join("data"))?;
        let url = format!("https://127.0.0.1:{}", member.client_port);
        let flags = [
            "--cert-file",
            &file("server.crt"),
            "--key-file",
            &file("server.key"),
            "--client-cert-auth",
            "--trusted-ca-file",
            &file("ca.crt"),
        ];
        // The last one given counts.
        let flags = flags.iter().map(|flag| (*flag).to_owned()).chain(["--listen-client-urls".to_owned(), url.clone()]);
        let flags = flags.chain(["--advertise-client-urls".to_owned(), url.clone()]);
        let member = flags.fold(member, Member::flag);
        let _etcd = member.spawn()?;
        let store = file_url(&dir.path().join("store"));
        let once = |kind: &str| Sidecar::new(["snapshot", "--once", kind, "--endpoints", &url, "--store", &store]);
        let client = ["--cert".to_owned(), file("client.crt"), "--key".to_owned(), file("client.key")];
        let full = || async {
            let ended = once("full").args(["--cacert".to_owned(), file("ca.crt")]).args(client.clone()).run().await?;
            ended.expect(0)
        };
        tests::eventually(std::time::Duration::from_secs(30), full).await.context(minor)?;
        once("delta").arg("--insecure-skip-tls-verify").args(client.clone()).run().await?.expect(0).context(minor)?;
        once("full").args(client.clone()).run().await?.expect(1)?.says("invalid peer certificate")?;
        once("full").args(["--cacert".to_owned(), file("ca.crt")]).run().await?.expect(1)?.says(&url)?;
        let missing: PathBuf = dir.path().join("nowhere.crt");
        let ended = once("full").args(["--cacert".to_owned(), missing.display().to_string()]).run().await?;
        ensure!(ended.code == 1 && ended.stderr.contains("nowhere.crt"), "{}", ended.stderr);
    }
    Ok(())
}
