//! Buckets that the predecessor wrote: read like any other, with none of the defects of its own restore; and written so
//! that it can read them. Tests are named after the issues of gardener/etcd-backup-restore where those were reported.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, LeaseGrantOptions, PutOptions, Txn, TxnOp};
use tests::etcd::{Etcd, Member};
use tests::gardener::Gardener;
use tests::state::{self, State};
use tests::store::Store;
use tests::workload::Workload;

/// A running etcd, and a store of the predecessor's.
struct Scene {
    dir: tempfile::TempDir,
    member: Member,
    etcd: Etcd,
    client: Client,
    gardener: Gardener,
    store: Store,
}

impl Scene {
    async fn new(minor: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let member = Member::single(minor, &dir.path().join("data"))?
            .flag("--max-request-bytes=33554432")
            .flag("--max-txn-ops=20000");
        let etcd = member.start().await?;
        let client = etcd.client().await?;
        let gardener = Gardener::new(&dir.path().join("store"));
        let store = gardener.store();
        Ok(Self { dir, member, etcd, client, gardener, store })
    }

    async fn revision(&mut self) -> Result<i64> {
        Ok(self.client.status().await?.header().context("no header")?.revision())
    }

    /// Writes until a revision.
    async fn write_to(&mut self, revision: i64) -> Result<()> {
        let mut at = self.revision().await?;
        while at < revision {
            at += 1;
            self.client.put(format!("k{}", at % 7), format!("value at {at}"), None).await?;
        }
        Ok(())
    }

    /// Everything etcd has.
    async fn state(&mut self) -> Result<State> {
        state::read(&mut self.client).await
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("restored")
    }

    /// Ends etcd, restores what the store has, starts etcd on that, and compares: all but TTLs, which the predecessor does
    /// not write down.
    async fn restores(&mut self, expected: &State, flags: &[&str]) -> Result<State> {
        self.etcd.kill9()?;
        let target = self.target();
        self.store
            .restore(&target)
            .args(["--initial-cluster", &self.member.initial_cluster])
            .args(flags.iter().copied())
            .run()
            .await?
            .expect(0)?;
        let found = state::of(&self.member.restored_in(&target)).await?;
        state::same_keys(expected, &found)?;
        ensure!(expected.hash == found.hash, "HashKV {:?} instead of {:?}", found.hash, expected.hash);
        for entry in expected.keys.values().filter(|entry| entry.numbers.3 != 0) {
            ensure!(found.leases.contains_key(&entry.numbers.3), "lease {:x} has no record", entry.numbers.3);
        }
        Ok(found)
    }

    async fn verify(&self, code: i32) -> Result<serde_json::Value> {
        let verify = self.store.command("verify").args(["-o", "json", "--level", "replay", "--work-dir"]);
        verify.arg(self.dir.path()).run().await?.expect(code)?.json()
    }
}

/// Both trees, every codec, a final one: a chain with leases, deletes and transactions.
async fn what_it_wrote_is_restored(minor: &str) -> Result<()> {
    let mut scene = Scene::new(minor).await?;
    let workload = |seed| Workload { seed, rounds: 12, compact: false, large: false, defragment: false };
    workload(1).run(&mut scene.client).await?;
    tests::workload::expire(&mut scene.client).await?;
    scene.gardener.full(&scene.member, &["--tree", "v1", "--codec", "lzw"]).await?;
    let mut last = scene.revision().await?;
    let places: [&[&str]; 4] =
        [&["--tree", "v1", "--dir", "1700000000", "--codec", "gzip"], &["--codec", "zlib"], &["--codec", "lzw"], &[]];
    let mut recorded = Vec::new();
    for (seed, place) in (2..).zip(places) {
        workload(seed).run(&mut scene.client).await?;
        let to = scene.revision().await?;
        scene.gardener.delta(&scene.member, last + 1, to, place).await?;
        last = to;
        recorded.push((to - 7, state::keys_at(&mut scene.client, to - 7).await?));
    }
    tests::workload::expire(&mut scene.client).await?;
    let to = scene.revision().await?;
    scene.gardener.delta(&scene.member, last + 1, to, &["--codec", "gzip"]).await?;
    let expected = scene.state().await?;
    let listed = scene.store.list().await?;
    ensure!(
        listed["timelines"][0]["timeline"] == 0 && listed["foreign"].as_array().is_some_and(Vec::is_empty),
        "{listed}"
    );
    let report = scene.verify(0).await?;
    ensure!(report["objects"] == 6 && report["replayed"][0]["revision"] == to, "{report}");
    scene.restores(&expected, &[]).await?;
    for (revision, keys) in recorded {
        let target = scene.dir.path().join(revision.to_string());
        scene.store.restore(&target).args(["--revision", &revision.to_string()]).run().await?.expect(0)?;
        let (found, there, _) = state::of_directory(&target)?;
        ensure!(found == revision && there == keys, "revision {revision} differs");
    }
    Ok(())
}

tests::on_every_minor! {
    what_it_wrote_is_restored_3_4: what_it_wrote_is_restored("3.4");
    what_it_wrote_is_restored_3_5: what_it_wrote_is_restored("3.5");
    what_it_wrote_is_restored_3_6: what_it_wrote_is_restored("3.6");
    what_it_wrote_is_restored_3_7: what_it_wrote_is_restored("3.7");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_codec_of_a_full_is_read() -> Result<()> {
    for codec in ["none", "gzip", "zlib", "lzw"] {
        let mut scene = Scene::new("3.6").await?;
        scene.write_to(40).await?;
        scene.gardener.full(&scene.member, &["--codec", codec, "--final"]).await?;
        let expected = scene.state().await?;
        scene.verify(0).await?;
        scene.restores(&expected, &[]).await.context(codec)?;
    }
    Ok(())
}

/// Two leaders uploaded deltas that overlap.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_1043_overlapping_deltas() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    scene.write_to(60).await?;
    for (from, to) in [(11, 20), (11, 26), (21, 30), (27, 40), (31, 60), (41, 50)] {
        scene.gardener.delta(&scene.member, from, to, &["--codec", "gzip"]).await?;
    }
    let expected = scene.state().await?;
    scene.verify(0).await?;
    scene.restores(&expected, &[]).await?;
    Ok(())
}

/// The full has more than its name says: beyond the end of the first delta, or of all.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_1044_full_newer_than_the_first_delta() -> Result<()> {
    for all in [false, true] {
        let mut scene = Scene::new("3.6").await?;
        scene.write_to(30).await?;
        scene.gardener.delta(&scene.member, 11, 20, &[]).await?;
        scene.gardener.delta(&scene.member, 21, 25, &[]).await?;
        let full = scene.gardener.full(&scene.member, &["--name-revision", "10", "--codec", "gzip"]).await?;
        ensure!(full.to_string_lossy().contains("Full-00000000-00000010-"), "{}", full.display());
        if !all {
            scene.write_to(45).await?;
            scene.gardener.delta(&scene.member, 26, 45, &[]).await?;
        }
        let expected = scene.state().await?;
        scene.verify(0).await?;
        // A revision that the full is beyond of already cannot be had from it.
        let refused = scene.store.restore(scene.target()).args(["--revision", "12"]).run().await?.expect(11)?;
        refused.says("it has revision 30 already")?;
        scene.restores(&expected, &[]).await?;
    }
    Ok(())
}

/// Leases that have run out by the time of the restore must not cost a revision, nor the first event after the full.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_1045_and_1046_leases_that_expire_during_restore() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.client.lease_grant(20, Some(LeaseGrantOptions::new().with_id(77))).await?;
    scene.client.put("/masterleases/a", "held", Some(PutOptions::new().with_lease(77))).await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    scene.client.put("first", "must not be lost", None).await?;
    scene.client.put("second", "nor this", None).await?;
    scene.gardener.delta(&scene.member, 11, 12, &[]).await?;
    let expected = scene.state().await?;
    ensure!(expected.revision == 12 && expected.leases.contains_key(&77), "the lease expired too early");
    tokio::time::sleep(Duration::from_secs(22)).await;
    let found = scene.restores(&expected, &[]).await?;
    ensure!(found.leases.get(&77) == Some(&20), "{:?}", found.leases);
    Ok(())
}

/// A transaction larger than what a client may send.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_963_a_revision_larger_than_2_mib() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    let puts: Vec<TxnOp> = (0..8u32).map(|n| TxnOp::put(format!("big/{n}"), vec![b'x'; 1_000_000], None)).collect();
    scene.client.txn(Txn::new().and_then(puts)).await?;
    let puts: Vec<TxnOp> = (0..12_000u32).map(|n| TxnOp::put(format!("many/{n}"), "x", None)).collect();
    scene.client.txn(Txn::new().and_then(puts)).await?;
    scene.gardener.delta(&scene.member, 11, 12, &["--codec", "gzip"]).await?;
    let expected = scene.state().await?;
    scene.restores(&expected, &[]).await?;
    Ok(())
}

/// A full that was cut short, or lost its hash, is found; an older one and the deltas since do as well.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_749_snapshot_without_its_hash() -> Result<()> {
    for damage in [["--drop-hash", "--codec=none"], ["--cut=5000", "--codec=gzip"], ["--cut=16", "--codec=zlib"]] {
        let mut scene = Scene::new("3.6").await?;
        scene.write_to(10).await?;
        scene.gardener.full(&scene.member, &[]).await?;
        scene.write_to(30).await?;
        scene.gardener.delta(&scene.member, 11, 30, &[]).await?;
        let bad = scene.gardener.full(&scene.member, &damage).await?;
        scene.write_to(35).await?;
        scene.gardener.delta(&scene.member, 31, 35, &[]).await?;
        let expected = scene.state().await?;
        let name = bad.file_name().context("no name")?.to_string_lossy().into_owned();
        let report = scene.verify(10).await?;
        ensure!(report["problems"][0]["at"].as_str().is_some_and(|at| at.ends_with(&name)), "{report}");
        let refused = scene.store.restore(scene.target()).run().await?.expect(10)?;
        refused.says(&name)?.says("--full-revision")?;
        ensure!(!scene.target().exists(), "something was left behind");
        scene.restores(&expected, &["--full-revision", "10"]).await?;
    }
    Ok(())
}

/// What an object is compressed with shows in its content, whatever its name says.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_360_wrong_codec_under_a_suffix() -> Result<()> {
    for (codec, suffix) in [("gzip", ""), ("none", ".gz"), ("zlib", ".Z"), ("lzw", ".gz"), ("gzip", ".zlib")] {
        let mut scene = Scene::new("3.6").await?;
        scene.write_to(10).await?;
        let flags = ["--codec", codec, "--suffix", suffix];
        scene.gardener.full(&scene.member, &flags).await?;
        scene.write_to(30).await?;
        scene.gardener.delta(&scene.member, 11, 30, &flags).await?;
        let expected = scene.state().await?;
        scene.verify(0).await?;
        scene.restores(&expected, &[]).await.with_context(|| format!("{codec} as {suffix:?}"))?;
    }
    Ok(())
}

/// Two snapshotters of one cluster at once: fulls and deltas of both, interleaved.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_676_two_writers() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &["--unix", "1700000000"]).await?;
    scene.gardener.full(&scene.member, &["--unix", "1700000001", "--codec", "gzip"]).await?;
    scene.write_to(25).await?;
    scene.gardener.delta(&scene.member, 11, 25, &["--unix", "1700000002"]).await?;
    scene.gardener.delta(&scene.member, 11, 18, &["--unix", "1700000002"]).await?;
    scene.gardener.full(&scene.member, &["--unix", "1700000003"]).await?;
    scene.write_to(40).await?;
    scene.gardener.delta(&scene.member, 19, 33, &["--unix", "1700000004"]).await?;
    scene.gardener.delta(&scene.member, 26, 40, &["--unix", "1700000004"]).await?;
    let expected = scene.state().await?;
    scene.verify(0).await?;
    scene.restores(&expected, &[]).await?;
    // And ours: two at once, into one prefix.
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    let writers =
        [scene.store.follow(&scene.member, "200ms").spawn()?, scene.store.follow(&scene.member, "300ms").spawn()?];
    for writer in &writers {
        // What it receives follows something: a full of its own, or the other's.
        tests::eventually(Duration::from_secs(60), || async {
            let log = writer.log();
            ensure!(log.contains("full snapshot is in the store") || log.contains("backed_up_to="), "{log}");
            Ok(())
        })
        .await?;
    }
    for revision in 11..60 {
        scene.write_to(revision).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let expected = scene.state().await?;
    for writer in writers {
        writer.terminate().await?.expect(0)?;
    }
    scene.restores(&expected, &[]).await?;
    Ok(())
}

/// Two clusters where one was meant, both backed up into one prefix: neither history mixes with the other.
#[tokio::test(flavor = "multi_thread")]
async fn ebr_864_two_clusters_write() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    let other = Member::single("3.6", &scene.dir.path().join("other"))?;
    let other_etcd = other.start().await?;
    let mut other_client = other_etcd.client().await?;
    for n in 0..30 {
        scene.client.put("whose", format!("one {n}"), None).await?;
        other_client.put("whose", format!("other {n}"), None).await?;
        if n % 10 == 0 {
            scene.store.once("full", &scene.member).run().await?.expect(0)?;
            scene.store.once("full", &other).run().await?.expect(0)?;
        }
    }
    let listed = scene.store.list().await?;
    let timelines = listed["timelines"].as_array().context("no timelines")?;
    ensure!(timelines.len() >= 2, "{listed}");
    for timeline in timelines {
        let (number, cluster) = (timeline["timeline"].to_string(), &timeline["clusterId"]);
        let target = scene.dir.path().join(&number);
        scene.store.restore(&target).args(["--timeline", &number]).run().await?.expect(0)?;
        let (_, keys, _) = state::of_directory(&target)?;
        let value = String::from_utf8(keys[b"whose".as_slice()].value.clone())?;
        let first = timelines.iter().find(|other| &other["clusterId"] == cluster).context("itself")?;
        let of_one = first["timeline"] == timelines[0]["timeline"];
        ensure!(value.starts_with(if of_one { "one" } else { "other" }), "timeline {number} has {value:?}: {listed}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_named_before_anything_is_touched() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    scene.write_to(40).await?;
    scene.gardener.delta(&scene.member, 11, 20, &[]).await?;
    scene.gardener.delta(&scene.member, 26, 40, &[]).await?;
    let keys = state::keys_at(&mut scene.client, 20).await?;
    let refused = scene.store.restore(scene.target()).run().await?.expect(11)?;
    refused.says("revisions 21 to 25 are missing")?;
    ensure!(!scene.target().exists());
    scene.store.restore(scene.target()).arg("--accept-gap").run().await?.expect(0)?;
    let (found, there, _) = state::of_directory(&scene.target())?;
    ensure!(found == 20 && there == keys);
    Ok(())
}

/// Parts of uploads, notes and files of other programs are left out, in either tree.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_snapshot_is_left_alone() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    let full = scene.gardener.full(&scene.member, &[]).await?;
    let tree = full.parent().context("no tree")?;
    std::fs::create_dir(tree.join("Full-00000000-00000099-1700000000"))?;
    for name in ["Full-00000000-00000099-1700000000/0000000001", "notes.txt", "Incr-00000099-00000050-1700000000"] {
        std::fs::write(tree.join(name), "part")?;
    }
    let expected = scene.state().await?;
    let listed = scene.store.list().await?;
    ensure!(listed["foreign"].as_array().is_some_and(|foreign| foreign.len() == 3), "{listed}");
    scene.restores(&expected, &[]).await?;
    Ok(())
}

/// Our first timeline forks from what the predecessor has of the same cluster, and both restore.
#[tokio::test(flavor = "multi_thread")]
async fn our_first_timeline_forks_from_its_chain() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    scene.write_to(30).await?;
    scene.gardener.delta(&scene.member, 11, 30, &["--codec", "gzip"]).await?;
    scene.write_to(35).await?;
    scene.store.once("full", &scene.member).run().await?.expect(0)?;
    scene.write_to(50).await?;
    scene.store.once("delta", &scene.member).run().await?.expect(0)?;
    let listed = scene.store.list().await?;
    let first = &listed["timelines"][1];
    ensure!(first["timeline"] == 1 && first["parent"] == 0 && first["forkRevision"] == 30, "{listed}");
    for revision in [20, 30, 35, 41] {
        let keys = state::keys_at(&mut scene.client, revision).await?;
        let target = scene.dir.path().join(revision.to_string());
        scene.store.restore(&target).args(["--revision", &revision.to_string()]).run().await?.expect(0)?;
        let (found, there, _) = state::of_directory(&target)?;
        ensure!(found == revision && there == keys, "revision {revision} differs");
    }
    scene
        .store
        .restore(scene.target())
        .args(["--revision", "33"])
        .run()
        .await?
        .expect(11)?
        .says("after revision 30")?;
    let expected = scene.state().await?;
    scene.restores(&expected, &[]).await?;
    Ok(())
}

/// Every byte of a chain flipped, one at a time: found, or without consequence.
#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_byte_is_found_or_harmless() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(5).await?;
    let mut objects = vec![scene.gardener.full(&scene.member, &["--codec", "zlib"]).await?];
    for (to, codec) in [(10, "none"), (14, "gzip"), (18, "zlib"), (22, "lzw")] {
        let from = scene.revision().await? + 1;
        scene.write_to(to).await?;
        objects.push(scene.gardener.delta(&scene.member, from, to, &["--codec", codec]).await?);
    }
    let expected = state::keys_at(&mut scene.client, 22).await?;
    for path in &objects {
        let whole = std::fs::read(path)?;
        // A database is mostly empty pages; deltas are looked at byte by byte.
        let step = whole.len().div_ceil(150);
        for at in (0..whole.len()).step_by(step) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(path, &damaged)?;
            let verified = scene.store.command("verify").run().await?;
            if verified.code != 0 {
                ensure!(verified.code == 10, "byte {at} of {}: {}", path.display(), verified.stderr);
                continue;
            }
            let target = scene.target();
            scene.store.restore(&target).run().await?.expect(0)?;
            let (found, there, _) = state::of_directory(&target)?;
            ensure!(found == 22 && there == expected, "byte {at} of {}", path.display());
            std::fs::remove_dir_all(&target)?;
        }
        std::fs::write(path, whole)?;
    }
    Ok(())
}

/// What we write in its layout it restores as its own code does: base, then every delta, transaction by transaction.
#[tokio::test(flavor = "multi_thread")]
async fn what_we_write_for_it_it_reads() -> Result<()> {
    let mut scene = Scene::new("3.5").await?;
    scene.write_to(10).await?;
    let layout = ["--layout", "gardener-v2"];
    let mut backup = scene.store.follow(&scene.member, "300ms").args(layout).spawn()?;
    backup.logs("full snapshot is in the store", Duration::from_secs(60)).await?;
    let workload = |seed| Workload { seed, rounds: 12, compact: false, large: seed == 2, defragment: false };
    for seed in 1..4 {
        workload(seed).run(&mut scene.client).await?;
    }
    tests::workload::expire(&mut scene.client).await?;
    backup.terminate().await?.expect(0)?;
    // And a second run goes on where the first ended.
    let last = scene.revision().await?;
    scene.write_to(last + 9).await?;
    let once =
        scene.store.once("delta", &scene.member).args(layout).args(["-o", "json"]).run().await?.expect(0)?.json()?;
    ensure!(once["kind"] == "delta" && once["deltas"].as_array().is_some_and(|deltas| deltas.len() == 1), "{once}");
    let expected = scene.state().await?;
    let read_by_it = replayed(&scene, &expected).await?;
    ensure!(read_by_it == expected.revision, "it reads up to {read_by_it}");
    scene.verify(0).await?;
    scene.restores(&expected, &[]).await?;
    // Another history cannot go into the same place.
    let other = Member::single("3.5", &scene.dir.path().join("other"))?;
    let _other = other.start().await?;
    let refused = scene.store.once("full", &other).args(layout).run().await?.expect(12)?;
    refused.says("cannot keep two apart")?;
    Ok(())
}

/// A revision that it could not replay is followed by a full at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_cannot_replay_is_in_a_full() -> Result<()> {
    let mut scene = Scene::new("3.5").await?;
    scene.write_to(10).await?;
    let layout = ["--layout", "gardener-v2"];
    let mut backup = scene.store.follow(&scene.member, "300ms").args(layout).spawn()?;
    backup.logs("full snapshot is in the store", Duration::from_secs(60)).await?;
    let puts: Vec<TxnOp> = (0..8u32).map(|n| TxnOp::put(format!("big/{n}"), vec![b'x'; 1_000_000], None)).collect();
    scene.client.txn(Txn::new().and_then(puts)).await?;
    backup.logs("too large for the predecessor's restore", Duration::from_secs(60)).await?;
    tests::eventually(Duration::from_secs(60), || async {
        let listed = scene.store.list().await?;
        ensure!(listed["timelines"][0]["fulls"].as_array().is_some_and(|fulls| fulls.len() == 2), "{listed}");
        Ok(())
    })
    .await?;
    scene.write_to(20).await?;
    let expected = scene.state().await?;
    backup.terminate().await?.expect(0)?;
    let read_by_it = replayed(&scene, &expected).await?;
    ensure!(read_by_it == expected.revision, "it reads up to {read_by_it}");
    Ok(())
}

/// Restores as the predecessor does, compares keys and revisions, and returns where it ended.
async fn replayed(scene: &Scene, expected: &State) -> Result<i64> {
    let base = scene.dir.path().join("base.db");
    scene.gardener.run("base", &["--out", &base.to_string_lossy()]).await?;
    let target = scene.dir.path().join("replayed");
    let member = Member::single("3.5", &target)?.flag("--max-txn-ops=10240").flag("--max-request-bytes=10485760");
    tests::succeed(
        tokio::process::Command::new(tests::program("etcd-3.5", "etcdutl")?)
            .args(["snapshot", "restore"])
            .arg(&base)
            .arg("--data-dir")
            .arg(&target)
            .args(["--initial-cluster", &member.initial_cluster, "--initial-advertise-peer-urls", &member.peer_url()]),
    )
    .await?;
    let etcd = member.start().await?;
    let replayed = scene.gardener.run("replay", &["--endpoint", &member.client_url()]).await?;
    let found = state::read(&mut etcd.client().await?).await?;
    let values = |state: &State| {
        let entries = state.keys.iter().map(|(key, entry)| {
            let (create, modified, version, _) = entry.numbers;
            (key.clone(), (entry.value.clone(), create, modified, version))
        });
        entries.collect::<std::collections::BTreeMap<_, _>>()
    };
    ensure!(values(&found) == values(expected), "what it restored differs");
    replayed["revision"].as_i64().context("no revision")
}

/// Whoever goes back to the predecessor keeps what it writes: a collection takes its backups and ours for two stores.
#[tokio::test(flavor = "multi_thread")]
async fn a_collection_does_not_take_its_newer_backups_for_old_ones() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    scene.store.once("full", &scene.member).run().await?.expect(0)?;
    scene.write_to(20).await?;
    scene.gardener.full(&scene.member, &[]).await?;
    scene.write_to(30).await?;
    scene.gardener.delta(&scene.member, 21, 30, &[]).await?;
    let keys = state::keys_at(&mut scene.client, 30).await?;
    let policies: [&[&str]; 2] = [&["--policy", "exponential"], &["--policy", "limit-based", "--max-backups", "1"]];
    for policy in policies {
        scene.store.command("gc").args(policy.iter().copied()).run().await?.expect(0)?;
        scene.store.restore(scene.target()).args(["--timeline", "0"]).run().await?.expect(0)?;
        let (found, there, _) = state::of_directory(&scene.target())?;
        ensure!(found == 30 && there == keys);
        std::fs::remove_dir_all(scene.target())?;
    }
    Ok(())
}

/// Its local store is not atomic: an object may be empty. It is named, and the others are looked at all the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_object_is_named() -> Result<()> {
    let mut scene = Scene::new("3.6").await?;
    scene.write_to(10).await?;
    let full = scene.gardener.full(&scene.member, &[]).await?;
    scene.write_to(20).await?;
    let delta = scene.gardener.delta(&scene.member, 11, 20, &[]).await?;
    let url = tests::file_url(&scene.dir.path().join("copied"));
    for path in [full, delta] {
        let whole = std::fs::read(&path)?;
        std::fs::write(&path, b"")?;
        let name = path.file_name().context("no name")?.to_string_lossy().into_owned();
        let report = scene.verify(10).await?;
        ensure!(report["problems"][0]["at"].as_str().is_some_and(|at| at.ends_with(&name)), "{report}");
        scene.store.restore(scene.target()).run().await?.expect(10)?.says(&name)?;
        let copied = scene.store.command("copy").args(["--to", &url]).run().await?.expect(10)?;
        ensure!(copied.stdout.contains(&name), "{}", copied.stdout);
        std::fs::write(&path, whole)?;
    }
    Ok(())
}
