//! Writes of every kind, with leases, compactions and a defragmentation in between.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, DeleteOptions, LeaseGrantOptions, PutOptions, Txn, TxnOp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Last digit of the ids of leases that are revoked,
const REVOKED: i64 = 2;
/// and of those that expire after one second.
const SHORT: i64 = 3;

/// Whether a lease is one that ends while the workload runs.
pub fn ends(lease: i64) -> bool {
    [REVOKED, SHORT].contains(&(lease % 10))
}

/// What to write.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Seed; the same one writes the same.
    pub seed: u64,
    /// Rounds of about twelve revisions.
    pub rounds: u32,
    /// Compact now and then.
    pub compact: bool,
    /// Write one value of 1 MiB and delete 10,000 keys at once.
    pub large: bool,
    /// Defragment in the middle.
    pub defragment: bool,
}

impl Workload {
    /// A small one.
    pub fn of(seed: u64) -> Self {
        Self { seed, rounds: 6, compact: false, large: false, defragment: false }
    }

    /// Everything, in short.
    pub fn everything(seed: u64) -> Self {
        Self { seed, rounds: 40, compact: true, large: true, defragment: true }
    }

    /// Writes until done.
    pub async fn run(self, client: &mut Client) -> Result<()> {
        let mut random = StdRng::seed_from_u64(self.seed);
        // Leases of a cluster that was restored must not meet those of this run.
        let lease_base = i64::try_from(self.seed % 1000)? * 1_000_000 + 1000;
        for round in 0..self.rounds {
            let key = |n: u32| format!("/w/{}/{:04}", self.seed % 7, n % 97);
            for _ in 0..6 {
                let size = if random.random_bool(0.05) {
                    random.random_range(5_000..20_000)
                } else {
                    random.random_range(0..300)
                };
                let value: Vec<u8> = (0..size).map(|_| random.random()).collect();
                client.put(key(random.random()), value, None).await?;
            }
            client.delete(key(random.random()), None).await?;
            let first = random.random_range(0..90);
            let operations = (0..5u32).map(|n| {
                let key = key(first + n);
                if random.random_bool(0.3) {
                    TxnOp::delete(key, None)
                } else {
                    TxnOp::put(key, format!("txn {round}"), None)
                }
            });
            client.txn(Txn::new().and_then(operations.collect::<Vec<_>>())).await?;
            self.leases(client, lease_base + i64::from(round) * 10, round).await?;
            if self.large && round == self.rounds / 3 {
                large(client).await?;
            }
            if self.compact && round % 13 == 12 {
                let revision = client.get("x", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
                client.compact(revision - i64::from(round), None).await?;
            }
            if self.defragment && round == self.rounds / 2 {
                client.defragment().await?;
            }
        }
        Ok(())
    }

    /// One lease that stays, one that is kept alive, one that is revoked and one that expires.
    async fn leases(self, client: &mut Client, base: i64, round: u32) -> Result<()> {
        if !round.is_multiple_of(5) {
            return Ok(());
        }
        let grants = [(base, 3600 + i64::from(round)), (base + 1, 36_000), (base + REVOKED, 60), (base + SHORT, 1)];
        for (id, ttl) in grants {
            client.lease_grant(ttl, Some(LeaseGrantOptions::new().with_id(id))).await?;
            let options = || Some(PutOptions::new().with_lease(id));
            for key in ["a", "b"] {
                match client.put(format!("/lease/{id}/{key}"), "held", options()).await {
                    // A slow machine may be too late for the shortest.
                    Err(etcd_client::Error::GRpcStatus(status))
                        if ttl == 1 && status.code() == tonic::Code::NotFound => {}
                    put => drop(put?),
                }
            }
        }
        let (mut keeper, mut answers) = client.lease_keep_alive(base + 1).await?;
        keeper.keep_alive().await?;
        answers.message().await?;
        // A key that leaves its lease.
        client.put(format!("/lease/{base}/b"), "free", None).await?;
        client.lease_revoke(base + REVOKED).await?;
        Ok(())
    }
}

async fn large(client: &mut Client) -> Result<()> {
    client.put("/large", vec![b'x'; 1 << 20], None).await?;
    for batch in 0..100u32 {
        let puts: Vec<TxnOp> = (0..100u32).map(|n| TxnOp::put(format!("/many/{batch:03}/{n:03}"), "v", None)).collect();
        client.txn(Txn::new().and_then(puts)).await?;
    }
    client.delete("/many/", Some(DeleteOptions::new().with_prefix())).await?;
    Ok(())
}

/// Waits until the leases of one second are gone, and with them the revisions that their ends make.
pub async fn expire(client: &mut Client) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let leases = client.leases().await?;
        let short = leases.leases().iter().map(etcd_client::LeaseStatus::id).find(|id| id % 10 == SHORT);
        let Some(short) = short else { return Ok(()) };
        ensure!(Instant::now() < deadline, "lease {short} of one second is still there");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
