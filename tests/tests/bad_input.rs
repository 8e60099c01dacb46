//! Damaged, missing and foreign objects, a full disk, wrong flags: a clear message, an exit code, and nothing left behind.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::etcd::Member;
use tests::program::Sidecar;
use tests::store::Store;
use tests::workload::Workload;
use tests::{file_url, objects, succeed};
use tokio::process::Command;

/// A store with a full and four deltas, and nothing running.
async fn backup(dir: &Path) -> Result<PathBuf> {
    let store = dir.join("store");
    let member = Member::single("3.6", &dir.join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let workload = |seed| Workload { seed, rounds: 6, compact: false, large: false, defragment: false };
    workload(1).run(&mut client).await?;
    let place = Store::directory(&store);
    let once = |kind: &str| place.once(kind, &member);
    once("full").run().await?.expect(0)?;
    for seed in 2..6 {
        workload(seed).run(&mut client).await?;
        once("delta").run().await?.expect(0)?;
    }
    Ok(store)
}

fn restore(store: &Path, target: &Path) -> Sidecar {
    Store::directory(store).restore(target)
}

/// Deltas first, then the full, as they sort.
fn full_and_deltas(store: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut deltas = objects(store)?;
    let full = deltas.pop().context("no objects")?;
    ensure!(full.to_string_lossy().contains("/full/"), "{} is not the full", full.display());
    Ok((full, deltas))
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_objects_are_named_and_nothing_is_left() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(dir.path()).await?;
    let (full, deltas) = full_and_deltas(&store)?;
    let target = dir.path().join("deep/down/restored");
    for object in [&full, &deltas[1]] {
        let whole = std::fs::read(object)?;
        let name = object.file_name().context("no name")?.to_string_lossy().into_owned();
        let middle = whole.len() / 2;
        let mut flipped = whole.clone();
        flipped[middle] ^= 1;
        let damages: [(&str, Vec<u8>); 5] = [
            ("flipped", flipped),
            ("cut in half", whole[..middle].to_vec()),
            ("cut by a byte", whole[..whole.len() - 1].to_vec()),
            ("empty", Vec::new()),
            ("something else", b"this is no backup at all".repeat(20)),
        ];
        for (how, bytes) in damages {
            std::fs::write(object, &bytes)?;
            let ended = restore(&store, &target).run().await?;
            // A cut in the seek table costs nothing that a restore needs.
            if how == "cut by a byte" && ended.code == 0 {
                std::fs::remove_dir_all(dir.path().join("deep"))?;
                continue;
            }
            ended.expect(10).context(how)?.says(&name).context(how)?;
            ensure!(!dir.path().join("deep").exists(), "{how}: a failed restore left something behind");
        }
        std::fs::write(object, &whole)?;
    }
    restore(&store, &target).run().await?.expect(0)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_delta_is_a_gap() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(dir.path()).await?;
    let (full, deltas) = full_and_deltas(&store)?;
    let target = dir.path().join("restored");
    std::fs::remove_file(&deltas[1])?;
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let number = |text: &str| text.trim_start_matches('0').to_owned();
    let before = number(name(&deltas[0]).split('-').nth(1).context("no last")?);
    let after = number(name(&deltas[2]).split('-').next().context("no first")?);
    let refused = restore(&store, &target).run().await?.expect(11)?.says("--accept-gap")?;
    let first_missing = before.parse::<i64>()? + 1;
    let last_missing = after.parse::<i64>()? - 1;
    refused.says(&format!("revisions {first_missing} to {last_missing} are missing"))?;
    ensure!(!target.exists());
    let listed = Sidecar::new(["list", "--store", &file_url(&store)]).run().await?.expect(0)?;
    ensure!(listed.stdout.contains(&format!("GAP: revisions {first_missing} to {last_missing}")), "{}", listed.stdout);
    let restored = restore(&store, &target).args(["--accept-gap", "-o", "json"]).run().await?.expect(0)?.json()?;
    ensure!(restored["revision"] == before.parse::<i64>()?, "{restored}");
    std::fs::remove_file(full)?;
    restore(&store, &dir.path().join("other")).run().await?.expect(11)?.says("has deltas but no full snapshot")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_objects_are_listed_and_left_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(dir.path()).await?;
    std::fs::create_dir_all(store.join("v2"))?;
    std::fs::write(store.join("v2/Full-00000000-00000004-1518427675.gz"), b"theirs")?;
    std::fs::write(store.join("t00000001/delta/notes.txt"), b"somebody's")?;
    let listed = Store::directory(&store).list().await?;
    ensure!(listed["foreign"].as_array().is_some_and(|foreign| foreign.len() == 1), "{listed}");
    ensure!(listed["timelines"][0]["timeline"] == 0 && listed["timelines"][1]["timeline"] == 1, "{listed}");
    restore(&store, &dir.path().join("restored")).run().await?.expect(0)?;
    ensure!(store.join("t00000001/delta/notes.txt").exists());
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty)?;
    restore(&empty, &dir.path().join("other")).run().await?.expect(11)?.says("is empty; check bucket and prefix")?;
    std::fs::write(empty.join("x"), b"x")?;
    restore(&empty, &dir.path().join("other")).run().await?.expect(11)?.says("none of ours; check the prefix")?;
    restore(&dir.path().join("nowhere"), &dir.path().join("other"))
        .run()
        .await?
        .expect(11)?
        .says("no such directory")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_with_something_in_it_is_refused_or_moved_aside() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(dir.path()).await?;
    let target = dir.path().join("restored");
    restore(&store, &target).run().await?.expect(0)?;
    std::fs::write(target.join("member/mark"), b"the first one")?;
    restore(&store, &target).run().await?.expect(12)?.says("--replace")?;
    ensure!(target.join("member/mark").exists());
    // What a killed restore left is not in the way.
    std::fs::create_dir_all(target.join("member.restoring/snap"))?;
    restore(&store, &target).arg("--replace").run().await?.expect(0)?;
    ensure!(!target.join("member/mark").exists() && !target.join("member.restoring").exists());
    let aside: Vec<_> = std::fs::read_dir(&target)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("mark").exists())
        .collect();
    ensure!(aside.len() == 1, "the member before it is not kept: {aside:?}");
    // An etcd that runs there is not replaced under its feet.
    let _etcd = Member::single("3.6", &target)?.restored_in(&target).start().await?;
    restore(&store, &target).arg("--replace").run().await?.expect(12)?.says("is in use")?;
    Sidecar::new(["check", "--data-dir"]).arg(&target).run().await?.expect(12)?.says("is in use")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_nothing_is_left() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = backup(dir.path()).await?;
    let small = dir.path().join("small");
    std::fs::create_dir(&small)?;
    // Less than the full snapshot; and enough for that, but not for what follows it.
    let whole = dir.path().join("whole");
    restore(&store, &whole).run().await?.expect(0)?;
    let database = std::fs::metadata(whole.join("member/snap/db"))?.len();
    for (size, said) in [(32 << 10, "make room"), (database - 4096, "No space left on device")] {
        // A small file system of its own. It takes root, which CI and containers have; without it this cannot be shown.
        let options = ["-t", "tmpfs", "-o", &format!("size={size},mode=0777"), "tmpfs"];
        succeed(Command::new("mount").args(options).arg(&small)).await.context("mounting a small tmpfs needs root")?;
        let result = async {
            let target = small.join("restored");
            restore(&store, &target).run().await?.expect(1)?.says(said)?;
            ensure!(!target.exists(), "a failed restore left something behind");
            anyhow::Ok(())
        }
        .await;
        succeed(Command::new("umount").arg(&small)).await?;
        result?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_that_make_no_sense_are_usage_errors() -> Result<()> {
    let usage: [&[&str]; 14] = [
        &["restore", "--data-dir", "x"],
        &["restore", "--store", "file:///x"],
        &["restore", "--store", "file:///x", "--skip-hash-check", "--data-dir", "z"],
        &["restore", "--store", "ftp://x", "--data-dir", "z"],
        &["restore", "--store", "file://x", "--data-dir", "z"],
        &["restore", "--store", "file:///x", "--data-dir", "z", "--etcd-version", "2.3"],
        &["restore", "--store", "file:///x", "--data-dir", "z", "--initial-cluster", "a"],
        &["restore", "--store", "file:///x", "--data-dir", "z", "--name", "b", "--initial-cluster", "a=http://a:2380"],
        &["restore", "--store", "file:///x", "--data-dir", "z", "--bump-revision", "5"],
        &["restore", "--store", "file:///x", "--all-members", "z"],
        &["snapshot", "--store", "file:///x", "--full-schedule", "every hour"],
        &["snapshot", "--store", "file:///x", "--delta-period", "soon"],
        &["snapshot", "--store", "file:///x", "--full-schedule", "0 0 30 2 *"],
        &["snapshot", "--store", "file:///tmp/steward-none", "--endpoints", "http://user:password@127.0.0.1:1"],
    ];
    for arguments in usage {
        let ended = Sidecar::new(arguments.iter().copied()).run().await?;
        ensure!(ended.code == 2 && !ended.stderr.is_empty(), "{arguments:?} gives {} {}", ended.code, ended.stderr);
        ensure!(!ended.stderr.contains("password@"), "a password is shown: {}", ended.stderr);
    }
    Sidecar::new(["check", "--data-dir", "/nonexistent"]).run().await?.expect(12)?.says("not a directory")?;
    let nobody =
        ["snapshot", "--once", "full", "--endpoints", "http://127.0.0.1:1", "--store", "file:///tmp/steward-none"];
    Sidecar::new(nobody).run().await?.expect(1)?.says("http://127.0.0.1:1")?;
    Ok(())
}

/// A store that cannot be written, by a user who is not root.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_without_permission_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let _etcd = member.start().await?;
    let file = dir.path().join("file");
    std::fs::write(&file, b"")?;
    // Root may do anything but make a directory inside a file.
    let store = format!("file://{}/inside", file.display());
    let once = ["snapshot", "--once", "full", "--endpoints", &member.client_url(), "--store", &store];
    Sidecar::new(once).run().await?.expect(1)?.says(&file.display().to_string())?;
    Ok(())
}

/// What the library would panic on, and what would go to another place than was meant.
#[tokio::test(flavor = "multi_thread")]
async fn places_that_are_none_are_refused() -> Result<()> {
    for endpoint in ["localhost:1", "127.0.0.1:19000", "not a url", "http://", "//x", "http://x:99999", "ftp://x"] {
        let list = Sidecar::new(["list", "--store", "s3://b/p"])
            .env("AWS_ENDPOINT_URL", endpoint)
            .env("AWS_REGION", "r")
            .env("AWS_ACCESS_KEY_ID", "a")
            .env("AWS_SECRET_ACCESS_KEY", "b");
        list.run().await?.expect(2)?.says("must be a URL")?;
        let list = Sidecar::new(["list", "--store", "az://b/p"])
            .env("AZURE_STORAGE_ENDPOINT", endpoint)
            .env("AZURE_STORAGE_ACCOUNT_NAME", "a")
            .env("AZURE_STORAGE_ACCOUNT_KEY", "Yg==");
        list.run().await?.expect(2)?.says("must be a URL")?;
    }
    let gcs = Sidecar::new(["list", "--store", "gs://b/p"]).env("STORAGE_EMULATOR_HOST", "not a url");
    gcs.run().await?.expect(2)?.says("must be a URL")?;
    for url in ["file:x", "file:/x", "file://x"] {
        Sidecar::new(["list", "--store", url]).run().await?.expect(2)?.says("three slashes")?;
    }
    Ok(())
}

/// What `launch` has not written stays as it is, and so does what is no file.
#[tokio::test(flavor = "multi_thread")]
async fn launch_writes_over_nothing_that_is_not_its_own() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("a.yaml"), "name: a")?;
    std::fs::write(at("a.json"), "{\"important\": 1}")?;
    std::fs::write(at("half.json"), "{ half")?;
    std::os::unix::fs::symlink(at("a.yaml"), at("link"))?;
    succeed(Command::new("mkfifo").arg(at("pipe"))).await?;
    for (name, said) in [
        ("a.yaml", "was not written by launch"),
        ("a.json", "was not written by launch"),
        ("half.json", "was not written by launch"),
        ("link", "is no file"),
        ("pipe", "is no file"),
    ] {
        let before = std::fs::symlink_metadata(at(name))?.ino();
        let launch = Sidecar::new(["launch", "--sidecar", "http://127.0.0.1:1", "--config"]).arg(at(name));
        launch.run().await?.expect(12)?.says(said)?.says("--config")?;
        ensure!(std::fs::symlink_metadata(at(name))?.ino() == before, "{name} was replaced");
    }
    // Nor is waited for what can never be, or shown what may be a password.
    for url in ["u:hidden@127.0.0.1", "ftp://x", "https://u:hidden@127.0.0.1:1", "https://127.0.0.1:1/?token=hidden"] {
        let launch = Sidecar::new(["launch", "--sidecar", url, "--config"]).arg(at("etcd.conf.yaml"));
        for call in [launch, Sidecar::new(["ctl", "--sidecar", url, "status"])] {
            let refused = call.run().await?.expect(2)?;
            ensure!(!refused.stderr.contains("hidden"), "{}", refused.stderr);
        }
    }
    Ok(())
}
