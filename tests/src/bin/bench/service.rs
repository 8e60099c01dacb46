//! What the service takes beside a live etcd: memory, processor, how far behind the store is, the time until etcd is ready, and
//! what clients of etcd notice of a full snapshot.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use proto::sidecar as api;
use sidecar::catalog::ObjectName;
use tests::certificates::Certificates;
use tests::eventually;
use tests::minio::Minio;
use tests::pod::Pod;
use tests::program::{self, Running, Sidecar};
use tests::store::Store;
use tokio::task::JoinSet;

use super::{Scenario, Values, fresh, measure, median, record, write_snapshot};

const LONG: Duration = Duration::from_secs(600);
/// Size of a written value, and how often all writers together write one: 30 MB/s,
const VALUE: usize = 16 << 10;
pub const FAST: Duration = Duration::from_micros(550);
/// and what a calm cluster does.
pub const CALM: Duration = Duration::from_millis(50);
const WRITERS: u64 = 16;

/// A pod with certificates, whose etcd may grow.
fn pod(dir: &Path, store: Store, more: &str) -> Result<Pod> {
    let mut pod = Pod::new(&dir.join("pod"), "3.6", Some(store))?;
    pod.tls = Some(Certificates::issue(&dir.join("certificates"))?);
    more.clone_into(&mut pod.more);
    pod.etcd_more = "quota-backend-bytes: 8589934592\nlog-level: error\n".into();
    Ok(pod)
}

/// What a process takes; memory in MiB.
struct Usage {
    resident: f64,
    /// Of that, what is not a part of its file that the kernel has read.
    anonymous: f64,
    peak: f64,
    cpu_seconds: f64,
}

fn usage(running: &Running) -> Result<Usage> {
    let pid = running.pid().context("it has ended")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mib = |field| record(&status, field).map(|kib| kib / 1024.0).with_context(|| format!("no {field}"));
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks =
        stat.rsplit(')').next().map(|rest| rest.split_whitespace().skip(11).take(2).flat_map(str::parse::<f64>));
    // The kernel counts in hundredths of a second for programs, whatever its own clock does.
    Ok(Usage {
        resident: mib("VmRSS:")?,
        anonymous: mib("RssAnon:")?,
        peak: mib("VmHWM:")?,
        cpu_seconds: ticks.context("no times")?.sum::<f64>() / 100.0,
    })
}

async fn take(pod: &Pod, kind: api::Kind) -> Result<()> {
    let request = api::TakeSnapshotRequest { kind: kind.into(), request_id: String::new(), is_final: false };
    pod.client(true).await?.take_snapshot(request).await?;
    Ok(())
}

/// Size, start-up, and memory with nothing to do.
pub async fn idle(dir: &Path) -> Result<()> {
    let dir = dir.join("idle");
    fresh(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let path = program::path()?;
    println!("service: the program has {:.1} MB", path.metadata()?.len() as f64 / 1e6);
    let starts = (0..50).map(|_| {
        let started = Instant::now();
        let status = Command::new(&path).arg("--version").stdout(Stdio::null()).status()?;
        ensure!(status.success(), "{status}");
        Ok(started.elapsed().as_secs_f64() * 1000.0)
    });
    println!("service: started and ended in {:.1} ms", median(starts.collect::<Result<_>>()?));
    let pod = pod(&dir, Store::directory(&dir.join("store")), "")?;
    let served = (0..10).map(|_| async {
        let started = Instant::now();
        let serving = pod.start_serve().await?;
        let took = started.elapsed().as_secs_f64() * 1000.0;
        serving.terminate().await?.expect(0)?;
        anyhow::Ok(took)
    });
    let mut times = Vec::new();
    for served in served {
        times.push(served.await?);
    }
    println!("service: serves its API after {:.0} ms (looked at every 20 ms)", median(times));
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    eventually(LONG, || take(&pod, api::Kind::Full)).await?;
    for n in 0..60 {
        client.put("idle", n.to_string(), None).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let Usage { resident, anonymous, peak, cpu_seconds } = usage(&serving)?;
    println!(
        "service: idle for 30 s: RSS {resident:.1} MiB, of which {anonymous:.1} anonymous, peak {peak:.1} MiB, {:.2} % of a CPU",
        cpu_seconds / 30.0 * 100.0
    );
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    fresh(&dir)
}

/// Writes until told to stop, in all one value of 16 KiB `every` so often; counts what was acknowledged.
fn write_on(clients: Vec<Client>, every: Duration, stop: &Arc<AtomicBool>, acknowledged: &Arc<AtomicU64>) -> Writers {
    let mut writers = JoinSet::new();
    let count = u32::try_from(clients.len()).unwrap_or(u32::MAX);
    for (writer, mut client) in clients.into_iter().enumerate() {
        let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
        writers.spawn(async move {
            let mut values = Values { state: writer as u64, buffer: Vec::new() };
            let mut tick = tokio::time::interval(every * count);
            let mut times = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                tick.tick().await;
                let key = format!("/written/{writer}/{}", values.state % 500);
                let started = Instant::now();
                client.put(key, values.next(VALUE), None).await?;
                times.push((started, started.elapsed().as_secs_f64() * 1000.0));
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(times)
        });
    }
    writers
}

/// Each returns when it wrote, and how many milliseconds that took.
type Writers = JoinSet<Result<Vec<(Instant, f64)>>>;

async fn clients(pod: &Pod, count: u64) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(pod.etcd().await?);
    }
    Ok(clients)
}

/// The last revision that a store has, by its names.
fn saved(store: &Path) -> Result<i64> {
    let names = tests::objects(store)?;
    let last = names.iter().filter_map(|path| {
        let name = path.strip_prefix(store).ok()?.to_str()?;
        ObjectName::parse(name)?.revisions().map(|(_, last)| last)
    });
    Ok(last.max().unwrap_or(0))
}

/// Writes to a live etcd a value every so often while it is backed up; prints what that takes, and how far the store is behind.
pub async fn tail(dir: &Path, every: Duration, period: u64) -> Result<()> {
    let limit = Duration::from_secs(30.max(3 * period));
    let dir = dir.join("tail");
    fresh(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let place = dir.join("store");
    let store = Store::directory(&place);
    let mut pod = pod(&dir, store.clone(), &format!("snapshots: {{deltaPeriod: {period}s}}\n"))?;
    pod.etcd_more.push_str("unsafe-no-fsync: true\n");
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    eventually(LONG, || take(&pod, api::Kind::Full)).await?;
    let before = usage(&serving)?.cpu_seconds;
    let (stop, written) = (Arc::default(), Arc::default());
    let writers = write_on(clients(&pod, WRITERS).await?, every, &stop, &written);
    let started = Instant::now();
    // When which revision was the newest, those that the store lacks.
    let (mut unsaved, mut lags) = (std::collections::VecDeque::new(), Vec::new());
    while started.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = Instant::now();
        let revision = client.status().await?.header().map_or(0, etcd_client::ResponseHeader::revision);
        unsaved.push_back((revision, now));
        let saved = saved(&place)?;
        while unsaved.front().is_some_and(|(revision, _)| *revision <= saved) {
            unsaved.pop_front();
        }
        lags.push(unsaved.front().map_or(0.0, |(_, since)| since.elapsed().as_secs_f64()));
    }
    stop.store(true, Ordering::Relaxed);
    writers.join_all().await.into_iter().try_for_each(|times| times.map(drop))?;
    let seconds = started.elapsed().as_secs_f64();
    let Usage { peak, cpu_seconds: cpu, .. } = usage(&serving)?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let megabytes = (written.load(Ordering::Relaxed) * VALUE as u64) as f64 / 1e6;
    lags.sort_by(f64::total_cmp);
    println!(
        "tail: a delta every {period} s, {:.1} MB/s: peak RSS {peak:.0} MiB, {:.1} ms of CPU per MB; what is not saved yet is {:.1} s old at the median, {:.1} s at most",
        megabytes / seconds,
        (cpu - before) * 1000.0 / megabytes,
        lags.get(lags.len() / 2).copied().unwrap_or_default(),
        lags.last().copied().unwrap_or_default(),
    );
    let restored = dir.join("restored");
    let restore =
        measure(Command::new(program::path()?).args(["restore", "--store", &store.url, "--data-dir"]).arg(&restored))?;
    println!("tail: restored and verified in {:.1} s", restore.seconds);
    fresh(&dir)
}

/// A pod with a database of so many rows, and a full snapshot of it; its etcd is not running.
async fn large_pod(dir: &Path, rows: i64, more: &str) -> Result<(Pod, Running)> {
    fresh(dir)?;
    std::fs::create_dir_all(dir)?;
    let pod = pod(dir, Store::directory(&dir.join("store")), more)?;
    let snapshot = dir.join("snapshot.db");
    let scenario = Scenario { name: "", rows, events: 0, value_bytes: 1650 };
    write_snapshot(scenario, &snapshot, &mut Values { state: 7, buffer: Vec::new() })?;
    let restore = Sidecar::new(["restore", "--initial-cluster", &pod.member.initial_cluster, "--snapshot-file"]);
    restore.arg(&snapshot).arg("--data-dir").arg(&pod.member.data_dir).run().await?.expect(0)?;
    std::fs::remove_file(&snapshot)?;
    let serving = pod.start_serve().await?;
    Ok((pod, serving))
}

/// How long it is from the start of both containers until etcd answers: with sound data, with lost data, and without us.
pub async fn ready(dir: &Path, runs: usize) -> Result<()> {
    let dir = dir.join("ready");
    let (pod, serving) = large_pod(&dir, 550_000, "snapshots: {deltaPeriod: 5s}\n").await?;
    let (launched, _) = pod.start_etcd().await?;
    eventually(LONG, || take(&pod, api::Kind::Full)).await?;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let data = &pod.member.data_dir;
    let size = data.join("member/snap/db").metadata()?.len() as f64 / 1e9;
    let started = async |is_lost: bool| {
        if is_lost {
            std::fs::remove_dir_all(data.join("member"))?;
        }
        rustix::fs::sync();
        let started = Instant::now();
        // As containers of one pod are: none waits for another.
        let serving = pod.serve()?.spawn()?;
        let (launched, _) = pod.start_etcd().await?;
        let seconds = started.elapsed().as_secs_f64();
        launched.terminate().await?;
        serving.terminate().await?.expect(0)?;
        anyhow::Ok(seconds)
    };
    let (mut intact, mut lost, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        rustix::fs::sync();
        let at = Instant::now();
        let mut etcd = pod.member.start().await?;
        alone.push(at.elapsed().as_secs_f64());
        etcd.stop()?;
        intact.push(started(false).await?);
        lost.push(started(true).await?);
    }
    let (alone, intact, lost) = (median(alone), median(intact), median(lost));
    println!(
        "ready: with {size:.1} GB, intact {intact:.1} s, lost {lost:.1} s; etcd alone {alone:.1} s: ratios {:.1} and {:.1}",
        intact / alone,
        lost / alone
    );
    fresh(&dir)
}

fn percentile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get((times.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
}

/// What clients of etcd notice of a full snapshot: quiet times and snapshots in turn, in one run.
pub async fn latency(dir: &Path) -> Result<()> {
    const ROUNDS: usize = 6;
    let dir = dir.join("latency");
    let (pod, serving) = large_pod(&dir, 300_000, "snapshots: {deltaPeriod: 5s}\n").await?;
    let (launched, _) = pod.start_etcd().await?;
    eventually(LONG, || take(&pod, api::Kind::Full)).await?;
    let (stop, written) = (Arc::default(), Arc::default());
    let writers = write_on(clients(&pod, 8).await?, Duration::from_millis(5), &stop, &written);
    let etcdctl = tests::program("etcd-3.6", "etcdctl")?;
    let endpoint = pod.member.client_url();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    tokio::time::sleep(Duration::from_secs(3)).await;
    for round in 0..ROUNDS {
        let started = Instant::now();
        take(&pod, api::Kind::Full).await?;
        ours.push((started, Instant::now()));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let started = Instant::now();
        let mut save = tokio::process::Command::new(&etcdctl);
        tests::succeed(save.args(["--endpoints", &endpoint, "snapshot", "save"]).arg(dir.join(format!("{round}.db"))))
            .await?;
        theirs.push((started, Instant::now()));
        std::fs::remove_file(dir.join(format!("{round}.db")))?;
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let puts: Vec<_> = writers.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat();
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let during = |spans: &[(Instant, Instant)], at: Instant| spans.iter().any(|(from, to)| (*from..*to).contains(&at));
    let of = |wanted: &dyn Fn(Instant) -> bool| -> Vec<f64> {
        puts.iter().filter(|(at, _)| wanted(*at)).map(|(_, took)| *took).collect()
    };
    let mut quiet = of(&|at| !during(&ours, at) && !during(&theirs, at));
    let (mut in_ours, mut in_theirs) = (of(&|at| during(&ours, at)), of(&|at| during(&theirs, at)));
    let p99 = |times: &mut Vec<f64>| percentile(times, 0.99);
    let (quiet, ours_p99, theirs_p99) = (p99(&mut quiet), p99(&mut in_ours), p99(&mut in_theirs));
    println!(
        "latency: puts take {quiet:.1} ms (p99), while a full snapshot of 0.5 GB is taken {ours_p99:.1} ms ({} puts): ratio {:.2}; while etcdctl saves one {theirs_p99:.1} ms ({} puts): ratio {:.2}",
        in_ours.len(),
        ours_p99 / quiet,
        in_theirs.len(),
        theirs_p99 / quiet,
    );
    fresh(&dir)
}

/// The store is away for so many seconds while etcd is written to; all is there afterwards.
pub async fn outage(dir: &Path, seconds: u64) -> Result<()> {
    let dir = dir.join("outage");
    fresh(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let port = tests::free_port()?;
    let place = dir.join("minio");
    let mut minio = Minio::start_on(&place, "backups", port, None).await?;
    let store = minio.store("backups/a");
    let pod = pod(&dir, store.clone(), "snapshots: {deltaPeriod: 5s}\n")?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    eventually(LONG, || take(&pod, api::Kind::Full)).await?;
    let (stop, written) = (Arc::default(), Arc::default());
    let writers = write_on(clients(&pod, 4).await?, Duration::from_millis(8), &stop, &written);
    tokio::time::sleep(Duration::from_secs(10)).await;
    minio.kill9();
    let mut most = 0.0f64;
    for _ in 0..seconds {
        tokio::time::sleep(Duration::from_secs(1)).await;
        most = most.max(usage(&serving)?.resident);
    }
    let minio = Minio::start_on(&place, "backups", port, None).await?;
    let back = Instant::now();
    stop.store(true, Ordering::Relaxed);
    writers.join_all().await.into_iter().try_for_each(|times| times.map(drop))?;
    eventually(LONG, || take(&pod, api::Kind::Delta)).await?;
    let caught_up = back.elapsed().as_secs_f64();
    let before = tests::state::read(&mut client).await?;
    let peak = usage(&serving)?.peak;
    launched.terminate().await?;
    serving.terminate().await?.expect(0)?;
    let member = tests::etcd::Member::single("3.6", &dir.join("restored"))?;
    tests::state::same(&before, &store.restore_and_read(&member).await?)?;
    println!(
        "outage: the store was away for {seconds} s with {:.0} MB written: RSS {most:.0} MiB at most meanwhile, {peak:.0} MiB with what followed; all of it saved {caught_up:.0} s after it was back, and restored equal",
        (written.load(Ordering::Relaxed) * VALUE as u64) as f64 / 1e6
    );
    drop(minio);
    fresh(&dir)
}
