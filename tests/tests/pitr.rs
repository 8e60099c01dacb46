//! Any point in time: every revision of a recorded history, a time, and histories that part.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::index;
use tests::etcd::Member;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

const LONG: Duration = Duration::from_secs(60);

/// Random revisions of a history, each restored and compared with what the live etcd said of it.
async fn any_revision_is_restored(minor: &str) -> Result<()> {
    let count = if minor == "3.6" { 200 } else { 30 };
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single(minor, &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("first", "1", None).await?;
    let mut backup = store.follow(&member, "200ms").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    let workload = |seed| Workload { seed, rounds: 12, compact: false, large: false, defragment: false };
    for seed in 1..4 {
        workload(seed).run(&mut client).await?;
        // More than one full to start from.
        store.once("full", &member).run().await?.expect(0)?;
    }
    tests::workload::expire(&mut client).await?;
    backup.terminate().await?.expect(0)?;
    let last = state::read(&mut client).await?.revision;
    let mut random = StdRng::seed_from_u64(6);
    let mut chosen: Vec<i64> = Vec::new();
    for at in index::sample(&mut random, usize::try_from(last - 2)?, count) {
        chosen.push(i64::try_from(at)? + 2);
    }
    chosen.extend([2, last]);
    let mut expected = Vec::new();
    for revision in chosen {
        expected.push((revision, state::keys_at(&mut client, revision).await?));
    }
    etcd.kill9()?;
    for (position, (revision, keys)) in expected.iter().enumerate() {
        let target = dir.path().join(format!("restored-{revision}"));
        let restored = store.restore(&target).args(["-o", "json", "--revision", &revision.to_string()]);
        let restored = restored.run().await?.expect(0).with_context(|| format!("revision {revision}"))?.json()?;
        ensure!(restored["revision"] == *revision, "{restored}");
        let (found, restored_keys, leases) = state::of_directory(&target)?;
        ensure!(found == *revision, "revision {found} instead of {revision}");
        ensure!(&restored_keys == keys, "keys differ at revision {revision}");
        let held = keys.values().map(|entry| entry.numbers.3).filter(|lease| *lease != 0);
        ensure!(held.clone().all(|lease| leases.contains(&lease)), "a lease is missing at revision {revision}");
        // And a real etcd sees the same on some.
        if position % 50 == 0 {
            // Which may have gone on since: leases of one second expire.
            let mut etcd = member.restored_in(&target).start().await?;
            let seen = state::keys_at(&mut etcd.client().await?, *revision).await?;
            ensure!(&seen == keys, "etcd sees something else at {revision}");
            etcd.stop()?;
        }
        std::fs::remove_dir_all(&target)?;
    }
    let target = dir.path().join("beyond");
    let beyond = (last + 1).to_string();
    store.restore(&target).args(["--revision", &beyond]).run().await?.expect(11)?.says("ends at revision")?;
    store.restore(&target).args(["--revision", "1"]).run().await?.expect(11)?.says("its oldest is of revision 2")?;
    ensure!(!target.exists());
    Ok(())
}

tests::on_every_minor! {
    any_revision_is_restored_3_4: any_revision_is_restored("3.4");
    any_revision_is_restored_3_5: any_revision_is_restored("3.5");
    any_revision_is_restored_3_6: any_revision_is_restored("3.6");
    any_revision_is_restored_3_7: any_revision_is_restored("3.7");
}

fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_is_restored() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let before_all = now();
    client.put("x", "0", None).await?;
    let mut backup = store.follow(&member, "1s").spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    let mut times = Vec::new();
    for n in 1..8u32 {
        client.put("x", n.to_string(), None).await?;
        // By then it was received.
        backup.logs_times("delta is in the store", n as usize, LONG).await?;
        times.push((now(), n, 2 + i64::from(n)));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    backup.terminate().await?.expect(0)?;
    etcd.kill9()?;
    let target = dir.path().join("restored");
    times.push(("2100-01-01T00:00:00Z".to_owned(), 7, 9));
    for (time, n, revision) in &times {
        let restored = store.restore(&target).args(["-o", "json", "--time", time]);
        let restored = restored.run().await?.expect(0).context(time.clone())?.json()?;
        ensure!(restored["revision"] == *revision, "{time}: {restored}");
        ensure!(restored["atTime"]["revision"] == *revision, "{time}: {restored}");
        let (_, keys, _) = state::of_directory(&target)?;
        ensure!(keys[b"x".as_slice()].value == n.to_string().as_bytes(), "{time}");
        std::fs::remove_dir_all(&target)?;
    }
    let (third, ..) = &times[2];
    let said = store.restore(&target).args(["--dry-run", "--time", third]).run().await?.expect(0)?;
    ensure!(
        said.stdout.contains("revision 5 was received at") && said.stdout.contains("the next one at"),
        "{}",
        said.stdout
    );
    let refused = store.restore(&target).args(["--time", &before_all]).run().await?.expect(11)?;
    refused.says("the oldest full snapshot in store")?;
    store.restore(&target).args(["--time", "yesterday"]).run().await?.expect(2)?;
    Ok(())
}

/// What changed between two full snapshots is not in the store where no delta has it: neither of the two is what there was.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_between_two_fulls_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let pause = || tokio::time::sleep(Duration::from_millis(50));
    client.put("x", "0", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    pause().await;
    let quiet = now();
    pause().await;
    store.once("full", &member).run().await?.expect(0)?;
    pause().await;
    let between = now();
    pause().await;
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    pause().await;
    let after = now();
    let target = dir.path().join("restored");
    let at = |time: &str| store.restore(&target).args(["-o", "json", "--time", time]);
    at(&between).run().await?.expect(11)?.says("the time lies between revisions 2 and 3")?;
    ensure!(!target.exists());
    client.put("x", "2", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    at(&between).run().await?.expect(11)?.says("the time lies between revisions 2 and 3")?;
    for (time, revision) in [(&quiet, 2), (&after, 3)] {
        let restored = at(time).run().await?.expect(0)?.json()?;
        ensure!(restored["revision"] == revision, "{restored}");
        std::fs::remove_dir_all(&target)?;
    }
    Ok(())
}

/// Restored to the middle and written to, the new history is a timeline of its own, and neither mixes with the other.
#[tokio::test(flavor = "multi_thread")]
async fn histories_that_part_do_not_mix() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "0", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    for n in 3..90i64 {
        client.put("x", format!("old {n}"), None).await?;
        if n % 10 == 0 {
            store.once("delta", &member).run().await?.expect(0)?;
        }
    }
    store.once("delta", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    store.restore_member(&member).args(["--revision", "47"]).run().await?.expect(0)?;
    etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for n in 48..60i64 {
        client.put("x", format!("new {n}"), None).await?;
    }
    store.once("full", &member).run().await?.expect(0)?;
    client.put("x", "new 60", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    let listed = store.list().await?;
    ensure!(listed["timelines"][1]["parent"] == 1 && listed["timelines"][1]["forkRevision"] == 47, "{listed}");
    let target = dir.path().join("restored");
    let restored = |more: &[&str]| {
        let restore = store.restore(&target).args(more.iter().copied());
        let target = target.clone();
        async move {
            restore.run().await?.expect(0)?;
            let (_, keys, _) = state::of_directory(&target)?;
            std::fs::remove_dir_all(&target)?;
            anyhow::Ok(String::from_utf8(keys[b"x".as_slice()].value.clone())?)
        }
    };
    ensure!(restored(&[]).await? == "new 60");
    ensure!(restored(&["--revision", "60"]).await? == "new 60");
    ensure!(restored(&["--revision", "59"]).await? == "new 59");
    // What they share is in the first; what only the second had before its full is in none.
    ensure!(restored(&["--revision", "47"]).await? == "old 47");
    let refused = store.restore(&target).args(["--revision", "50"]).run().await?.expect(11)?;
    refused.says("the two part after revision 47")?.says("--timeline 1")?;
    ensure!(restored(&["--revision", "50", "--timeline", "1"]).await? == "old 50");
    ensure!(restored(&["--timeline", "1"]).await? == "old 89");
    Ok(())
}
