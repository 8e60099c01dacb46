//! What becomes of the store meanwhile: it is away, refuses, was another's, was tampered with.

use tests::etcd::MINORS;
use tests::eventually;
use tests::minio::Minio;

use super::*;

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
        let value = tests::noise(1_000_000);
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    let mut backup = store.follow(&member, "300ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    writes(1).run(&mut client).await?;
    backup.logs("delta is in the store", LONG).await?;
    let port = minio.port();
    minio.kill9();
    let had = backup.log().matches("delta is in the store").count();
    writes(2).run(&mut client).await?;
    backup.logs("it is kept and tried again", Duration::from_secs(120)).await?;
    let failed = store.once("full", &member).run().await?.expect(1)?;
    ensure!(failed.stderr.contains("s3://backups/some/prefix"), "{}", failed.stderr);
    let _minio = Minio::start_on(&bucket, "backups", port, None).await?;
    writes(3).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    backup.logs_times("delta is in the store", had + 1, Duration::from_secs(90)).await?;
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
    store.brings_back(&mut etcd).await
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
    store.brings_back(&mut etcd).await
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
    store.brings_back(&mut etcd).await
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
        let had = backup.log().matches("delta is in the store").count();
        client.put("x", "before", None).await?;
        backup.logs_times("delta is in the store", had + 1, LONG).await?;
        std::fs::create_dir(&aside)?;
        tests::exchange(&place, &aside)?;
        client.put("x", "elsewhere", None).await?;
        tokio::time::sleep(Duration::from_millis(400 * round)).await;
        tests::exchange(&place, &aside)?;
        std::fs::remove_dir_all(&aside)?;
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
    store.brings_back(&mut etcd).await
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
    // As a whole: half a copy has no full.
    tests::exchange(&old, &place)?;
    backup.logs("revisions up to 4 were in the store, which ends at 3 now", LONG).await?;
    backup.logs_times("delta is in the store", 3, LONG).await?;
    client.put("x", "4", None).await?;
    backup.terminate().await?.expect(0)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    store.brings_back(&mut etcd).await
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
