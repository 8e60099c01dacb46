//! Our files in the hands of etcd's own tools, theirs in ours, and data that moves from minor to minor.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use etcd_client::{LeaseGrantOptions, PutOptions};
use etcd_format::bolt::{Builder, Db};
use etcd_format::mvcc;
use sha2::{Digest, Sha256};
use tests::etcd::{MINORS, Member};
use tests::program::Sidecar;
use tests::store::Store;
use tests::workload::Workload;
use tests::{objects, program, state, succeed};
use tokio::process::Command;

fn workload(seed: u64) -> Workload {
    Workload { seed, rounds: 16, compact: true, large: false, defragment: true }
}

/// etcd's own restore: etcdutl, or etcdctl on 3.4.
fn restore_tool(minor: &str) -> Result<Command> {
    let tool = format!("etcd-{minor}");
    let mut command = Command::new(program(&tool, if minor == "3.4" { "etcdctl" } else { "etcdutl" })?);
    command.env("ETCDCTL_API", "3");
    Ok(command)
}

/// `zstd -d` of a full gives what the minor's own restore takes, and the etcd on it has the same data.
async fn decompressed_full_is_etcds_own(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = dir.path().join("store");
    let member = Member::single(minor, &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    workload(4).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    Store::directory(&store).once("full", &member).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    let full = objects(&store)?.into_iter().next().context("no full")?;
    let plain = dir.path().join("plain.db");
    succeed(Command::new(program("zstd", "zstd")?).args(["-q", "-d"]).arg(&full).arg("-o").arg(&plain)).await?;

    // Theirs on our bytes.
    let theirs = dir.path().join("theirs");
    succeed(restore_tool(minor)?.args(["snapshot", "restore"]).arg(&plain).arg("--data-dir").arg(&theirs)).await?;
    Sidecar::new(["check", "--data-dir"]).arg(&theirs).run().await?.expect(0)?;
    // Ours on their bytes, compressed and plain.
    for (name, file) in [("plain", &plain), ("compressed", &full)] {
        let ours = dir.path().join(name);
        Sidecar::new(["restore", "--snapshot-file"]).arg(file).arg("--data-dir").arg(&ours).run().await?.expect(0)?;
        let status = restore_tool(minor)?
            .args(["snapshot", "status", "-w", "json"])
            .arg(ours.join("member/snap/db"))
            .output()
            .await?;
        ensure!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    }
    for name in ["theirs", "plain", "compressed"] {
        let after = state::of(&member.restored_in(&dir.path().join(name))).await?;
        state::same(&before, &after).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// What etcd's own `snapshot save` writes, restored by us.
async fn plain_snapshot_is_restored(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single(minor, &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    workload(5).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    let file = dir.path().join("snapshot.db");
    let etcdctl = program(&format!("etcd-{minor}"), "etcdctl")?;
    let endpoint = member.client_url();
    let mut save = Command::new(etcdctl);
    succeed(save.env("ETCDCTL_API", "3").args(["--endpoints", &endpoint, "snapshot", "save"]).arg(&file)).await?;
    let before = state::read(&mut client).await?;
    etcd.stop()?;
    // A copy of a stopped member's db has no sha256.
    let bare = dir.path().join("bare.db");
    std::fs::copy(member.data_dir.join("member/snap/db"), &bare)?;
    let refused = dir.path().join("refused");
    Sidecar::new(["restore", "--snapshot-file"])
        .arg(&bare)
        .arg("--data-dir")
        .arg(&refused)
        .run()
        .await?
        .expect(10)?
        .says("--skip-hash-check")?;
    ensure!(!refused.exists(), "a refused restore left something behind");
    for (name, file, skip) in [("saved", &file, false), ("bare", &bare, true)] {
        let data = dir.path().join(name);
        let mut restore = Sidecar::new(["restore", "--snapshot-file"]).arg(file).arg("--data-dir").arg(&data);
        if skip {
            restore = restore.arg("--skip-hash-check");
        }
        restore.run().await?.expect(0)?;
        state::same(&before, &state::of(&member.restored_in(&data)).await?).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// 3.4 → 3.5 → 3.6 → 3.7, each restored from the backup of the one before, and from the oldest straight to the newest.
#[tokio::test(flavor = "multi_thread")]
async fn data_moves_up_through_all_minors() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut expected = None;
    let mut data = dir.path().join("data-3.4");
    for (position, minor) in MINORS.into_iter().enumerate() {
        let member = Member::single(minor, &data)?;
        let member = if position == 0 { member } else { member.restored_in(&data) };
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        if let Some(before) = &expected {
            state::same(before, &state::read(&mut client).await?).context(minor)?;
        }
        workload(10 + position as u64).run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        let store = Store::directory(&dir.path().join(format!("store-{minor}")));
        for kind in ["full", "delta"] {
            store.once(kind, &member).run().await?.expect(0)?;
            client.put("/moved", minor, None).await?;
        }
        store.once("delta", &member).run().await?.expect(0)?;
        expected = Some(state::read(&mut client).await?);
        etcd.kill9()?;
        if let Some(next) = MINORS.get(position + 1) {
            data = dir.path().join(format!("data-{next}"));
            restore_for(&store, &data, next).await?;
        }
        if position == 0 {
            let far = dir.path().join("far");
            restore_for(&store, &far, "3.7").await?;
            let found = state::of(&Member::single("3.7", &far)?.restored_in(&far)).await?;
            state::same(expected.as_ref().context("no state")?, &found)?;
        }
    }
    Ok(())
}

async fn restore_for(store: &Store, data: &Path, minor: &str) -> Result<()> {
    store.restore(data).args(["--etcd-version", minor]).run().await?.expect(0).map(drop)
}

/// Newer data on an older minor: what is possible is said to be, and starts.
#[tokio::test(flavor = "multi_thread")]
async fn data_moves_down_when_the_target_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.7", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    workload(20).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    let store = Store::directory(&dir.path().join("store"));
    store.once("full", &member).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    for minor in ["3.6", "3.5", "3.4"] {
        let data = dir.path().join(minor);
        restore_for(&store, &data, minor).await?;
        let found = state::of(&Member::single(minor, &data)?.restored_in(&data)).await.context(minor)?;
        state::same(&before, &found).context(minor)?;
    }
    Ok(())
}

/// `--bump-revision --mark-compacted`: revisions that clients may have seen are below, and asking for them says so.
#[tokio::test(flavor = "multi_thread")]
async fn bumped_revision_is_above_all_that_clients_saw() -> Result<()> {
    for minor in MINORS {
        let dir = tempfile::tempdir()?;
        let member = Member::single(minor, &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        workload(30).run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        let store = Store::directory(&dir.path().join("store"));
        store.once("full", &member).run().await?.expect(0)?;
        let before = state::read(&mut client).await?;
        etcd.kill9()?;
        std::fs::remove_dir_all(&member.data_dir)?;
        let restore = store.restore_member(&member).args(["--bump-revision", "1000000", "--mark-compacted"]);
        restore.run().await?.expect(0)?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        let after = state::read(&mut client).await?;
        ensure!(
            after.revision == before.revision + 1_000_000,
            "revision {} after {} on {minor}",
            after.revision,
            before.revision
        );
        ensure!(after.keys == before.keys, "keys differ on {minor}");
        let old = etcd_client::GetOptions::new().with_revision(before.revision);
        let refused = client.get("x", Some(old)).await.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(refused.contains("compacted"), "an old revision gives {refused:?} on {minor}");
        workload(31).run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        let later = state::read(&mut client).await?;
        etcd.stop()?;
        Sidecar::new(["check", "--data-dir"]).arg(&member.data_dir).run().await?.expect(0)?;
        state::same(&later, &state::of(&member).await?)?;
    }
    Ok(())
}

/// Takes every lease record out of a file of `snapshot save`, as a restore that loses leases leaves a cluster.
fn remove_leases(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let db = Db::open(&bytes[..bytes.len() - 32])?;
    let mut builder = Builder::append(&db, Vec::new())?;
    builder.start(mvcc::LEASE_BUCKET)?;
    let (finished, tail) = builder.finish()?;
    let mut whole = bytes[..bytes.len() - 32].to_vec();
    whole.extend_from_slice(&tail);
    let metas = finished.metas().concat();
    whole[..metas.len()].copy_from_slice(&metas);
    let digest = Sha256::digest(&whole);
    whole.extend_from_slice(&digest);
    Ok(std::fs::write(path, whole)?)
}

/// A key whose lease has no record stays, and its lease becomes one that etcd knows.
#[tokio::test(flavor = "multi_thread")]
async fn orphaned_leases_get_a_record() -> Result<()> {
    for minor in MINORS {
        let dir = tempfile::tempdir()?;
        let member = Member::single(minor, &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        client.lease_grant(500, Some(LeaseGrantOptions::new().with_id(0x77))).await?;
        client.put("leased", "v", Some(PutOptions::new().with_lease(0x77))).await?;
        let file = dir.path().join("snapshot.db");
        let etcdctl = program(&format!("etcd-{minor}"), "etcdctl")?;
        let endpoint = member.client_url();
        let mut save = Command::new(etcdctl);
        succeed(save.env("ETCDCTL_API", "3").args(["--endpoints", &endpoint, "snapshot", "save"]).arg(&file)).await?;
        let before = state::read(&mut client).await?;
        etcd.stop()?;
        remove_leases(&file)?;
        let target = dir.path().join("restored");
        let restore = Sidecar::new(["restore", "-o", "json", "--snapshot-file"]).arg(&file);
        let restored = restore.arg("--data-dir").arg(&target).run().await?.expect(0)?.json()?;
        ensure!(restored["orphanedLeases"] == serde_json::json!(["77"]), "{restored}");
        let etcd = member.restored_in(&target).start().await?;
        let mut client = etcd.client().await?;
        let after = state::read(&mut client).await?;
        state::same_keys(&before, &after).context(minor)?;
        ensure!(after.leases.get(&0x77).is_some_and(|ttl| *ttl > 86_400), "{:?}", after.leases);
        client.put("leased", "w", Some(PutOptions::new().with_ignore_lease())).await.context(minor)?;
    }
    Ok(())
}

tests::on_every_minor! {
    decompressed_full_is_etcds_own_3_4: decompressed_full_is_etcds_own("3.4");
    decompressed_full_is_etcds_own_3_5: decompressed_full_is_etcds_own("3.5");
    decompressed_full_is_etcds_own_3_6: decompressed_full_is_etcds_own("3.6");
    decompressed_full_is_etcds_own_3_7: decompressed_full_is_etcds_own("3.7");
    plain_snapshot_is_restored_3_4: plain_snapshot_is_restored("3.4");
    plain_snapshot_is_restored_3_5: plain_snapshot_is_restored("3.5");
    plain_snapshot_is_restored_3_6: plain_snapshot_is_restored("3.6");
    plain_snapshot_is_restored_3_7: plain_snapshot_is_restored("3.7");
}
