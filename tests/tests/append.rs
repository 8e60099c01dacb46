//! An intact member that is merely behind gets only what it misses, and nothing else is appended to.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use tests::etcd::{Etcd, Member};
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

/// A member that is backed up while it is written to, and a copy of it from the middle of that.
struct Scene {
    dir: tempfile::TempDir,
    store: Store,
    member: Member,
    etcd: Etcd,
    client: Client,
}

fn workload(seed: u64) -> Workload {
    Workload { seed, rounds: 12, compact: false, large: false, defragment: false }
}

async fn copy(from: &Path, to: &Path) -> Result<()> {
    tests::succeed(tokio::process::Command::new("cp").arg("-r").arg(from).arg(to)).await.map(drop)
}

impl Scene {
    /// The copy is of a member that was stopped, or killed.
    async fn new(minor: &str, kill: bool) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let store = Store::directory(&dir.path().join("store"));
        let member = Member::single(minor, &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        workload(1).run(&mut client).await?;
        store.once("full", &member).run().await?.expect(0)?;
        workload(2).run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        if kill {
            etcd.kill9()?;
        } else {
            etcd.stop()?;
        }
        copy(&member.data_dir, &dir.path().join("old")).await?;
        etcd = member.start().await?;
        client = etcd.client().await?;
        store.once("delta", &member).run().await?.expect(0)?;
        workload(3).run(&mut client).await?;
        tests::workload::expire(&mut client).await?;
        store.once("delta", &member).run().await?.expect(0)?;
        Ok(Self { dir, store, member, etcd, client })
    }

    fn append(&self, dir: &Path) -> tests::program::Sidecar {
        self.store.restore(dir).args(["--append", "-o", "json"])
    }
}

async fn what_is_behind_catches_up(minor: &str) -> Result<()> {
    for kill in [false, true] {
        let mut scene = Scene::new(minor, kill).await?;
        let expected = state::read(&mut scene.client).await?;
        scene.etcd.kill9()?;
        let old = scene.dir.path().join("old");
        let appended = scene.append(&old).run().await?.expect(0)?.json()?;
        ensure!(appended["revision"] == expected.revision && appended["events"].as_u64() > Some(100), "{appended}");
        ensure!(appended["proof"]["hash"].is_u64(), "{appended}");
        tests::program::Sidecar::new(["check", "--data-dir"]).arg(&old).run().await?.expect(0)?;
        let again = scene.append(&old).run().await?.expect(0)?.json()?;
        ensure!(again["proof"].is_null() && again["revision"] == expected.revision, "{again}");
        // It is the member that it was, of the cluster that it was.
        let member = Member { data_dir: old.clone(), ..scene.member.clone() };
        state::same(&expected, &state::of(&member).await?)?;
        let mut etcd = member.start().await?;
        let mut client = etcd.client().await?;
        workload(4).run(&mut client).await?;
        client.compact(expected.revision, None).await?;
        client.defragment().await?;
        tests::workload::expire(&mut client).await?;
        let after = state::read(&mut client).await?;
        etcd.kill9()?;
        state::same(&after, &state::of(&member).await?)?;
        // Like every restore that becomes a live cluster it begins a timeline.
        etcd = member.start().await?;
        scene.store.once("full", &member).run().await?.expect(0)?;
        let listed = scene.store.list().await?;
        ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 2), "{listed}");
        etcd.kill9()?;
    }
    Ok(())
}

tests::on_every_minor! {
    what_is_behind_catches_up_3_4: what_is_behind_catches_up("3.4");
    what_is_behind_catches_up_3_5: what_is_behind_catches_up("3.5");
    what_is_behind_catches_up_3_6: what_is_behind_catches_up("3.6");
    what_is_behind_catches_up_3_7: what_is_behind_catches_up("3.7");
}

/// Refused, and the member is what it was to the byte.
async fn refused(scene: &Scene, dir: &Path, code: i32, text: &str) -> Result<()> {
    let before = std::fs::read(dir.join("member/snap/db"))?;
    scene.append(dir).run().await?.expect(code)?.says(text)?;
    ensure!(std::fs::read(dir.join("member/snap/db"))? == before, "the database has changed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_history_is_refused() -> Result<()> {
    let mut scene = Scene::new("3.6", false).await?;
    // Written to on its own since.
    let old = Member { data_dir: scene.dir.path().join("old"), ..Member::single("3.6", &scene.member.data_dir)? };
    let old = Member { initial_cluster: scene.member.initial_cluster.clone(), ..old };
    let mut apart = old.start().await?;
    for n in 0..20 {
        apart.client().await?.put("mine", n.to_string(), None).await?;
    }
    apart.stop()?;
    refused(&scene, &old.data_dir, 12, "holds another history").await?;
    // Another cluster, at a revision that the backup has.
    let other = Member::single("3.6", &scene.dir.path().join("other"))?;
    let mut etcd = other.start().await?;
    let mut client = etcd.client().await?;
    workload(1).run(&mut client).await?;
    workload(2).run(&mut client).await?;
    scene.append(&other.data_dir).run().await?.expect(12)?.says("an etcd runs on this data directory")?;
    etcd.stop()?;
    refused(&scene, &other.data_dir, 12, "is of cluster").await?;
    // Not behind at all: the backup ends where the database does, and the log goes on.
    for n in 0..5 {
        scene.client.put("beyond", n.to_string(), None).await?;
    }
    scene.etcd.kill9()?;
    let ahead = scene.append(&scene.member.data_dir).run().await?;
    ensure!(
        [0, 12].contains(&ahead.code) && !ahead.stdout.contains("\"events\": 1"),
        "{}{}",
        ahead.stdout,
        ahead.stderr
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_appended_to_is_refused() -> Result<()> {
    let mut scene = Scene::new("3.6", false).await?;
    let nothing = scene.dir.path().join("nothing");
    scene.append(&nothing).run().await?.expect(12)?.says("is not a directory")?;
    let old = scene.dir.path().join("old");
    // What would show that it is the same history is missing.
    let deltas: Vec<_> = tests::objects(&scene.dir.path().join("store"))?
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("/delta/"))
        .collect();
    let hidden = scene.dir.path().join("hidden");
    std::fs::rename(&deltas[0], &hidden)?;
    refused(&scene, &old, 12, "ahead of timeline 1").await?;
    std::fs::rename(&hidden, &deltas[0])?;
    // A damaged delta.
    let whole = std::fs::read(&deltas[1])?;
    let mut damaged = whole.clone();
    let middle = whole.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&deltas[1], damaged)?;
    let before = scene.append(&old).run().await?.expect(10)?;
    ensure!(before.stderr.contains(&*deltas[1].file_name().context("no name")?.to_string_lossy()), "{}", before.stderr);
    tests::program::Sidecar::new(["check", "--data-dir"]).arg(&old).run().await?.expect(0)?;
    std::fs::write(&deltas[1], whole)?;
    // Users that no delta has.
    let client = scene.etcd.enable_auth().await?;
    drop(client);
    scene.member.auth = true;
    scene.store.once("full", &scene.member).run().await?.expect(0)?;
    scene.etcd.client().await?.put("after", "auth", None).await?;
    scene.store.once("delta", &scene.member).run().await?.expect(0)?;
    refused(&scene, &old, 12, "users or roles have changed").await?;
    // A damaged member.
    let db = old.join("member/snap/db");
    let mut bytes = std::fs::read(&db)?;
    let at = bytes.len() / 3;
    bytes[at..at + 64].fill(0xff);
    std::fs::write(&db, bytes)?;
    let said = scene.append(&old).run().await?;
    ensure!(said.code == 12 || said.code == 10, "{}{}", said.stdout, said.stderr);
    // One of several members.
    let names = ["a", "b", "c"].map(|name| (name, scene.dir.path().join(name)));
    let of_three: Vec<_> = names.iter().map(|(name, dir)| (*name, dir.as_path())).collect();
    let members = Member::cluster("3.6", &of_three)?;
    let mut started = Vec::new();
    for member in &members {
        started.push(member.spawn()?);
    }
    for etcd in &mut started {
        etcd.ready().await?;
    }
    for etcd in &mut started {
        etcd.stop()?;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    refused(&scene, &members[0].data_dir, 12, "one of 3 members").await?;
    Ok(())
}
