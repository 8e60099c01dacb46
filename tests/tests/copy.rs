//! From store to store, in every direction, and what does not arrive.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::etcd::Member;
use tests::gardener::Gardener;
use tests::minio::Minio;
use tests::state::{self, State};
use tests::store::Store;
use tests::workload::Workload;
use tests::{file_url, objects};

const LONG: Duration = Duration::from_secs(60);

/// Two fulls with deltas after each, and what etcd had at the end.
async fn backup(dir: &Path) -> Result<(Store, Member, State)> {
    let store = Store::directory(&dir.join("store"));
    let member = Member::single("3.6", &dir.join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for (seed, kind) in [(1, "full"), (2, "delta"), (3, "delta"), (4, "full"), (5, "delta"), (6, "delta")] {
        Workload { seed, rounds: 6, compact: false, large: false, defragment: false }.run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        store.once(kind, &member).run().await?.expect(0)?;
    }
    // Several parts.
    for n in 0..20u32 {
        let value = tests::noise(1_000_000);
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    store.once("full", &member).run().await?.expect(0)?;
    client.put("x", "y", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    let state = state::read(&mut client).await?;
    etcd.kill9()?;
    Ok((store, member, state))
}

async fn copy(from: &Store, to: &Store, flags: &[&str], code: i32) -> Result<Value> {
    let command = from.command("copy").args(["-o", "json", "--to", &to.url]).args(flags.iter().copied());
    let command = to.environment.iter().fold(command, |command, (name, value)| command.env(name, value));
    let copied = command.run().await?.expect(code)?;
    if copied.stdout.is_empty() { Ok(Value::String(copied.stderr)) } else { copied.json() }
}

fn contents(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let read = |path: PathBuf| Ok((path.strip_prefix(dir)?.to_owned(), std::fs::read(&path)?));
    objects(dir)?.into_iter().map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn there_and_back_nothing_changes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, member, expected) = backup(dir.path()).await?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let there = minio.store("backups/copied");
    let copied = copy(&store, &there, &[], 0).await?;
    ensure!(copied["copied"] == 8 && copied["alreadyThere"] == 0, "{copied}");
    let copied = copy(&store, &there, &[], 0).await?;
    ensure!(copied["copied"] == 0 && copied["alreadyThere"] == 8, "{copied}");
    let back = Store { environment: there.environment.clone(), ..Store::directory(&dir.path().join("back")) };
    copy(&there, &back, &[], 0).await?;
    ensure!(contents(&dir.path().join("store"))? == contents(&dir.path().join("back"))?, "objects differ");
    let description = |place: &str| std::fs::read(dir.path().join(place).join("t00000001/timeline.json"));
    ensure!(description("store")? == description("back")?);
    state::same(&expected, &back.restore_and_read(&member).await?)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_does_not_arrive() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, ..) = backup(dir.path()).await?;
    let target = Store::directory(&dir.path().join("target"));
    let all = objects(&dir.path().join("store"))?;
    let (delta, large) =
        (&all[0], all.iter().max_by_key(|path| path.metadata().map_or(0, |meta| meta.len())).context("none")?);
    let mut saved = Vec::new();
    for path in [delta, large] {
        let whole = std::fs::read(path)?;
        let mut damaged = whole.clone();
        let middle = whole.len() / 2;
        damaged[middle] ^= 16;
        std::fs::write(path, damaged)?;
        saved.push((path, whole));
    }
    let copied = copy(&store, &target, &[], 10).await?;
    ensure!(
        copied["copied"] == 6 && copied["problems"].as_array().is_some_and(|problems| problems.len() == 2),
        "{copied}"
    );
    let listed = target.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    for (path, whole) in saved {
        std::fs::write(path, whole)?;
    }
    ensure!(copy(&store, &target, &[], 0).await?["copied"] == 2);
    target.command("verify").run().await?.expect(0)?;
    // One that was cut short at the destination is not taken for done.
    let cut = objects(&dir.path().join("target"))?.remove(2);
    std::fs::OpenOptions::new().write(true).open(&cut)?.set_len(100)?;
    let copied = copy(&store, &target, &[], 10).await?;
    ensure!(copied["problems"][0].as_str().is_some_and(|what| what.contains("100 bytes")), "{copied}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moment_on_is_copied_with_what_it_takes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, member, expected) = backup(dir.path()).await?;
    let listed = store.list().await?;
    let fulls = listed["timelines"][0]["fulls"].as_array().context("no fulls")?;
    let target = Store::directory(&dir.path().join("target"));
    let since = fulls[1]["time"].as_str().context("no time")?;
    let since = chrono::DateTime::parse_from_rfc3339(since)? + chrono::Duration::seconds(1);
    let copied = copy(&store, &target, &["--since", &since.to_rfc3339()], 0).await?;
    ensure!(copied["copied"] == 5, "{copied}");
    let there = target.list().await?;
    ensure!(there["timelines"][0]["fulls"][0]["lastRevision"] == fulls[1]["lastRevision"], "{there}");
    state::same(&expected, &target.restore_and_read(&member).await?)?;
    Ok(())
}

/// Into the predecessor's layout and back: all is there but what that layout has no place for.
#[tokio::test(flavor = "multi_thread")]
async fn layouts_are_converted() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, member, expected) = backup(dir.path()).await?;
    let gardener = Gardener::new(&dir.path().join("gardener"));
    let copied = copy(&store, &gardener.store(), &["--layout", "gardener-v2"], 0).await?;
    ensure!(copied["copied"] == 8, "{copied}");
    ensure!(copy(&store, &gardener.store(), &["--layout", "gardener-v2"], 0).await?["alreadyThere"] == 8);
    let set = gardener.run("list", &[]).await?;
    ensure!(set["fullSnapshot"]["lastRevision"] == expected.revision - 1, "{set}");
    ensure!(set["deltaSnapshots"].as_array().is_some_and(|deltas| deltas.len() == 1), "{set}");
    gardener.store().command("verify").run().await?.expect(0)?;
    let back = Store::directory(&dir.path().join("back"));
    ensure!(copy(&gardener.store(), &back, &["--layout", "steward"], 0).await?["copied"] == 8);
    ensure!(copy(&gardener.store(), &back, &["--layout", "steward"], 0).await?["alreadyThere"] == 8);
    back.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    for place in [gardener.store(), back] {
        let found = place.restore_and_read(&member).await?;
        state::same_keys(&expected, &found)?;
        ensure!(found.hash == expected.hash);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, member, _) = backup(dir.path()).await?;
    let target = Store::directory(&dir.path().join("target"));
    ensure!(copy(&store, &target, &["--timeline", "7"], 11).await?.to_string().contains("no timeline 7"));
    ensure!(copy(&store, &target, &["--since", "now"], 2).await?.to_string().contains("2026-11-22T18:00:00Z"));
    let nowhere = Store::directory(&dir.path().join("nowhere"));
    ensure!(copy(&nowhere, &target, &[], 11).await?.to_string().contains("no such directory"));
    // Another cluster's backups under the same number.
    let other = Member::single("3.6", &dir.path().join("other"))?;
    let _etcd = other.start().await?;
    target.once("full", &other).run().await?.expect(0)?;
    ensure!(copy(&store, &target, &[], 12).await?.to_string().contains("another timeline 1"));
    // Two timelines cannot become one.
    std::fs::remove_dir_all(&member.data_dir)?;
    store.once("full", &other).run().await?.expect(0)?;
    let fresh = file_url(&dir.path().join("fresh"));
    let refused = store.command("copy").args(["--to", &fresh, "--layout", "gardener-v2"]).run().await?.expect(2)?;
    refused.says("--timeline")?;
    store
        .command("copy")
        .args(["--to", &fresh, "--layout", "gardener-v2", "--timeline", "2"])
        .run()
        .await?
        .expect(0)?;
    Ok(())
}

/// The predecessor's layout has one history: what is of another does not go to the same place.
#[tokio::test(flavor = "multi_thread")]
async fn two_histories_are_not_mixed_in_its_layout() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, ..) = backup(dir.path()).await?;
    let other = Member::single("3.6", &dir.path().join("other"))?;
    let _etcd = other.start().await?;
    store.once("full", &other).run().await?.expect(0)?;
    let target = Store::directory(&dir.path().join("target"));
    copy(&store, &target, &["--layout", "gardener-v2", "--timeline", "1"], 0).await?;
    copy(&store, &target, &["--layout", "gardener-v2", "--timeline", "1"], 0).await?;
    ensure!(
        copy(&store, &target, &["--layout", "gardener-v2", "--timeline", "2"], 12)
            .await?
            .to_string()
            .contains("another")
    );
    let theirs = Gardener::new(&dir.path().join("theirs"));
    theirs.full(&other, &[]).await?;
    ensure!(copy(&theirs.store(), &target, &[], 12).await?.to_string().contains("another timeline 0"));
    Ok(())
}

/// A cluster that goes elsewhere: its last full snapshot is waited for, and what there is is copied where it does not come.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_a_cluster_is_waited_for() -> Result<()> {
    for layout in ["steward", "gardener-v2"] {
        let dir = tempfile::tempdir()?;
        let store = Store::directory(&dir.path().join("store"));
        let member = Member::single("3.6", &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        client.put("x", "1", None).await?;
        let once = |kind| store.once(kind, &member).args(["--layout", layout]);
        once("full").run().await?.expect(0)?;
        let early = Store::directory(&dir.path().join("early"));
        let copied = copy(&store, &early, &["--wait-for-final", "1s"], 11).await?;
        ensure!(copied["copied"] == 1, "{copied}");

        client.put("x", "2", None).await?;
        let target = Store::directory(&dir.path().join("target"));
        let mut copying = store.command("copy").args(["--to", &target.url, "--wait-for-final", "2m"]).spawn()?;
        copying.logs("the source has no final snapshot yet", LONG).await?;
        once("final").run().await?.expect(0)?;
        copying.wait().await?.expect(0)?;
        // The mark goes with it, into another layout too; and one that came back and went on has none.
        let other = if layout == "steward" { "gardener-v2" } else { "steward" };
        let converted = Store::directory(&dir.path().join("converted"));
        copy(&target, &converted, &["--layout", other, "--wait-for-final", "0s"], 0).await?;
        copy(&converted, &Store::directory(&dir.path().join("back")), &["--wait-for-final", "0s"], 0).await?;
        client.put("x", "3", None).await?;
        once("full").run().await?.expect(0)?;
        let late = Store::directory(&dir.path().join("late"));
        copy(&store, &late, &["--wait-for-final", "0s"], 11).await?;
        late.brings_back(&mut etcd).await?;
    }
    Ok(())
}
