//! Clusters of three members, each under its sidecar's care: one that loses its data comes back, and when all lose theirs one
//! restores and the others join it.

mod hosts;
mod members;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use futures::future::{join_all, try_join_all};
use proto::sidecar as api;
use tests::etcd::Member;
use tests::eventually;
use tests::faults::{self, Hit};
use tests::garage::Garage;
use tests::minio::Minio;
use tests::network::Network;
use tests::pod::{Launched, Pod};
use tests::program::Running;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

use self::members::Cluster;

const LONG: Duration = Duration::from_secs(90);
const STOPPED: i32 = 128 + 15;

async fn write(client: &mut Client, seed: u64) -> Result<()> {
    Workload::of(seed).run(client).await?;
    tests::workload::expire(client).await
}

async fn members_come_back(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    // Who restores is claimed in the store: in one that knows conditions, and in one that does not.
    let (minio, garage);
    let store = match minor {
        "3.5" => {
            minio = Minio::start(&place, "backups").await?;
            minio.store("backups/c")
        }
        "3.7" => {
            garage = Garage::start(&place, "backups").await?;
            garage.store("backups/c")
        }
        _ => Store::directory(&place),
    };
    let mut cluster = Cluster::start(dir.path(), minor, Some(&store)).await?;
    let mut client = cluster.client(0).await?;
    write(&mut client, 1).await?;

    // One that leads loses its disk, while the others serve.
    let lost = cluster.leader().await?;
    cluster.stop(lost).await?;
    cluster.wipe(lost)?;
    let mut client = cluster.client((lost + 1) % 3).await?;
    write(&mut client, 2).await?;
    cluster.start_one(lost)?;
    cluster.settled().await?;
    ensure!(cluster.log(lost).contains("comes back to its cluster as a learner"), "{}", cluster.log(lost));
    let mut again = cluster.client(lost).await?;
    state::same(&state::read(&mut client).await?, &state::read(&mut again).await?)?;

    // Another has damage.
    let damaged = (lost + 1) % 3;
    cluster.stop(damaged).await?;
    tests::damage(&cluster.pods[damaged].member.data_dir)?;
    cluster.start_one(damaged)?;
    cluster.settled().await?;
    ensure!(cluster.log(damaged).contains("the data is damaged"), "{}", cluster.log(damaged));
    write(&mut cluster.client(damaged).await?, 3).await?;
    cluster.back_up().await?;
    let before = state::read(&mut cluster.client(0).await?).await?;

    // All lose everything.
    cluster.stop_all().await?;
    (0..3).try_for_each(|member| cluster.wipe(member))?;
    cluster.launch_all().await?;
    ensure!(cluster.acted("Restore") == 1 && cluster.acted("Join") == 2, "{}", cluster.logs());
    for member in 0..3 {
        let after = state::read(&mut cluster.client(member).await?).await?;
        state::same(&before, &after).with_context(|| cluster.serve_logs())?;
    }
    write(&mut cluster.client(1).await?, 4).await?;
    cluster.back_up().await?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 2), "{listed}");

    // And an ordinary restart.
    let before = state::read(&mut cluster.client(0).await?).await?;
    cluster.stop_all().await?;
    cluster.launch_all().await?;
    ensure!(cluster.acted("Keep") == 3, "{}", cluster.logs());
    state::same(&before, &state::read(&mut cluster.client(2).await?).await?)?;
    cluster.stop_all().await?;
    for serving in cluster.serving.drain(..) {
        serving.terminate().await?.expect(0)?;
    }
    Ok(())
}

tests::on_every_minor! {
    members_come_back_3_4: members_come_back("3.4");
    members_come_back_3_5: members_come_back("3.5");
    members_come_back_3_6: members_come_back("3.6");
    members_come_back_3_7: members_come_back("3.7");
}

/// Where a sidecar is cut off on its way: at what it sends, and at what it does to its disk.
const CUTS: [(Hit, &str, &[usize]); 5] = [
    (Hit::Kill, "sendto,writev,sendmsg", &[1, 2, 3, 4, 5, 6, 8, 10, 12]),
    (Hit::Kill, "rename,renameat,renameat2", &[1]),
    (Hit::Kill, "fsync", &[1]),
    (Hit::Error, "rename,renameat,renameat2", &[1, 2]),
    (Hit::Error, "mkdir,mkdirat", &[1]),
];

/// A member that is on its way back is cut off at every step: the next start finishes it, and it never votes under its old id.
#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_that_is_cut_off_is_finished() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.back_up().await?;
    let mut hits = 0;
    for (round, (hit, calls, nth)) in
        CUTS.iter().flat_map(|(hit, calls, nths)| nths.iter().map(move |nth| (*hit, *calls, *nth))).enumerate()
    {
        let member = cluster.pods[2].member.clone();
        let old = member_id(&mut cluster.client(0).await?, &member.name).await?;
        cluster.stop(2).await?;
        cluster.serving.pop().context("no sidecar")?.terminate().await?.expect(0)?;
        if round % 2 == 0 {
            cluster.wipe(2)?;
        } else {
            tests::damage(&member.data_dir)?;
        }
        let drive = async {
            let _ = tokio::time::timeout(Duration::from_secs(20), cluster.pods[2].initialize()).await;
        };
        let ended = faults::run_while(&cluster.pods[2].serve()?, calls, nth, hit, drive).await?;
        hits += usize::from(matches!(ended, faults::Ended::With(_)));
        eprintln!("{hit:?} of {calls} {nth}: {ended:?}");
        cluster.serving.push(cluster.pods[2].start_serve().await?);
        cluster.start_one(2)?;
        let what = || format!("{hit:?} of {calls} {nth}, {ended:?}: {}", cluster.serve_logs());
        cluster.settled().await.with_context(what)?;
        let new = member_id(&mut cluster.client(0).await?, &member.name).await?;
        ensure!(old != new, "{}", what());
        let mut states = Vec::new();
        for member in [0, 2] {
            states.push(state::read(&mut cluster.client(member).await?).await?);
        }
        state::same(&states[0], &states[1]).with_context(what)?;
    }
    ensure!(hits > 10, "only {hits} were hit");
    Ok(())
}

async fn member_id(client: &mut Client, name: &str) -> Result<u64> {
    let listed = client.member_list().await?;
    let id = listed.members().iter().find(|member| member.name() == name).map(etcd_client::Member::id);
    id.with_context(|| format!("{name} is not in {listed:?}"))
}

/// One of three that lost everything is cut off while it claims the restore, or carries it out: once it is back, or without it,
/// the cluster is restored once.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_of_all_that_is_cut_off_is_finished() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    let mut hits = 0;
    let cuts = [("linkat", 1), ("linkat", 2), ("mkdir,mkdirat", 1), ("pwrite64", 2), ("rename,renameat,renameat2", 1)];
    for (round, (calls, nth)) in cuts.into_iter().enumerate() {
        write(&mut cluster.client(0).await?, round as u64).await?;
        cluster.back_up().await?;
        let before = state::read(&mut cluster.client(0).await?).await?;
        let timelines = store.list().await?["timelines"].as_array().map_or(0, Vec::len);
        cluster.stop_all().await?;
        (0..3).try_for_each(|member| cluster.wipe(member))?;
        cluster.serving.remove(0).terminate().await?.expect(0)?;
        cluster.start_one(1)?;
        cluster.start_one(2)?;
        let drive = async {
            let _ = tokio::time::timeout(Duration::from_secs(60), cluster.pods[0].initialize()).await;
        };
        let ended = faults::run_while(&cluster.pods[0].serve()?, calls, nth, Hit::Kill, drive).await?;
        hits += usize::from(matches!(ended, faults::Ended::With(_)));
        eprintln!("kill at {calls} {nth}: {ended:?}");
        cluster.serving.insert(0, cluster.pods[0].start_serve().await?);
        cluster.start_one(0)?;
        let what = || format!("kill at {calls} {nth}, {ended:?}: {}", cluster.serve_logs());
        cluster.settled().await.with_context(what)?;
        state::same(&before, &state::read(&mut cluster.client(1).await?).await?).with_context(what)?;
        cluster.back_up().await?;
        let after = store.list().await?["timelines"].as_array().map_or(0, Vec::len);
        ensure!(after == timelines + 1, "{timelines} timelines became {after}: {}", what());
    }
    // Who of the three restores is open, and the others do less.
    ensure!(hits > 1, "only {hits} were hit");
    Ok(())
}

/// Without a quorum nothing is decided: the others may have what the backups lack.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_be_merely_away_is_waited_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.back_up().await?;
    write(&mut cluster.client(0).await?, 2).await?;
    let before = state::read(&mut cluster.client(0).await?).await?;
    cluster.stop_all().await?;
    cluster.wipe(0)?;
    cluster.wipe(1)?;
    cluster.start_one(0)?;
    cluster.start_one(1)?;
    for member in [0, 1] {
        let launched = cluster.launched[member].as_mut().context("it runs")?;
        launched.running()?.logs("2 of 3 members say that they lost their data", LONG).await?;
    }
    // The third has everything, and is not enough.
    cluster.start_one(2)?;
    for member in [0, 1] {
        let launched = cluster.launched[member].as_mut().context("it runs")?;
        launched.running()?.logs("have no quorum", LONG).await?;
    }
    ensure!((0..2).all(|member| !cluster.pods[member].member.data_dir.join("member").exists()));
    cluster.stop(2).await?;
    // A person decides: its data is what counts.
    for member in [0, 1] {
        cluster.launched[member].take().context("it runs")?.terminate().await?.expect(1)?;
    }
    let pod = &cluster.pods[2];
    let db = dir.path().join("saved.db");
    std::fs::copy(pod.member.data_dir.join("member/snap/db"), &db)?;
    cluster.wipe(2)?;
    let url = format!("c={}", pod.member.peer_url());
    let restore =
        tests::program::Sidecar::new(["restore", "--skip-hash-check", "--name", "c", "--initial-cluster", &url]);
    let restore = restore.arg("--snapshot-file").arg(&db).arg("--data-dir").arg(&pod.member.data_dir);
    restore.args(["--initial-cluster-token", "by-hand"]).run().await?.expect(0)?;
    cluster.launch_all().await?;
    state::same(&before, &state::read(&mut cluster.client(0).await?).await?)?;
    Ok(())
}

/// A value has flipped on a member that took no backup, so that only the others show it: nothing is backed up from there when it
/// leads, and it does not lead for long.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_member_alone_has_is_not_backed_up() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    let leader = cluster.leader().await?;
    let mut client = cluster.client(leader).await?;
    client.put("flipped", tests::VALUE, None).await?;
    cluster.back_up().await?;
    let before = state::read(&mut client).await?;
    let damaged = (leader + 1) % 3;
    let id = cluster.client(damaged).await?.status().await?.header().map(etcd_client::ResponseHeader::member_id);
    cluster.stop(damaged).await?;
    tests::flip(&cluster.pods[damaged].member.data_dir)?;
    cluster.start_one(damaged)?;
    cluster.settled().await?;
    eventually(LONG, || async {
        cluster.client(cluster.leader().await?).await?.move_leader(id.context("no id")?).await?;
        Ok(())
    })
    .await?;
    eventually(LONG, || async {
        ensure!(cluster.serving[damaged].log().contains("leadership is handed over"), "it leads still");
        ensure!(cluster.leader().await? != damaged, "it leads still");
        Ok(())
    })
    .await
    .with_context(|| cluster.serve_logs())?;
    cluster.back_up().await?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "{listed}");
    let error = async |cluster: &Cluster| {
        anyhow::Ok(cluster.pods[damaged].status().await?.backup.map(|backup| backup.error).unwrap_or_default())
    };
    eventually(LONG, || async {
        let error = error(&cluster).await?;
        ensure!(error.contains("is damaged: "), "{error}");
        Ok(())
    })
    .await?;
    // As it says.
    cluster.stop(damaged).await?;
    cluster.wipe(damaged)?;
    cluster.start_one(damaged)?;
    cluster.settled().await?;
    eventually(LONG, || async {
        let error = error(&cluster).await?;
        ensure!(error.is_empty(), "{error}");
        Ok(())
    })
    .await?;
    state::same(&before, &state::read(&mut cluster.client(damaged).await?).await?)
}

/// Each member is defragmented, the followers first, and leadership is handed over before it is the leader's turn.
#[tokio::test(flavor = "multi_thread")]
async fn every_member_is_defragmented() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pods = Pod::cluster(dir.path(), "3.6", &["a", "b", "c"], None)?;
    for pod in &mut pods {
        pod.more = "defragmentation: {schedule: '* * * * *', leastFreeShare: 0.2}\n".into();
    }
    let serving = try_join_all(pods.iter().map(Pod::start_serve)).await?;
    let mut cluster = Cluster { pods, serving, launched: vec![None, None, None] };
    cluster.launch_all().await?;
    let mut client = cluster.client(0).await?;
    for round in 0..40 {
        client.put("large", vec![round; 200_000], None).await?;
    }
    let revision = client.put("large", "small", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    client.compact(revision, Some(etcd_client::CompactionOptions::new().with_physical())).await?;
    // Pages count as free from the second write on after they were freed.
    for _ in 0..50 {
        client.put("small", "", None).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let defragmented = || async {
        let logs = cluster.serve_logs();
        ensure!(logs.matches("the database is defragmented").count() >= 3, "{logs}");
        ensure!(logs.contains("leadership is handed over"), "{logs}");
        for member in 0..3 {
            let size = cluster.client(member).await?.status().await?.db_size();
            ensure!(size < 2_000_000, "{size}: {logs}");
        }
        Ok(())
    };
    eventually(2 * LONG, defragmented).await?;
    cluster.stop_all().await
}

/// Two etcds with one id would acknowledge for each other what neither has.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_anothers_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path(), "3.6", None).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.stop(2).await?;
    let saved = dir.path().join("saved");
    let data = &cluster.pods[2].member.data_dir;
    tests::succeed(tokio::process::Command::new("cp").arg("-r").arg(data).arg(&saved)).await?;
    cluster.start_one(2)?;
    cluster.settled().await?;
    // A second pod of the same name, on an older copy.
    let twin = cluster.pods[2].twin(&dir.path().join("twin"), &saved).await?;
    let serving = twin.start_serve().await?;
    let mut launched = twin.start_launch()?;
    launched.running()?.logs("runs as this member elsewhere", LONG).await?;
    launched.terminate().await?.expect(1)?;
    serving.terminate().await?.expect(0)?;
    // Another member's pod, on that copy.
    cluster.stop(1).await?;
    let other = cluster.pods[1].twin(&dir.path().join("other"), &saved).await?;
    let serving = other.start_serve().await?;
    other.launch()?.run().await?.expect(12)?.says("the volume is another's")?;
    serving.terminate().await?.expect(0)?;
    cluster.start_one(1)?;
    cluster.settled().await?;
    // The member lost its disk meanwhile and came back under another id; then the old volume is found.
    let before = state::read(&mut cluster.client(0).await?).await?;
    cluster.stop(2).await?;
    cluster.wipe(2)?;
    cluster.start_one(2)?;
    cluster.settled().await?;
    cluster.stop(2).await?;
    let data = &cluster.pods[2].member.data_dir;
    std::fs::remove_dir_all(data)?;
    tests::succeed(tokio::process::Command::new("cp").arg("-r").arg(&saved).arg(data)).await?;
    cluster.joins(2, &before).await?;
    // All are down, and two volumes are swapped: nobody serves who could tell.
    for member in 0..3 {
        cluster.stop(member).await?;
    }
    let swap = |cluster: &Cluster| -> Result<()> {
        let [a, b] = [0, 1].map(|member: usize| cluster.pods[member].member.data_dir.clone());
        std::fs::rename(&a, dir.path().join("swapped"))?;
        std::fs::rename(&b, &a)?;
        Ok(std::fs::rename(dir.path().join("swapped"), &b)?)
    };
    swap(&cluster)?;
    for (member, other) in [(0, "b"), (1, "a")] {
        let refused = cluster.pods[member].launch()?.run().await?.expect(12)?;
        refused.says(&format!("is that of member {other}"))?;
    }
    swap(&cluster)?;
    cluster.launch_all().await?;
    state::same(&before, &state::read(&mut cluster.client(0).await?).await?)?;
    cluster.stop_all().await
}

/// A person restores all members, and the volume of one of them is not where it should be: it gets what the others have.
#[tokio::test(flavor = "multi_thread")]
async fn one_without_data_among_restored_ones_joins_them() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", None).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    let before = state::read(&mut cluster.client(0).await?).await?;
    store.once("full", &cluster.pods[0].member).run().await?.expect(0)?;
    cluster.stop_all().await?;
    let restored = dir.path().join("restored");
    let initial = &cluster.pods[0].member.initial_cluster;
    let restore = store.command("restore").arg("--all-members").arg(&restored).args(["--initial-cluster", initial]);
    restore.run().await?.expect(0)?;
    (0..3).try_for_each(|member| cluster.wipe(member))?;
    for (at, name) in [(0, "a"), (1, "b")] {
        let data = &cluster.pods[at].member.data_dir;
        std::fs::remove_dir_all(data)?;
        std::fs::rename(restored.join(name), data)?;
        cluster.start_one(at)?;
    }
    let serves = || async { state::read(&mut cluster.client(0).await?).await };
    state::same(&before, &eventually(LONG, serves).await?)?;
    cluster.joins(2, &before).await?;
    cluster.stop_all().await
}

/// An etcd that waits for a quorum listens, and answers no TLS handshake: the others start all the same.
#[tokio::test(flavor = "multi_thread")]
async fn members_with_certificates_start_one_after_the_other() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pods = Pod::cluster(dir.path(), "3.6", &["a", "b", "c"], None)?;
    Pod::secure(&mut pods, &dir.path().join("certificates"), &["127.0.0.1"])?;
    let serving = try_join_all(pods.iter().map(Pod::start_serve)).await?;
    let mut cluster = Cluster { pods, serving, launched: vec![None, None, None] };
    for _ in 0..2 {
        for member in 0..3 {
            cluster.start_one(member)?;
            let listens = || async {
                Ok(tokio::net::TcpStream::connect(("127.0.0.1", cluster.pods[member].member.client_port))
                    .await
                    .map(drop)?)
            };
            eventually(LONG, listens).await.with_context(|| cluster.log(member))?;
        }
        cluster.settled().await?;
        cluster.stop_all().await?;
    }
    Ok(())
}

/// Somebody began to back a cluster up, which was lost before anything could be restored: all members begin anew, also those
/// that the first no longer tells that it lost its data, too.
#[tokio::test(flavor = "multi_thread")]
async fn all_begin_anew_where_a_backup_was_only_begun() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let begun = dir.path().join("store/t00000001");
    std::fs::create_dir_all(&begun)?;
    let description = serde_json::json!({
        "layout": 1, "timeline": 1, "parent": 0, "fork_revision": 0, "reason": "first", "cluster_id": "9",
        "created": "2026-11-01T00:00:00Z",
    });
    std::fs::write(begun.join("timeline.json"), description.to_string())?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    // Two are a quorum: who looks once these have a backup joins them.
    let (anew, joined) = (cluster.acted("Bootstrap"), cluster.acted("Join"));
    ensure!(anew >= 2 && anew + joined == 3, "{anew} began anew, {joined} joined\n{}", cluster.logs());
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.back_up().await?;
    cluster.stop_all().await
}

/// Until a restored cluster has backups of its own, its members tell by themselves that they are of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_restarts_before_its_first_backup() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut cluster = Cluster::start(dir.path(), "3.6", Some(&store)).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.back_up().await?;
    cluster.stop_all().await?;
    (0..3).try_for_each(|member| cluster.wipe(member))?;
    cluster.launch_all().await?;
    write(&mut cluster.client(0).await?, 2).await?;
    let before = state::read(&mut cluster.client(0).await?).await?;
    cluster.stop_all().await?;
    // As if the store had been away since.
    std::fs::rename(dir.path().join("store/t00000002"), dir.path().join("away"))?;
    cluster.launch_all().await?;
    ensure!(cluster.acted("Keep") == 3, "{}", cluster.logs());
    state::same(&before, &state::read(&mut cluster.client(1).await?).await?)?;
    cluster.stop_all().await
}

/// What somebody puts in the place of damaged data is looked at, also while others are waited for.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_the_place_of_damage_is_kept() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path(), "3.6", None).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    let before = state::read(&mut cluster.client(0).await?).await?;
    cluster.stop_all().await?;
    let pod = &cluster.pods[0];
    let (member, good) = (pod.member.data_dir.join("member"), dir.path().join("good"));
    tests::succeed(tokio::process::Command::new("cp").arg("-r").arg(&member).arg(&good)).await?;
    tests::damage(&pod.member.data_dir)?;
    cluster.start_one(0)?;
    cluster.launched[0].as_mut().context("it runs")?.running()?.logs("no other member serves", LONG).await?;
    tests::exchange(&member, &good)?;
    cluster.start_one(1)?;
    cluster.start_one(2)?;
    cluster.settled().await?;
    ensure!(cluster.log(0).contains("action=Keep"), "{}", cluster.log(0));
    state::same(&before, &state::read(&mut cluster.client(0).await?).await?)?;
    cluster.stop_all().await
}

/// A member that was taken out of the configuration, and is away, leaves the cluster; one that is merely away stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_nobody_configures_leaves() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pods = Pod::cluster(dir.path(), "3.6", &["a", "b", "c"], None)?;
    for pod in &mut pods {
        pod.reach_more = "  removeMembersAfter: 6s\n".into();
    }
    let mut cluster = Cluster::of(pods).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.stop(2).await?;
    tokio::time::sleep(Duration::from_secs(15)).await;
    let members = async |cluster: &Cluster| anyhow::Ok(cluster.client(0).await?.member_list().await?.members().len());
    ensure!(members(&cluster).await? == 3, "{}", cluster.serve_logs());
    let initial: Vec<_> = cluster.pods[0].member.initial_cluster.split(',').map(str::to_owned).collect();
    let left: Vec<_> = initial.into_iter().filter(|member| !member.starts_with("c=")).collect();
    for member in [0, 1] {
        cluster.pods[member].member.initial_cluster = left.join(",");
        cluster.serving.remove(0).terminate().await?.expect(0)?;
        let serving = cluster.pods[member].start_serve().await?;
        cluster.serving.push(serving);
    }
    eventually(LONG, || async {
        let left = members(&cluster).await?;
        ensure!(left == 2, "{left}\n{}", cluster.serve_logs());
        Ok(())
    })
    .await?;
    write(&mut cluster.client(1).await?, 2).await?;
    cluster.stop_all().await
}

/// Peers of a running cluster come to show each other certificates, one member after the other.
#[tokio::test(flavor = "multi_thread")]
async fn peers_turn_to_tls() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(dir.path(), "3.6", None).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    let tls = tests::certificates::Certificates::issue(&dir.path().join("certificates"))?;
    let mut members: Vec<_> = cluster.pods.iter().map(|pod| pod.member.clone()).collect();
    for member in &mut members {
        member.peer_tls = Some(tls.clone());
    }
    Member::introduce(&mut members);
    for (at, member) in members.iter().enumerate() {
        cluster.stop(at).await?;
        cluster.pods[at].member = member.clone();
        cluster.serving.remove(at).terminate().await?.expect(0)?;
        let serving = cluster.pods[at].start_serve().await?;
        cluster.serving.insert(at, serving);
        cluster.start_one(at)?;
        let listed = || async {
            let listed = cluster.client(at).await?.member_list().await?;
            let ours = listed.members().iter().find(|listed| listed.name() == member.name).context("not listed")?;
            ensure!(ours.peer_urls() == [member.peer_url()], "{listed:?}");
            Ok(())
        };
        eventually(LONG, listed).await.with_context(|| cluster.serve_logs())?;
    }
    cluster.settled().await?;
    write(&mut cluster.client(2).await?, 2).await?;
    let before = state::read(&mut cluster.client(2).await?).await?;
    for member in [0, 1] {
        let caught_up = || async { state::same(&before, &state::read(&mut cluster.client(member).await?).await?) };
        eventually(LONG, caught_up).await?;
    }
    cluster.stop_all().await
}
