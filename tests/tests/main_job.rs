//! The main job on every minor: live writes of every kind, backed up as they happen, the etcd lost, restored, proved equal,
//! and good for use. One member with auth on and a directory as the store; three members and S3.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use tests::etcd::{Etcd, Member};
use tests::minio::Minio;
use tests::program::Sidecar;
use tests::state::{self, State};
use tests::store::Store;
use tests::workload::{self, Workload};

const LONG: Duration = Duration::from_secs(60);

/// After a restore everything must go on working: writes, leases, compaction, defragmentation, a restart.
async fn lives_on(etcd: &mut Etcd, client: &mut Client) -> Result<()> {
    Workload { seed: 77, rounds: 8, compact: false, large: false, defragment: true }.run(client).await?;
    let revision = client.get("x", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    client.compact(revision, Some(etcd_client::CompactionOptions::new().with_physical())).await?;
    client.defragment().await?;
    workload::expire(client).await?;
    let before = state::read(client).await?;
    etcd.stop()?;
    *etcd = etcd.member.start().await?;
    let mut client = etcd.client().await?;
    state::same(&before, &state::read(&mut client).await?)?;
    client.put("after", "restart", None).await?;
    Ok(())
}

async fn back_up_and_lose(store: &Store, members: &mut [Etcd]) -> Result<State> {
    let member = members[0].member.clone();
    let mut client = members[0].client().await?;
    Workload { seed: 1, rounds: 15, compact: true, large: false, defragment: false }.run(&mut client).await?;
    let mut backup = store.follow(&member, "300ms").args(["--delta-max-bytes", "256KiB"]).spawn()?;
    backup.logs("full snapshot is in the store", LONG).await?;
    Workload::everything(2).run(&mut client).await?;
    backup.logs_times("delta is in the store", 3, LONG).await?;
    workload::expire(&mut client).await?;
    Workload { seed: 3, rounds: 10, compact: true, large: false, defragment: false }.run(&mut client).await?;
    let ended = backup.terminate().await?.expect(0)?;
    // A machine that stands still for some seconds makes it connect again, and say so.
    let is_trouble =
        |line: &&str| line.contains("ERROR") || line.contains("WARN") && !line.contains("backup is interrupted");
    ensure!(
        !ended.stderr.lines().any(|line| is_trouble(&line)) && ended.stderr.matches("is interrupted").count() < 4,
        "unexpected trouble on {}: {}",
        member.minor,
        ended.stderr
    );
    // The leases of one second may expire at any moment, and with each a revision: take them along.
    workload::expire(&mut client).await?;
    store.once("delta", &member).run().await?.expect(0)?;
    let state = state::read(&mut client).await?;
    for member in members.iter_mut() {
        member.kill9()?;
        std::fs::remove_dir_all(&member.member.data_dir)?;
    }
    Ok(state)
}

async fn one_member(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut first = Member::single(minor, &dir.path().join("data"))?.start().await?;
    first.enable_auth().await?;
    let member = first.member.clone();
    let store = Store::directory(&dir.path().join("store"));
    let before = back_up_and_lose(&store, &mut [first]).await?;
    let restored = store.restore_member(&member).args(["-o", "json"]).run().await?.expect(0)?.json()?;
    ensure!(restored["revision"] == before.revision, "{restored} is not of revision {}", before.revision);
    ensure!(
        restored["proof"]["hashRevision"] == before.revision,
        "the hash of the last revision was not compared: {restored}"
    );
    ensure!(restored["leasesWithGuessedTtl"].as_array().is_some_and(Vec::is_empty), "{restored}");
    let checked =
        Sidecar::new(["check", "-o", "json", "--data-dir"]).arg(&member.data_dir).run().await?.expect(0)?.json()?;
    ensure!(checked["result"] == "intact", "{checked}");
    let mut etcd = member.start().await?;
    ensure!(etcd.client_as(None).await?.get("x", None).await.is_err(), "auth is off after the restore");
    let mut client = etcd.client().await?;
    let after = state::read(&mut client).await?;
    state::same(&before, &after)?;
    lives_on(&mut etcd, &mut client).await?;
    etcd.stop()?;
    Sidecar::new(["check", "--data-dir"]).arg(&member.data_dir).run().await?.expect(0)?;
    Ok(())
}

async fn three_members(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    std::fs::create_dir(&data)?;
    let paths = ["m1", "m2", "m3"].map(|name| (name, data.join(name)));
    let cluster = Member::cluster(minor, &paths.each_ref().map(|(name, path)| (*name, path.as_path())))?;
    let start = || async {
        let mut members = Vec::new();
        for member in &cluster {
            members.push(member.spawn()?);
        }
        for member in &mut members {
            member.ready().await?;
        }
        anyhow::Ok(members)
    };
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    let store = minio.store("backups/of/three members");
    let mut members = start().await?;
    let before = back_up_and_lose(&store, &mut members).await?;
    let restore = store.command("restore").args(["--initial-cluster", &cluster[0].initial_cluster, "--all-members"]);
    restore.arg(&data).run().await?.expect(0)?;
    let mut members = start().await?;
    for member in &members {
        let after = state::read(&mut member.client().await?).await?;
        state::same(&before, &after).context(member.member.name.clone())?;
    }
    let mut client = members[1].client().await?;
    Workload { seed: 9, rounds: 6, compact: true, large: false, defragment: false }.run(&mut client).await?;
    workload::expire(&mut client).await?;
    members[0].stop()?;
    members[0] = cluster[0].start().await?;
    let expected = state::read(&mut members[2].client().await?).await?;
    let read = || async {
        let found = state::read(&mut members[0].client().await?).await?;
        state::same(&expected, &found)
    };
    tests::eventually(LONG, read).await
}

tests::on_every_minor! {
    one_member_3_4: one_member("3.4");
    one_member_3_5: one_member("3.5");
    one_member_3_6: one_member("3.6");
    one_member_3_7: one_member("3.7");
    three_members_3_4: three_members("3.4");
    three_members_3_5: three_members("3.5");
    three_members_3_6: three_members("3.6");
    three_members_3_7: three_members("3.7");
}
