//! What gardener/etcd-backup-restore answered, and what it left in a store.

use serde_json::json;

use super::*;

/// The predecessor's etcd-wrapper, as it asks: status until it is `New`, start, status until `Successful`, configuration.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_as_etcd_wrapper_gets_its_answers() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let place = dir.path().join("certificates");
    pod.tls = Some(Certificates::issue(&place)?);
    let serving = pod.start_serve().await?;
    // It has the CA and no certificate.
    let ca = reqwest::Certificate::from_pem(&std::fs::read(place.join("ca.crt"))?)?;
    let http = reqwest::Client::builder().tls_certs_only([ca]).build()?;
    let ask = async |path: &str| {
        let answer = http.get(format!("{}{path}", pod.url())).send().await?;
        let (status, length) = (answer.status().as_u16(), answer.content_length());
        let text = answer.text().await?;
        // It gives up the request before it reads the body: that must have come in one piece, of a known length.
        ensure!(length == Some(text.len() as u64), "{path}: {length:?}");
        anyhow::Ok((status, text))
    };
    let told = |text: &str| (200, text.to_owned());
    // Twice: its etcd is restarted.
    for turn in 0..2 {
        ensure!(ask("/config").await?.0 == if turn == 0 { 500 } else { 200 });
        ensure!(ask("/initialization/status").await? == told("New"));
        ensure!(ask("/initialization/start?mode=sanity").await? == told(""));
        let successful = || async {
            let status = ask("/initialization/status").await?;
            ensure!(status == told("Successful"), "{status:?}");
            Ok(())
        };
        eventually(LONG, successful).await?;
        ensure!(ask("/initialization/status").await? == told("New"), "how it ended is told once");
        let (status, config) = ask("/config").await?;
        ensure!(status == 200 && config.contains(&pod.member.initial_cluster), "{config}");
    }
    // What cannot be decided is `Failed`, once.
    std::fs::create_dir_all(pod.member.data_dir.join("member/snap"))?;
    std::fs::write(pod.member.data_dir.join("member/snap/db"), "not a database")?;
    ask("/initialization/start").await?;
    let failed = || async {
        let status = ask("/initialization/status").await?;
        ensure!(status == told("Failed"), "{status:?}");
        Ok(())
    };
    eventually(LONG, failed).await?;
    ensure!(ask("/initialization/status").await? == told("New") && ask("/config").await?.0 == 500);
    serving.terminate().await?.expect(0)?;
    // Where it is not configured, it needs a certificate like everybody. The environment counts before the file.
    let mut serving = pod.serve()?.env("SIDECAR_SERVER_ETCD_WRAPPER", "false").spawn()?;
    serving.logs("the API is served", LONG).await?;
    for path in ["/initialization/status", "/initialization/start", "/config"] {
        ensure!(ask(path).await?.0 == 401, "{path}");
    }
    let known = pod.http()?.get(format!("{}/initialization/status", pod.url())).send().await?;
    ensure!(known.status() == 200 && known.text().await? == "New");
    serving.terminate().await?.expect(0)?;
    // And flags before the environment.
    let wrapper = ["--set", "server.etcdWrapper=true", "--set", "server.openSnapshots=true"];
    let mut serving = pod.serve()?.env("SIDECAR_SERVER_ETCD_WRAPPER", "false").args(wrapper).spawn()?;
    serving.logs("snapshots are taken for everybody who reaches the API", LONG).await?;
    serving.logs("the API is served", LONG).await?;
    ensure!(ask("/config").await?.0 == 500);
    // Without a store nobody can take one.
    ensure!(ask("/snapshot/full").await?.0 == 405);
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// What is asked of the predecessor, and what Prometheus reads.
#[tokio::test(flavor = "multi_thread")]
async fn the_predecessors_calls_are_answered() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    let certificates = Certificates::issue(&dir.path().join("certificates"))?;
    pod.tls = Some(certificates.clone());
    pod.more = "snapshots: {deltaPeriod: 1h}\n".into();
    let mut serving = pod.start_serve().await?;
    let ca = reqwest::Certificate::from_pem(&std::fs::read(certificates.ca())?)?;
    let client = || reqwest::Client::builder().tls_certs_only([ca.clone()]);
    let (cert, key) = certificates.client();
    let identity = reqwest::Identity::from_pem(&[std::fs::read(cert)?, std::fs::read(key)?].concat())?;
    let (nobody, known) = (client().build()?, client().identity(identity).build()?);
    let ask = async |client: &reqwest::Client, path: &str, code: u16| {
        let answer = client.get(format!("{}{path}", pod.url())).send().await?;
        let (status, text) = (answer.status().as_u16(), answer.text().await?);
        ensure!(status == code, "{path}: {status}: {text}");
        anyhow::Ok(text)
    };
    ask(&known, "/snapshot/full", 405).await?;
    let (launched, mut etcd) = pod.start_etcd().await?;
    backed_up(&pod).await?;
    for path in ["/snapshot/full", "/snapshot/delta", "/snapshot/latest"] {
        ask(&nobody, path, 401).await?;
    }
    ask(&known, "/snapshot/full?final=perhaps", 400).await?;
    let full: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/full?final=true", 200).await?)?;
    ensure!(full["kind"] == "Full" && full["isFinal"] == true && full["startRevision"] == 0, "{full}");
    for (field, value) in [
        ("immutabilityExpriyTime", json!("0001-01-01T00:00:00Z")),
        ("versionID", json!(null)),
        ("snapDir", json!("")),
        ("prefix", json!("")),
        ("compressionSuffix", json!(".zst")),
        ("isChunk", json!(false)),
    ] {
        ensure!(full.get(field) == Some(&value), "{field} is not {value} in {full}");
    }
    let created = full["createdOn"].as_str().map(chrono::DateTime::parse_from_rfc3339);
    ensure!(matches!(created, Some(Ok(_))) && full["snapName"].is_string(), "{full}");
    ensure!(ask(&known, "/snapshot/delta", 200).await? == "null");
    let alone: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/latest", 200).await?)?;
    ensure!(alone["fullSnapshot"]["startRevision"] == 0 && alone["deltaSnapshots"].is_null(), "{alone}");
    // It is kept with the backup, and who asks again gets the same until something changes.
    ensure!(alone["fullSnapshot"]["isFinal"] == true, "{alone}");
    let again: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/full?final=true", 200).await?)?;
    ensure!(again["isFinal"] == true && again["snapName"] == full["snapName"], "{again} is not {full}");
    // It answers to any method, and with these headers.
    for method in ["POST", "PUT"] {
        let answer = known.request(method.parse()?, format!("{}/snapshot/latest", pod.url())).send().await?;
        ensure!(answer.status() == 200, "{method}: {}", answer.status());
        for (header, value) in
            [("strict-transport-security", "max-age=31536000"), ("content-security-policy", "default-src 'self'")]
        {
            ensure!(answer.headers().get(header).is_some_and(|told| told == value), "{:?}", answer.headers());
        }
    }
    ensure!(ask(&nobody, "/healthz", 200).await? == "{\"health\":true}");
    Workload::of(1).run(&mut etcd).await?;
    tests::workload::expire(&mut etcd).await?;
    let delta: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/delta", 200).await?)?;
    ensure!(delta["kind"] == "Incr" && delta["lastRevision"].as_i64() > Some(2), "{delta}");
    let latest: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/latest", 200).await?)?;
    ensure!(latest["fullSnapshot"]["kind"] == "Full", "{latest}");
    let later: serde_json::Value = serde_json::from_str(&ask(&known, "/snapshot/full?final=true", 200).await?)?;
    ensure!(later["isFinal"] == true && later["lastRevision"] == delta["lastRevision"], "{later}");
    let newest = latest["deltaSnapshots"].as_array().and_then(|deltas| deltas.last());
    ensure!(newest.is_some_and(|newest| newest["lastRevision"] == delta["lastRevision"]), "{latest}");
    let told = async || {
        let metrics = ask(&nobody, "/metrics", 200).await?;
        let last = format!("etcdbr_snapshot_latest_revision{{kind=\"Incr\"}} {}\n", delta["lastRevision"]);
        for line in [last.as_str(), "sidecar_member_role{role=\"leader\"} 1\n", "sidecar_backup_lag_revisions 0\n"] {
            ensure!(metrics.contains(line), "{line} is not in {metrics}");
        }
        Ok(())
    };
    eventually(LONG, told).await?;

    // Who does not speak the language, says too much, or nothing at all is turned away, and holds up nobody.
    let address = pod.url().replace("https://", "");
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(tokio::net::TcpStream::connect(&address).await?);
    }
    let plain = reqwest::get(format!("http://{address}/healthz")).await;
    ensure!(plain.is_err(), "{plain:?}");
    ask(&nobody, "/healthz", 200).await?;
    let mut api = pod.client(true).await?;
    let large =
        api::TakeSnapshotRequest { kind: api::Kind::Delta.into(), request_id: "x".repeat(1 << 20), is_final: false };
    let refused = api.take_snapshot(large).await;
    ensure!(refused.is_err_and(|status| status.code() == tonic::Code::OutOfRange));
    drop(silent);
    launched.terminate().await?.expect(STOPPED)?;
    serving.logs("the member's role role=None", LONG).await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// Backups of the predecessor do not say of which cluster they are: a running etcd goes on from them, read in place or copied,
/// unless they reach further than it does.
#[tokio::test(flavor = "multi_thread")]
async fn the_predecessors_backups_are_followed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (before, copied) = (dir.path().join("before"), dir.path().join("copied"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let mut etcd = pod.member.start().await?;
    let mut client = etcd.client().await?;
    for n in 0..9u32 {
        client.put("x", n.to_string(), None).await?;
    }
    let predecessor = Store::directory(&before);
    predecessor.once("full", &pod.member).args(["--layout", "gardener-v2"]).run().await?.expect(0)?;
    let to = Store::directory(&copied);
    predecessor.command("copy").args(["--to", &to.url, "--layout", "steward"]).run().await?.expect(0)?;
    for (store, timelines) in [(&predecessor, 2), (&to, 2)] {
        client.put("x", "more", None).await?;
        pod.store = Some(store.clone());
        let serving = pod.start_serve().await?;
        pod.back_up(api::Kind::Delta).await?;
        serving.terminate().await?.expect(0)?;
        let listed = store.list().await?;
        ensure!(listed["timelines"].as_array().is_some_and(|listed| listed.len() == timelines), "{listed}");
    }
    etcd.stop()?;
    let (again, copied_again) = (dir.path().join("again"), Store::directory(&dir.path().join("copied again")));
    std::fs::create_dir_all(&again)?;
    tests::copy(&before.join("v2"), &again.join("v2")).await?;
    let again = Store::directory(&again);
    again.command("copy").args(["--to", &copied_again.url, "--layout", "steward"]).run().await?.expect(0)?;
    let mut other = Pod::new(&dir.path().join("other"), "3.6", None)?;
    let mut etcd = other.member.start().await?;
    for store in [again, copied_again] {
        other.store = Some(store);
        let mut serving = other.start_serve().await?;
        serving.logs("backups reach revision 10, which etcd, at 1, does not have", LONG).await?;
        serving.terminate().await?.expect(0)?;
    }
    etcd.stop()?;
    Ok(())
}
