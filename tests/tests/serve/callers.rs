//! Who may call, and with which certificates.

use super::*;

/// With TLS nobody calls without a certificate of the CA, but for probes; new certificates are used at once.
#[tokio::test(flavor = "multi_thread")]
async fn callers_show_a_certificate() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let place = dir.path().join("certificates");
    pod.tls = Some(Certificates::issue(&place)?);
    let mut serving = pod.start_serve().await?;
    let refused = |answer: Result<tonic::Response<api::StatusResponse>, tonic::Status>| {
        answer.map_or_else(|status| status.code(), |_| tonic::Code::Ok)
    };
    let mut nobody = pod.client(false).await?;
    ensure!(refused(nobody.status(api::StatusRequest {}).await) == tonic::Code::Unauthenticated);
    let initialize = nobody.initialize(api::InitializeRequest::default()).await.map(drop);
    ensure!(initialize.is_err_and(|status| status.code() == tonic::Code::Unauthenticated));
    let mut somebody = pod.client(true).await?;
    ensure!(refused(somebody.status(api::StatusRequest {}).await) == tonic::Code::Ok);
    // Probes have none.
    let ca = reqwest::Certificate::from_pem(&std::fs::read(place.join("ca.crt"))?)?;
    let http = reqwest::Client::builder().tls_certs_only([ca]).build()?;
    let get = |path: &'static str| {
        let request = http.get(format!("{}{path}", pod.url()));
        async move { anyhow::Ok(request.send().await?.status().as_u16()) }
    };
    ensure!(get("/healthz").await? == 200 && get("/readyz").await? == 503);
    ensure!(get("/helthz").await? == 404);
    // Plain text to it, and a client that says nothing, harm nobody.
    ensure!(reqwest::get(pod.url().replace("https", "http") + "/healthz").await.is_err());
    let address = pod.url().trim_start_matches("https://").to_owned();
    let silent = std::net::TcpStream::connect(&address)?;
    let (launched, _) = pod.start_etcd().await?;
    ensure!(get("/readyz").await? == 200);
    // Another CA: who is of the old one is refused, connections that stand stay; what cannot be used changes nothing.
    let old = std::fs::read(place.join("server.crt"))?;
    std::fs::write(place.join("server.crt"), "not a certificate")?;
    ensure!(refused(pod.client(true).await?.status(api::StatusRequest {}).await) == tonic::Code::Ok);
    std::fs::write(place.join("server.crt"), &old)?;
    let expired = Certificates::issue_until(&dir.path().join("expired"), &["127.0.0.1"], 2020)?;
    let (cert, key) = expired.server();
    let old_key = std::fs::read(place.join("server.key"))?;
    std::fs::copy(key, place.join("server.key"))?;
    std::fs::copy(cert, place.join("server.crt"))?;
    ensure!(refused(pod.client(true).await?.status(api::StatusRequest {}).await) == tonic::Code::Ok);
    serving.logs("the new certificate of the API is not valid now", LONG).await?;
    std::fs::write(place.join("server.crt"), &old)?;
    std::fs::write(place.join("server.key"), &old_key)?;
    let mut stranger = pod.clone();
    stranger.tls = Some(Certificates::issue(&dir.path().join("others"))?);
    ensure!(stranger.client(true).await.is_err(), "a client trusts a server of another CA");
    Certificates::issue(&place)?;
    ensure!(refused(pod.client(true).await?.status(api::StatusRequest {}).await) == tonic::Code::Ok);
    ensure!(refused(somebody.status(api::StatusRequest {}).await) == tonic::Code::Ok);
    serving.logs("certificates of the API have changed", LONG).await?;
    serving.logs("the ones before stay in use", LONG).await?;
    drop(silent);
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A new CA and new certificates, as Kubernetes puts them in place, while somebody calls and etcd is backed up.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_rotate_under_load() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    pod.more = "snapshots: {deltaPeriod: 1s}\n".into();
    let (old, new) = (Certificates::issue(&dir.path().join("old"))?, Certificates::issue(&dir.path().join("new"))?);
    let expired = Certificates::issue_until(&dir.path().join("expired"), &["127.0.0.1"], 2020)?;
    let live = dir.path().join("live");
    let put = |version: u32, cas: &[&Certificates], of: &Certificates| -> Result<()> {
        let place = dir.path().join(format!("v{version}"));
        Certificates::mixed(&place, cas, of)?;
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&place, &link)?;
        Ok(std::fs::rename(&link, &live)?)
    };
    put(1, &[&old], &old)?;
    pod.tls = Some(Certificates::at(&live));
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    backed_up(&pod).await?;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut standing = pod.client(true).await?;
    let watched = stopped.clone();
    let one_connection = tokio::spawn(async move {
        let mut calls = 0;
        while !*watched.borrow() {
            standing.status(api::StatusRequest {}).await?;
            calls += 1;
        }
        anyhow::Ok(calls)
    });
    let (caller, place) = (pod.clone(), live.clone());
    let many_connections = tokio::spawn(async move {
        let mut calls = 0;
        while !*stopped.borrow() {
            // All files of one version, as who mounts them reads them.
            let now = caller.with_tls(Certificates::at(&place.canonicalize()?));
            now.client(true).await?.status(api::StatusRequest {}).await?;
            calls += 1;
        }
        anyhow::Ok(calls)
    });
    let mut written = 0;
    for (version, cas, of) in [(2, vec![&old, &new], &old), (3, vec![&old, &new], &new), (4, vec![&new], &new)] {
        for _ in 0..100 {
            client.put(format!("k{written}"), "v", None).await?;
            written += 1;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        put(version, &cas, of)?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.send(true)?;
    let calls = (one_connection.await??, many_connections.await??);
    ensure!(calls.0 > 100 && calls.1 > 20, "{calls:?}");
    pod.back_up(api::Kind::Delta).await?;
    let ca = reqwest::Certificate::from_pem(&std::fs::read(new.ca())?)?;
    let http = reqwest::Client::builder().tls_certs_only([ca]).build()?;
    let metrics = http.get(format!("{}/metrics", pod.url())).send().await?.text().await?;
    for kind in ["Full", "Incr"] {
        let failed = format!("etcdbr_snapshot_duration_seconds_count{{kind=\"{kind}\",succeeded=\"false\"}} 0\n");
        ensure!(metrics.contains(&failed), "{metrics}");
    }
    // Who comes with the old CA's, with one that has expired, or with a stranger's, is not let in.
    put(5, &[&new, &expired], &new)?;
    let nobody = [
        Certificates::mixed(&dir.path().join("n1"), &[&new], &old)?,
        Certificates::mixed(&dir.path().join("n2"), &[&new], &expired)?,
    ];
    for tls in nobody {
        let caller = pod.with_tls(tls);
        let answer = async { anyhow::Ok(caller.client(true).await?.status(api::StatusRequest {}).await?) };
        ensure!(answer.await.is_err(), "{:?} is let in", caller.tls);
    }
    pod.ctl(["status"]).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    state::same(&before, &store.restore_and_read(&pod.member).await?)
}

/// Many who never end their request keep nobody from being answered, and go.
#[tokio::test(flavor = "multi_thread")]
async fn who_never_ends_a_request_goes() -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let serving = pod.start_serve().await?;
    let address = pod.url().trim_start_matches("http://").to_owned();
    let mut slow = Vec::new();
    for _ in 0..300 {
        let mut stream = tokio::net::TcpStream::connect(&address).await?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ").await?;
        slow.push(tokio::spawn(async move {
            let (mut read, mut write) = stream.into_split();
            let mut answer = [0; 512];
            let drip = async {
                while write.write_all(b"y").await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                }
            };
            tokio::select! {
                () = drip => 0,
                read = read.read(&mut answer) => read.unwrap_or(0),
            }
        }));
    }
    let answered = tokio::time::timeout(Duration::from_secs(20), reqwest::get(format!("{}/healthz", pod.url()))).await;
    ensure!(answered??.status() == 200);
    pod.ctl(["status"]).run().await?.expect(0)?;
    ensure!(!slow.iter().any(tokio::task::JoinHandle::is_finished), "they were not let in");
    let ended = tokio::time::timeout(Duration::from_secs(100), futures::future::join_all(slow)).await;
    ended.context("slow clients are still there")?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}
