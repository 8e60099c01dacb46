//! What happens while it runs: compactions ahead of it, auth, restarts, a store that goes away, TLS, users.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, CompactionOptions, Permission, Txn, TxnOp};
use proto::sidecar as api;
use rustix::process::Signal;
use tests::etcd::{MINORS, Member, ROOT};
use tests::minio::Minio;
use tests::pod::Pod;
use tests::program::Sidecar;
use tests::store::Store;
use tests::workload::Workload;
use tests::{eventually, objects, state};

const LONG: Duration = Duration::from_secs(60);

fn writes(seed: u64) -> Workload {
    Workload { seed, rounds: 12, compact: false, large: false, defragment: false }
}

async fn compact(client: &mut Client) -> Result<()> {
    let revision = client.get("x", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await?;
    Ok(())
}

/// etcd compacts revisions before the watch has had them: a full follows, it is said loudly, and the latest state is whole.
#[tokio::test(flavor = "multi_thread")]
async fn compaction_ahead_of_the_cursor_leads_to_a_full() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    // With nothing but a full, and that compacted, nothing shows that it is the same history.
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    compact(&mut client).await?;
    // It remembers hashes from before a compaction until it restarts.
    etcd.stop()?;
    etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "2", None).await?;
    store.once("delta", &member).run().await?.expect(12)?.says("has compacted, up to revision 2, what would prove")?;
    writes(1).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    let snapshot = store.follow(&member, "200ms");
    let mut backup = snapshot.spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    backup.kill9().await?;
    // While nobody looks: writes, and a compaction of them.
    writes(2).run(&mut client).await?;
    compact(&mut client).await?;
    store.once("delta", &member).run().await?.expect(12)?.says("compacted its history up to revision")?;
    let mut backup = snapshot.spawn()?;
    backup.logs("etcd compacted revisions that are in no delta yet", LONG).await?;
    backup.logs("full snapshot is in the store", LONG).await?;
    writes(3).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    let listed = store.list().await?;
    ensure!(listed["timelines"][0]["gaps"].as_array().is_some_and(|gaps| gaps.len() == 2), "{listed}");
    let restored = store.restore_and_read(&member).await?;
    state::same(&before, &restored)
}

/// A full snapshot that was begun before etcd compacted what is in no delta does not span that: until another one does, what
/// follows is no backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_from_before_a_hole_does_not_span_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, away) = (dir.path().join("store"), dir.path().join("away"));
    std::fs::create_dir(&place)?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&place)))?;
    pod.more += "snapshots: {deltaPeriod: 1s, deltaMaxBytes: 1048576, fullBytesPerSecond: 1048576}\n";
    let mut serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    serving.logs("full snapshot is in the store", LONG).await?;
    // The next takes some time.
    for n in 0..80u8 {
        client.put([n], vec![n; 200_000], None).await?;
    }
    let asking = pod.clone();
    let asked = tokio::spawn(async move { asking.take(api::Kind::Full, "").await });
    serving.logs_times("take a full snapshot", 2, LONG).await?;
    // More than what is on its way holds.
    std::fs::rename(&place, &away)?;
    for n in 0..400u32 {
        client.put("x", vec![n.to_le_bytes()[0]; 200_000], None).await?;
    }
    compact(&mut client).await?;
    std::fs::rename(&away, &place)?;
    serving.logs("etcd compacted revisions that are in no delta yet", LONG).await?;
    ensure!(!asked.is_finished(), "it was over too soon");
    asked.await??;
    let ended = serving.terminate().await?.expect(1)?;
    ended.says("no full snapshot was done that the last changes could follow")?;
    launched.terminate().await?;
    // The next run takes one, and all is well.
    pod.more = pod.more.replace("fullBytesPerSecond: 1048576", "fullBytesPerSecond: 0");
    let mut serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    serving.logs("full snapshot is in the store", LONG).await?;
    client.put("x", "last", None).await?;
    pod.take(api::Kind::Delta, "").await?;
    let before = state::read(&mut client).await?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let restored = pod.store.as_ref().context("it has one")?.restore_and_read(&pod.member).await?;
    state::same(&before, &restored)
}

/// Users and roles are not in events: a change of them makes a full due at once. Everything runs as a user then.
async fn auth_change_makes_a_full_due(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single(minor, &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    writes(1).run(&mut client).await?;
    // A user is no obstacle while auth is off.
    let snapshot = store.follow(&member, "200ms");
    let mut backup = snapshot.clone().args(["--user", ROOT.0]).env("ETCDCTL_PASSWORD", ROOT.1).spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    // On 3.4 a first look is needed to compare with.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    client.role_add("writer").await?;
    client.role_grant_permission("writer", Permission::read_write("/w/").with_prefix()).await?;
    backup.logs("users, roles or auth have changed", LONG).await?;
    backup.logs_times("full snapshot is in the store", 2, LONG).await?;
    let mut client = etcd.enable_auth().await?;
    // It goes on as that user.
    backup.logs_times("connected", 2, LONG).await?;
    writes(5).run(&mut client).await?;
    backup.terminate().await?.expect(0)?;
    // Without a user nothing works any more, and it says so.
    let once = store.once("full", &member);
    once.run().await?.expect(1)?.says("user name is empty")?;
    once.clone().args(["--user", "root:wrong"]).run().await?.expect(1)?.says("authentication failed")?;
    let mut backup = snapshot.clone().args(["--user", ROOT.0]).env("ETCDCTL_PASSWORD", ROOT.1).spawn()?;
    backup.logs("connected", LONG).await?;
    writes(2).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    let ended = backup.terminate().await?.expect(0)?;
    ensure!(!ended.stderr.contains(ROOT.1), "the password is in the log: {}", ended.stderr);
    // Turning auth on was after the last full on 3.4, which does not tell; take it along.
    let member = etcd.member.clone();
    store.once("full", &member).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    let after = store.restore_and_read(&member).await?;
    state::same(&before, &after)?;
    let etcd = member.start().await?;
    let anonymous = etcd.client_as(None).await?.get("x", None).await;
    ensure!(anonymous.is_err(), "auth is off after the restore");
    Ok(())
}

tests::on_every_minor! {
    auth_change_makes_a_full_due_3_4: auth_change_makes_a_full_due("3.4");
    auth_change_makes_a_full_due_3_5: auth_change_makes_a_full_due("3.5");
    auth_change_makes_a_full_due_3_6: auth_change_makes_a_full_due("3.6");
    auth_change_makes_a_full_due_3_7: auth_change_makes_a_full_due("3.7");
}

/// etcd restarts in the middle: the backup waits, goes on where it was, and has every revision.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_restarts_is_waited_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.7", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut backup = store.follow(&member, "100ms").spawn()?;
    for seed in 1..4 {
        writes(seed).run(&mut etcd.client().await?).await?;
        if seed == 2 {
            etcd.stop()?;
        } else {
            etcd.kill9()?;
        }
        backup.logs_times("backup is interrupted", usize::try_from(seed)?, LONG).await?;
        etcd = member.start().await?;
        backup.logs_times("connected", usize::try_from(seed)? + 1, LONG).await?;
    }
    let mut client = etcd.client().await?;
    writes(4).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut etcd.client().await?).await?;
    etcd.kill9()?;
    let listed = store.list().await?;
    ensure!(
        listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1),
        "more than one timeline: {listed}"
    );
    ensure!(listed["timelines"][0]["gaps"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["timelines"][0]["fulls"].as_array().is_some_and(|fulls| fulls.len() == 1), "{listed}");
    let after = store.restore_and_read(&member).await?;
    state::same(&before, &after)
}

/// An etcd that was restored is another history: a new timeline, also when its cluster id is the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_etcd_begins_a_new_timeline() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.5", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let once = |kind: &str| store.once(kind, &member);
    writes(1).run(&mut etcd.client().await?).await?;
    once("full").run().await?.expect(0)?;
    let mut client = etcd.client().await?;
    writes(2).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    once("delta").run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    store.restore_member(&member).run().await?.expect(0)?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    writes(3).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    // There is no full in the new timeline that a delta could follow.
    once("delta").run().await?.expect(12)?.says("begin a new timeline")?;
    once("full").run().await?.expect(0)?;
    let before = state::read(&mut etcd.client().await?).await?;
    etcd.kill9()?;
    let after = store.restore_and_read(&member).await?;
    state::same(&before, &after)
}

/// Where a timeline has a full snapshot alone, its hash says where the next one parts from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeline_parts_from_a_full_snapshot_too() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    writes(1).run(&mut etcd.client().await?).await?;
    store.once("full", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    store.restore_member(&member).run().await?.expect(0)?;
    let mut etcd = member.start().await?;
    writes(2).run(&mut etcd.client().await?).await?;
    store.once("full", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    let listed = store.list().await?;
    let (first, second) = (&listed["timelines"][0], &listed["timelines"][1]);
    ensure!(second["forkRevision"] == first["fulls"][0]["lastRevision"], "{listed}");
    Ok(())
}

/// Restored once, then again from an older snapshot, and written past every revision that is backed up: neither the ids nor
/// the numbers tell this etcd from the one before, what it holds does.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_restore_is_not_taken_for_the_first() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let once = |kind: &str| store.once(kind, &member);
    let put = |name: &'static str, from: u32, to: u32| {
        let url = member.clone();
        async move {
            let mut client = Client::connect([url.client_url()], None).await?;
            for n in from..to {
                client.put(format!("{name}/{n}"), name, None).await?;
            }
            anyhow::Ok(())
        }
    };
    let mut etcd = member.start().await?;
    put("a", 0, 40).await?;
    once("full").run().await?.expect(0)?;
    put("b", 0, 60).await?;
    once("delta").run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    store.restore_member(&member).run().await?.expect(0)?;
    let mut etcd = member.start().await?;
    put("c", 0, 10).await?;
    once("full").run().await?.expect(0)?.says("begin a new timeline")?;
    put("c", 10, 15).await?;
    once("delta").run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    // The oldest snapshot, without its deltas.
    let full =
        objects(&dir.path().join("store"))?.into_iter().find(|path| path.to_string_lossy().contains("t00000001/full"));
    let file = Sidecar::new(["restore", "--snapshot-file"])
        .arg(full.context("no full")?)
        .arg("--data-dir")
        .arg(&member.data_dir);
    file.args(["--initial-cluster", &member.initial_cluster]).run().await?.expect(0)?;
    let mut etcd = member.start().await?;
    put("n", 0, 90).await?;
    once("delta").run().await?.expect(12)?.says("this etcd was restored")?;
    once("full").run().await?.expect(0)?;
    let before = state::read(&mut etcd.client().await?).await?;
    etcd.kill9()?;
    let after = store.restore_and_read(&member).await?;
    state::same(&before, &after)
}

/// S3, with a full in several parts, a server that dies half-way and comes back, and one that is gone for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_dies_half_way_loses_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bucket = dir.path().join("minio");
    let mut minio = Minio::start(&bucket, "backups").await?;
    let store = minio.store("backups/some/prefix");
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    // Random bytes do not compress: the full has several parts.
    for n in 0..40u32 {
        let value: Vec<u8> = (0..1_000_000).map(|_| rand::random()).collect();
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    let mut backup = store.follow(&member, "300ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    writes(1).run(&mut client).await?;
    backup.logs("delta is in the store", LONG).await?;
    let port = minio.port();
    minio.kill9();
    writes(2).run(&mut client).await?;
    backup.logs("it is kept and tried again", Duration::from_secs(120)).await?;
    let failed = store.once("full", &member).run().await?.expect(1)?;
    ensure!(failed.stderr.contains("s3://backups/some/prefix"), "{}", failed.stderr);
    let _minio = Minio::start_on(&bucket, "backups", port, None).await?;
    writes(3).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    backup.logs_times("delta is in the store", 3, Duration::from_secs(90)).await?;
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["timelines"][0]["gaps"].as_array().is_some_and(Vec::is_empty), "{listed}");
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// Changes that are in no store when the run ends are an error, not a clean end.
#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_saved_is_an_error() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let store = minio.store("backups/x");
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let mut backup = store.follow(&member, "100ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    client.put("x", "1", None).await?;
    backup.logs("delta is in the store", LONG).await?;
    minio.kill9();
    client.put("x", "2", None).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    backup.terminate().await?.expect(1)?.says("they are not backed up")?;
    Ok(())
}

/// A delta that is damaged in the store does not stop the backup: a full follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_delta_leads_to_a_full() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    for n in 0..200u32 {
        client.put(format!("y/{n}"), format!("{n}").repeat(100), None).await?;
    }
    store.once("delta", &member).run().await?.expect(0)?;
    let delta = objects(&dir.path().join("store"))?.into_iter().next().context("no delta")?;
    let mut bytes = std::fs::read(&delta)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&delta, bytes)?;
    // With its hash out of date the delta's events are what is left to compare.
    client.compact(3, Some(CompactionOptions::new().with_physical())).await?;
    etcd.stop()?;
    etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "2", None).await?;
    let mut backup = store.follow(&member, "100ms").spawn()?;
    backup.logs("an object that the chain needs is damaged", LONG).await?;
    backup.logs("full snapshot is in the store", LONG).await?;
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// Asked to end while it is behind, a run receives first what etcd has.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ends_has_everything() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let mut backup = store.follow(&member, "1h").args(["--delta-max-bytes", "64KiB"]).spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    for n in 0..40u32 {
        let puts: Vec<TxnOp> = (0..100u32).map(|m| TxnOp::put(format!("/{n}/{m}"), "v".repeat(300), None)).collect();
        client.txn(Txn::new().and_then(puts)).await?;
    }
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// While no key exists etcd hashes whatever rows there are: what a compaction took must not fail the proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_keys_is_restored() -> Result<()> {
    for minor in MINORS {
        let dir = tempfile::tempdir()?;
        let store = Store::directory(&dir.path().join("store"));
        let member = Member::single(minor, &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        client.put("x", "1", None).await?;
        store.once("full", &member).run().await?.expect(0)?;
        client.put("y", "1", None).await?;
        client.put("y", "2", None).await?;
        client.delete("x", None).await?;
        client.delete("y", None).await?;
        store.once("delta", &member).run().await?.expect(0)?;
        client.compact(5, Some(CompactionOptions::new().with_physical())).await?;
        client.put("z", "1", None).await?;
        client.delete("z", None).await?;
        store.once("delta", &member).run().await?.expect(0)?;
        let before = state::read(&mut client).await?;
        ensure!(before.keys.is_empty());
        etcd.kill9()?;
        let after = store.restore_and_read(&member).await.context(minor)?;
        state::same_keys(&before, &after).context(minor)?;
    }
    Ok(())
}

/// Two writers on one prefix: overlaps are legal, and neither stops the other.
#[tokio::test(flavor = "multi_thread")]
async fn two_writers_do_not_harm_each_other() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    let mut first = store.follow(&member, "100ms").spawn()?;
    first.logs("full snapshot is in the store", LONG).await?;
    let mut second = store.follow(&member, "100ms").spawn()?;
    second.logs("connected", LONG).await?;
    for seed in 0..6 {
        writes(seed).run(&mut client).await?;
        if seed == 2 {
            second.signal(Signal::STOP)?;
        }
        if seed == 4 {
            second.signal(Signal::CONT)?;
        }
    }
    tests::workload::expire(&mut client).await?;
    first.terminate().await?.expect(0)?;
    second.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// A delta under a name that promises more than it has, and a store that is emptied: both lead to a new full.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_did_to_the_store_is_noticed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let store = Store::directory(&place);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    client.put("x", "2", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    let delta = objects(&place)?.into_iter().next().context("no delta")?;
    let renamed = delta.to_string_lossy().replace("-00000000000000000003-", "-00000000000000001000-");
    std::fs::rename(&delta, &renamed)?;
    client.put("x", "3", None).await?;
    let mut backup = store.follow(&member, "100ms").spawn()?;
    backup.logs("it was renamed", LONG).await?;
    backup.logs("full snapshot is in the store", LONG).await?;
    client.put("x", "4", None).await?;
    backup.logs("delta is in the store", LONG).await?;
    // It overlaps what is good, and can be left out.
    let target = dir.path().join("restored");
    store.restore(&target).run().await?.expect(10)?.says("it was renamed")?;
    let name = renamed.split_once("/t00000001/").map(|(_, name)| format!("t00000001/{name}")).context("no timeline")?;
    store.restore(&target).args(["--without", &name]).run().await?.expect(0)?;
    ensure!(state::of_directory(&target)?.0 == 5);
    std::fs::remove_dir_all(place.join("t00000001"))?;
    backup.logs("the full snapshot that deltas follow is gone", LONG).await?;
    backup.logs_times("full snapshot is in the store", 2, LONG).await?;
    client.put("x", "5", None).await?;
    backup.terminate().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// Another cluster's store in the place of ours: a timeline of its own begins there, and theirs stays theirs.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_takes_the_place_of_another_is_noticed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, theirs) = (dir.path().join("store"), dir.path().join("theirs"));
    let store = Store::directory(&place);
    let (member, other) =
        (Member::single("3.6", &dir.path().join("data"))?, Member::single("3.6", &dir.path().join("other"))?);
    let mut stranger = other.start().await?;
    stranger.client().await?.put("theirs", "1", None).await?;
    Store::directory(&theirs).once("full", &other).run().await?.expect(0)?;
    // So that ours has a timeline whose number theirs has not.
    store.once("full", &other).run().await?.expect(0)?;
    let before = state::read(&mut stranger.client().await?).await?;
    stranger.stop()?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for n in 0..5 {
        client.put(format!("ours/{n}"), "1", None).await?;
    }
    let mut backup = store.follow(&member, "200ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    client.put("ours", "2", None).await?;
    backup.logs("delta is in the store", LONG).await?;
    std::fs::rename(&place, dir.path().join("ours"))?;
    std::fs::rename(&theirs, &place)?;
    // Before anybody looks, too.
    client.put("ours", "3", None).await?;
    backup.logs("another store was put in its place", LONG).await?;
    backup.logs("nothing is backed up into it", LONG).await?;
    client.put("ours", "4", None).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "{listed}");
    ensure!(objects(&place)?.len() == 1, "something went astray: {listed}");
    // And back.
    std::fs::rename(&place, &theirs)?;
    std::fs::rename(dir.path().join("ours"), &place)?;
    backup.logs_times("delta is in the store", 2, LONG).await?;
    backup.terminate().await?.expect(0)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let other = Member { data_dir: dir.path().join("restored"), ..other };
    state::same(&before, &Store::directory(&theirs).restore_and_read(&other).await?)?;
    let ours = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&ours, &store.restore_and_read(&member).await?)
}

/// The store is away for a moment, as a file system that is not mounted, and what is put meanwhile goes elsewhere: nothing is put
/// behind the hole that this leaves, it is filled from etcd first.
#[tokio::test(flavor = "multi_thread")]
async fn what_went_elsewhere_is_put_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, aside) = (dir.path().join("store"), dir.path().join("aside"));
    let store = Store::directory(&place);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    let mut backup = store.follow(&member, "200ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    for round in 0..3u64 {
        client.put("x", "before", None).await?;
        backup.logs_times("delta is in the store", 1 + round as usize, LONG).await?;
        std::fs::rename(&place, &aside)?;
        std::fs::create_dir(&place)?;
        client.put("x", "elsewhere", None).await?;
        tokio::time::sleep(Duration::from_millis(400 * round)).await;
        std::fs::remove_dir_all(&place)?;
        std::fs::rename(&aside, &place)?;
        client.put("x", "after", None).await?;
        let revision = client.get("x", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
        eventually(LONG, || async {
            let listed = store.list().await?;
            let timeline = &listed["timelines"][0];
            ensure!(timeline["gaps"].as_array().is_none_or(Vec::is_empty), "{listed}");
            let last = timeline["restorable"].as_array().and_then(|runs| runs.last()?["lastRevision"].as_i64());
            ensure!(last == Some(revision), "{revision} is not there: {listed}");
            Ok(())
        })
        .await
        .with_context(|| backup.log())?;
    }
    backup.terminate().await?.expect(0)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// A delta of another cluster in a timeline, from whatever wrote it there: a verification finds it, and what says whose the
/// timeline is, once lost, is written again.
#[tokio::test(flavor = "multi_thread")]
async fn whose_a_timeline_is_stays_known() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, strange) = (dir.path().join("store"), dir.path().join("strange"));
    let store = Store::directory(&place);
    let (member, other) =
        (Member::single("3.6", &dir.path().join("data"))?, Member::single("3.6", &dir.path().join("other"))?);
    for (member, place) in [(&member, &place), (&other, &strange)] {
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        client.put("x", "1", None).await?;
        Store::directory(place).once("full", member).run().await?.expect(0)?;
        client.put("x", "2", None).await?;
        Store::directory(place).once("delta", member).run().await?.expect(0)?;
        etcd.stop()?;
    }
    std::fs::remove_file(place.join("t00000001/timeline.json"))?;
    let mut etcd = member.start().await?;
    etcd.client().await?.put("x", "3", None).await?;
    store.once("delta", &member).run().await?.expect(0)?.says("it is written again")?;
    let listed = store.list().await?;
    ensure!(listed["timelines"][0]["clusterId"].as_str().is_some_and(|id| !id.is_empty()), "{listed}");
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let delta = objects(&strange)?.into_iter().find(|path| path.to_string_lossy().contains("delta"));
    let delta = delta.context("no delta")?;
    std::fs::copy(&delta, place.join("t00000001/delta").join(delta.file_name().context("no name")?))?;
    let verified = store.command("verify").args(["--level", "bytes"]).run().await?.expect(10)?;
    ensure!(verified.stdout.contains("another's store"), "{}", verified.stdout);
    etcd.stop()
}

/// An older copy of the store in its place: what it lacks is taken again, as long as etcd has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_set_back_is_filled_up() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, old) = (dir.path().join("store"), dir.path().join("old"));
    let store = Store::directory(&place);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    let mut backup = store.follow(&member, "200ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    client.put("x", "2", None).await?;
    backup.logs("delta is in the store", LONG).await?;
    tests::copy(&place, &old).await?;
    client.put("x", "3", None).await?;
    backup.logs_times("delta is in the store", 2, LONG).await?;
    tests::copy(&old, &place).await?;
    backup.logs("revisions up to 4 were in the store, which ends at 3 now", LONG).await?;
    backup.logs_times("delta is in the store", 3, LONG).await?;
    client.put("x", "4", None).await?;
    backup.terminate().await?.expect(0)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)
}

/// Wrong bucket, wrong credentials, wrong endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_refuses_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let _etcd = member.start().await?;
    let target = dir.path().join("restored");
    let commands = |place: &str| {
        let store = minio.store(place);
        [store.command("list"), store.restore(&target), store.once("full", &member)]
    };
    for command in commands("nowhere/x") {
        command.run().await?.expect(11)?.says("s3://nowhere/x")?;
    }
    minio.store("backups/empty").restore(&target).run().await?.expect(11)?.says("is empty; check bucket and prefix")?;
    for command in commands("backups/x") {
        let denied = command.env("AWS_SECRET_ACCESS_KEY", "wrong-password").run().await?.expect(1)?;
        ensure!(!denied.stderr.contains("wrong-password"), "a secret is shown: {}", denied.stderr);
        denied.says("permission denied")?;
    }
    ensure!(!target.exists(), "a failed restore left something behind");
    Ok(())
}

/// kill -9 of the backup at any time: the next one goes on from the store, and nothing is missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backup_is_continued() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store_dir = dir.path().join("store");
    let store = Store::directory(&store_dir);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let snapshot = store.follow(&member, "100ms");
    for round in 0..12u64 {
        let backup = snapshot.spawn()?;
        writes(round).run(&mut client).await?;
        tokio::time::sleep(Duration::from_millis(37 * round)).await;
        backup.kill9().await?;
    }
    let mut backup = snapshot.spawn()?;
    backup.logs("connected", LONG).await?;
    tests::workload::expire(&mut client).await?;
    backup.signal(Signal::INT)?;
    backup.wait().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    ensure!(!objects(&store_dir)?.is_empty());
    let listed = store.list().await?;
    ensure!(listed["timelines"][0]["gaps"].as_array().is_some_and(Vec::is_empty), "{listed}");
    let after = store.restore_and_read(&member).await?;
    state::same(&before, &after).context("after twelve kills")
}

/// Turning auth on or off changes no user, no role and no auth revision; a restored etcd would let everybody in, or nobody.
async fn turning_auth_on_or_off_makes_a_full_due(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut member = Member::single(minor, &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.role_add("root").await?;
    client.user_add(ROOT.0, ROOT.1, None).await?;
    client.user_grant_role(ROOT.0, "root").await?;
    store.once("full", &member).run().await?.expect(0)?;
    let taken = async |member: &Member| {
        let taken = store.once("delta", member).args(["-o", "json"]).run().await?.expect(0)?.json()?;
        anyhow::Ok(taken["kind"].as_str().map(str::to_owned))
    };
    client.auth_enable().await?;
    member.auth = true;
    let mut client = etcd.client_as(Some(ROOT)).await?;
    client.put("x", "1", None).await?;
    ensure!(taken(&member).await?.as_deref() == Some("full"), "turning auth on went unnoticed");
    client.put("x", "2", None).await?;
    ensure!(taken(&member).await?.as_deref() == Some("delta"));
    client.auth_disable().await?;
    client.put("x", "3", None).await?;
    ensure!(taken(&member).await?.as_deref() == Some("full"), "turning auth off went unnoticed");
    member.auth = false;
    etcd.kill9()?;
    let restored = store.restore_and_read(&member).await?;
    ensure!(restored.keys[b"x".as_slice()].value == b"3");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn turning_auth_on_or_off_makes_a_full_due_3_5() -> Result<()> {
    turning_auth_on_or_off_makes_a_full_due("3.5").await
}

#[tokio::test(flavor = "multi_thread")]
async fn turning_auth_on_or_off_makes_a_full_due_3_6() -> Result<()> {
    turning_auth_on_or_off_makes_a_full_due("3.6").await
}

#[tokio::test(flavor = "multi_thread")]
async fn turning_auth_on_or_off_makes_a_full_due_3_7() -> Result<()> {
    turning_auth_on_or_off_makes_a_full_due("3.7").await
}
