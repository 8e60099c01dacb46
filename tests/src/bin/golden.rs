//! Makes the golden files of `etcd-format`: small data directories and snapshots written by each real etcd minor, with what
//! etcd and its tools say of them. `cargo run --package tests --bin golden` writes them anew.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, CompactionOptions, LeaseGrantOptions, Permission, PutOptions, Txn, TxnOp};
use serde_json::{Value, json};
use tests::etcd::{MINORS, Member};
use tests::{program, succeed};
use tokio::process::Command;

/// The same writes on every minor: all kinds of rows, leases, a compaction, auth records, and enough entries for a raft
/// snapshot.
async fn write(client: &mut Client) -> Result<()> {
    for n in 0..12 {
        client.put(format!("key/{n:02}"), format!("value {n}"), None).await?;
    }
    for n in [3, 5, 5, 7] {
        client.put(format!("key/{n:02}"), "again", None).await?;
    }
    client.delete("key/07", None).await?;
    let operations =
        vec![TxnOp::put("txn/a", "1", None), TxnOp::put("txn/b", "2", None), TxnOp::delete("key/00", None)];
    client.txn(Txn::new().and_then(operations)).await?;
    client.lease_grant(5000, Some(LeaseGrantOptions::new().with_id(0x1234))).await?;
    client.put("leased", "x", Some(PutOptions::new().with_lease(0x1234))).await?;
    client.compact(14, Some(CompactionOptions::new().with_physical())).await?;
    client.role_add("reader").await?;
    client.role_grant_permission("reader", Permission::read("key/").with_prefix()).await?;
    client.put("key/07", "born again", None).await?;
    client.delete("key/01", None).await?;
    client.put("large", vec![b'L'; 5000], None).await?;
    Ok(())
}

async fn make(minor: &str, to: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut member = Member::single(minor, &dir.path().join("data"))?;
    // Fixed, so that ids are the same every time.
    member.peer_port = 42380;
    member.initial_cluster = format!("default={}", member.peer_url());
    let mut etcd = member.clone().flag("--snapshot-count=10").start().await?;
    let mut client = etcd.client().await?;
    write(&mut client).await?;
    let status = client.status().await?;
    let revision = status.header().context("no header")?.revision();
    let mut hashes = Vec::new();
    for at in [0, revision - 4, 17] {
        let answer = client.hash_kv(at).await?;
        let at = if at == 0 { revision } else { at };
        hashes.push(json!({ "revision": at, "compactRevision": answer.compact_version(), "hash": answer.hash() }));
    }
    let snapshot = dir.path().join("snapshot.db");
    let tool = format!("etcd-{minor}");
    let mut etcdctl = Command::new(program(&tool, "etcdctl")?);
    succeed(
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", &member.client_url(), "snapshot", "save"]).arg(&snapshot),
    )
    .await?;
    let header = client.status().await?;
    let header = header.header().context("no header")?;
    let (cluster_id, member_id) = (header.cluster_id(), header.member_id());
    etcd.stop()?;

    let utl = if minor == "3.4" { "etcdctl" } else { "etcdutl" };
    let own_tool = || -> Result<Command> {
        let mut command = Command::new(program(&tool, utl)?);
        command.env("ETCDCTL_API", "3");
        Ok(command)
    };
    let status = own_tool()?.args(["snapshot", "status", "-w", "json"]).arg(&snapshot).output().await?;
    ensure!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let restored = dir.path().join("restored");
    let flags = [
        "--name",
        "m1",
        "--initial-cluster",
        "m1=http://10.0.0.1:2380,m2=http://10.0.0.2:2380,m2=http://10.0.0.2:2381",
    ];
    let mut restore = own_tool()?;
    restore.args(["snapshot", "restore"]).arg(&snapshot).args(flags);
    restore.args([
        "--initial-advertise-peer-urls",
        "http://10.0.0.1:2380",
        "--initial-cluster-token",
        "golden",
        "--data-dir",
    ]);
    succeed(restore.arg(&restored)).await?;

    let _ = std::fs::remove_dir_all(to);
    keep(&dir.path().join("data/member"), &to.join("live")).await?;
    keep(&restored.join("member"), &to.join("restored")).await?;
    compress(&snapshot, &to.join("snapshot.db.zst")).await?;
    let expected = json!({
        "revision": revision,
        "clusterId": format!("{cluster_id:x}"),
        "memberId": format!("{member_id:x}"),
        "peerUrl": member.peer_url(),
        "hashes": hashes,
        "snapshotStatusHash": status["hash"],
        "snapshotStatusRevision": status["revision"],
    });
    std::fs::write(to.join("expected.json"), serde_json::to_string_pretty(&expected)? + "\n")?;
    Ok(())
}

/// Keeps database, raft snapshots and log segments, compressed: a segment is mostly preallocated zeros.
async fn keep(member: &Path, to: &Path) -> Result<()> {
    for sub in ["snap", "wal"] {
        for entry in std::fs::read_dir(member.join(sub))? {
            let path = entry?.path();
            let name = path.file_name().context("no name")?.to_string_lossy().into_owned();
            if path.extension().is_some_and(|extension| extension != "tmp") {
                compress(&path, &to.join(sub).join(format!("{name}.zst"))).await?;
            }
        }
    }
    Ok(())
}

async fn compress(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to.parent().context("no parent")?)?;
    succeed(Command::new(program("zstd", "zstd")?).args(["-q", "-19", "-f"]).arg(from).arg("-o").arg(to)).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../sidecar/format/tests/golden");
    for minor in MINORS {
        make(minor, &golden.join(minor)).await.with_context(|| format!("golden files of {minor}"))?;
    }
    Ok(())
}
