//! `sidecar restore`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use etcd_format::datadir::{Minor, check_target};
use etcd_format::membership::NewCluster;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Output, parse_time, print};
use crate::catalog::Timeline;
use crate::human::{bytes, time};
use crate::initialize::DEFAULT_TOKEN;
use crate::restore::{
    Appended, AtTime, Choice, Far, Outcome, Plan, Progress, Proof, Source, Target, Upto, append, choose, execute,
};
use crate::store::{Open, Store};
use crate::{Error, Result};

/// Make data directories from a backup, without any etcd.
///
/// Restores the latest state, verifies it (every row, every lease, etcd's own hash where the backup has it), and only then
/// puts it in place. On failure nothing is left behind.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true).args(["data_dir", "all_members"]))]
pub struct Args {
    /// Where backups are; see `sidecar list --help`.
    #[arg(long, env = "SIDECAR_STORE", value_name = "URL")]
    store: Option<String>,
    /// Restore a plain etcd snapshot instead of what a store has, or a downloaded full snapshot of ours.
    #[arg(long, value_name = "FILE")]
    snapshot_file: Option<PathBuf>,
    /// Take a snapshot file without its sha256, such as a copy of a stopped member's db, or with a wrong one.
    #[arg(long, requires = "snapshot_file")]
    skip_hash_check: bool,
    /// The data directory to make. It must be empty or not exist.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Make the data directory of every member of --initial-cluster, as DIR/NAME.
    #[arg(long, value_name = "DIR")]
    all_members: Option<PathBuf>,
    /// Name of this member.
    #[arg(long, default_value = "default", conflicts_with = "all_members")]
    name: String,
    /// The members of the new cluster, as name=peer-url,…; by default this member alone, at http://localhost:2380.
    #[arg(long, value_name = "NAME=URL,…")]
    initial_cluster: Option<String>,
    /// Peer URLs of this member; by default those that --initial-cluster has.
    #[arg(long, value_name = "URL,…", conflicts_with = "all_members")]
    initial_advertise_peer_urls: Option<String>,
    /// Token that tells the new cluster from others. By default one of what is restored, so that whoever still runs on older data
    /// is of another cluster; where members are restored one by one, give all the same --timeline and --revision. Of a snapshot
    /// file that is etcd-cluster, as etcdutl has it.
    #[arg(long, value_name = "TOKEN")]
    initial_cluster_token: Option<String>,
    /// Raise the revision by so much, so that it is above any that clients have seen. Needs --mark-compacted.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(i64).range(0..1 << 60), requires = "mark_compacted")]
    bump_revision: i64,
    /// Mark everything below the raised revision compacted, so that clients with older revisions notice.
    #[arg(long)]
    mark_compacted: bool,
    /// The etcd minor that will run on the data, such as 3.6; by default that of the backup.
    #[arg(long, value_name = "MINOR")]
    etcd_version: Option<String>,
    /// Restore this timeline rather than the newest.
    #[arg(long, value_name = "N", conflicts_with = "snapshot_file")]
    timeline: Option<Timeline>,
    /// Start from the full snapshot of this revision, for when a newer one is damaged; the deltas after it follow.
    #[arg(long, value_name = "REVISION", conflicts_with = "snapshot_file")]
    full_revision: Option<i64>,
    /// Restore this revision rather than the latest; it may lie in the middle of a delta.
    #[arg(long, value_name = "N", conflicts_with = "snapshot_file", value_parser = clap::value_parser!(i64).range(1..))]
    revision: Option<i64>,
    /// Restore the state at this time, such as 2026-11-22T18:00:00Z: the last revision that the backup had received by
    /// then. It says how exact that is.
    #[arg(long, value_name = "RFC3339", conflicts_with_all = ["snapshot_file", "revision"], value_parser = parse_time)]
    time: Option<i64>,
    /// Leave this object out, as if it were not there; its name as an error or `sidecar list -o json` shows it. For when it
    /// is damaged and others overlap it.
    #[arg(long, value_name = "NAME", conflicts_with = "snapshot_file")]
    without: Vec<String>,
    /// When revisions are missing in the backup, restore up to there.
    #[arg(long, conflicts_with = "snapshot_file")]
    accept_gap: bool,
    /// Move a member that is in the data directory aside.
    #[arg(long)]
    replace: bool,
    /// Keep the member that is in --data-dir, when it is intact and merely behind, and append only what it misses. It stays a
    /// member of its own cluster. Refused unless the backup shows that it is of the same history.
    #[arg(long, requires = "data_dir", conflicts_with_all = [
        "snapshot_file", "all_members", "initial_cluster", "initial_advertise_peer_urls", "bump_revision", "etcd_version",
        "full_revision", "revision", "time", "without", "accept_gap", "replace", "dry_run",
    ])]
    append: bool,
    /// Print what would be done and do nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    if args.append {
        return run_append(args, output, stop).await;
    }
    if args.mark_compacted && args.bump_revision == 0 {
        return Err(Error::invalid("--mark-compacted needs --bump-revision above 0"));
    }
    let (cluster, targets) = members(&args, DEFAULT_TOKEN)?;
    let minor = args.etcd_version.as_deref().map(Minor::parse).transpose().map_err(Error::format("--etcd-version"))?;
    let (source, store) = match (&args.snapshot_file, &args.store) {
        (Some(path), _) => (Source::File { path: path.clone(), skip_hash_check: args.skip_hash_check }, None),
        (None, Some(url)) => {
            let store = Store::open(url, Open::Existing)?;
            let mut catalog = store.catalog().await?;
            for name in &args.without {
                catalog.remove(name.strip_prefix(store.url()).unwrap_or(name).trim_start_matches('/'))?;
            }
            let upto = match (args.revision, args.time) {
                (Some(revision), _) => Upto::Revision(revision),
                (None, Some(unix_ms)) => Upto::Time(unix_ms),
                (None, None) => Upto::Latest,
            };
            let (timeline, full_revision, accept_gap) = (args.timeline, args.full_revision, args.accept_gap);
            let choice = Choice { timeline, full_revision, accept_gap, upto };
            (choose(&store, &catalog, &choice).await?, Some(store))
        }
        (None, None) => return Err(Error::invalid("give --store or --snapshot-file")),
    };
    let cluster = match &source {
        Source::Chain { timeline, chain, upto, passed_over, .. } => {
            // The same on each machine, and another one when the same is restored again beside what came of it.
            let revision = upto.unwrap_or(chain.last);
            let newest = passed_over.as_ref().map_or(*timeline, |(newest, _)| *newest);
            // A full snapshot of the predecessor's may have more than its name says.
            let full = if chain.deltas.is_empty() { chain.full.unix_ms } else { 0 };
            members(&args, &format!("{DEFAULT_TOKEN}-t{timeline:08}-{revision}-{newest}-{full}"))?.0
        }
        Source::File { .. } => cluster,
    };
    let plan = Plan { source, targets, cluster, minor, bump_revision: args.bump_revision, replace: args.replace };
    let url = store.as_ref().map(|store| store.url().to_owned());
    if args.dry_run {
        for target in &plan.targets {
            let dir = format!("restore into {}", target.data_dir.display());
            check_target(&target.data_dir, plan.replace).map_err(Error::format(dir))?;
        }
        if let Source::File { path, .. } = &plan.source {
            std::fs::File::open(path).map_err(Error::io("open", path.display()))?;
        }
        print(output, &plan_value(&plan, url.as_deref()), |_| plan_table(&plan, url.as_deref()))?;
        return Ok(0);
    }
    let watcher = Watcher::new();
    let gap_after = if let Source::Chain { chain, .. } = &plan.source { chain.gap.map(|gap| gap.after) } else { None };
    let from_chain = matches!(plan.source, Source::Chain { .. });
    let executed = execute(plan, store, stop, move |progress| watcher.see(progress), || Ok(())).await;
    let outcome = executed.inspect_err(|error| {
        if from_chain && error.class() == crate::Class::Corrupt {
            tracing::warn!("to go round what is damaged: --full-revision starts from another full snapshot, --without leaves an object out, --revision ends before it; `sidecar verify` finds all damage");
        }
    })?;
    let outcome = Outcome { gap_after, ..outcome };
    print(output, &outcome, table)?;
    Ok(0)
}

async fn run_append(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let (Some(url), Some(data_dir)) = (&args.store, &args.data_dir) else {
        return Err(Error::invalid("--append needs --store and --data-dir"));
    };
    let store = Store::open(url, Open::Existing)?;
    let watcher = Watcher::new();
    let appended = append(&store, data_dir, args.timeline, &stop, move |progress| watcher.see(progress)).await?;
    print(output, &appended, append_table)?;
    Ok(0)
}

fn append_table(appended: &Appended) -> String {
    let dir = appended.data_dir.display();
    let Some(proof) = &appended.proof else {
        return format!("nothing to do: {dir} has revision {}, the last there is", appended.revision);
    };
    let mut text = format!(
        "appended revisions {} to {} ({} changes) to {dir}, {} in {:.1} s\n",
        appended.from_revision + 1,
        appended.revision,
        appended.events,
        bytes(appended.db_size),
        appended.seconds
    );
    text.push_str(&proof_text(proof, appended.revision));
    for lease in &appended.leases_with_guessed_ttl {
        text.push_str(&guessed_lease(lease));
    }
    text
}

fn guessed_lease(lease: &str) -> String {
    format!("remark: the TTL of lease {lease} is not in the backup; it got 60 s\n")
}

fn proof_text(proof: &Proof, revision_of_backup: i64) -> String {
    let mut text = format!(
        "verified: {} rows, no revision missing, {} keys in sequence, {} leases on record\n",
        proof.rows, proof.keys, proof.leases
    );
    text.push_str(&match (proof.hash, proof.hash_revision) {
        (Some(hash), Some(revision)) if revision < revision_of_backup => format!(
            "verified: HashKV {hash} at revision {revision} is what etcd itself answered; of the revisions after it etcd gave no hash\n"
        ),
        (Some(hash), Some(revision)) => {
            format!("verified: HashKV {hash} at revision {revision} is what etcd itself answered\n")
        }
        _ => format!("not verified against etcd's own HashKV: {}\n", proof.hash_missing.unwrap_or_default()),
    });
    text
}

/// How exact a time is.
fn exactness(at: &AtTime) -> String {
    let millis = |unix_ms| {
        let time = chrono::DateTime::from_timestamp_millis(unix_ms).unwrap_or_default();
        time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
    };
    let received = match at.received_unix_ms {
        Some(received) => format!("revision {} was received at {}", at.revision, millis(received)),
        None => format!("revision {} is the last one before", at.revision),
    };
    match at.next_unix_ms {
        Some(next) => format!("{received}, the next one at {}", millis(next)),
        None => format!("{received}; the backup has no later one"),
    }
}

/// Who the members are; `token` is for when none is given.
fn members(args: &Args, token: &str) -> Result<(NewCluster, Vec<Target>)> {
    let initial_cluster = args.initial_cluster.clone().unwrap_or_else(|| {
        let urls = args.initial_advertise_peer_urls.as_deref().unwrap_or("http://localhost:2380");
        urls.split(',').map(|url| format!("{}={url}", args.name)).collect::<Vec<_>>().join(",")
    });
    let token = args.initial_cluster_token.as_deref().unwrap_or(token);
    let cluster = NewCluster::parse(&initial_cluster, token).map_err(Error::format("--initial-cluster"))?;
    if let Some(dir) = &args.all_members {
        if args.initial_cluster.is_none() {
            return Err(Error::invalid("--all-members needs --initial-cluster, which names the members"));
        }
        let bad = cluster.members().iter().find(|member| member.name.contains('/') || member.name.starts_with('.'));
        if let Some(member) = bad {
            return Err(Error::invalid(format!(
                "member name {:?} cannot be the name of a directory; restore it with --data-dir",
                member.name
            )));
        }
        let targets = cluster
            .members()
            .iter()
            .map(|member| Target { name: member.name.clone(), data_dir: dir.join(&member.name) });
        let targets = targets.collect();
        return Ok((cluster, targets));
    }
    cluster.member(&args.name).map_err(Error::format("--name"))?;
    if let Some(urls) = &args.initial_advertise_peer_urls {
        cluster.check_advertised(&args.name, urls).map_err(Error::format("--initial-advertise-peer-urls"))?;
    }
    let data_dir = args.data_dir.clone().ok_or_else(|| Error::invalid("give --data-dir or --all-members"))?;
    Ok((cluster, vec![Target { name: args.name.clone(), data_dir }]))
}

fn plan_value(plan: &Plan, url: Option<&str>) -> Value {
    let source = match &plan.source {
        Source::File { path, .. } => json!({ "file": path.display().to_string() }),
        Source::Chain { timeline, chain, upto, at_time, .. } => json!({
            "store": url, "timeline": timeline, "fullRevision": chain.full.revision, "fullTime": time(chain.full.unix_ms), "deltas": chain.deltas.len(),
            "revision": upto.unwrap_or(chain.last), "atTime": at_time, "bytes": chain.size(),
            "gapAfter": chain.gap.map(|gap| gap.after),
        }),
    };
    json!({
        "source": source, "clusterId": plan.cluster.id().to_string(), "members": plan.targets, "etcdMinor": plan.minor.map(|minor| minor.to_string()),
        "bumpRevision": plan.bump_revision, "replace": plan.replace,
    })
}

fn plan_table(plan: &Plan, url: Option<&str>) -> String {
    let mut text = match &plan.source {
        Source::File { path, .. } => format!("would restore the snapshot {}\n", path.display()),
        Source::Chain { timeline, chain, upto, at_time, .. } => {
            format!(
                "would restore revision {} from timeline {timeline} of {}:\n  the full snapshot of revision {} ({}) and {} deltas, {} to download\n",
                upto.unwrap_or(chain.last),
                url.unwrap_or_default(),
                chain.full.revision,
                time(chain.full.unix_ms),
                chain.deltas.len(),
                bytes(chain.size())
            ) + &at_time.map(|at| format!("  {}\n", exactness(&at))).unwrap_or_default()
        }
    };
    for target in &plan.targets {
        text.push_str(&format!(
            "into {} as member {} of the new cluster {}\n",
            target.data_dir.display(),
            target.name,
            plan.cluster.id()
        ));
    }
    if plan.bump_revision > 0 {
        text.push_str(&format!(
            "raising the revision by {} and marking everything below compacted\n",
            plan.bump_revision
        ));
    }
    text
}

fn table(outcome: &Outcome) -> String {
    let mut text = format!(
        "restored revision {} (snapshot of {} and {} changes), {} in {:.1} s\n",
        outcome.revision,
        outcome.snapshot_revision,
        outcome.events,
        bytes(outcome.db_size),
        outcome.seconds
    );
    for member in &outcome.members {
        text.push_str(&format!(
            "  member {} of cluster {} in {}\n",
            member.name,
            outcome.cluster_id,
            member.data_dir.display()
        ));
    }
    for replaced in &outcome.replaced {
        text.push_str(&format!("  the member before it is in {}\n", replaced.display()));
    }
    if let Some(after) = outcome.gap_after {
        text.push_str(&format!("  revisions after {after} are not in it: they are missing in the backup\n"));
    }
    if let Some(at) = &outcome.at_time {
        text.push_str(&format!("  {}\n", exactness(at)));
    }
    text.push_str(&proof_text(&outcome.proof, outcome.backup_revision));
    for lease in &outcome.leases_with_guessed_ttl {
        text.push_str(&guessed_lease(lease));
    }
    for lease in &outcome.orphaned_leases {
        text.push_str(&format!(
            "remark: lease {lease}, which live keys refer to, had no record when the snapshot was taken; it got one of ten years\n"
        ));
    }
    text
}

/// Shows progress: a bar for people, a JSON line now and then for programs.
struct Watcher {
    bar: Option<ProgressBar>,
    seen: Mutex<Seen>,
}

struct Seen {
    far: Far,
    last_line: Instant,
}

impl Watcher {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::no_length);
        Self { bar, seen: Mutex::new(Seen { far: Far::default(), last_line: Instant::now() }) }
    }

    fn see(&self, progress: Progress) {
        let Ok(mut seen) = self.seen.lock() else { return };
        let begins = seen.far.see(progress);
        match &self.bar {
            Some(bar) if begins => show(bar, &seen.far),
            Some(bar) => bar.set_position(seen.far.done),
            None if begins || seen.last_line.elapsed() > Duration::from_secs(1) => {
                seen.last_line = Instant::now();
                line(&seen.far);
            }
            None => {}
        }
    }
}

/// Has the bar of a phase that begins.
fn show(bar: &ProgressBar, far: &Far) {
    let template = match far.phase {
        "snapshot" => "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}",
        "deltas" => "{msg} {bar:30} {pos}/{len}",
        "verify" => "{msg} and sync {elapsed}",
        _ => "{msg}",
    };
    bar.reset();
    if far.total > 0 {
        bar.set_length(far.total);
    }
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(far.phase);
    bar.enable_steady_tick(Duration::from_millis(200));
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(far: &Far) {
    let total = Some(far.total).filter(|total| *total > 0);
    let line = json!({ "phase": far.phase, "done": far.done, "total": total });
    let _ = writeln!(std::io::stderr(), "{line}");
}
