//! What is deleted from a store, and that the rest restores.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::etcd::Member;
use tests::objects;
use tests::state::{self, State};
use tests::store::Store;

/// So many full snapshots with five deltas after each; what etcd had at the end.
async fn backup(dir: &Path, fulls: u32) -> Result<(Store, Member, State)> {
    let store = Store::directory(&dir.join("store"));
    let member = Member::single("3.6", &dir.join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for n in 0..fulls {
        client.put("x", n.to_string(), None).await?;
        store.once("full", &member).run().await?.expect(0)?;
        for m in 0..5u32 {
            client.put("x", format!("{n}.{m}"), None).await?;
            store.once("delta", &member).run().await?.expect(0)?;
        }
    }
    let state = state::read(&mut client).await?;
    etcd.kill9()?;
    Ok((store, member, state))
}

async fn gc(store: &Store, flags: &[&str]) -> Result<Value> {
    ends(store, flags, 0).await
}

async fn ends(store: &Store, flags: &[&str], code: i32) -> Result<Value> {
    let flags = ["-o", "json"].iter().chain(flags);
    store.command("gc").args(flags.copied()).run().await?.expect(code)?.json()
}

fn going(collected: &Value) -> Result<usize> {
    let decisions = collected["decisions"].as_array().context("no decisions")?;
    ensure!(
        decisions.iter().all(|decision| decision["reason"].as_str().is_some_and(|why| !why.is_empty())),
        "{collected}"
    );
    Ok(decisions.iter().filter(|decision| decision["delete"] == true).count())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_newer_backups_replaced_goes_and_the_rest_restores() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, member, expected) = backup(dir.path(), 4).await?;
    let place = dir.path().join("store");
    let foreign = place.join("t00000001/full/notes.txt");
    std::fs::write(&foreign, "mine")?;
    let flags = ["--policy", "limit-based", "--max-backups", "2"];
    let planned = gc(&store, &[flags.as_slice(), &["--dry-run"]].concat()).await?;
    ensure!(going(&planned)? == 17 && planned["deleted"] == 0, "{planned}");
    ensure!(objects(&place)?.len() == 24);
    let done = gc(&store, &flags).await?;
    ensure!(done["deleted"] == 17 && done["decisions"] == planned["decisions"], "{done}");
    ensure!(objects(&place)?.len() == 7 && foreign.exists());
    store.command("verify").run().await?.expect(0)?;
    ensure!(going(&gc(&store, &flags).await?)? == 0);
    state::same(&expected, &store.restore_and_read(&member).await?)?;
    // What the deltas of the last hour build upon stays: each full, since a revision that only a full has lies between.
    let dir = tempfile::tempdir()?;
    let (store, ..) = backup(dir.path(), 3).await?;
    ensure!(
        going(&gc(&store, &["--policy", "limit-based", "--max-backups", "1", "--delta-retention", "1h"]).await?)? == 0
    );
    store.command("gc").args(["--policy", "best"]).run().await?.expect(2)?;
    store.command("gc").args(["--max-backups", "3"]).run().await?.expect(2)?.says("limit-based")?;
    store.command("gc").args(["--policy", "limit-based", "--max-backups", "0"]).run().await?.expect(2)?;
    store.command("gc").args(["--delta-retention", "1 year"]).run().await?.expect(2)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_for_the_sake_of_a_damaged_full() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, ..) = backup(dir.path(), 3).await?;
    let fulls: Vec<_> = objects(&dir.path().join("store"))?
        .into_iter()
        .filter(|path| path.to_string_lossy().contains(".db.zst"))
        .collect();
    let flags = ["--policy", "limit-based", "--max-backups", "1"];
    let damage = |at: usize| {
        let mut bytes = std::fs::read(&fulls[at])?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&fulls[at], bytes)
    };
    damage(2)?;
    let done = ends(&store, &flags, 10).await?;
    ensure!(done["deleted"] == 6 && fulls[1].exists(), "{done}");
    let older = store.list().await?["timelines"][0]["fulls"][0]["lastRevision"].to_string();
    let target = dir.path().join("restored");
    store.restore(&target).args(["--full-revision", &older, "--accept-gap"]).run().await?.expect(0)?;
    damage(1)?;
    let done = ends(&store, &flags, 10).await?;
    ensure!(done["deleted"] == 0 && done["verified"].as_array().is_some_and(Vec::is_empty), "{done}");
    Ok(())
}

/// Clocks that were days ahead, years behind and back again while backups were taken: the order is that of revisions, and what
/// the newest state needs stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_costs_nothing() -> Result<()> {
    const DAY_MS: i64 = 86_400_000;
    let dir = tempfile::tempdir()?;
    let (store, member, mut expected) = backup(dir.path(), 4).await?;
    for (n, path) in objects(&dir.path().join("store"))?.into_iter().enumerate() {
        let name = path.file_name().and_then(|name| name.to_str()).context("a name")?;
        let (revisions, rest) = name.rsplit_once('-').context("no time")?;
        let (time, suffix) = rest.split_once('.').context("no suffix")?;
        let jumped = time.parse::<i64>()? + [0, 30 * DAY_MS, -2000 * DAY_MS, -DAY_MS][n % 4];
        std::fs::rename(&path, path.with_file_name(format!("{revisions}-{jumped:013}.{suffix}")))?;
    }
    let policies: [&[&str]; 3] = [
        &["--policy", "exponential", "--delta-retention", "7d", "--dry-run"],
        &["--policy", "exponential"],
        &["--policy", "limit-based", "--max-backups", "1"],
    ];
    for (n, policy) in policies.into_iter().enumerate() {
        gc(&store, policy).await?;
        store.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
        state::same(&expected, &store.restore_and_read(&member).await?)?;
        // A restore to a time answers with what was there, or that nothing was.
        let target = dir.path().join("at-a-time");
        let at = store.restore(&target).args(["--time", "2026-01-01T00:00:00Z"]).run().await?;
        if at.code == 0 {
            let (revision, keys, _) = state::of_directory(&target)?;
            ensure!(keys.values().all(|entry| entry.numbers.1 <= revision), "revision {revision} has later keys");
            std::fs::remove_dir_all(&target)?;
        } else {
            ensure!(at.code == 11 && !target.exists(), "{}", at.stderr);
        }
        // The clock is right again, and the newest backup is from the future.
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        store.once("full", &member).run().await?.expect(0)?;
        client.put("y", n.to_string(), None).await?;
        store.once("delta", &member).run().await?.expect(0)?;
        expected = state::read(&mut client).await?;
        etcd.kill9()?;
    }
    state::same(&expected, &store.restore_and_read(&member).await?)
}
