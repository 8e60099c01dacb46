//! Every store does what a backup needs of it: many parts, names given at the end, ranges, listing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use tests::azurite::Azurite;
use tests::etcd::Member;
use tests::garage::Garage;
use tests::gcs::FakeGcs;
use tests::google::Google;
use tests::listing::{self, Listing};
use tests::minio::Minio;
use tests::program::Sidecar;
use tests::proxy::{Fault, Message, Proxy, forward};
use tests::state;
use tests::store::Store;

/// Of 1 MB each.
async fn write_blobs(client: &mut Client, blobs: u32) -> Result<()> {
    for n in 0..blobs {
        let value = tests::noise(1_000_000);
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    Ok(())
}

/// A full of several parts, deltas, a listing, every byte of it read, and a restore.
async fn keeps_backups(store: &Store, nowhere: &Store) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    write_blobs(&mut client, 25).await?;
    store.once("full", &member).run().await?.expect(0)?;
    for n in 0..5u32 {
        client.put("x", n.to_string(), None).await?;
        store.once("delta", &member).run().await?.expect(0)?;
    }
    let before = state::read(&mut client).await?;
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["foreign"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["timelines"][0]["deltas"].as_array().is_some_and(|deltas| deltas.len() == 5), "{listed}");
    store.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)?;
    // An emulator that answers otherwise than what it stands for is no measure.
    if !nowhere.url.starts_with("gs:") {
        nowhere.command("list").run().await?.expect(11)?.says(&nowhere.url)?;
    }
    let collected =
        store.command("gc").args(["--policy", "limit-based", "--max-backups", "1"]).run().await?.expect(0)?;
    ensure!(collected.stdout.contains("deleted 0 objects"), "{}", collected.stdout);
    store.command("compact").run().await?.expect(0)?;
    store.command("gc").args(["--policy", "limit-based", "--max-backups", "1"]).run().await?.expect(0)?;
    let listed = store.list().await?;
    ensure!(listed["timelines"][0]["deltas"].as_array().is_some_and(Vec::is_empty), "{listed}");
    state::same(&before, &store.restore_and_read(&member).await?)?;
    Ok(())
}

/// What doctor says of one thing.
async fn doctor(store: &Store, code: i32, what: &str) -> Result<String> {
    let report = store.command("doctor").args(["-o", "json"]).run().await?.expect(code)?.json()?;
    let findings = report["findings"].as_array().context("no findings")?;
    let finding = findings.iter().find(|finding| finding["what"] == what).with_context(|| report.to_string())?;
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    Ok(finding["health"].to_string() + ": " + &finding["found"].to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, nowhere) = (dir.path().join("a/b"), dir.path().join("nowhere"));
    keeps_backups(&Store::directory(&store), &Store::directory(&nowhere)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn minio_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    keeps_backups(&minio.store("backups/a/b"), &minio.store("nowhere/a")).await?;
    ensure!(doctor(&minio.store("backups/c"), 0, "create once").await?.starts_with("\"good\""));
    Ok(())
}

/// A server that overwrites what should be created once.
#[tokio::test(flavor = "multi_thread")]
async fn garage_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let garage = Garage::start(&dir.path().join("garage"), "backups").await?;
    keeps_backups(&garage.store("backups/a/b"), &garage.store("nowhere/a")).await?;
    let said = doctor(&garage.store("backups/c"), 0, "create once").await?;
    ensure!(said.contains("overwrites the first"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn azurite_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let azurite = Azurite::start(&dir.path().join("log"), "backups").await?;
    keeps_backups(&azurite.store("backups/a/b"), &azurite.store("nowhere/a")).await?;
    ensure!(doctor(&azurite.store("backups/c"), 0, "create once").await?.starts_with("\"good\""));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn fake_gcs_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let gcs = FakeGcs::start(&dir.path().join("log"), "backups").await?;
    keeps_backups(&gcs.store("backups/a/b"), &gcs.store("nowhere/a")).await?;
    ensure!(doctor(&gcs.store("backups/c"), 0, "create once").await?.starts_with("\"good\""));
    Ok(())
}

/// The objects of timeline 0, by name, the oldest first.
async fn of_the_predecessor(store: &Store) -> Result<Vec<String>> {
    let listed = store.list().await?;
    let fulls = listed["timelines"][0]["fulls"].as_array().with_context(|| listed.to_string())?;
    Ok(fulls.iter().filter_map(|full| full["name"].as_str().map(str::to_owned)).collect())
}

/// Three fulls in the predecessor's layout: what the newest restores, and what the one before does once the newest has been
/// excluded by its provider's mark.
async fn a_mark_excludes(store: &Store, exclude: impl AsyncFn(&str) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for n in 0..3u32 {
        client.put("x", n.to_string(), None).await?;
        store.once("full", &member).args(["--layout", "gardener-v2"]).run().await?.expect(0)?;
    }
    let fulls = of_the_predecessor(store).await?;
    ensure!(fulls.len() == 3, "{fulls:?}");
    let restored = async |name: &str| {
        let target = dir.path().join(name);
        store.restore(&target).run().await?.expect(0)?;
        anyhow::Ok(state::of_directory(&target)?.0)
    };
    let newest = restored("before").await?;
    exclude(&fulls[2]).await?;
    ensure!(of_the_predecessor(store).await? == fulls[..2], "{} is still listed", fulls[2]);
    ensure!(restored("after").await? == newest - 1, "what is excluded was restored");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn azurite_excludes_what_is_tagged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let azurite = Azurite::start(&dir.path().join("log"), "backups").await?;
    a_mark_excludes(&azurite.store("backups/a b/c"), async |name| {
        let tags = "<Tags><TagSet><Tag><Key>x-etcd-snapshot-exclude</Key><Value>true</Value></Tag></TagSet></Tags>";
        azurite.send("PUT", &format!("backups/a%20b/c/{name}?comp=tags"), tags).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn fake_gcs_excludes_what_has_the_metadata() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let gcs = FakeGcs::start(&dir.path().join("log"), "backups").await?;
    a_mark_excludes(&gcs.store("backups/a/b"), async |name| {
        let object = format!("a/b/{name}").replace('/', "%2F");
        gcs.send("PATCH", &format!("b/backups/o/{object}"), r#"{"metadata":{"x-etcd-snapshot-exclude":"true"}}"#).await
    })
    .await
}

/// On a versioned bucket the oldest version counts, whatever was put over it, and a deleted object too, unless it was tagged.
#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_version_counts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let enable = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    minio.send("PUT", "backups?versioning", enable).await?;
    let store = minio.store("backups/a b+c");
    let place = "backups/a%20b%2Bc";
    a_mark_excludes(&store, async |name| {
        let tags =
            "<Tagging><TagSet><Tag><Key>x-etcd-snapshot-exclude</Key><Value>true</Value></Tag></TagSet></Tagging>";
        minio.send("PUT", &format!("{place}/{name}?tagging"), tags).await?;
        ensure!(of_the_predecessor(&store).await?.len() == 3, "a tag alone must not exclude");
        minio.send("DELETE", &format!("{place}/{name}"), "").await
    })
    .await?;
    let fulls = of_the_predecessor(&store).await?;
    minio.send("PUT", &format!("{place}/{}", fulls[0]), "overwritten").await?;
    minio.send("DELETE", &format!("{place}/{}", fulls[1]), "").await?;
    ensure!(of_the_predecessor(&store).await? == fulls, "what was deleted is not listed");
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    // A deletion of ours is of all versions: what was put over the one that counted does not count then.
    store.command("gc").args(["--policy", "limit-based", "--max-backups", "1"]).run().await?.expect(0)?;
    ensure!(of_the_predecessor(&store).await? == fulls[1..], "{:?}", of_the_predecessor(&store).await?);
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    Ok(())
}

/// Two who begin a timeline in the same moment, where nothing stops the second from overwriting the first: one of them has
/// it, and the other notices.
#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_that_begin_at_once_do_not_share_a_timeline() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let garage = Garage::start(&dir.path().join("garage"), "backups").await?;
    let store = garage.store("backups/both");
    let mut writers = Vec::new();
    let mut members = Vec::new();
    for name in ["one", "two"] {
        let member = Member::single("3.6", &dir.path().join(name))?;
        let etcd = member.start().await?;
        etcd.client().await?.put("whose", name, None).await?;
        members.push((member, etcd));
    }
    for (member, _) in &members {
        writers.push(store.follow(member, "1s").spawn()?);
    }
    for writer in &mut writers {
        writer.logs("full snapshot is in the store", Duration::from_secs(60)).await?;
    }
    for writer in writers {
        writer.terminate().await?.expect(0)?;
    }
    let listed = store.list().await?;
    let timelines = listed["timelines"].as_array().context("no timelines")?;
    ensure!(timelines.len() == 2 && timelines[0]["clusterId"] != timelines[1]["clusterId"], "{listed}");
    store.command("verify").run().await?.expect(0)?;
    Ok(())
}

/// One request of a run goes wrong, each in turn and in every way: the command either says that it failed, or what it says is
/// so; and the next run is not held up by what is left.
async fn one_request_goes_wrong(
    healthy: &Store,
    port: u16,
    faults: impl IntoIterator<Item = (usize, Fault)>,
) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    write_blobs(&mut client, 12).await?;
    for (n, fault) in faults {
        let healthy = Store { url: format!("{}/{n}", healthy.url), ..healthy.clone() };
        let proxy = Proxy::before(port, Arc::new(move |at, _| if at == n { fault } else { Fault::None })).await?;
        let through = healthy.through(&proxy);
        let mut failed = 0;
        let full = through.once("full", &member).run().await?;
        failed += usize::from(full.code != 0);
        if full.code != 0 {
            ensure!(full.code == 1, "{}", full.stderr);
            healthy.once("full", &member).run().await?.expect(0)?;
        }
        client.put("x", n.to_string(), None).await?;
        let delta = through.once("delta", &member).run().await?;
        failed += usize::from(delta.code != 0);
        if delta.code != 0 {
            healthy.once("delta", &member).run().await?.expect(0)?;
        }
        let verified = through.command("verify").run().await?;
        failed += usize::from(verified.code != 0);
        ensure!([0, 1].contains(&verified.code), "request {n}: {}{}", verified.stdout, verified.stderr);
        let target = dir.path().join(format!("restored-{n}"));
        let restored = through.restore(&target).run().await?;
        failed += usize::from(restored.code != 0);
        if restored.code != 0 {
            ensure!(restored.code == 1 && !target.exists(), "request {n}: {}", restored.stderr);
            healthy.restore(&target).run().await?.expect(0)?;
        }
        // One fault, one failure at most.
        ensure!(failed <= 1 && proxy.seen() > n, "request {n}: {failed} commands failed of {} requests", proxy.seen());
        let live = state::read(&mut client).await?;
        let (revision, keys, _) = state::of_directory(&target)?;
        ensure!(revision == live.revision && keys == live.keys, "request {n}: what was restored differs");
        std::fs::remove_dir_all(&target)?;
        healthy.command("verify").run().await?.expect(0)?;
        let listed = healthy.list().await?;
        ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "request {n}: {listed}");
    }
    Ok(())
}

/// The same for what changes a store without an etcd: a compaction, a copy and a collection.
async fn one_request_of_upkeep_goes_wrong(fault: Fault, requests: impl Iterator<Item = usize>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let original = minio.store("backups/original");
    write_blobs(&mut client, 9).await?;
    original.once("full", &member).run().await?.expect(0)?;
    for n in 0..3u32 {
        client.put("x", n.to_string(), None).await?;
        original.once("delta", &member).run().await?.expect(0)?;
    }
    let live = state::read(&mut client).await?;
    let same = async |store: &Store, what: &str| {
        let target = dir.path().join("restored");
        store.restore(&target).run().await?.expect(0)?;
        let (revision, keys, _) = state::of_directory(&target)?;
        std::fs::remove_dir_all(&target)?;
        ensure!(revision == live.revision && keys == live.keys, "{what}: what was restored differs");
        anyhow::Ok(())
    };
    for n in requests {
        let (healthy, copied) = (minio.store(&format!("backups/{n}")), minio.store(&format!("backups/{n}-copied")));
        original.command("copy").args(["--to", &healthy.url]).run().await?.expect(0)?;
        let proxy =
            Proxy::before(minio.port(), Arc::new(move |at, _| if at == n { fault } else { Fault::None })).await?;
        let through = healthy.through(&proxy);
        let mut failed = Vec::new();
        for arguments in [
            vec!["compact"],
            vec!["copy", "--to", &copied.url],
            vec!["gc", "--policy", "limit-based", "--max-backups", "1"],
        ] {
            let (name, rest) = arguments.split_first().context("no command")?;
            let run = through.command(name).args(rest.iter().copied()).run().await?;
            if run.code != 0 {
                // One fault, one failure at most; what it left does not hold up the next.
                failed.push(*name);
                ensure!(run.code == 1, "request {n}: {arguments:?}: {}: {}", run.code, run.stderr);
                same(&healthy, &format!("request {n}, {name} failed")).await?;
                healthy.command(name).args(rest.iter().copied()).run().await?.expect(0)?;
            }
        }
        ensure!(failed.len() <= 1, "request {n}: {failed:?} failed");
        for store in [&healthy, &copied] {
            same(store, &format!("request {n}, {}", store.url)).await?;
            store.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
        }
        let listed = healthy.list().await?;
        let timeline = &listed["timelines"][0];
        ensure!(timeline["deltas"].as_array().is_some_and(Vec::is_empty), "request {n}: not collected: {listed}");
        ensure!(proxy.seen() > 20, "only {} requests went through the proxy", proxy.seen());
        if proxy.seen() <= n {
            return Ok(());
        }
    }
    Ok(())
}

macro_rules! goes_wrong {
    ($($name:ident: $server:ident($fault:expr, $requests:expr);)*) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $name() -> Result<()> {
            $server($fault, $requests).await
        })*
    };
}

async fn minio(fault: Fault, requests: impl Iterator<Item = usize>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    one_request_goes_wrong(&minio.store("backups"), minio.port(), requests.map(|n| (n, fault))).await
}

// A full, a delta, a verification and a restore are about thirty requests.
goes_wrong! {
    an_answer_of_500: minio(Fault::Status(500), 0..10);
    an_answer_of_503: minio(Fault::Status(503), 0..24);
    an_answer_to_wait: minio(Fault::Busy(1), 0..10);
    a_connection_that_is_reset: minio(Fault::Reset, 0..24);
    an_answer_that_is_lost: minio(Fault::LostAnswer, 0..30);
    an_answer_that_is_late: minio(Fault::Slow(Duration::from_secs(2)), 0..10);
    an_answer_that_is_cut: minio(Fault::Short, 0..30);
    upkeep_with_an_answer_of_500: one_request_of_upkeep_goes_wrong(Fault::Status(500), (0..).step_by(11));
    upkeep_with_a_connection_that_is_reset: one_request_of_upkeep_goes_wrong(Fault::Reset, (1..).step_by(9));
    upkeep_with_an_answer_that_is_lost: one_request_of_upkeep_goes_wrong(Fault::LostAnswer, (0..).step_by(3));
    upkeep_with_an_answer_that_is_cut: one_request_of_upkeep_goes_wrong(Fault::Short, (2..).step_by(5));
}

/// All faults in turn, each at another request.
fn one_of_each() -> impl Iterator<Item = (usize, Fault)> {
    let faults = [
        Fault::LostAnswer,
        Fault::Status(500),
        Fault::Short,
        Fault::Reset,
        Fault::Busy(1),
        Fault::Slow(Duration::from_secs(1)),
        Fault::Status(503),
    ];
    // Fifteen requests, each with another fault than seven requests before.
    (0..15).map(move |n| (2 * n, faults[n % faults.len()]))
}

/// What gives a large object its staging name, and then its own: asked again, MinIO says that it exists, and Garage that
/// there is no such upload.
async fn answers_that_end_an_upload_are_lost(healthy: &Store, port: u16) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    write_blobs(&mut client, 12).await?;
    let lost = Arc::new(Mutex::new(Vec::new()));
    let decide = {
        let lost = lost.clone();
        move |_: usize, request: &Message| {
            let Some((name, _)) = request.line.strip_prefix("POST ").and_then(|line| line.split_once("?uploadId="))
            else {
                return Fault::None;
            };
            let mut lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
            if lost.iter().any(|other| other == name) {
                return Fault::None;
            }
            lost.push(name.to_owned());
            Fault::LostAnswer
        }
    };
    let proxy = Proxy::before(port, Arc::new(decide)).await?;
    healthy.through(&proxy).once("full", &member).run().await?.expect(0)?;
    let lost = lost.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(lost.len() == 2 && lost[1].contains("/full/"), "{lost:?}");
    let listed = healthy.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["timelines"][0]["fulls"].as_array().is_some_and(|fulls| fulls.len() == 1), "{listed}");
    healthy.command("verify").run().await?.expect(0)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_end_an_upload_to_minio_are_lost() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    answers_that_end_an_upload_are_lost(&minio.store("backups"), minio.port()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_end_an_upload_to_garage_are_lost() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let garage = Garage::start(&dir.path().join("garage"), "backups").await?;
    answers_that_end_an_upload_are_lost(&garage.store("backups"), garage.port()).await
}

/// Azure may answer that a copy has begun: what is copied from stays until it has ended, and one that fails is made again.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_azure_takes_its_time() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let azurite = Azurite::start(&dir.path().join("log"), "backups").await?;
    let healthy = azurite.store("backups");
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    write_blobs(&mut etcd.client().await?, 12).await?;
    let told = Arc::new(Mutex::new(Vec::new()));
    let serve = {
        let (port, told) = (azurite.port(), told.clone());
        move |request: Message| -> std::pin::Pin<Box<dyn Future<Output = Result<Message>> + Send>> {
            let told = told.clone();
            Box::pin(async move {
                let mut answer = forward(port, &request).await?;
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                let copying = ["pending", "failed", "pending", "pending"];
                if request.line.starts_with("HEAD ") && request.line.contains("/full/") {
                    let asked = told.iter().filter(|line: &&String| line.starts_with("HEAD ")).count();
                    if let Some(status) = copying.get(asked) {
                        answer.headers.retain(|(name, _)| name != "x-ms-copy-status");
                        answer.headers.push(("x-ms-copy-status".to_owned(), (*status).to_owned()));
                    }
                }
                // What is deleted is in the body.
                let is_delete = request.line.contains("comp=batch");
                let is_look = request.line.starts_with("HEAD ") && request.line.contains("/full/");
                if is_delete || is_look || request.header("x-ms-copy-source").is_some() {
                    told.push(format!("{}{}", request.line, String::from_utf8_lossy(&request.body)));
                }
                Ok(answer)
            })
        }
    };
    let proxy = Proxy::start(Arc::new(serve), Arc::new(|_, _| Fault::None)).await?;
    healthy.through(&proxy).once("full", &member).run().await?.expect(0)?;
    let told = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let methods: Vec<_> = told.iter().filter_map(|line| line.split(' ').next()).collect();
    // Of the second copy the last question is answered as Azurite does; then the staging copy goes.
    let expected = ["PUT", "HEAD", "HEAD", "POST", "PUT", "HEAD", "HEAD", "HEAD", "POST"];
    ensure!(methods == expected && !told[3].contains("uploading-") && told[8].contains("uploading-"), "{told:#?}");
    healthy.command("verify").run().await?.expect(0)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_to_garage_goes_wrong() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let garage = Garage::start(&dir.path().join("garage"), "backups").await?;
    one_request_goes_wrong(&garage.store("backups"), garage.port(), one_of_each()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_to_azurite_goes_wrong() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let azurite = Azurite::start(&dir.path().join("log"), "backups").await?;
    one_request_goes_wrong(&azurite.store("backups"), azurite.port(), one_of_each()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_to_fake_gcs_goes_wrong() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let gcs = FakeGcs::start(&dir.path().join("log"), "backups").await?;
    one_request_goes_wrong(&gcs.store("backups"), gcs.port(), one_of_each()).await
}

/// Pages of one object, empty pages, objects out of order and twice: the protocol allows it all.
#[tokio::test(flavor = "multi_thread")]
async fn listings_come_in_strange_pages() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let proxy = listing::before(minio.port(), Listing::Strange).await?;
    let healthy = minio.store("backups/a");
    let store = healthy.through(&proxy);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    store.once("full", &member).run().await?.expect(0)?;
    for n in 0..4u32 {
        client.put("x", n.to_string(), None).await?;
        store.once(if n == 2 { "full" } else { "delta" }, &member).run().await?.expect(0)?;
    }
    let before = state::read(&mut client).await?;
    let (plain, strange) = (healthy.list().await?, store.list().await?);
    ensure!(plain["timelines"] == strange["timelines"], "{plain}\n{strange}");
    store.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
    let mut copied = store.clone();
    copied.url = "s3://backups/copied".into();
    store.command("copy").args(["--to", &copied.url]).run().await?.expect(0)?;
    store.command("compact").run().await?.expect(0)?;
    store.command("gc").args(["--policy", "limit-based", "--max-backups", "1"]).run().await?.expect(0)?;
    etcd.kill9()?;
    state::same(&before, &copied.restore_and_read(&member).await?)?;
    state::same(&before, &store.restore_and_read(&member).await?)?;
    Ok(())
}

/// A store whose listings are some requests old: what is there is restored, and nothing that was acknowledged is lost.
#[tokio::test(flavor = "multi_thread")]
async fn listings_lag_behind() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let proxy = listing::before(minio.port(), Listing::Lags(3)).await?;
    let healthy = minio.store("backups/a");
    let store = healthy.through(&proxy);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let mut acknowledged = 0;
    for n in 0..12u32 {
        client.put("x", n.to_string(), None).await?;
        // One that sees too little may refuse; one that says it is done has to have done it.
        let run = store.once(if n % 4 == 0 { "full" } else { "delta" }, &member).run().await?;
        if run.code == 0 {
            acknowledged = n;
            let target = dir.path().join("restored");
            healthy.restore(&target).run().await?.expect(0)?;
            let (_, keys, _) = state::of_directory(&target)?;
            std::fs::remove_dir_all(&target)?;
            let found = keys.get(b"x".as_slice()).is_some_and(|entry| entry.value == n.to_string().as_bytes());
            ensure!(found, "write {n} was acknowledged and is not restored: {}", run.stderr);
        }
        if n % 4 == 3 {
            let gc = store.command("gc").args(["--policy", "limit-based", "--max-backups", "1"]).run().await?;
            ensure!([0, 11].contains(&gc.code), "{}", gc.stderr);
            let target = dir.path().join("restored");
            healthy.restore(&target).run().await?.expect(0)?;
            let (_, keys, _) = state::of_directory(&target)?;
            std::fs::remove_dir_all(&target)?;
            let last = acknowledged.to_string();
            let found = keys.get(b"x".as_slice()).is_some_and(|entry| entry.value == last.as_bytes());
            ensure!(found, "write {last} was acknowledged and gc lost it: {}", gc.stderr);
        }
    }
    ensure!(acknowledged >= 8, "no backup succeeded after write {acknowledged}");
    let mut following = store.follow(&member, "300ms").spawn()?;
    following.logs("connected", Duration::from_secs(60)).await?;
    for n in 0..20u32 {
        client.put("y", n.to_string(), None).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    following.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &healthy.restore_and_read(&member).await?)?;
    healthy.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
    Ok(())
}

/// A server that asks for time gets it.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_asked_to_wait_waits() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let mut store = minio.store("backups/a");
    let busy = |at, _: &_| if at < 3 { Fault::Busy(3) } else { Fault::None };
    let proxy = Proxy::before(minio.port(), Arc::new(busy)).await?;
    store = store.through(&proxy);
    let started = std::time::Instant::now();
    store.command("list").run().await?.expect(0)?;
    ensure!(proxy.seen() >= 4 && started.elapsed() >= Duration::from_secs(9), "{} requests", proxy.seen());
    Ok(())
}

/// A server that says nothing is given up, with its name.
#[tokio::test(flavor = "multi_thread")]
async fn silence_is_not_waited_for_for_ever() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let mut store = minio.store("backups/a");
    let proxy = Proxy::before(minio.port(), Arc::new(|_, _: &_| Fault::Silence)).await?;
    store = store.through(&proxy);
    store.command("list").run().await?.expect(1)?.says("s3://backups/a")?;
    Ok(())
}

/// A machine that has a token of somebody else's instead of a key of Google's.
#[tokio::test(flavor = "multi_thread")]
async fn google_s_token_service_gives_credentials() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let google = Google::start(&dir.path().join("google"), "backups").await?;
    let store = google.store("backups/a")?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "0", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    store.brings_back(&mut etcd).await?;
    std::fs::write(google.token(), "a-token-that-nobody-knows")?;
    let refused = store.command("list").run().await?.expect(1)?.says("the subject token is unknown")?;
    ensure!(!refused.stderr.contains("a-token-that-nobody-knows"), "{}", refused.stderr);
    Ok(())
}

/// Keys in files, as a mounted secret has them, replaced under a running backup.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_in_files_are_read_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let secret = dir.path().join("secret");
    let (store, key) = minio.store_by_secret("backups/a", &secret)?;
    std::fs::write(secret.join("secretAccessKey"), "not-the-key-that-it-should-be")?;
    let refused = store.command("list").run().await?.expect(1)?.says("permission denied")?;
    ensure!(!refused.stderr.contains("not-the-key"), "{}", refused.stderr);
    std::fs::write(secret.join("secretAccessKey"), &key)?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "0", None).await?;
    let mut backup = store.follow(&member, "300ms").spawn()?;
    backup.logs("full snapshot is in the store", Duration::from_secs(60)).await?;
    // Revoked in the middle of a run, and given back.
    std::fs::write(secret.join("secretAccessKey"), "revoked")?;
    client.put("x", "1", None).await?;
    backup.logs("permission denied", Duration::from_secs(60)).await?;
    std::fs::write(secret.join("secretAccessKey"), &key)?;
    backup.logs("delta is in the store", Duration::from_secs(60)).await?;
    // What no header can have is refused before it is put into one; what `echo` wrote is taken.
    let id = std::fs::read_to_string(secret.join("accessKeyID"))?;
    std::fs::write(secret.join("accessKeyID"), "hid\nden")?;
    client.put("x", "2", None).await?;
    backup.logs("accessKeyID has a line break", Duration::from_secs(60)).await?;
    std::fs::write(secret.join("accessKeyID"), format!("{id}\n"))?;
    backup.logs_times("delta is in the store", 2, Duration::from_secs(60)).await?;
    let ended = backup.terminate().await?.expect(0)?;
    ensure!(!ended.stderr.contains("panicked") && !ended.stderr.contains("hid"), "{}", ended.stderr);
    std::fs::remove_file(secret.join("accessKeyID"))?;
    store.command("list").run().await?.expect(2)?.says("has no accessKeyID")?;
    Ok(())
}

/// Variables as `echo` makes them, and such as the libraries would panic on, or print; and a machine without any CA.
#[tokio::test(flavor = "multi_thread")]
async fn variables_that_no_request_can_have_are_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let store = minio.store("backups/a");
    let value = |name: &str| store.environment.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let mut list = store.command("list");
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"] {
        let value = value(name).context("no such variable")?;
        list = list.env(name, format!(" {value}\n"));
    }
    list.env("SSL_CERT_FILE", "/nowhere").env("SSL_CERT_DIR", "/nowhere").run().await?.expect(0)?;
    // What is of no store is nobody's business.
    let list =
        store.command("list").env("AWS_SOMETHING_ELSE", "with a space").env("AZURE_STORAGE_TOKEN", "with a space");
    let list = list.env("AWS_USER_AGENT", "with a space");
    list.run().await?.expect(0)?;
    let pem = "-----BEGIN PRIVATE KEY-----\nhidden";
    for (name, value) in [
        ("AWS_ACCESS_KEY_ID", "hid\nden"),
        ("AWS_SESSION_TOKEN", "hidden\u{e9}"),
        ("AWS_REGION", "hidden here"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1/hidden here"),
        ("AWS_CA_BUNDLE", pem),
        ("AWS_APPLICATION_CREDENTIALS_JSON", "{\"secretAccessKey\": \"hidden\"}"),
    ] {
        let refused = store.command("list").env(name, value).run().await?.expect(2)?.says(name)?;
        ensure!(!refused.stderr.contains("hid") && !refused.stderr.contains("panicked"), "{}", refused.stderr);
    }
    for (place, name, value) in [
        ("az://c/p", "AZURE_STORAGE_TOKEN", "hid\nden"),
        ("gs://b/p", "GOOGLE_SERVICE_ACCOUNT", "{\"private_key\": \"hidden\"}"),
        ("gs://b/p", "GOOGLE_SERVICE_ACCOUNT_KEY", "{\"private_key\": [\"hidden\"]}"),
    ] {
        let list = Sidecar::new(["list", "--store", place]).env(name, value);
        let refused = list.run().await?.expect(2)?.says(name)?;
        ensure!(!refused.stderr.contains("hid") && !refused.stderr.contains("panicked"), "{}", refused.stderr);
    }
    Ok(())
}
