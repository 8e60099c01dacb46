//! Backups that prove themselves: what is whole is said to be, and what is not is found.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::etcd::Member;
use tests::objects;
use tests::store::Store;
use tests::workload::Workload;

async fn verify(store: &Store, level: &str, code: i32) -> Result<Value> {
    let work_dir = tempfile::tempdir()?;
    let verify = store.command("verify").args(["-o", "json", "--level", level, "--work-dir"]).arg(work_dir.path());
    let report = verify.run().await?.expect(code)?.json()?;
    ensure!(std::fs::read_dir(work_dir.path())?.next().is_none(), "a replay left something behind");
    Ok(report)
}

fn problems(report: &Value) -> usize {
    report["problems"].as_array().map_or(0, Vec::len)
}

/// Two fulls with deltas after each, some while etcd compacts; small.
async fn backup(minor: &str, dir: &Path) -> Result<Store> {
    let store = Store::directory(&dir.join("store"));
    let member = Member::single(minor, &dir.join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    for (seed, kind) in [(1, "full"), (2, "delta"), (3, "delta"), (4, "full"), (5, "delta")] {
        Workload { seed, rounds: 14, compact: kind == "full", large: false, defragment: false }
            .run(&mut client)
            .await?;
        tests::workload::expire(&mut client).await?;
        store.once(kind, &member).run().await?.expect(0)?;
    }
    Ok(store)
}

/// What is whole passes every level, and a replay finds each hash that etcd gave.
async fn what_is_whole_passes(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(minor, dir.path()).await?;
    for level in ["names", "bytes", "decode", "replay"] {
        let report = verify(&store, level, 0).await?;
        ensure!(problems(&report) == 0 && report["objects"] == 5, "{report}");
        // Between the second full and what came before it.
        ensure!(report["remarks"].as_array().is_some_and(|remarks| remarks.len() == 1), "{report}");
        if level == "replay" {
            let replayed = report["replayed"].as_array().context("no chains")?;
            ensure!(replayed.len() == 2, "{report}");
            ensure!(
                replayed.iter().all(|chain| chain["hashes"].as_array().is_some_and(|hashes| !hashes.is_empty())),
                "{report}"
            );
        }
    }
    Ok(())
}

tests::on_every_minor! {
    what_is_whole_passes_3_4: what_is_whole_passes("3.4");
    what_is_whole_passes_3_5: what_is_whole_passes("3.5");
    what_is_whole_passes_3_6: what_is_whole_passes("3.6");
    what_is_whole_passes_3_7: what_is_whole_passes("3.7");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_at_the_level_where_it_shows() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup("3.6", dir.path()).await?;
    for object in objects(&dir.path().join("store"))? {
        let name = object.file_name().context("no name")?.to_string_lossy().into_owned();
        let whole = std::fs::read(&object)?;
        for (at, bit) in
            [(9, 0), (whole.len() / 3, 3), (whole.len() / 2, 7), (whole.len() - 30, 1), (whole.len() - 5, 2)]
        {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            std::fs::write(&object, damaged)?;
            ensure!(problems(&verify(&store, "names", 0).await?) == 0);
            let report = verify(&store, "bytes", 10).await.with_context(|| format!("{name}, byte {at}"))?;
            ensure!(report["problems"][0]["at"].as_str().is_some_and(|at| at.ends_with(&name)), "{report}");
        }
        for bytes in [&whole[..whole.len() - 1], &[]] {
            std::fs::write(&object, bytes)?;
            verify(&store, "bytes", 10).await.with_context(|| format!("{name}, cut to {}", bytes.len()))?;
        }
        std::fs::write(&object, whole)?;
    }
    // Under another name it is whole and wrong.
    let deltas = objects(&dir.path().join("store"))?;
    let delta = deltas.iter().rfind(|path| path.to_string_lossy().contains("/delta/")).context("no delta")?;
    let name = delta.to_string_lossy().replace("/delta/0000000000000000", "/delta/0000000000000001");
    let name = name.replacen("-0000000000000000", "-0000000000000001", 1);
    std::fs::rename(delta, name)?;
    let report = verify(&store, "names", 11).await?;
    ensure!(report["problems"][0]["isGap"] == true, "{report}");
    verify(&store, "bytes", 10).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_nothing_to_restore_does_not_pass() -> Result<()> {
    let dir = tempfile::tempdir()?;
    verify(&Store::directory(dir.path()), "names", 11).await?;
    Ok(())
}

/// A run that is killed goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_cut_short_goes_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup("3.6", dir.path()).await?;
    let journal = dir.path().join("journal");
    let run = || async {
        let command = store.command("verify").args(["-o", "json", "--level", "replay", "--resume"]).arg(&journal);
        command.run().await
    };
    let first = run().await?.expect(0)?.json()?;
    ensure!(first["known"] == 0 && first["replayed"].as_array().is_some_and(|chains| chains.len() == 2), "{first}");
    // As if it had been killed after the third object, in the middle of a line.
    let lines = std::fs::read_to_string(&journal)?;
    let kept: usize = lines.lines().take(3).map(|line| line.len() + 1).sum();
    std::fs::write(&journal, &lines[..kept + 7])?;
    let second = run().await?.expect(0)?.json()?;
    ensure!(second["known"] == 3 && second["objects"] == 5, "{second}");
    ensure!(run().await?.expect(0)?.json()?["known"] == 5);
    // What is damaged is found all the same, when its size has changed or nothing was noted of it.
    let object = objects(&dir.path().join("store"))?.remove(0);
    std::fs::OpenOptions::new().write(true).open(&object)?.set_len(90)?;
    run().await?.expect(10)?;
    run().await?.expect(10)?;
    Ok(())
}
