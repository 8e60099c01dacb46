//! Measures restore, compaction, verification and full snapshot against doing the least possible with the same bytes, and against etcd's own
//! tools, side by side in one run. `cargo bench-restore --help` says how.

#![expect(clippy::print_stdout, reason = "the numbers are the result")]

mod compression;
mod service;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use etcd_format::bolt::Builder;
use etcd_format::datadir::{self, Verify, WantHash};
use etcd_format::mvcc::{self, HashRules, KeyValue, RowKey};
use proto::backup::{DeltaEnd, HashKv, ObjectMeta};
use sha2::{Digest, Sha256};
use sidecar::catalog::ObjectName;
use sidecar::container::{self, Writer};
use sidecar::delta;
use tests::etcd::Member;
use tests::program;

const USAGE: &str = "\
usage: cargo bench-restore [--dir DIR] [--runs N] [SCENARIO …]
scenarios:
  events   110 MB of database and 1,000,000 events of 1.7 KB
  large    1.1 GB of database and 100,000 events of 1.1 KB
  merge    1.1 GB of database and 1,000,000 events of 1.1 KB
  small    11 MB of database and 10,000 events, to try it
  tail     a live etcd (which does not sync) written to beside `sidecar serve`: at about 30 MB/s, and 20 times a second with a
           delta every 1, 5 and 20 s
  service  `sidecar serve`: size, start-up, memory; the time until etcd is ready on 1 GB; what a full snapshot costs etcd's clients
  outage   the store is away for ten minutes while etcd is written to
  compression  what backups take while a kube-apiserver writes to etcd; fetches it first
Without one, events and large. Needs about 10 GB in DIR (default: a temporary directory).";

#[derive(Debug, Clone, Copy)]
struct Scenario {
    name: &'static str,
    rows: i64,
    events: i64,
    value_bytes: usize,
}

const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "events", rows: 62_000, events: 1_000_000, value_bytes: 1650 },
    Scenario { name: "large", rows: 1_000_000, events: 100_000, value_bytes: 1000 },
    Scenario { name: "merge", rows: 1_000_000, events: 1_000_000, value_bytes: 1000 },
    Scenario { name: "small", rows: 10_000, events: 10_000, value_bytes: 1000 },
];

/// Bytes like those of a Kubernetes object: structure that repeats, and parts that do not.
struct Values {
    state: u64,
    buffer: Vec<u8>,
}

impl Values {
    fn next(&mut self, size: usize) -> &[u8] {
        self.buffer.clear();
        while self.buffer.len() < size {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let text = format!("\"uid\":\"{:016x}\",\"managedFields\":{{\"manager\":\"kubelet\"}},", self.state >> 3);
            self.buffer.extend_from_slice(text.as_bytes());
        }
        self.buffer.truncate(size);
        &self.buffer
    }
}

fn key(n: i64) -> String {
    format!("/registry/pods/namespace-{:03}/pod-{:07}", n % 200, n)
}

/// Writes etcd's snapshot of `rows` keys, each in a revision of its own; returns its revision.
fn write_snapshot(scenario: Scenario, path: &Path, values: &mut Values) -> Result<i64> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let mut builder = Builder::create(BufWriter::with_capacity(1 << 20, file), 4096)?;
    builder.start(mvcc::KEY_BUCKET)?;
    let mut row = Vec::new();
    for n in 0..scenario.rows {
        let main = n + 2;
        let key = key(n);
        let value = values.next(scenario.value_bytes);
        row.clear();
        KeyValue { key: key.as_bytes(), create_revision: main, mod_revision: main, version: 1, value, lease: 0 }
            .encode(&mut row);
        builder.push(&RowKey::first_of(main), &row)?;
    }
    builder.start(mvcc::META_BUCKET)?;
    // As a kube-apiserver leaves it, which has etcd compact what is older than some minutes.
    let compacted = RowKey::first_of((scenario.rows + 1 - 10_000).max(2));
    builder.push(mvcc::CONSISTENT_INDEX, &10u64.to_be_bytes())?;
    builder.push(mvcc::FINISHED_COMPACT, &compacted)?;
    builder.push(mvcc::SCHEDULED_COMPACT, &compacted)?;
    builder.push(mvcc::TERM, &2u64.to_be_bytes())?;
    let (finished, out) = builder.finish()?;
    let file = out.into_inner().map_err(|error| anyhow::anyhow!("write the snapshot: {error}"))?;
    std::os::unix::fs::FileExt::write_all_at(&file, &finished.metas().concat(), 0)?;
    let mut sha = Sha256::new();
    let mut reader = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = std::io::Read::read(&mut reader, &mut buffer)?;
        if read == 0 {
            break;
        }
        sha.update(&buffer[..read]);
    }
    let mut file = File::options().append(true).open(path)?;
    file.write_all(&sha.finalize())?;
    file.sync_all()?;
    Ok(scenario.rows + 1)
}

fn meta(first: i64, last: i64) -> ObjectMeta {
    ObjectMeta {
        layout: 1,
        cluster_id: 1,
        etcd_version: "3.6.0".into(),
        first_revision: first,
        last_revision: last,
        ..ObjectMeta::default()
    }
}

fn put(store: &Path, name: ObjectName, content: &[bytes::Bytes]) -> Result<()> {
    let path = store.join(name.to_string());
    std::fs::create_dir_all(path.parent().context("no parent")?)?;
    let mut file = File::create(path)?;
    for piece in content {
        file.write_all(piece)?;
    }
    Ok(file.sync_all()?)
}

/// The store: the snapshot as a full, and the events as deltas of 10 MiB. Returns the name of the last one.
fn write_store(
    scenario: Scenario,
    snapshot: &Path,
    store: &Path,
    values: &mut Values,
    revision: i64,
) -> Result<ObjectName> {
    let mut writer = Writer::for_full()?;
    let compact_revision = (revision - 10_000).max(2);
    let content_bytes = snapshot.metadata()?.len();
    writer.put_meta(&ObjectMeta { content_bytes, compact_revision, ..meta(revision, revision) })?;
    let mut content = Vec::new();
    let mut reader = File::open(snapshot)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = std::io::Read::read(&mut reader, &mut buffer)?;
        if read == 0 {
            break;
        }
        writer.write(&buffer[..read])?;
        content.push(writer.take());
    }
    content.push(writer.finish()?);
    put(store, ObjectName::Full { timeline: 1, revision, unix_ms: 1 }, &content)?;
    let mut builder = delta::Builder::new(revision)?;
    let mut name = None;
    for n in 0..scenario.events {
        let main = revision + 1 + n;
        let key = key(n % scenario.rows);
        let (create_revision, version) = (n % scenario.rows + 2, 2 + n / scenario.rows);
        let value = values.next(scenario.value_bytes);
        builder.revision(main, 1)?;
        builder.put(&KeyValue {
            key: key.as_bytes(),
            create_revision,
            mod_revision: main,
            version,
            value,
            lease: 0,
        })?;
        if builder.content_bytes() >= 10 << 20 || n + 1 == scenario.events {
            let (first, last) = (builder.first(), builder.last());
            let next = delta::Builder::new(last)?;
            let end = DeltaEnd { compact_revision: (last - 10_000).max(0), ..DeltaEnd::default() };
            let content = std::mem::replace(&mut builder, next).finish(end, meta(first, last))?;
            let delta = ObjectName::Delta { timeline: 1, first, last, unix_ms: 1 };
            put(store, delta, &content)?;
            name = Some(delta);
        }
    }
    name.context("a scenario without events")
}

/// Records with the last delta the HashKV of the restored rows, as a live etcd would have answered: a restore then has it to
/// compare.
fn record_hash(restored: &Path, store: &Path, last: ObjectName) -> Result<()> {
    let options = Verify { hash: Some(WantHash::Current(HashRules::of("3.6.0"))), compaction: None };
    let verdict = datadir::verify(restored, &options)?.context("no member")?;
    let found = verdict.summary.and_then(|summary| summary.hash).context("no hash")?;
    let object = std::fs::read(store.join(last.to_string()))?;
    let mut reader = container::Reader::new(object.as_slice(), "last delta")?;
    let mut meta = reader.meta().cloned().context("no metadata")?;
    meta.hash_kv =
        Some(HashKv { hash: found.hash, revision: found.revision, compact_revision: found.compact_revision });
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut content)?;
    let mut writer = Writer::for_delta();
    writer.write(&content)?;
    put(store, last, &writer.finish_with_leading_meta(&meta)?)
}

/// Wall time and peak resident memory of a command.
#[derive(Debug, Clone, Copy)]
struct Run {
    seconds: f64,
    peak_mib: f64,
}

fn measure(command: &mut Command) -> Result<Run> {
    // What an earlier run left to write is not this one's.
    rustix::fs::sync();
    let text = format!("{command:?}");
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let status_path = format!("/proc/{}/status", child.id());
    let mut peak_kib = 0f64;
    let status = loop {
        // The kernel keeps the high-water mark; the last look before the end has it but for a moment.
        let status = std::fs::read_to_string(&status_path).unwrap_or_default();
        peak_kib = peak_kib.max(record(&status, "VmHWM:").unwrap_or(0.0));
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let seconds = started.elapsed().as_secs_f64();
    let mut error = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        std::io::Read::read_to_string(&mut stderr, &mut error)?;
    }
    ensure!(status.success(), "{text} failed with {status}: {error}");
    Ok(Run { seconds, peak_mib: peak_kib / 1024.0 })
}

/// A size in KiB from `/proc/…/status`.
fn record(status: &str, field: &str) -> Option<f64> {
    status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs two commands in turn and prints times, ratio and memory.
fn pair(
    what: &str,
    runs: usize,
    mut ours: impl FnMut() -> Result<Run>,
    other: &str,
    mut theirs: impl FnMut() -> Result<Run>,
) -> Result<()> {
    let mut pairs = Vec::new();
    for _ in 0..runs {
        pairs.push((ours()?, theirs()?));
    }
    let of = |get: fn(&(Run, Run)) -> f64| median(pairs.iter().map(get).collect());
    println!(
        "{what:<34} {:>7.2} s   {other:<26} {:>7.2} s   ratio {:>5.2}   peak RSS {:>4.0} MiB, theirs {:>4.0} MiB",
        of(|pair| pair.0.seconds),
        of(|pair| pair.1.seconds),
        of(|pair| pair.0.seconds / pair.1.seconds),
        of(|pair| pair.0.peak_mib),
        of(|pair| pair.1.peak_mib)
    );
    Ok(())
}

/// Runs a command that there is nothing to compare with.
fn alone(what: &str, runs: usize, size: u64, command: impl Fn() -> Result<Run>) -> Result<()> {
    let runs = (0..runs).map(|_| command()).collect::<Result<Vec<_>>>()?;
    let seconds = median(runs.iter().map(|run| run.seconds).collect());
    let peak = median(runs.iter().map(|run| run.peak_mib).collect());
    println!("{what:<34} {seconds:>7.2} s   {:.2} GB/s, peak RSS {peak:.0} MiB", size as f64 / 1e9 / seconds);
    Ok(())
}

fn fresh(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    Ok(())
}

/// Writes and syncs the bytes of a file: the least that a restore to it can do.
fn copy_and_sync(from: &Path, to: &Path) -> Command {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", from.display())).arg(format!("of={}", to.display())).args([
        "bs=1M",
        "conv=fsync",
        "status=none",
    ]);
    command
}

async fn run(scenario: Scenario, dir: &Path, runs: usize) -> Result<()> {
    let sidecar = program::path()?;
    let etcdutl = program("etcd-3.6", "etcdutl")?;
    let dir = dir.join(scenario.name);
    fresh(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let (snapshot, store) = (dir.join("snapshot.db"), dir.join("store"));
    let mut values = Values { state: 7, buffer: Vec::new() };
    let revision = write_snapshot(scenario, &snapshot, &mut values)?;
    let last = write_store(scenario, &snapshot, &store, &mut values, revision)?;
    let (restored, copy, theirs) = (dir.join("restored"), dir.join("copy"), dir.join("theirs"));
    let restored_db = restored.join("member/snap/db");
    let store_url = tests::file_url(&store);
    let restore = || {
        fresh(&restored)?;
        measure(Command::new(&sidecar).args(["restore", "--store", &store_url, "--data-dir"]).arg(&restored))
    };
    restore()?;
    record_hash(&restored, &store, last)?;
    let size = restored_db.metadata()?.len();
    println!(
        "\n{}: {} rows and {} events, {:.0} MB restored",
        scenario.name,
        scenario.rows,
        scenario.events,
        size as f64 / 1e6
    );
    // The copy is of the restored bytes, which the first restore made.
    let kept = dir.join("kept.db");
    std::fs::rename(&restored_db, &kept)?;
    pair("restore from the store", runs, restore, "write and sync the bytes", || {
        let _ = std::fs::remove_file(&copy);
        measure(&mut copy_and_sync(&kept, &copy))
    })?;
    std::fs::remove_file(&copy)?;
    std::fs::remove_file(&kept)?;
    let middle = (revision + scenario.events / 2).to_string();
    let to_middle = || {
        fresh(&restored)?;
        let mut command = Command::new(&sidecar);
        command.args(["restore", "--store", &store_url, "--revision", &middle, "--data-dir"]).arg(&restored);
        measure(&mut command)
    };
    pair("restore the revision in the middle", runs, to_middle, "restore the last", restore)?;
    let objects = tests::objects(&store)?;
    let compact = || {
        // Both start from the same: nothing of an earlier run is on the disk or in its cache.
        fresh(&restored)?;
        let run = measure(Command::new(&sidecar).args(["compact", "--store", &store_url, "--work-dir"]).arg(&dir))?;
        for object in tests::objects(&store)?.iter().filter(|object| !objects.contains(object)) {
            std::fs::remove_file(object)?;
        }
        Ok(run)
    };
    pair("compact", runs, compact, "restore", restore)?;
    let verify = || measure(Command::new(&sidecar).args(["verify", "--level", "decode", "--store", &store_url]));
    alone("verify --level decode", runs, size, verify)?;
    let plain = dir.join("plain");
    let restore_plain = || {
        fresh(&plain)?;
        measure(
            Command::new(&sidecar).args(["restore", "--snapshot-file"]).arg(&snapshot).arg("--data-dir").arg(&plain),
        )
    };
    pair("restore a plain snapshot", runs, restore_plain, "etcdutl snapshot restore", || {
        fresh(&theirs)?;
        measure(Command::new(&etcdutl).args(["snapshot", "restore"]).arg(&snapshot).arg("--data-dir").arg(&theirs))
    })?;
    fresh(&plain)?;
    fresh(&theirs)?;
    let check = || measure(Command::new(&sidecar).args(["check", "--data-dir"]).arg(&restored));
    alone("check", runs, size, check)?;

    live(&dir, &restored, scenario, size, runs).await?;
    fresh(&dir)
}

/// Starts etcd on what was restored, backs it up, and has a copy of it catch up with what was written since.
async fn live(dir: &Path, restored: &Path, scenario: Scenario, size: u64, runs: usize) -> Result<()> {
    let (sidecar, etcdctl) = (program::path()?, program("etcd-3.6", "etcdctl")?);
    let initial_cluster = "default=http://localhost:2380".to_owned();
    let member =
        Member { initial_cluster, ..Member::single("3.6", restored)?.flag("--quota-backend-bytes=8589934592") };
    let mut etcd = member.start().await?;
    let endpoint = member.client_url();
    let full_store = dir.join("full");
    let full = || {
        fresh(&full_store)?;
        let store = tests::file_url(&full_store);
        measure(Command::new(&sidecar).args([
            "snapshot",
            "--once",
            "full",
            "--endpoints",
            &endpoint,
            "--store",
            &store,
        ]))
    };
    let saved = dir.join("saved.db");
    pair("full snapshot of a live etcd", runs, full, "etcdctl snapshot save", || {
        let _ = std::fs::remove_file(&saved);
        measure(Command::new(&etcdctl).args(["--endpoints", &endpoint, "snapshot", "save"]).arg(&saved))
    })?;
    let object = tests::objects(&full_store)?.first().context("no full")?.metadata()?.len();
    println!("{:<34} {:.0} MB of {:.0} MB", "size of the full", object as f64 / 1e6, size as f64 / 1e6);
    std::fs::remove_file(&saved)?;
    etcd.stop()?;
    let behind = dir.join("behind");
    let copy = |to: &Path| {
        fresh(to)?;
        ensure!(Command::new("cp").arg("-r").arg(restored).arg(to).status()?.success(), "copying failed");
        anyhow::Ok(())
    };
    let old = dir.join("old");
    copy(&old)?;
    etcd = member.start().await?;
    let written = write_behind(&etcd, scenario).await?;
    let store = tests::file_url(&full_store);
    let delta = ["snapshot", "--once", "delta", "--endpoints", &endpoint, "--store", &store];
    measure(Command::new(&sidecar).args(delta))?;
    etcd.stop()?;
    // What is copied and what is restored to must not be the same place.
    fresh(restored)?;
    std::fs::rename(&old, restored)?;
    let whole = dir.join("whole");
    let append = || {
        copy(&behind)?;
        let flags = ["restore", "--append", "--store", &store, "--data-dir"];
        measure(Command::new(&sidecar).args(flags).arg(&behind))
    };
    let what = format!("append {written} events that are missing");
    pair(&what, runs, append, "restore all of it", || {
        fresh(&whole)?;
        measure(Command::new(&sidecar).args(["restore", "--store", &store, "--data-dir"]).arg(&whole))
    })
}

/// Puts as many events as a delta or some have; returns how many.
async fn write_behind(etcd: &tests::etcd::Etcd, scenario: Scenario) -> Result<i64> {
    const WRITERS: i64 = 64;
    let each = scenario.events.min(50_000) / WRITERS;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let mut client = etcd.client().await?;
        writers.spawn(async move {
            let mut values = Values { state: writer as u64, buffer: Vec::new() };
            for n in 0..each {
                client.put(key((writer * each + n) % scenario.rows), values.next(scenario.value_bytes), None).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    Ok(each * WRITERS)
}

/// A scenario of another kind, by name.
async fn other(name: &str, dir: &Path, runs: usize) -> Result<()> {
    match name {
        "tail" => {
            service::tail(dir, service::FAST, 5).await?;
            for period in [1, 5, 20] {
                service::tail(dir, service::CALM, period).await?;
            }
            Ok(())
        }
        "service" => {
            service::idle(dir).await?;
            service::ready(dir, runs).await?;
            service::latency(dir).await
        }
        "outage" => service::outage(dir, 600).await,
        "compression" => compression::run(dir).await,
        name => bail!("there is no scenario {name}\n{USAGE}"),
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut dir, mut runs, mut chosen) = (None, 3, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            "--dir" => dir = arguments.next().map(PathBuf::from),
            "--runs" => runs = arguments.next().context("--runs needs a number")?.parse()?,
            _ => chosen.push(argument),
        }
    }
    if chosen.is_empty() {
        chosen.extend(SCENARIOS.iter().take(2).map(|scenario| scenario.name.to_owned()));
    }
    let temporary = tempfile::tempdir()?;
    let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
    for name in chosen {
        match SCENARIOS.iter().find(|scenario| scenario.name == name) {
            Some(scenario) => run(*scenario, &dir, runs).await?,
            None => other(&name, &dir, runs).await?,
        }
    }
    Ok(())
}
