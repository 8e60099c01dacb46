//! Every store does what a backup needs of it: many parts, names given at the end, ranges, listing.

use anyhow::{Result, ensure};
use tests::etcd::Member;
use tests::minio::Minio;
use tests::state;
use tests::store::Store;

/// A full of several parts, deltas, a listing, every byte of it read, and a restore.
async fn keeps_backups(store: &Store, nowhere: &Store) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let mut etcd = member.start().await?;
    let mut client = etcd.client().await?;
    // Random bytes do not compress.
    for n in 0..25u32 {
        let value: Vec<u8> = (0..1_000_000).map(|_| rand::random()).collect();
        client.put(format!("/blob/{n}"), value, None).await?;
    }
    store.once("full", &member).run().await?.expect(0)?;
    for n in 0..5u32 {
        client.put("x", n.to_string(), None).await?;
        store.once("delta", &member).run().await?.expect(0)?;
    }
    let before = state::read(&mut client).await?;
    let listed = store.list().await?;
    ensure!(listed["unfinishedUploads"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["foreign"].as_array().is_some_and(Vec::is_empty), "{listed}");
    ensure!(listed["timelines"][0]["deltas"].as_array().is_some_and(|deltas| deltas.len() == 5), "{listed}");
    store.command("verify").args(["--level", "decode"]).run().await?.expect(0)?;
    etcd.kill9()?;
    state::same(&before, &store.restore_and_read(&member).await?)?;
    nowhere.command("list").run().await?.expect(11)?.says(&nowhere.url)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, nowhere) = (dir.path().join("a/b"), dir.path().join("nowhere"));
    keeps_backups(&Store::directory(&store), &Store::directory(&nowhere)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn minio_keeps_backups() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let minio = Minio::start(&dir.path().join("minio"), "backups").await?;
    keeps_backups(&minio.store("backups/a/b"), &minio.store("nowhere/a")).await
}
