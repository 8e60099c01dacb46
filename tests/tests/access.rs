//! Who may call, how, and what becomes of calls that are cut off; and what happens to backups when clocks jump and credentials
//! are revoked while a sidecar serves.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proto::Message;
use proto::sidecar as api;
use tests::certificates::Certificates;
use tests::etcd::Member;
use tests::minio::Minio;
use tests::pod::Pod;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;
use tests::{eventually, succeed};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const LONG: Duration = Duration::from_secs(60);

/// The gRPC status of a call with an empty message, when the server answers with nothing else; `None` when it answers more.
async fn grpc_status(client: &reqwest::Client, url: &str, path: &str) -> Result<Option<String>> {
    let call = client.post(format!("{url}{path}")).header("content-type", "application/grpc").header("te", "trailers");
    let answer = call.body(vec![0; 5]).send().await?;
    Ok(answer.headers().get("grpc-status").map(|code| code.to_str().map(str::to_owned)).transpose()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_certificate_learns_little() -> Result<()> {
    const UNAUTHENTICATED: &str = "16";
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let tls = Certificates::issue(&dir.path().join("certificates"))?;
    pod.tls = Some(tls.clone());
    let serving = pod.start_serve().await?;
    let ca = reqwest::Certificate::from_pem(&std::fs::read(tls.ca())?)?;
    let nobody = reqwest::Client::builder().tls_certs_only([ca]).build()?;
    let described = prost_types::FileDescriptorSet::decode(proto::sidecar::DESCRIPTOR)?;
    let ours = described.file.iter().find(|file| file.package() == "steward.sidecar.v1").context("not described")?;
    let methods = ours.service.iter().flat_map(|service| &service.method).map(prost_types::MethodDescriptorProto::name);
    let mut paths: Vec<_> = methods.map(|method| format!("/steward.sidecar.v1.Sidecar/{method}")).collect();
    ensure!(paths.len() >= 11, "{paths:?}");
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    paths.push(reflection.to_owned());
    for path in &paths {
        let code = grpc_status(&nobody, &pod.url(), path).await?;
        ensure!(code.as_deref() == Some(UNAUTHENTICATED), "{path} answers {code:?}");
    }
    let health = grpc_status(&nobody, &pod.url(), "/grpc.health.v1.Health/Check").await?;
    ensure!(health.is_none_or(|code| code == "0"), "health needs a certificate");
    for (path, method) in [
        ("/snapshot/full", "GET"),
        ("/snapshot/full", "POST"),
        ("/snapshot/delta", "GET"),
        ("/snapshot/latest", "GET"),
        ("/", "GET"),
    ] {
        let request = nobody.request(method.parse()?, format!("{}{path}", pod.url()));
        let code = request.send().await?.status();
        ensure!(code == 401, "{method} {path} answers {code}");
    }
    ensure!(pod.status().await?.phase() == api::Phase::New, "somebody was let in");
    // Which is for probes, for Prometheus, and for etcd-wrapper where that is configured.
    for path in ["/healthz", "/metrics", "/initialization/status"] {
        let code = nobody.get(format!("{}{path}", pod.url())).send().await?.status();
        ensure!(code == 200, "{path} answers {code}");
    }
    // With one they are answered.
    let asked = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(pod.channel(true).await?);
    let mut answers = reflection.server_reflection_info(futures::stream::iter([asked])).await?.into_inner();
    let answer = answers.message().await?.and_then(|answer| answer.message_response);
    let Some(MessageResponse::ListServicesResponse(listed)) = answer else { bail!("{answer:?}") };
    let names: Vec<_> = listed.service.iter().map(|service| service.name.as_str()).collect();
    for service in ["steward.sidecar.v1.Sidecar", "grpc.health.v1.Health"] {
        ensure!(names.contains(&service), "{names:?}");
    }
    // The protocol must be of this decade, or nearly.
    let address = pod.url().trim_start_matches("https://").to_owned();
    for (version, works) in [("-tls1_1", false), ("-tls1_2", true), ("-tls1_3", true)] {
        let mut client = tokio::process::Command::new("openssl");
        client.args(["s_client", "-connect", &address, version, "-cipher", "DEFAULT@SECLEVEL=0"]);
        let shaken = succeed(&mut client).await;
        ensure!(shaken.is_ok() == works, "{version}: {shaken:?}");
    }
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// More of them than there are places: who comes is let in, and asks what it may.
#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_keeps_nobody_out() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    pod.tls = Some(Certificates::issue(&dir.path().join("tls"))?);
    let serving = pod.start_serve().await?;
    let mut known = pod.client(true).await?;
    let address = pod.url().trim_start_matches("https://").to_owned();
    let mut silent = Vec::new();
    for _ in 0..700 {
        silent.push(tokio::net::TcpStream::connect(&address).await?);
    }
    let asked = std::time::Instant::now();
    // One may be turned away whose turn was too long in coming.
    eventually(Duration::from_secs(8), || async { pod.ctl(["status"]).run().await?.expect(0).map(drop) }).await?;
    ensure!(pod.http()?.get(format!("{}/healthz", pod.url())).send().await?.status() == 200);
    // One that has shown a certificate stays, whoever comes.
    known.status(api::StatusRequest {}).await?;
    ensure!(asked.elapsed() < Duration::from_secs(9), "it took {:?}", asked.elapsed());
    drop(silent);
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// Who asks and does not read has what it asked for wait in memory: that is little.
#[tokio::test(flavor = "multi_thread")]
async fn one_connection_has_few_calls_at_once() -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const SETTINGS: u8 = 4;
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let serving = pod.start_serve().await?;
    let mut stream = tokio::net::TcpStream::connect(pod.url().trim_start_matches("http://")).await?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    stream.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await?;
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    ensure!(head[3] == SETTINGS, "{head:?}");
    let mut settings = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut settings).await?;
    let most = settings.chunks_exact(6).find(|setting| setting[..2] == MAX_CONCURRENT_STREAMS.to_be_bytes());
    let most = u32::from_be_bytes(most.context("no limit")?[2..].try_into()?);
    ensure!((1..=32).contains(&most), "{most}");
    drop(stream);
    serving.terminate().await?.expect(0)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn to_serve_without_tls_is_said_out_loud() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    pod.serve()?;
    let config = dir.path().join("pod/sidecar.yaml");
    std::fs::write(&config, std::fs::read_to_string(&config)?.replace("  insecure: true\n", ""))?;
    let serve = tests::program::Sidecar::new(["serve", "--config", &config.display().to_string(), "--insecure"]);
    let mut serving = serve.spawn()?;
    serving.logs("everybody who reaches it may call everything", LONG).await?;
    ensure!(serving.log().contains("WARN"), "{}", serving.log());
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// Two who ask for an initialization while one runs hear of the same one, and of why it waits.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_again_joins_what_runs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pods = Pod::cluster(dir.path(), "3.6", &["a", "b", "c"], None)?;
    let pod = &mut pods[0];
    // The others are waited for.
    pod.etcd_more = "initial-cluster-state: existing\n".into();
    let mut serving = pod.start_serve().await?;
    let hears = async || {
        let mut told = pod.client(true).await?.initialize(api::InitializeRequest::default()).await?.into_inner();
        while let Some(progress) = told.message().await? {
            if progress.phase == "wait" {
                return Ok(progress.text);
            }
        }
        anyhow::bail!("it ended")
    };
    let (one, two) = tokio::try_join!(hears(), hears())?;
    ensure!(one == two && one.contains("the configuration says that the cluster exists"), "{one} and {two}");
    let now = pod.status().await?;
    ensure!(now.phase() == api::Phase::Initializing && now.reason == one, "{now:?}");
    serving.logs("decided what becomes of the data", LONG).await?;
    let log = serving.log();
    ensure!(log.matches("decided what becomes of the data").count() == 1, "{log}");
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A caller that goes away and asks again with the same id has it done once.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_is_done_once() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&place)))?;
    pod.more = "snapshots: {deltaPeriod: 1h, fullBytesPerSecond: 5000000}\n".into();
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    for n in 0..60 {
        client.put(format!("k{n}"), vec![b'x'; 1_000_000], None).await?;
    }
    pod.back_up(api::Kind::Full).await?;
    let fulls = || Ok::<_, anyhow::Error>(std::fs::read_dir(place.join("t00000001/full"))?.count());
    let before = fulls()?;
    // At its pace it takes more than ten seconds.
    for patience in [300, 3000, 50] {
        let cut = tokio::time::timeout(Duration::from_millis(patience), pod.take(api::Kind::Full, "once")).await;
        ensure!(cut.is_err(), "a full snapshot of 60 MB takes no time");
    }
    let done = pod.take(api::Kind::Full, "once").await?;
    ensure!(done.snapshots.len() == 1 && fulls()? == before + 1, "{} fulls more", fulls()? - before);
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// The clock jumps ten years ahead and twenty back while a sidecar serves: it goes on, and all can be restored.
#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_jump_cost_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    pod.tls = Some(Certificates::issue(&dir.path().join("certificates"))?);
    pod.more = "snapshots: {deltaPeriod: 1s}\nretention: {policy: exponential, deltas: 1h, period: 1s}\n".into();
    let clock = dir.path().join("clock");
    std::fs::write(&clock, "+0")?;
    let library = tests::library("faketime/libfaketime.so.1")?;
    let serve = pod.serve()?.env("LD_PRELOAD", library.display().to_string());
    let serve = serve.env("FAKETIME_TIMESTAMP_FILE", clock.display().to_string());
    // Only the clock that people set jumps, as on a machine; it is looked at for each call.
    let serve = serve.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let mut serving = serve.spawn()?;
    serving.logs("the API is served", LONG).await?;
    let (launched, mut client) = pod.start_etcd().await?;
    pod.back_up(api::Kind::Full).await?;
    for (seed, jump) in [(1, "+3650d"), (2, "-3650d"), (3, "+0")] {
        Workload::of(seed).run(&mut client).await?;
        pod.back_up(api::Kind::Delta).await?;
        std::fs::write(&clock, jump)?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        Workload::of(seed + 10).run(&mut client).await?;
        pod.back_up(api::Kind::Delta).await?;
        pod.back_up(api::Kind::Full).await?;
    }
    let names = tests::objects(&dir.path().join("store"))?;
    let years = |at: &str| names.iter().any(|name| name.to_string_lossy().contains(at));
    ensure!(years("-209") || years("-208") || years("-21"), "the clock did not jump: {names:?}");
    tests::workload::expire(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    let before = state::read(&mut client).await?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let member = Member::single("3.6", &dir.path().join("restored"))?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// Credentials that are revoked while it serves: that is said, nobody is let in, and nothing is lost once there are new ones.
#[tokio::test(flavor = "multi_thread")]
async fn revoked_credentials_are_said_and_lose_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let secret = dir.path().join("secret");
    let (store, good) = minio.store_by_secret("backups/a", &secret)?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    pod.more = "snapshots: {deltaPeriod: 1s}\n".into();
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    pod.back_up(api::Kind::Full).await?;
    Workload::of(1).run(&mut client).await?;
    std::fs::write(secret.join("secretAccessKey"), "revoked")?;
    Workload::of(2).run(&mut client).await?;
    let said = || async {
        let error = pod.status().await?.backup.context("no backup")?.error;
        ensure!(error.contains("s3://backups/a"), "{error:?}");
        Ok(())
    };
    eventually(LONG, said).await.with_context(|| serving.log())?;
    ensure!(!serving.log().contains("revoked") && !serving.log().contains(&good), "a secret is logged");
    Workload::of(3).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    std::fs::write(secret.join("secretAccessKey"), &good)?;
    pod.back_up(api::Kind::Delta).await?;
    let well = || async {
        let error = pod.status().await?.backup.context("no backup")?.error;
        ensure!(error.is_empty(), "{error}");
        Ok(())
    };
    eventually(LONG, well).await?;
    let before = state::read(&mut client).await?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let member = Member::single("3.6", &dir.path().join("restored"))?;
    state::same(&before, &store.restore_and_read(&member).await?)
}
