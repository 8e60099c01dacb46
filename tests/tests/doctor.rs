//! `sidecar doctor` against a whole configuration.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::ExtendedKeyUsagePurpose;
use tests::certificates::Certificates;
use tests::eventually;
use tests::pod::Pod;
use tests::store::Store;

/// What it says of each thing, as (health, found).
async fn findings(pod: &Pod, code: i32) -> Result<Vec<(String, String, String)>> {
    let report = pod.doctor()?.args(["-o", "json"]).run().await?.expect(code)?.json()?;
    let of = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().context("no findings")?;
    Ok(findings.iter().map(|finding| (of(finding, "what"), of(finding, "health"), of(finding, "found"))).collect())
}

fn says(findings: &[(String, String, String)], what: &str, health: &str, found: &str) -> Result<()> {
    let is_it = |(of, is, text): &(String, String, String)| of == what && is == health && text.contains(found);
    ensure!(findings.iter().any(is_it), "no {health} finding of {what} with {found:?} in {findings:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_well_is_said_to_be() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.tls = Some(Certificates::issue(&dir.path().join("tls"))?);
    pod.more = format!("compaction:\n  workDir: {}\n", dir.path().display());
    let before = findings(&pod, 0).await?;
    says(&before, "etcd", "remark", "before etcd is started")?;
    says(&before, "data directory", "good", "not there yet")?;
    says(&before, "newest backup", "remark", "none yet")?;
    says(&before, "server.listen", "good", "free")?;
    says(&before, "server.tls.cert", "good", "valid until 4096")?;
    says(&before, "compaction.workDir", "good", "free")?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    client.put("x", "1", None).await?;
    let backed_up = || async { pod.ctl(["take-snapshot", "delta"]).run().await?.expect(0) };
    eventually(Duration::from_secs(30), backed_up).await?;
    let running = findings(&pod, 0).await?;
    says(&running, "etcd", "good", "3.6.16, Leader of cluster")?;
    says(&running, "data directory", "good", "in use")?;
    says(&running, "newest backup", "good", "KiB")?;
    says(&running, "server.listen", "remark", "taken")?;
    says(&running, "room for a restore", "good", "free")?;
    says(&running, "auth", "good", "off")?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    says(&findings(&pod, 0).await?, "data directory", "good", "storage of etcd 3.6")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_fail_is_bad_and_says_what_to_do() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    // A key of another certificate, and one that has expired.
    let old = Certificates::issue_until(&dir.path().join("old"), &["127.0.0.1"], 2020)?;
    pod.tls = Some(old.clone());
    says(&findings(&pod, 12).await?, "server.tls.cert", "bad", "expired on 2020-01-01")?;
    pod.tls = Some(Certificates::issue_for(&dir.path().join("nameless"), &[])?);
    says(&findings(&pod, 12).await?, "server.tls.cert", "bad", "no subject alternative name")?;
    let of_client = [ExtendedKeyUsagePurpose::ClientAuth];
    pod.tls = Some(Certificates::issue_with(&dir.path().join("misused"), &["127.0.0.1"], 4096, &of_client)?);
    says(&findings(&pod, 12).await?, "server.tls.cert", "bad", "serverAuth")?;
    let tls = Certificates::issue(&dir.path().join("tls"))?;
    std::fs::copy(old.server().1, tls.server().1)?;
    pod.tls = Some(tls.clone());
    says(&findings(&pod, 12).await?, "server.tls.cert", "bad", "not the key of")?;
    std::fs::write(tls.server().0, "nothing")?;
    says(&findings(&pod, 12).await?, "server.tls.cert", "bad", "no certificate is in it")?;
    std::fs::remove_file(tls.ca())?;
    says(&findings(&pod, 12).await?, "server.tls.clientCa", "bad", "No such file")?;
    pod.tls = None;
    let found = findings(&pod, 0).await?;
    says(&found, "server.listen", "remark", "everybody")?;
    says(&found, "store", "remark", "no backups")?;
    // Not etcd's port, but one that answers something else.
    let other = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = other.local_addr()?;
    std::thread::spawn(move || other.incoming().for_each(drop));
    let doctor = pod.doctor()?.args(["-o", "json", "--set", &format!("etcd.endpoints=http://{address}")]);
    doctor.run().await?.expect(12)?;
    // A store that cannot be reached, and data that is damaged.
    let nowhere = pod.doctor()?.args(["--set", "store.url=file:///no/such/place"]).run().await?.expect(12)?;
    // It goes on to the rest.
    ensure!(
        ["/no/such/place", "room for a restore"].iter().all(|said| nowhere.stdout.contains(said)),
        "{}",
        nowhere.stdout
    );
    let wrong_port = pod.doctor()?.args(["--set", "etcd.endpoints=http://127.0.0.1:1"]).run().await?.expect(12)?;
    ensure!(wrong_port.stdout.contains("nor will etcd, whose listen-client-urls have ports"), "{}", wrong_port.stdout);
    let member = pod.member.data_dir.join("member");
    std::fs::create_dir_all(member.join("snap"))?;
    std::fs::create_dir_all(member.join("wal"))?;
    std::fs::write(member.join("snap/db"), vec![7; 40_000])?;
    says(&findings(&pod, 12).await?, "data directory", "bad", "damaged")?;
    pod.doctor()?.args(["--set", "no.such=1"]).run().await?.expect(2)?.says("no.such")?;
    Ok(())
}

/// Certificates that whoever is shown them would not take are found in the files, before anybody calls.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_do_not_fit_are_found() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pods = Pod::cluster(dir.path(), "3.6", &["a", "b", "c"], Some(&store))?;
    Pod::secure(&mut pods, &dir.path().join("tls"), &["127.0.0.1"])?;
    findings(&pods[0], 0).await?;
    let strange = Certificates::issue(&dir.path().join("strange"))?;
    let (ca, (cert, key)) = (strange.ca(), strange.client());
    let set = |field: &str, path: &std::path::Path| format!("{field}={}", path.display());
    let cases: [(&[String], &str, &str); 4] = [
        (&[set("etcd.cacert", &ca)], "etcd's certificate, to the sidecar", "would be refused"),
        (&[set("etcd.cert", &cert), set("etcd.key", &key)], "etcd.cert, to etcd", "would be refused"),
        (&[set("server.tls.clientCa", &ca)], "the certificate shown to other sidecars", "would be refused"),
        (
            &[format!("server.listen=127.0.0.1:{}", pods[0].member.client_port)],
            "server.listen",
            "a port of etcd's listen-client-urls",
        ),
    ];
    for (sets, what, said) in cases {
        let doctor = sets.iter().fold(pods[0].doctor()?, |doctor, set| doctor.args(["--set", set]));
        let told = doctor.run().await?.expect(12)?.stdout;
        ensure!(told.lines().any(|line| line.contains(what) && line.contains(said)), "{what}: {told}");
    }
    // For a host that it is not called at.
    Pod::secure(&mut pods, &dir.path().join("elsewhere"), &["10.0.0.9"])?;
    let told = findings(&pods[0], 12).await?;
    says(&told, "etcd's certificate, to the sidecar", "bad", "at 127.0.0.1")?;
    says(&told, "server.tls.cert, to other sidecars", "bad", "at 127.0.0.1")?;
    says(&told, "server.tls.cert", "remark", "a launcher beside the sidecar")?;
    Ok(())
}
