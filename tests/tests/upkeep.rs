//! What the leader's sidecar does from time to time: it keeps store and database in shape, and never in etcd's way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::sidecar::{GetLatestRequest, Kind};
use tests::eventually;
use tests::pod::Pod;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

const LONG: Duration = Duration::from_secs(60);

/// What nobody asks for each time: deltas are merged, what that replaces goes, and the newest chain is restored to see.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_kept_in_shape() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.more = format!(
        "snapshots: {{deltaPeriod: 1s}}\nretention: {{policy: limit-based, maxBackups: 1, period: 5s}}\ncompaction: {{deltas: 3, workDir: {work}}}\nverification: {{schedule: '* * * * *', workDir: {work}}}\n",
        work = dir.path().display()
    );
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    pod.back_up(Kind::Full).await?;
    for seed in 0..5 {
        Workload::of(seed).run(&mut client).await?;
        pod.back_up(Kind::Delta).await?;
    }
    let in_shape = || async {
        let log = serving.log();
        ensure!(log.contains("deltas are merged") && log.contains("looked which backups can go"), "{log}");
        let verified = pod.status().await?.backup.and_then(|backup| backup.verified);
        ensure!(
            verified.as_ref().is_some_and(|verified| verified.revision > 1 && verified.seconds > 0.0),
            "{verified:?}"
        );
        let latest = pod.client(true).await?.get_latest(GetLatestRequest {}).await?.into_inner();
        ensure!(latest.deltas.len() < 5, "{latest:?}");
        let fulls = pod.store.as_ref().context("no store")?.list().await?["timelines"][0]["fulls"].clone();
        ensure!(fulls.as_array().is_none_or(|fulls| fulls.len() == 1), "{fulls}");
        Ok(())
    };
    eventually(Duration::from_secs(90), in_shape).await?;
    tests::workload::expire(&mut client).await?;
    let before = state::read(&mut client).await?;
    pod.back_up(Kind::Delta).await?;
    launched.terminate().await?;
    std::fs::remove_dir_all(pod.member.data_dir.join("member"))?;
    let (launched, mut client) = pod.start_etcd().await?;
    let after = state::read(&mut client).await?;
    ensure!(before.keys == after.keys, "other keys");
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A cluster that is full is compacted, defragmented and written to again, where that is allowed; and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_gets_space_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.etcd_more = "quota-backend-bytes: 8000000\n".into();
    pod.more = "defragmentation: {resolveNoSpace: true}\n".into();
    let mut serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    pod.back_up(Kind::Full).await?;
    let mut written = 0;
    while client.put("same", vec![written; 400_000], None).await.is_ok() {
        written += 1;
    }
    ensure!(written > 5);
    let again = || {
        let mut client = client.clone();
        async move { Ok(client.put("after", "", None).await.map(drop)?) }
    };
    eventually(LONG, again).await.with_context(|| serving.log())?;
    serving.logs("there is space again", LONG).await?;
    ensure!(serving.log().contains("NOSPACE"), "{}", serving.log());
    let got = client.get("same", None).await?;
    ensure!(got.kvs()[0].value() == vec![written - 1; 400_000]);
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A database that is mostly free is defragmented at once, and one whose cluster has other worries is not.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_mostly_free_does_not_wait() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    pod.more = "defragmentation: {schedule: '0 0 1 1 *', urgentFreeShare: 0.5}\n".into();
    let mut serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    for round in 0..100u8 {
        client.put("large", vec![round; 1_000_000], None).await?;
    }
    let revision = client.put("large", "small", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    client.compact(revision, Some(etcd_client::CompactionOptions::new().with_physical())).await?;
    let before = client.status().await?.db_size();
    let smaller = || {
        let mut client = client.clone();
        async move {
            // Pages count as free from the second write on after they were freed.
            client.put("small", "", None).await?;
            let size = client.status().await?.db_size();
            ensure!(size < before / 4, "{size} of {before}");
            Ok(())
        }
    };
    eventually(2 * LONG, smaller).await.with_context(|| serving.log())?;
    serving.logs("the database is defragmented", LONG).await?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A chain that cannot be restored is said and counted, and what was verified before stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_cannot_be_restored_is_said() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let place = dir.path().join("store");
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&place)))?;
    let work = dir.path().join("work");
    std::fs::create_dir(&work)?;
    pod.more = format!(
        "snapshots: {{deltaPeriod: 1h}}\nverification: {{schedule: '* * * * *', workDir: {}}}\nbackground: {{bytesPerSecond: 200000}}\n",
        work.display()
    );
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    Workload::of(1).run(&mut client).await?;
    pod.back_up(Kind::Full).await?;
    Workload::of(2).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    pod.back_up(Kind::Delta).await?;
    let expected = state::read(&mut client).await?.revision;
    let verified = || async {
        let verified = pod.status().await?.backup.and_then(|backup| backup.verified).context("not yet")?;
        // The minute may have turned between the two backups.
        ensure!(verified.revision == expected && !verified.hashes.is_empty(), "{verified:?}, not {expected}");
        Ok(verified)
    };
    let verified = eventually(3 * LONG, verified).await.with_context(|| serving.log())?;
    // A byte of the last delta changes in the store.
    let delta = tests::objects(&place)?
        .into_iter()
        .rfind(|name| name.to_string_lossy().contains(".delta."))
        .context("no delta")?;
    let mut bytes = std::fs::read(&delta)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&delta, bytes)?;
    let counted = || async {
        let metrics = pod.http()?.get(format!("{}/metrics", pod.url())).send().await?.text().await?;
        ensure!(metrics.contains("sidecar_verifications_total{succeeded=\"false\"} 1\n"), "{metrics}");
        ensure!(serving.log().contains("could not restore the newest chain"), "it is not said");
        Ok(())
    };
    eventually(2 * LONG, counted).await.with_context(|| serving.log())?;
    ensure!(pod.status().await?.backup.and_then(|backup| backup.verified).as_ref() == Some(&verified));
    ensure!(std::fs::read_dir(&work)?.next().is_none(), "something is left in the work directory");
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}
