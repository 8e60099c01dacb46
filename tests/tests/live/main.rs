//! What happens while it runs: compactions ahead of it, auth, restarts, a store that goes away, TLS, users.

mod stores;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, CompactionOptions, Permission, Txn, TxnOp};
use proto::sidecar as api;
use rustix::process::Signal;
use tests::etcd::{Member, ROOT};
use tests::pod::Pod;
use tests::program::{Running, Sidecar};
use tests::store::Store;
use tests::workload::Workload;
use tests::{objects, state};

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
    pod.more += "snapshots: {deltaPeriod: 1s, deltaMaxBytes: 1048576, fullBytesPerSecond: 524288}\n";
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
        client.put("x", vec![n.to_le_bytes()[0]; 60_000], None).await?;
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
    pod.more = pod.more.replace("fullBytesPerSecond: 524288", "fullBytesPerSecond: 0");
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
    backup.logs("full snapshot is in the store", LONG).await?;
    for seed in 1..4 {
        writes(seed).run(&mut etcd.client().await?).await?;
        let had = |backup: &Running, what: &str| backup.log().matches(what).count();
        let (interrupted, connected) = (had(&backup, "backup is interrupted"), had(&backup, "connected"));
        if seed == 2 {
            etcd.stop()?;
        } else {
            etcd.kill9()?;
        }
        backup.logs_times("backup is interrupted", interrupted + 1, LONG).await?;
        etcd = member.start().await?;
        backup.logs_times("connected", connected + 1, LONG).await?;
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
    store.brings_back(&mut etcd).await
}

/// What is restored is another cluster than the one that was lost, and the same one on whichever machine it is restored.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_has_an_id_of_its_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let lost = client.put("x", "1", None).await?.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
    store.once("full", &member).run().await?.expect(0)?;
    client.put("x", "2", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    let of = async |cluster: &str, flags: &[&str]| {
        let restore = store.restore(dir.path().join("restored")).args(["--dry-run", "-o", "json"]);
        let plan =
            restore.args(["--initial-cluster", cluster]).args(flags.iter().copied()).run().await?.expect(0)?.json()?;
        anyhow::Ok(plan["clusterId"].as_str().context("no id")?.to_owned())
    };
    let alone = member.initial_cluster.as_str();
    let token = ["--initial-cluster-token", "etcd-cluster"];
    ensure!(of(alone, &token).await? == format!("{lost:x}"), "it is the token that tells them apart");
    let restored = of(alone, &[]).await?;
    ensure!(restored != format!("{lost:x}") && restored != of(alone, &["--revision", "2"]).await?, "{restored}");
    let two = format!("{alone},b=http://127.0.0.1:1");
    ensure!(
        of(&two, &[]).await? == of(&two, &["--name", "b"]).await?,
        "each member is restored into a cluster of its own"
    );
    Ok(())
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
    let restore = store.restore_member(&member).args(["--initial-cluster-token", "etcd-cluster"]);
    restore.run().await?.expect(0)?;
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
    store.brings_back(&mut etcd).await
}

/// Asked to end while it is behind, a run receives first what etcd has.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ends_has_everything() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let mut backup = store.follow(&member, "1h").args(["--delta-max-bytes", "256KiB"]).spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    for n in 0..40u32 {
        let puts: Vec<TxnOp> = (0..100u32).map(|m| TxnOp::put(format!("/{n}/{m}"), "v".repeat(300), None)).collect();
        client.txn(Txn::new().and_then(puts)).await?;
    }
    backup.terminate().await?.expect(0)?;
    store.brings_back(&mut etcd).await
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
    // Something that they follow: deltas of a run that was killed before its first full would leave a gap behind them.
    client.put("first", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
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
