//! What an initialization finds has a name of its own, a reason with evidence, and an outcome.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::sidecar::{Action, Cause};
use tests::etcd::Member;
use tests::pod::Pod;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;
use tests::{VALUE, copy, flip};

/// The last segment of the log, and where what was written to it ends.
fn end_of_log(data: &Path) -> Result<(PathBuf, u64)> {
    let segments = std::fs::read_dir(data.join("member/wal"))?.filter_map(|entry| Some(entry.ok()?.path()));
    let last = segments.filter(|path| path.extension().is_some_and(|kind| kind == "wal")).max().context("no log")?;
    let written = std::fs::read(&last)?.iter().rposition(|byte| *byte != 0).context("an empty log")?;
    Ok((last, (written as u64 + 8) / 8 * 8))
}

type Harm = fn(&Path) -> Result<()>;
/// What it is called, what is copied, what is done to it; what is found, what is done about it, and what is said.
type Case<'c> = (&'static str, &'c Path, Harm, Cause, Action, &'static str);

fn cases<'c>(good: &'c Path, old: &'c Path, other: &'c Path) -> [Case<'c>; 11] {
    let nothing: Harm = |_| Ok(());
    [
        ("sound", good, nothing, Cause::Sound, Action::Keep, "the data is sound"),
        ("none", good, |data| Ok(std::fs::remove_dir_all(data)?), Cause::NoData, Action::Restore, "there is no data"),
        ("behind", old, nothing, Cause::Behind, Action::Append, "behind the backups"),
        ("foreign", other, nothing, Cause::ForeignCluster, Action::Refuse, "another's"),
        (
            "torn",
            good,
            |data| {
                // The head of a record of 600 bytes, of which nothing else came to the disk.
                let (path, end) = end_of_log(data)?;
                Ok(File::options().write(true).open(path)?.write_all_at(&600u64.to_le_bytes(), end)?)
            },
            Cause::Repairable,
            Action::Keep,
            "the log ends in a record that a crash cut",
        ),
        (
            "no log",
            good,
            |data| Ok(std::fs::remove_dir_all(data.join("member/wal"))?),
            Cause::DamagedLog,
            Action::Restore,
            "the log directory is missing",
        ),
        (
            "a flipped bit in the log",
            good,
            |data| {
                let (path, end) = end_of_log(data)?;
                let file = File::options().read(true).write(true).open(path)?;
                let mut byte = [0];
                file.read_exact_at(&mut byte, end / 2)?;
                Ok(file.write_all_at(&[byte[0] ^ 1], end / 2)?)
            },
            Cause::DamagedLog,
            Action::Restore,
            ".wal",
        ),
        ("corrupt pages", good, tests::damage, Cause::DamagedDatabase, Action::Restore, "snap/db"),
        (
            "a flipped bit in a value",
            good,
            flip,
            Cause::DamagedDatabase,
            Action::Restore,
            "a value in snap/db has changed",
        ),
        (
            "a cut database",
            good,
            |data| {
                let file = File::options().write(true).open(data.join("member/snap/db"))?;
                Ok(file.set_len(3 * 4096)?)
            },
            Cause::DamagedDatabase,
            Action::Restore,
            "snap/db",
        ),
        (
            "no database",
            good,
            |data| Ok(std::fs::remove_file(data.join("member/snap/db"))?),
            Cause::DamagedDatabase,
            Action::Restore,
            "the database is missing",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_is_found_has_a_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    let data = pod.member.data_dir.clone();
    let (good, old, other) = (dir.path().join("good"), dir.path().join("old"), dir.path().join("other"));
    let mut etcd = pod.member.start().await?;
    Workload::of(1).run(&mut etcd.client().await?).await?;
    tests::workload::expire(&mut etcd.client().await?).await?;
    store.once("full", &pod.member).run().await?.expect(0)?;
    etcd.stop()?;
    copy(&data, &old).await?;
    etcd = pod.member.start().await?;
    Workload::of(2).run(&mut etcd.client().await?).await?;
    tests::workload::expire(&mut etcd.client().await?).await?;
    for (key, value) in [("flipped", VALUE), ("last", b"which the backups have too")] {
        etcd.client().await?.put(key, value, None).await?;
    }
    store.once("delta", &pod.member).run().await?.expect(0)?;
    etcd.stop()?;
    copy(&data, &good).await?;
    let (revision, keys, _) = state::of_directory(&good)?;
    let stranger = Member::single("3.6", &other)?;
    let mut etcd = stranger.start().await?;
    etcd.client().await?.put("x", "1", None).await?;
    etcd.stop()?;

    pod.more = "snapshots: {deltaPeriod: 1h}\n".into();
    let mut serving = pod.start_serve().await?;
    for (what, from, harm, cause, action, said) in cases(&good, &old, &other) {
        copy(from, &data).await?;
        harm(&data)?;
        let outcome = pod.initialize().await.context(what)?;
        ensure!(
            (outcome.cause(), outcome.action()) == (cause, action) && outcome.reason.contains(said),
            "{what}: {outcome:?}"
        );
        let status = pod.status().await?;
        ensure!(status.initialized.as_ref() == Some(&outcome), "{what}: {status:?}");
        serving.logs(said, Duration::from_secs(60)).await.with_context(|| format!("{what} is not logged"))?;
        if action != Action::Refuse {
            ensure!(state::of_directory(&data)?.0 == revision, "{what}: the revision is another");
            ensure!(state::of_directory(&data)?.1 == keys, "{what}: the keys are others");
        }
        // What was there lies beside.
        let aside = !outcome.moved_to.is_empty() && Path::new(&outcome.moved_to).exists();
        ensure!(aside == (action == Action::Restore && what != "none"), "{what}: {outcome:?}");
    }
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// What a hash alone shows to be damaged and is in no backup is not given up without a person; a restored member, whose rows are
/// others under the same numbers, is not taken for damaged.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_damaged_database_has_stays() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&dir.path().join("store"))))?;
    pod.more = "snapshots: {deltaPeriod: 1h}\n".into();
    let (store, data) = (pod.store.clone().context("no store")?, pod.member.data_dir.clone());
    let mut etcd = pod.member.start().await?;
    let mut client = etcd.client().await?;
    client.put("flipped", VALUE, None).await?;
    let (early, older) = (dir.path().join("early"), dir.path().join("older"));
    store.once("full", &pod.member).run().await?.expect(0)?;
    etcd.stop()?;
    copy(&data, &older).await?;
    etcd = pod.member.start().await?;
    client = etcd.client().await?;
    for n in 0..6 {
        client.put("x", n.to_string(), None).await?;
    }
    store.once("delta", &pod.member).run().await?.expect(0)?;
    client.put("x", "more", None).await?;
    etcd.stop()?;
    let serving = pod.start_serve().await?;
    ensure!(pod.initialize().await?.action() == Action::Keep);
    flip(&data)?;
    let before = state::of_directory(&data)?;
    let outcome = pod.initialize().await?;
    ensure!(outcome.cause() == Cause::DamagedDatabase && outcome.action() == Action::Refuse, "{outcome:?}");
    ensure!(outcome.reason.contains("revisions up to 9, where the backups end at 8"), "{}", outcome.reason);
    ensure!(state::of_directory(&data)? == before);
    // As it says.
    let db = data.join("member/snap/db");
    let restore = tests::program::Sidecar::new(["restore", "--skip-hash-check", "--snapshot-file"]).arg(db);
    restore
        .arg("--data-dir")
        .arg(&early)
        .args(["--name", &pod.member.name, "--initial-cluster"])
        .arg(&pod.member.initial_cluster)
        .run()
        .await?
        .expect(0)?;
    copy(&early, &data).await?;
    let outcome = pod.initialize().await?;
    ensure!(outcome.action() == Action::Keep && outcome.revision == 9, "{outcome:?}");
    serving.terminate().await?.expect(0)?;
    // The volume as it was before, with other writes after it and the same at the end, by an etcd that nobody looked after.
    for (round, same_end) in [false, true].into_iter().enumerate() {
        copy(&older, &data).await?;
        let mut etcd = pod.member.start().await?;
        let mut client = etcd.client().await?;
        for n in 0..6 {
            let value = if same_end && n == 5 { "5".to_owned() } else { format!("{round} {n}") };
            client.put("x", value, None).await?;
        }
        // The log may be as long as that of the other history, too.
        for _ in 0..40 {
            client.lease_grant(1000, None).await?;
        }
        etcd.stop()?;
        let serving = pod.start_serve().await?;
        let outcome = pod.initialize().await?;
        ensure!(outcome.action() == Action::Keep && outcome.cause() == Cause::Sound, "{same_end}: {outcome:?}");
        ensure!(outcome.revision == 8, "{outcome:?}");
        serving.terminate().await?.expect(0)?;
    }
    Ok(())
}

/// A disk that became read-only is looked at like any other; that nothing can be done there is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_written_is_told_of() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&dir.path().join("store"))))?;
    let data = pod.member.data_dir.clone();
    std::fs::create_dir_all(&data)?;
    let mount = |options: &[&str]| {
        let mut command = tokio::process::Command::new("mount");
        command.args(options).arg(&data);
        async move { tests::succeed(&mut command).await.context("mounting needs root") }
    };
    mount(&["-t", "tmpfs", "-o", "size=200m,mode=0700", "tmpfs"]).await?;
    let result = async {
        let mut etcd = pod.member.start().await?;
        etcd.client().await?.put("x", "1", None).await?;
        pod.store.as_ref().context("no store")?.once("full", &pod.member).run().await?.expect(0)?;
        etcd.stop()?;
        let before = state::of_directory(&data)?;
        mount(&["-o", "remount,ro"]).await?;
        let serving = pod.start_serve().await?;
        let outcome = pod.initialize().await?;
        ensure!(outcome.action() == Action::Keep && outcome.reason.contains("Read-only file system"), "{outcome:?}");
        mount(&["-o", "remount,rw"]).await?;
        tests::damage(&data)?;
        mount(&["-o", "remount,ro"]).await?;
        let mut launched = pod.start_launch()?;
        launched.running()?.logs("Read-only file system", Duration::from_secs(60)).await?;
        ensure!(!launched.log().contains("etcd is started"), "{}", launched.log());
        let _ = launched.terminate().await?;
        mount(&["-o", "remount,rw"]).await?;
        let outcome = pod.initialize().await?;
        ensure!(outcome.action() == Action::Restore && state::of_directory(&data)? == before, "{outcome:?}");
        serving.terminate().await?.expect(0)?;
        anyhow::Ok(())
    }
    .await;
    tests::succeed(tokio::process::Command::new("umount").arg(&data)).await?;
    result
}

/// An etcd that cannot start on its data, although that is sound, is sent back a few times and no more; the data stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_fails_on_its_data_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let mut etcd = pod.member.start().await?;
    etcd.client().await?.put("x", "1", None).await?;
    // The members agree on the version of the cluster a while after they have begun.
    let version = || async {
        let http = reqwest::get(format!("{}/version", pod.member.client_url())).await?.text().await?;
        ensure!(http.contains("\"etcdcluster\":\"3.6"), "{http}");
        Ok(())
    };
    tests::eventually(Duration::from_secs(30), version).await?;
    etcd.stop()?;
    let before = state::of_directory(&pod.member.data_dir)?;
    // An older minor does not take it.
    pod.member.minor = "3.5".into();
    let serving = pod.start_serve().await?;
    let mut launched = pod.start_launch()?;
    launched.running()?.logs_times("etcd has ended", 3, Duration::from_secs(60)).await?;
    let ended = launched.wait().await?;
    ensure!(ended.code != 0 && ended.code != 12, "{}: {}", ended.code, ended.stderr);
    ensure!(ended.stderr.matches("etcd is started").count() == 3, "{}", ended.stderr);
    ensure!(serving.log().contains("how the last etcd ended"), "{}", serving.log());
    ensure!(state::of_directory(&pod.member.data_dir)? == before);
    serving.terminate().await?.expect(0)?;
    // A sidecar that comes anew still knows.
    let serving = pod.start_serve().await?;
    let status = pod.status().await?;
    ensure!(status.last_exit.is_some_and(|exit| exit.code == ended.code), "{status:?}");
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A store that answers and is damaged, or lacks revisions in the middle, may have more than a volume that is old.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_volume_does_not_start_beside_damaged_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&place)))?;
    pod.more = "snapshots: {deltaPeriod: 1h}\n".into();
    let (data, old, whole) = (pod.member.data_dir.clone(), dir.path().join("old"), dir.path().join("whole"));
    let store = pod.store.clone().context("no store")?;
    let mut etcd = pod.member.start().await?;
    Workload::of(1).run(&mut etcd.client().await?).await?;
    store.once("full", &pod.member).run().await?.expect(0)?;
    etcd.stop()?;
    copy(&data, &old).await?;
    etcd = pod.member.start().await?;
    for seed in [2, 3, 4] {
        let mut client = etcd.client().await?;
        Workload::of(seed).run(&mut client).await?;
        // With the end of a lease comes a revision.
        tests::workload::expire(&mut client).await?;
        store.once("delta", &pod.member).run().await?.expect(0)?;
    }
    etcd.stop()?;
    let newest = state::of_directory(&data)?.0;
    copy(&place, &whole).await?;
    let mut deltas = tests::objects(&place)?;
    deltas.retain(|name| name.to_string_lossy().contains(".delta."));
    let serving = pod.start_serve().await?;
    for (what, said) in [("gap", "are missing"), ("description", "timeline.json"), ("whole", "behind the backups")] {
        copy(&old, &data).await?;
        copy(&whole, &place).await?;
        match what {
            "gap" => std::fs::remove_file(&deltas[0])?,
            "description" => std::fs::write(place.join("t00000001/timeline.json"), "{")?,
            _ => {}
        }
        let outcome = pod.initialize().await?;
        let expected = if what == "whole" { Action::Append } else { Action::Refuse };
        ensure!(outcome.action() == expected && outcome.reason.contains(said), "{what}: {outcome:?}");
        let revision = state::of_directory(&data)?.0;
        ensure!(what == "whole" || revision < newest, "{what}: it is at {revision}");
        ensure!(what != "whole" || revision == newest, "{what}: it is at {revision}");
    }
    serving.terminate().await?.expect(0)?;
    Ok(())
}
