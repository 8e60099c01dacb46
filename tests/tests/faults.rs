//! The n-th system call of each kind that changes or reads a disk fails, or the process is killed there: no success is claimed
//! that is none, nothing good is lost, and the next run goes on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::copy;
use tests::etcd::{Etcd, Member};
use tests::faults::{CALLS, Ended, Hit, run_while};
use tests::objects;
use tests::pod::Pod;
use tests::program::Sidecar;
use tests::state::{self, Keys};
use tests::store::Store;
use tests::workload::Workload;

/// Which calls of a kind are hit; the others lie between two that are. With `FAULTS=every` in the environment all are, which
/// takes some minutes.
const NTH: [usize; 7] = [1, 2, 3, 5, 8, 13, 30];

fn nth() -> Box<dyn Iterator<Item = usize>> {
    let every = std::env::var("FAULTS").is_ok_and(|which| which == "every");
    if every { Box::new(1..) } else { Box::new(NTH.into_iter()) }
}

/// Two fulls with deltas, and an old copy of the member.
struct Scene {
    dir: tempfile::TempDir,
    member: Member,
    etcd: Etcd,
    revision: i64,
    keys: Keys,
}

impl Scene {
    async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let store = Store::directory(&dir.path().join("store"));
        let member = Member::single("3.6", &dir.path().join("data"))?;
        let mut etcd = member.start().await?;
        for (seed, kind) in [(1, "full"), (2, "delta"), (3, "full"), (4, "delta"), (5, "delta")] {
            let mut client = etcd.client().await?;
            Workload { seed, rounds: 4, compact: false, large: false, defragment: false }.run(&mut client).await?;
            tests::workload::expire(&mut client).await?;
            store.once(kind, &member).run().await?.expect(0)?;
            if seed == 4 {
                etcd.stop()?;
                copy(&member.data_dir, &dir.path().join("old")).await?;
                etcd = member.start().await?;
            }
        }
        let mut client = etcd.client().await?;
        let revision = state::read(&mut client).await?.revision;
        let keys = state::keys_at(&mut client, revision).await?;
        Ok(Self { dir, member, etcd, revision, keys })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A fresh copy of the store.
    async fn store(&self, name: &str) -> Result<Store> {
        copy(&self.path("store"), &self.path(name)).await?;
        Ok(Store::directory(&self.path(name)))
    }

    /// The latest state of a store is what etcd had.
    async fn holds(&self, store: &Store) -> Result<()> {
        store.command("verify").run().await?.expect(0)?;
        let target = self.path("held");
        store.restore(&target).run().await?.expect(0)?;
        let same = self.is_restored(&target);
        std::fs::remove_dir_all(&target)?;
        same
    }

    fn is_restored(&self, dir: &Path) -> Result<()> {
        let (revision, keys, _) = state::of_directory(dir)?;
        ensure!(revision == self.revision && keys == self.keys, "revision {revision} is not what etcd had");
        Ok(())
    }
}

/// Hits every kind of call of a command. `prepare` gives the command; `check` gets its exit code, and looks at what it left.
async fn sweep<P, C>(prepare: impl FnMut() -> P, check: impl FnMut(i32) -> C) -> Result<()>
where
    P: Future<Output = Result<Sidecar>>,
    C: Future<Output = Result<()>>,
{
    sweep_while(prepare, std::future::pending, check).await
}

/// The same of one that serves, and is asked for something meanwhile.
async fn sweep_while<P, D, C>(
    mut prepare: impl FnMut() -> P,
    mut drive: impl FnMut() -> D,
    mut check: impl FnMut(i32) -> C,
) -> Result<()>
where
    P: Future<Output = Result<Sidecar>>,
    D: Future<Output = ()>,
    C: Future<Output = Result<()>>,
{
    let mut hits = 0;
    for hit in [Hit::Kill, Hit::Error, Hit::Full] {
        for calls in CALLS {
            // A disk that is full still reads and removes.
            if hit == Hit::Full && !["openat", "write", "pwrite64", "mkdir,mkdirat"].contains(&calls) {
                continue;
            }
            for nth in nth() {
                let command = prepare().await?;
                let code = match run_while(&command, calls, nth, hit, drive()).await? {
                    Ended::With(code) => code,
                    Ended::Untouched => break,
                    Ended::Elsewhere => continue,
                };
                hits += 1;
                let what = || format!("{hit:?} of {calls} {nth}, exit code {code}");
                ensure!((code == 0) <= (hit != Hit::Kill), "{}", what());
                check(code).await.with_context(what)?;
            }
        }
    }
    ensure!(hits > 15, "only {hits} calls were hit");
    eprintln!("{hits} calls were hit");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn restore() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let (target, store) = (scene.path("restored"), scene.store("copy").await?);
    let prepare = || async {
        let _ = std::fs::remove_dir_all(&target);
        Ok(store.restore(&target))
    };
    sweep(prepare, |code| {
        let (scene, target, store) = (&scene, &target, &store);
        async move {
            let is_there = target.join("member").exists();
            ensure!(code != 0 || is_there, "it claims success");
            // Killed, or told of an error, after the very last step.
            if is_there {
                return scene.is_restored(target);
            }
            store.restore(target).run().await?.expect(0)?;
            let left: Vec<_> = std::fs::read_dir(target)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<Result<_, _>>()?;
            ensure!(left.len() == 1, "the next run left {left:?}");
            scene.is_restored(target)
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn append() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let (target, old, store) = (scene.path("appended"), scene.path("old"), scene.store("copy").await?);
    let prepare = || async {
        copy(&old, &target).await?;
        Ok(store.restore(&target).arg("--append"))
    };
    let (before, ..) = state::of_directory(&old)?;
    sweep(prepare, |code| {
        let (scene, target, store) = (&scene, &target, &store);
        async move {
            Sidecar::new(["check", "--data-dir"]).arg(target).run().await?.expect(0)?;
            let (revision, ..) = state::of_directory(target)?;
            ensure!(revision == scene.revision || code != 0 && revision == before, "it is at {revision}");
            store.restore(target).arg("--append").run().await?.expect(0)?;
            scene.is_restored(target)
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn compact() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let work = scene.path("work");
    let prepare = || async {
        let _ = std::fs::remove_dir_all(&work);
        std::fs::create_dir(&work)?;
        Ok(scene.store("compacted").await?.command("compact").arg("--work-dir").arg(&work))
    };
    let before = objects(&scene.path("store"))?.len();
    sweep(prepare, |code| {
        let scene = &scene;
        async move {
            let store = Store::directory(&scene.path("compacted"));
            let after = objects(&scene.path("compacted"))?.len();
            ensure!(after == before + 1 || code != 0 && after == before, "{after} objects of {before}");
            scene.holds(&store).await?;
            store.command("compact").run().await?.expect(0)?;
            scene.holds(&store).await
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn copying() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let (store, target) = (scene.store("from").await?, scene.path("to"));
    let url = tests::file_url(&target);
    let prepare = || async {
        let _ = std::fs::remove_dir_all(&target);
        Ok(store.command("copy").args(["--to", &url]))
    };
    let all = objects(&scene.path("from"))?.len();
    sweep(prepare, |code| {
        let (scene, target, store, url) = (&scene, &target, &store, &url);
        async move {
            ensure!(code != 0 || objects(target)?.len() == all, "it claims success");
            store.command("copy").args(["--to", url]).run().await?.expect(0)?;
            ensure!(objects(target)?.len() == all);
            scene.holds(&Store::directory(target)).await
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn gc() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let flags = ["--policy", "limit-based", "--max-backups", "1"];
    let prepare = || async { Ok(scene.store("collected").await?.command("gc").args(flags)) };
    sweep(prepare, |code| {
        let scene = &scene;
        async move {
            let store = Store::directory(&scene.path("collected"));
            let left = objects(&scene.path("collected"))?.len();
            ensure!(left == 3 || code != 0 && (3..=5).contains(&left), "{left} objects are left");
            scene.holds(&store).await?;
            store.command("gc").args(flags).run().await?.expect(0)?;
            ensure!(objects(&scene.path("collected"))?.len() == 3);
            scene.holds(&store).await
        }
    })
    .await
}

async fn snapshot(kind: &str) -> Result<()> {
    let mut scene = Scene::new().await?;
    let mut client = scene.etcd.client().await?;
    client.put("one", "more", None).await?;
    scene.revision += 1;
    scene.keys = state::keys_at(&mut client, scene.revision).await?;
    let member = scene.member.clone();
    let prepare = || async { Ok(scene.store("taken").await?.once(kind, &member)) };
    let before = objects(&scene.path("store"))?.len();
    sweep(prepare, |code| {
        let (scene, member) = (&scene, &member);
        async move {
            let store = Store::directory(&scene.path("taken"));
            let after = objects(&scene.path("taken"))?.len();
            ensure!(after == before + 1 || code != 0 && after == before, "{after} objects of {before}");
            store.command("verify").run().await?.expect(0)?;
            // A full whose hash could not be had is nothing to go on from by itself.
            if store.once("delta", member).run().await?.code != 0 {
                store.once("full", member).run().await?.expect(0)?;
            }
            scene.holds(&store).await?;
            let listed = store.list().await?;
            ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "{listed}");
            Ok(())
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_full() -> Result<()> {
    snapshot("full").await
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshot_delta() -> Result<()> {
    snapshot("delta").await
}

/// What a serving sidecar does before etcd starts: whenever it fails or is killed there, the next one gets the member going
/// with everything that the backups have, and what was there before lies beside it.
async fn initialization(from: Option<&str>) -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.etcd.kill9()?;
    let mut pod = Pod::new(&scene.path("pod"), "3.6", Some(Store::directory(&scene.path("copy"))))?;
    pod.member = Member { data_dir: scene.path("looked-after"), ..scene.member.clone() };
    let data = pod.member.data_dir.clone();
    let before = from.map(|from| state::of_directory(&scene.path(from))).transpose()?.map(|(revision, ..)| revision);
    let prepare = || async {
        scene.store("copy").await?;
        let _ = std::fs::remove_dir_all(&data);
        if let Some(from) = from {
            copy(&scene.path(from), &data).await?;
        }
        pod.serve()
    };
    let drive = || async {
        // It may be killed, or fail, at any moment.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(30), pod.initialize()).await;
    };
    sweep_while(prepare, drive, |_| {
        let (scene, pod, data) = (&scene, &pod, &data);
        async move {
            if let (Some(before), true) = (before, data.join("member").exists()) {
                let (revision, ..) = state::of_directory(data)?;
                ensure!(revision == scene.revision || revision == before, "it is at {revision}");
            }
            let serving = pod.start_serve().await?;
            let outcome = pod.initialize().await?;
            serving.terminate().await?.expect(0)?;
            ensure!(outcome.revision == scene.revision, "{outcome:?}");
            scene.is_restored(data)?;
            let names = std::fs::read_dir(data)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let left: Vec<_> = names.filter(|name| name != "member" && !name.starts_with("member.replaced-")).collect();
            ensure!(left.is_empty(), "the next one left {left:?}");
            Ok(())
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn initialization_of_what_is_lost() -> Result<()> {
    initialization(None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn initialization_of_what_is_behind() -> Result<()> {
    initialization(Some("old")).await
}
