//! The main job, end to end, told as it goes: a real etcd, a folder as the store, the loss of everything, and the proof that
//! it came back.

#![expect(clippy::print_stdout, reason = "it talks to a person")]

use std::time::Duration;

use anyhow::Result;
use tests::etcd::Member;
use tests::program::Sidecar;
use tests::state;
use tests::workload::Workload;

fn say(text: &str) {
    println!("\n>> {text}");
}

async fn sidecar(arguments: &[&str]) -> Result<()> {
    println!("   $ sidecar {}", arguments.join(" "));
    let ended = Sidecar::new(arguments.iter().copied()).run().await?.expect(0)?;
    for line in ended.stdout.lines() {
        println!("   {line}");
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("etcd");
    let store = format!("file://{}", dir.path().join("backups").display());
    let member = Member::single("3.6", &data)?;
    let endpoint = member.client_url();

    say("Start etcd 3.6 and write to it: keys, transactions, leases.");
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    Workload { seed: 1, rounds: 20, compact: false, large: false, defragment: false }.run(&mut client).await?;

    say("Begin to back it up: a full snapshot, then a delta every second.");
    println!("   $ sidecar snapshot --endpoints {endpoint} --store {store} --delta-period 1s &");
    let mut backup =
        Sidecar::new(["snapshot", "--endpoints", &endpoint, "--store", &store, "--delta-period", "1s"]).spawn()?;
    backup.logs("full snapshot is in the store", Duration::from_secs(30)).await?;

    say("Go on writing: among it 10,000 keys and their deletion, a compaction, a defragmentation.");
    Workload::everything(2).run(&mut client).await?;
    backup.logs_times("delta is in the store", 2, Duration::from_secs(30)).await?;
    tests::workload::expire(&mut client).await?;

    say("Stop the backup with SIGTERM; it flushes what is pending.");
    backup.terminate().await?.expect(0)?;
    sidecar(&["snapshot", "--once", "delta", "--endpoints", &endpoint, "--store", &store]).await?;
    sidecar(&["list", "--store", &store]).await?;

    let before = state::read(&mut client).await?;
    say(&format!(
        "etcd is at revision {} with {} keys. kill -9, and its data directory is deleted.",
        before.revision,
        before.keys.len()
    ));
    etcd.kill9()?;
    std::fs::remove_dir_all(&data)?;

    say("Restore. No etcd takes part.");
    let data_text = data.display().to_string();
    sidecar(&["restore", "--store", &store, "--data-dir", &data_text, "--initial-cluster", &member.initial_cluster])
        .await?;
    sidecar(&["check", "--data-dir", &data_text]).await?;

    say("Start etcd on it and compare every key, value, revision, version and lease, and etcd's own hash.");
    let etcd = member.start().await?;
    let after = state::read(&mut etcd.client().await?).await?;
    state::same(&before, &after)?;
    println!(
        "   revision {}: {} keys equal, {} leases on record",
        after.revision,
        after.keys.len(),
        after.leases.len()
    );
    println!("   HashKV {} before the loss, {} after the restore", before.hash.0, after.hash.0);
    say("It is the same data.");
    Ok(())
}
