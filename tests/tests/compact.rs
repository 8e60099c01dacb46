//! A chain made into one full snapshot.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use etcd_format::mvcc::KeyValue;
use proto::backup::{DeltaEnd, ObjectMeta};
use serde_json::Value;
use sidecar::catalog::ObjectName;
use sidecar::container;
use sidecar::delta::Builder;
use tests::etcd::{Etcd, Member};
use tests::gardener::Gardener;
use tests::minio::Minio;
use tests::objects;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

async fn compact(store: &Store, flags: &[&str]) -> Result<Value> {
    let dir = tempfile::tempdir()?;
    let command = store.command("compact").args(["-o", "json", "--work-dir"]).arg(dir.path());
    let compacted = command.args(flags.iter().copied()).run().await?.expect(0)?.json()?;
    ensure!(std::fs::read_dir(dir.path())?.next().is_none(), "something was left in the work directory");
    Ok(compacted)
}

/// A full and many deltas, with leases, deletes and compactions in between.
async fn backup(minor: &str, store: &Store, dir: &Path) -> Result<(Member, Etcd, Client)> {
    let member = Member::single(minor, &dir.join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let workload = |seed| Workload { seed, rounds: 30, compact: true, large: seed == 2, defragment: false };
    workload(1).run(&mut client).await?;
    let mut backup = store.follow(&member, "200ms").spawn()?;
    backup.logs("full snapshot is in the store", Duration::from_secs(60)).await?;
    for seed in 2..5 {
        workload(seed).run(&mut client).await?;
    }
    tests::workload::expire(&mut client).await?;
    backup.terminate().await?.expect(0)?;
    Ok((member, etcd, client))
}

fn fulls(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    Ok(objects(dir)?.into_iter().filter(|path| path.to_string_lossy().ends_with(".db.zst")).collect())
}

/// The new full is, as far as etcd can tell, what etcd's own would have been; and it is what the deltas after it follow.
async fn a_chain_becomes_a_full(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let store = Store::directory(&place);
    let (member, mut etcd, mut client) = backup(minor, &store, dir.path()).await?;
    let before = state::read(&mut client).await?;
    let compacted = compact(&store, &[]).await?;
    ensure!(compacted["revision"] == before.revision && compacted["hashCompared"] == true, "{compacted}");
    ensure!(compacted["compactRevision"] == before.hash.1, "{compacted}");
    ensure!(compact(&store, &[]).await?["object"].is_null());
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    // Only what was merged is left.
    let kept = fulls(&place)?.pop().context("no full")?;
    for object in objects(&place)?.into_iter().filter(|object| *object != kept) {
        std::fs::remove_file(object)?;
    }
    // The same etcd goes on from there.
    Workload { seed: 5, rounds: 6, compact: false, large: false, defragment: false }.run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    ensure!(
        objects(&place)?.len() == 2 && store.list().await?["timelines"].as_array().is_some_and(|all| all.len() == 1)
    );
    let after = state::read(&mut client).await?;
    etcd.kill9()?;
    state::same(&after, &store.restore_and_read(&member).await?)?;
    // And by itself it is what etcd had then; etcd's own tool takes it too.
    let target = dir.path().join("then");
    store.restore(&target).args(["--revision", &before.revision.to_string()]).run().await?.expect(0)?;
    state::same(&before, &state::of(&member.restored_in(&target)).await?)?;
    let plain = dir.path().join("plain.db");
    let zstd = tests::program("zstd", "zstd")?;
    tests::succeed(tokio::process::Command::new(zstd).arg("-dqo").arg(&plain).arg(&kept)).await?;
    let tool = if minor == "3.4" { "etcdctl" } else { "etcdutl" };
    let tool = tests::program(&format!("etcd-{minor}"), tool)?;
    let by_etcd = dir.path().join("by-etcd");
    let mut restore = tokio::process::Command::new(tool);
    restore.args(["snapshot", "restore"]).arg(&plain).arg("--data-dir").arg(&by_etcd).env("ETCDCTL_API", "3");
    tests::succeed(&mut restore).await?;
    let restored = state::of(&member.restored_in(&by_etcd)).await?;
    state::same(&before, &restored)
}

tests::on_every_minor! {
    a_chain_becomes_a_full_3_4: a_chain_becomes_a_full("3.4");
    a_chain_becomes_a_full_3_5: a_chain_becomes_a_full("3.5");
    a_chain_becomes_a_full_3_6: a_chain_becomes_a_full("3.6");
    a_chain_becomes_a_full_3_7: a_chain_becomes_a_full("3.7");
}

/// Through a store that takes parts, and with only the newest values.
#[tokio::test(flavor = "multi_thread")]
async fn history_is_discarded_when_asked_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let store = minio.store("backups/here");
    let (member, mut etcd, mut client) = backup("3.6", &store, dir.path()).await?;
    for n in 0..20u32 {
        let value = tests::noise(1_000_000);
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    store.once("delta", &member).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    let compacted = compact(&store, &["--discard-history"]).await?;
    ensure!(compacted["rows"] == before.keys.len() && compacted["compactRevision"] == before.revision, "{compacted}");
    client.compact(before.revision, None).await?;
    let live = state::read(&mut client).await?;
    etcd.kill9()?;
    let restored = store.restore_and_read(&member).await?;
    state::same_keys(&before, &restored)?;
    ensure!(restored.hash == live.hash, "HashKV {:?} instead of {:?}", restored.hash, live.hash);
    ensure!(compact(&store, &["--discard-history"]).await?["object"].is_null());
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    Ok(())
}

/// What the predecessor wrote becomes one of its fulls.
#[tokio::test(flavor = "multi_thread")]
async fn the_predecessors_chain_is_compacted_too() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let gardener = Gardener::new(&dir.path().join("store"));
    let member = Member::single("3.5", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    let mut last = 1;
    for seed in 1..4 {
        Workload { seed, rounds: 10, compact: false, large: false, defragment: false }.run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        let to = state::read(&mut client).await?.revision;
        match seed {
            1 => drop(gardener.full(&member, &["--codec", "zlib"]).await?),
            _ => drop(gardener.delta(&member, last + 1, to, &["--codec", "gzip", "--unix", "1700000000"]).await?),
        }
        last = to;
    }
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    let compacted = compact(&gardener.store(), &[]).await?;
    ensure!(compacted["object"].as_str().is_some_and(|name| name.starts_with("v2/Full-")), "{compacted}");
    let set = gardener.run("list", &[]).await?;
    ensure!(
        set["fullSnapshot"]["lastRevision"] == last && set["deltaSnapshots"].as_array().is_none_or(Vec::is_empty),
        "{set}"
    );
    let restored = gardener.store().restore_and_read(&member).await?;
    state::same_keys(&before, &restored)?;
    ensure!(restored.hash == before.hash);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_merged_is_said() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let store = Store::directory(&place);
    let (_, mut etcd, _) = backup("3.6", &store, dir.path()).await?;
    etcd.kill9()?;
    let all = objects(&place)?;
    let before = all.len();
    // One of the newest chain.
    let mut deltas = all.iter().filter(|path| path.to_string_lossy().contains(".delta."));
    let delta = deltas.nth_back(1).context("fewer than two deltas")?;
    let whole = std::fs::read(delta)?;
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 4;
    std::fs::write(delta, damaged)?;
    let name = delta.file_name().context("no name")?.to_string_lossy().into_owned();
    store.command("compact").run().await?.expect(10)?.says(&name)?;
    std::fs::remove_file(delta)?;
    store.command("compact").run().await?.expect(11)?.says("cannot be merged")?;
    std::fs::write(delta, whole)?;
    store.command("compact").args(["--timeline", "9"]).run().await?.expect(11)?.says("timeline 9")?;
    store.command("compact").args(["--work-dir", "/nowhere"]).run().await?.expect(1)?.says("/nowhere")?;
    ensure!(objects(&place)?.len() == before);
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    Ok(())
}

/// A restore that raised the revision leaves more than one row a key below what it calls compacted.
#[tokio::test(flavor = "multi_thread")]
async fn a_raised_revision_hides_no_deleted_key() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let (member, mut etcd, mut client) = backup("3.6", &store, dir.path()).await?;
    for n in 0..9u32 {
        client.put("changed", n.to_string(), None).await?;
        client.put("deleted", n.to_string(), None).await?;
    }
    client.delete("deleted", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    etcd.kill9()?;
    std::fs::remove_dir_all(&member.data_dir)?;
    store.restore_member(&member).args(["--bump-revision", "1000", "--mark-compacted"]).run().await?.expect(0)?;
    etcd = member.start().await?;
    client = etcd.client().await?;
    store.once("full", &member).run().await?.expect(0)?;
    for n in 0..9u32 {
        client.put("changed", format!("again {n}"), None).await?;
    }
    store.once("delta", &member).run().await?.expect(0)?;
    let revision = state::read(&mut client).await?.revision;
    client.compact(revision - 1, None).await?;
    client.put("after", "the compaction", None).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    let before = state::read(&mut client).await?;
    etcd.kill9()?;
    compact(&store, &[]).await?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let after = store.restore_and_read(&member).await?;
    ensure!(!after.keys.contains_key(b"deleted".as_slice()), "a deleted key is back");
    state::same_keys(&before, &after)
}

/// Named up to a revision that it does not have: merged, it would be a full snapshot that nothing could restore.
#[tokio::test(flavor = "multi_thread")]
async fn a_delta_that_ends_before_its_name_is_not_merged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let store = Store::directory(&place);
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    let mut client = etcd.client().await?;
    client.put("x", "1", None).await?;
    store.once("full", &member).run().await?.expect(0)?;
    let revision = state::read(&mut client).await?.revision;
    let (first, last) = (revision + 1, revision + 6);
    let mut builder = Builder::new(revision)?;
    builder.revision(first, 1)?;
    let kv = KeyValue { key: b"y", create_revision: first, mod_revision: first, version: 1, value: b"1", lease: 0 };
    builder.put(&kv)?;
    let object = builder.finish(DeltaEnd::default(), ObjectMeta::default())?.concat();
    let mut reader = container::Reader::new(object.as_slice(), "delta")?;
    let cluster_id = client.status().await?.header().context("no header")?.cluster_id();
    let meta = ObjectMeta { last_revision: last, cluster_id, ..reader.meta().cloned().context("no metadata")? };
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut content)?;
    let mut writer = container::Writer::for_delta();
    writer.write(&content)?;
    let name = ObjectName::Delta { timeline: 1, first, last, unix_ms: 1_800_000_000_000 };
    let path = place.join(name.to_string());
    std::fs::create_dir_all(path.parent().context("no directory")?)?;
    std::fs::write(path, writer.finish_with_leading_meta(&meta)?.concat())?;
    store.command("verify").args(["--level", "decode"]).run().await?.expect(10)?;
    store.command("compact").run().await?.expect(10)?.says("ends at")?;
    ensure!(objects(&place)?.len() == 2, "something was uploaded");
    store.restore(dir.path().join("restored")).run().await?.expect(10)?;
    Ok(())
}
