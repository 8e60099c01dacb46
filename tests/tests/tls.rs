//! TLS to etcd and to the store: what works, what is said when it does not, and certificates that change.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::certificates::Certificates;
use tests::etcd::{MINORS, Member, ROOT};
use tests::free_port;
use tests::minio::Minio;
use tests::program::Sidecar;
use tests::store::Store;

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A member that only takes clients with a certificate of that CA, and its URL.
fn member(minor: &str, dir: &Path, tls: &Certificates) -> Result<(Member, String)> {
    let mut member = Member::single(minor, &dir.join("data"))?;
    member.tls = Some(tls.clone());
    let url = member.client_url();
    Ok((member, url))
}

/// Flags of a client of it.
fn client(tls: &Certificates) -> [String; 4] {
    let (certificate, key) = tls.client();
    ["--cert".to_owned(), text(&certificate), "--key".to_owned(), text(&key)]
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_used_and_checked() -> Result<()> {
    for minor in MINORS {
        let dir = tempfile::tempdir()?;
        let tls = Certificates::issue(&dir.path().join("tls"))?;
        let (member, url) = member(minor, dir.path(), &tls)?;
        let _etcd = member.spawn()?;
        let store = Store::directory(&dir.path().join("store"));
        let once = |kind: &str| store.command("snapshot").args(["--once", kind, "--endpoints", &url]);
        let with_ca = |path: &Path| once("full").args(["--cacert".to_owned(), text(path)]);
        let full = || async { with_ca(&tls.ca()).args(client(&tls)).run().await?.expect(0) };
        tests::eventually(Duration::from_secs(30), full).await.context(minor)?;
        once("delta").arg("--insecure-skip-tls-verify").args(client(&tls)).run().await?.expect(0).context(minor)?;
        once("full").args(client(&tls)).run().await?.expect(1)?.says("invalid peer certificate")?;
        with_ca(&tls.ca()).run().await?.expect(1)?.says(&url)?;
        with_ca(&dir.path().join("nowhere.crt")).run().await?.expect(1)?.says("nowhere.crt")?;
    }
    Ok(())
}

/// Every certificate and the CA are replaced on disk while the backup runs; etcd restarts with the new ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_takes_up_new_certificates() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let tls = Certificates::issue(&dir.path().join("tls"))?;
    let (member, url) = member("3.6", dir.path(), &tls)?;
    let mut etcd = member.spawn()?;
    let store = Store::directory(&dir.path().join("store"));
    let snapshot = store.command("snapshot").args(["--endpoints", &url, "--delta-period", "100ms"]);
    let place = dir.path().join("ours");
    let ours = Certificates::mixed(&place, &[&tls], &tls)?;
    let snapshot = snapshot.args(["--cacert".to_owned(), text(&ours.ca())]).args(client(&ours));
    let ready = || async { snapshot.clone().args(["--once", "full"]).run().await?.expect(0) };
    tests::eventually(Duration::from_secs(30), ready).await?;
    let mut backup = snapshot.spawn()?;
    backup.logs("connected", Duration::from_secs(30)).await?;
    Certificates::issue(&dir.path().join("tls"))?;
    Certificates::mixed(&place, &[&tls], &tls)?;
    etcd.stop()?;
    etcd = member.spawn()?;
    backup.logs_times("connected", 2, Duration::from_secs(60)).await?;
    // What cannot be used changes nothing: no certificate, no CA at all, a key that lost its lines.
    let (cert, key) = ours.client();
    for (times, (path, text)) in (3..).zip([
        (cert, "not a certificate".to_owned()),
        (ours.ca(), String::new()),
        (key.clone(), std::fs::read_to_string(&key)?.replace('\n', "")),
    ]) {
        let before = std::fs::read(&path)?;
        std::fs::write(&path, text)?;
        etcd.stop()?;
        etcd = member.spawn()?;
        backup.logs_times("connected", times, Duration::from_secs(60)).await?;
        std::fs::write(&path, before)?;
    }
    let log = backup.log();
    ensure!(log.contains("the ones before stay in use") && !log.contains("[80, 82, 73"), "{log}");
    backup.terminate().await?.expect(0)?;
    Ok(())
}

/// The name in the client certificate is no user of etcd's: changes of users are seen all the same, as the user that was given.
#[tokio::test(flavor = "multi_thread")]
async fn users_are_followed_whatever_the_certificate_is_called() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let tls = Certificates::issue(&dir.path().join("tls"))?;
    let (member, url) = member("3.6", dir.path(), &tls)?;
    let mut etcd = member.start().await?;
    let store = Store::directory(&dir.path().join("store"));
    let snapshot = store.command("snapshot").args(["--endpoints", &url, "--delta-period", "100ms", "--user", ROOT.0]);
    let snapshot = snapshot.args(["--cacert".to_owned(), text(&tls.ca())]).args(client(&tls));
    let limit = Duration::from_secs(60);
    let mut backup = snapshot.env("ETCDCTL_PASSWORD", ROOT.1).spawn()?;
    backup.logs("full snapshot is in the store", limit).await?;
    let mut client = etcd.enable_auth().await?;
    backup.logs("users, roles or auth have changed", limit).await?;
    backup.logs_times("full snapshot is in the store", 2, limit).await?;
    let had = backup.log().matches("users, roles or auth have changed").count();
    client.user_add("another", "password", None).await?;
    backup.logs_times("users, roles or auth have changed", had + 1, limit).await?;
    backup.terminate().await?.expect(0)?;
    Ok(())
}

/// S3 behind a CA of its own, named as the AWS tools name it.
#[tokio::test(flavor = "multi_thread")]
async fn the_store_may_have_its_own_ca() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let tls = Certificates::issue(&dir.path().join("tls"))?;
    let minio = Minio::start_on(&dir.path().join("minio"), "backups", free_port()?, Some(&tls)).await?;
    let store = minio.store("backups/a");
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    client.put("x", "2", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    store.brings_back(&mut etcd).await?;
    let other = Certificates::issue(&dir.path().join("other"))?;
    let list = |bundle: &Path| -> Sidecar { store.command("list").env("AWS_CA_BUNDLE", text(bundle)) };
    let refused = list(&other.ca()).run().await?.expect(1)?;
    ensure!(refused.stderr.contains("certificate"), "{}", refused.stderr);
    list(&dir.path().join("nowhere.pem")).run().await?.expect(1)?.says("nowhere.pem")?;
    Ok(())
}
