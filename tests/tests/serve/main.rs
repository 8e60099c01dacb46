//! A member under its sidecar's care: what becomes of its data before etcd starts, and its backups while it runs.

mod callers;
mod predecessor;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proto::sidecar as api;
use rustix::process::Signal;
use tests::certificates::Certificates;
use tests::etcd::Member;
use tests::eventually;
use tests::pod::Pod;
use tests::program::Sidecar;
use tests::state;
use tests::store::Store;
use tests::workload::Workload;

const LONG: Duration = Duration::from_secs(60);
/// As which etcd ends when it was asked to: by the signal.
const STOPPED: i32 = 128 + 15;

async fn backed_up(pod: &Pod) -> Result<()> {
    eventually(LONG, || async {
        let latest = pod.client(true).await?.get_latest(api::GetLatestRequest {}).await?.into_inner();
        latest.full.map(drop).context("no full snapshot yet")
    })
    .await
}

fn aside(data_dir: &Path) -> Result<usize> {
    let names = std::fs::read_dir(data_dir)?.filter_map(Result::ok);
    Ok(names.filter(|entry| entry.file_name().to_string_lossy().starts_with("member.replaced-")).count())
}

/// Cuts the newest delta.
fn damage_store(pod: &Pod) -> Result<()> {
    let store = pod.store.as_ref().and_then(|store| store.url.strip_prefix("file://")).context("no directory")?;
    let deltas = std::fs::read_dir(Path::new(store).join("t00000001/delta"))?;
    let newest = deltas.filter_map(Result::ok).map(|entry| entry.path()).max().context("no delta")?;
    let bytes = std::fs::read(&newest)?;
    Ok(std::fs::write(newest, &bytes[..bytes.len() / 2])?)
}

/// Begun anew, backed up, damaged, lost and behind: each time etcd has everything again, and nothing that was there is deleted.
async fn a_member_is_looked_after(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), minor, Some(store))?;
    pod.more = "snapshots:\n  deltaPeriod: 1s\n".into();
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("there is no data, and there are no backups"), "{}", launched.log());
    Workload::of(1).run(&mut client).await?;
    backed_up(&pod).await?;
    Workload::of(2).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    let before = state::read(&mut client).await?;
    eventually(LONG, || async {
        let told = pod.status().await?;
        ensure!(told.phase() == api::Phase::Ready && told.role() == api::Role::Leader, "{told:?}");
        ensure!(told.backup.as_ref().is_some_and(|backup| backup.active && backup.error.is_empty()), "{told:?}");
        Ok(())
    })
    .await?;
    launched.terminate().await?.expect(STOPPED)?.says("etcd has ended")?;
    let data = pod.member.data_dir.clone();

    tests::damage(&data)?;
    for year in 2019..2023 {
        std::fs::create_dir(data.join(format!("member.replaced-{year}0101T000000.000Z")))?;
    }
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("the data is damaged"), "{}", launched.log());
    state::same(&before, &state::read(&mut client).await?)?;
    ensure!(aside(&data)? == 3 && !data.join("member.replaced-20200101T000000.000Z").exists());
    launched.terminate().await?.expect(STOPPED)?;

    std::fs::remove_dir_all(data.join("member"))?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("there is no data; the backups reach"), "{}", launched.log());
    state::same(&before, &state::read(&mut client).await?)?;
    // Restored, it is another history: that has to be in the store before a volume can be behind it.
    let timelines = || async {
        let listed = pod.store.as_ref().context("no store")?.list().await?;
        let count = listed["timelines"].as_array().map_or(0, Vec::len);
        ensure!(count >= 2, "{listed}");
        anyhow::Ok(count)
    };
    eventually(LONG, timelines).await?;
    Workload::of(3).run(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    launched.terminate().await?.expect(STOPPED)?;

    if minor == "3.4" {
        // Its database lacks records of the member that its log has, so that it is refused to be appended to.
        eprintln!("not tried on 3.4: a member that is behind");
        serving.terminate().await?.expect(0)?;
        return Ok(());
    }
    let old = dir.path().join("old");
    tests::succeed(tokio::process::Command::new("cp").arg("-r").arg(&data).arg(&old)).await?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("the data is sound"), "{}", launched.log());
    Workload::of(4).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    let newest = state::read(&mut client).await?;
    launched.terminate().await?.expect(STOPPED)?;
    std::fs::rename(&data, dir.path().join("newer"))?;
    std::fs::rename(&old, &data)?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("behind the backups"), "{}", launched.log());
    state::same(&newest, &state::read(&mut client).await?)?;
    // A second caller touches nothing while etcd runs, and starts none.
    let mut again = pod.start_launch()?;
    again.running()?.logs("nothing is touched", LONG).await?;
    again.terminate().await?.expect(1)?;
    let told = pod.status().await?;
    ensure!(told.phase() == api::Phase::Ready, "what is known of the data still holds: {told:?}");
    ensure!(told.initialized.is_some_and(|outcome| outcome.cause() == api::Cause::Behind));
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// etcd is killed at one moment after another of its first second: the next start gets it going, and keeps what it
/// acknowledged.
async fn killed_while_it_begins(minor: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), minor, None)?;
    let serving = pod.start_serve().await?;
    let data = pod.member.data_dir.clone();
    for after_ms in [0, 3, 6, 10, 15, 25, 60, 150, 400, 900] {
        let mut launched = pod.start_launch()?;
        launched.running()?.logs("etcd is started", LONG).await?;
        let begun = std::time::Instant::now();
        while !data.join("member/snap/db").exists() {
            ensure!(begun.elapsed() < LONG, "etcd does not begin: {}", launched.log());
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        launched.kill_etcd().await?;
        let (launched, mut client) = pod.start_etcd().await.with_context(|| format!("killed after {after_ms} ms"))?;
        client.put("x", after_ms.to_string(), None).await?;
        // And once more, before it commits what it acknowledged.
        launched.kill_etcd().await?;
        let (launched, mut client) = pod.start_etcd().await.with_context(|| format!("killed after {after_ms} ms"))?;
        let kept = client.get("x", None).await?.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(kept == Some(after_ms.to_string().into_bytes()), "{after_ms}: {kept:?}");
        launched.terminate().await?.expect(STOPPED)?;
        std::fs::remove_dir_all(&data)?;
    }
    serving.terminate().await?.expect(0)?;
    Ok(())
}

tests::on_every_minor! {
    killed_while_it_begins_3_4: killed_while_it_begins("3.4");
    killed_while_it_begins_3_5: killed_while_it_begins("3.5");
    killed_while_it_begins_3_6: killed_while_it_begins("3.6");
    killed_while_it_begins_3_7: killed_while_it_begins("3.7");
}

tests::on_every_minor! {
    a_member_is_looked_after_3_4: a_member_is_looked_after("3.4");
    a_member_is_looked_after_3_5: a_member_is_looked_after("3.5");
    a_member_is_looked_after_3_6: a_member_is_looked_after("3.6");
    a_member_is_looked_after_3_7: a_member_is_looked_after("3.7");
}

/// Killed with writes that no backup has, and that its database does not have yet: its log has them.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_log_has_is_kept() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.more = "snapshots:\n  deltaPeriod: 1h\n".into();
    let serving = pod.start_serve().await?;
    let mut written = 0u32;
    for turn in 0..4 {
        let (launched, mut client) = pod.start_etcd().await?;
        ensure!(turn == 0 || launched.log().contains("the data is sound"), "{}", launched.log());
        let value = client.get("x", None).await?.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(turn == 0 || value == Some(written.to_string().into_bytes()), "turn {turn}: {value:?} of {written}");
        backed_up(&pod).await?;
        for n in 0..200u32 {
            written += 1;
            client.put("x", written.to_string(), None).await?;
            // In some turns the backup has all but the last, in some next to nothing.
            if n == 50 * turn {
                pod.back_up(api::Kind::Delta).await?;
            }
        }
        launched.kill_etcd().await?;
    }
    serving.terminate().await?;
    Ok(())
}

/// Restored by hand to an older revision, or from an older timeline than the newest, it stays there: that is what somebody wants.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_restored_by_hand_stays() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    for n in 0..20u32 {
        client.put("x", n.to_string(), None).await?;
    }
    backed_up(&pod).await?;
    for n in 20..40u32 {
        client.put("x", n.to_string(), None).await?;
    }
    pod.back_up(api::Kind::Delta).await?;
    launched.terminate().await?.expect(STOPPED)?;
    std::fs::remove_dir_all(pod.member.data_dir.join("member"))?;
    let restore = |more: &[&str]| store.restore_member(&pod.member).args(more);
    restore(&["--revision", "25", "--initial-cluster-token", "second"]).run().await?.expect(0)?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(launched.log().contains("restored since the backups"), "{}", launched.log());
    let kv = client.get("x", None).await?;
    ensure!(kv.header().is_some_and(|header| header.revision() == 25), "{kv:?}");
    client.put("x", "second", None).await?;
    pod.back_up(api::Kind::Delta).await?;
    launched.terminate().await?.expect(STOPPED)?;
    std::fs::remove_dir_all(pod.member.data_dir.join("member"))?;
    restore(&["--timeline", "1", "--initial-cluster-token", "third"]).run().await?.expect(0)?;
    let (launched, mut client) = pod.start_etcd().await?;
    let kv = client.get("x", None).await?;
    ensure!(kv.kvs().first().is_some_and(|kv| kv.value() == b"39"), "{kv:?}");
    client.put("x", "third", None).await?;
    pod.back_up(api::Kind::Delta).await?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 3), "{listed}");
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// Where nobody can know what is right, nothing is touched and etcd does not start.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_decided_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    client.put("x", "1", None).await?;
    let told = pod.status().await?;
    ensure!(told.backup.is_some_and(|backup| backup.store.is_empty() && !backup.active));
    launched.terminate().await?.expect(STOPPED)?;
    // Without a store only the check happens.
    let (launched, _) = pod.start_etcd().await?;
    ensure!(launched.log().contains("no store to compare it with"), "{}", launched.log());
    launched.terminate().await?.expect(STOPPED)?;
    tests::damage(&pod.member.data_dir)?;
    pod.launch()?.run().await?.expect(12)?.says("etcd must not start: the data is damaged")?;
    ensure!(pod.member.data_dir.join("member").exists() && aside(&pod.member.data_dir)? == 0);
    serving.terminate().await?.expect(0)?;
    // Unless it is allowed to begin anew; what was there moves aside.
    pod.more = "safety:\n  mayStartEmpty: true\n".into();
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    ensure!(client.get("x", None).await?.kvs().is_empty() && aside(&pod.member.data_dir)? == 1);
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;

    // Data of one cluster, backups of another.
    let store = Store::directory(&dir.path().join("store"));
    let other = Member::single("3.6", &dir.path().join("other"))?;
    let _etcd = other.start().await?;
    store.once("full", &other).run().await?.expect(0)?;
    pod.store = Some(store);
    pod.more = String::new();
    let serving = pod.start_serve().await?;
    pod.launch()?.run().await?.expect(12)?.says("the volume or the store is another's")?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// No data, and a store that does not answer: nothing begins anew, and nothing ends; it goes on when the store is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_waited_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let port = tests::free_port()?;
    let place = dir.path().join("minio");
    let mut minio = tests::minio::Minio::start_on(&place, "backups", port, None).await?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(minio.store("backups/a")))?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    client.put("x", "1", None).await?;
    backed_up(&pod).await?;
    pod.back_up(api::Kind::Delta).await?;
    launched.terminate().await?.expect(STOPPED)?;
    minio.kill9();
    std::fs::remove_dir_all(pod.member.data_dir.join("member"))?;
    let mut launched = pod.start_launch()?;
    launched.running()?.logs("whether there are backups cannot be told", Duration::from_secs(180)).await?;
    ensure!(!pod.member.data_dir.join("member").exists());
    let minio = tests::minio::Minio::start_on(&place, "backups", port, None).await?;
    launched.running()?.logs("etcd is started", Duration::from_secs(180)).await?;
    let url = pod.member.client_url();
    let value = || async {
        let mut client = etcd_client::Client::connect([url.clone()], None).await?;
        let got = client.get("x", None).await?;
        got.kvs().first().map(|kv| kv.value().to_vec()).context("x is not there")
    };
    ensure!(eventually(LONG, value).await? == b"1");
    // Away when all ends: what is in no store by then is an error, in time.
    pod.back_up(api::Kind::Delta).await?;
    drop(minio);
    pod.etcd().await?.put("x", "2", None).await?;
    let started = std::time::Instant::now();
    let ended = serving.terminate().await?.expect(1)?;
    ensure!(
        ["not backed up", "may not be in the store"].iter().any(|said| ended.stderr.contains(said)),
        "{}",
        ended.stderr
    );
    ensure!(started.elapsed() < Duration::from_secs(45), "{:?}", started.elapsed());
    launched.terminate().await?.expect(STOPPED)?;
    Ok(())
}

/// Without its sidecar etcd does not start, and whoever waits can be asked to end.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_sidecar_nothing_starts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let mut launched = pod.start_launch()?;
    launched.running()?.logs_times("etcd cannot start yet", 3, LONG).await?;
    ensure!(!pod.member.data_dir.exists());
    launched.terminate().await?.expect(1)?.says("stopped on request")?;
    let mut launched = pod.start_launch()?;
    launched.running()?.logs("etcd cannot start yet", LONG).await?;
    let serving = pod.start_serve().await?;
    launched.running()?.logs("etcd is started", LONG).await?;
    // Sent to the process and to its group, it is one wish, and etcd ends as it should.
    launched.running()?.signal(Signal::TERM)?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// etcd's own end is the launcher's end, with its code.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_ends_ends_the_launcher() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    let mut serving = pod.start_serve().await?;
    // Somebody else has its port.
    let taken = std::net::TcpListener::bind(("127.0.0.1", pod.member.client_port))?;
    let ended = pod.launch()?.run().await?;
    ensure!(ended.code == 1 && ended.stderr.contains("etcd has ended"), "{}: {}", ended.code, ended.stderr);
    drop(taken);
    serving.logs("etcd has ended", LONG).await?;
    ensure!(ended.stderr.matches("etcd is started").count() == 3, "{}", ended.stderr);
    ensure!(pod.status().await?.last_exit.is_some_and(|exit| exit.code == 1));
    // It might come up, and did not.
    eventually(LONG, || async {
        let code = pod.http()?.get(format!("{}/readyz", pod.url())).send().await?.status();
        ensure!(code == 503, "{code}");
        Ok(())
    })
    .await?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// A person looks at the page, with a browser.
#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_page() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    backed_up(&pod).await?;
    Workload::of(9).run(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    // A listing to look at may be half a minute old.
    let url = pod.url();
    let shown = || async {
        let chromium = tokio::process::Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--window-size=1000,900", "--virtual-time-budget=2000", "--dump-dom"])
            .arg(format!("--user-data-dir={}", dir.path().join("browser").display()))
            .arg(&url)
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(LONG, chromium).await?.context("chromium: run cargo tools fetch")?;
        let page = String::from_utf8_lossy(&output.stdout).into_owned();
        for told in ["leads", "Timeline 1", "class=\"delta\"", "class=\"full\"", "class=\"member\"", "3.6.16"] {
            ensure!(page.contains(told), "{told} is not in {page}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        ensure!(!page.contains("<script"), "{page}");
        Ok(())
    };
    eventually(2 * LONG, shown).await?;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// Who may not read the data, or not write beside it, is told so; nothing is touched, and etcd does not start.
#[tokio::test(flavor = "multi_thread")]
async fn without_permission_nothing_is_touched() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    backed_up(&pod).await?;
    Workload::of(5).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    pod.back_up(api::Kind::Delta).await?;
    let before = state::read(&mut client).await?;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    let data = pod.member.data_dir.clone();
    tests::damage(&data)?;
    let damaged = std::fs::read(data.join("member/snap/db"))?;
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    open(dir.path(), 0o755)?;
    for (mode, said) in [(0o700, "Permission denied"), (0o755, "Permission denied")] {
        open(&data, mode)?;
        for path in ["member", "member/snap", "member/wal"] {
            open(&data.join(path), mode)?;
        }
        for file in std::fs::read_dir(data.join("member/snap"))?.chain(std::fs::read_dir(data.join("member/wal"))?) {
            open(&file?.path(), 0o644)?;
        }
        let mut nobody = pod.serve()?.as_nobody().spawn()?;
        nobody.logs("the API is served", LONG).await?;
        let mut launched = pod.start_launch()?;
        launched.running()?.logs(said, LONG).await?;
        ensure!(!launched.log().contains("etcd is started"), "{}", launched.log());
        let _ = launched.terminate().await?;
        nobody.terminate().await?;
        ensure!(std::fs::read(data.join("member/snap/db"))? == damaged && aside(&data)? == 0, "mode {mode:o}");
    }
    let serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    state::same(&before, &state::read(&mut client).await?)?;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// What is wrong in a configuration is said, with its place; nothing starts.
#[tokio::test(flavor = "multi_thread")]
async fn configurations_that_make_no_sense_are_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", None)?;
    for (more, said) in [
        ("snapshot: {}\n", "snapshot"),
        ("snapshots:\n  deltaPeriod: 5 weeks\n", "duration"),
        ("snapshots:\n  fullSchedule: often\n", "cron"),
        ("store:\n  url: ftp://x/y\n", "ftp"),
        ("store:\n  url: file:///nowhere\n  password: x\n", "password"),
    ] {
        pod.more = more.into();
        let refused = pod.serve()?.run().await?;
        ensure!(refused.code == 2 && refused.stderr.contains(said), "{more}: {}: {}", refused.code, refused.stderr);
    }
    // Nor is it printed as if it did.
    pod.more = String::new();
    for (set, said) in [
        ("snapshots.deltaMaxBytes=1", "deltaMaxBytes"),
        ("etcd.cert=/x", "go together"),
        ("etcd.endpoints=ftp://a:1", "https://host:port"),
        ("etcd.endpoints=http://", "such as https://127.0.0.1:2379"),
        ("store.url=file://rel/x", "three slashes"),
        ("store.url=s3://", "such as s3://bucket/prefix"),
        ("store.url=", "such as s3://bucket/prefix"),
        ("compaction.deltas=0", "nothing can be merged"),
        ("kubernetes.heartbeatPeriod=0s", "heartbeatPeriod must be 1s"),
        ("verification.schedule=", "verification.schedule"),
    ] {
        pod.serve()?.args(["--print-config", "--set", set]).run().await?.expect(2)?.says(said)?;
    }
    pod.more = String::new();
    // Nothing that a person wrote has no end.
    let endless = pod.serve()?.args(["--set", "member.etcdConfig=/dev/zero"]).run().await?;
    ensure!(endless.code == 1 && endless.stderr.contains("not a file"), "{}", endless.stderr);
    let printed = pod.serve()?.arg("--print-config").run().await?.expect(0)?.json()?;
    ensure!(printed["snapshots"]["fullSchedule"] == "0 * * * *", "{printed}");
    let pipe = dir.path().join("pipe");
    tests::succeed(tokio::process::Command::new("mkfifo").arg(&pipe)).await?;
    let tls = format!("tls: {{cert: {0}, key: {0}, clientCa: {0}}}", pipe.display());
    let piped = dir.path().join("piped.yaml");
    let text = std::fs::read_to_string(dir.path().join("pod/sidecar.yaml"))?.replace("insecure: true", &tls);
    std::fs::write(&piped, text)?;
    for config in [&pipe, &piped] {
        let serve = Sidecar::new(["serve", "--config", &config.display().to_string()]);
        serve.run().await?.expect(1)?.says("not a file")?;
    }
    // No TLS, and nobody said that this is meant.
    let config = dir.path().join("pod/sidecar.yaml");
    let text = std::fs::read_to_string(&config)?.replace("  insecure: true\n", "");
    std::fs::write(&config, text)?;
    let serve = Sidecar::new(["serve", "--config", &config.display().to_string()]);
    serve.run().await?.expect(2)?.says("server.insecure")?;
    // An address that somebody has.
    let taken = pod.start_serve().await?;
    pod.serve()?.run().await?.expect(1)?.says("listen on")?;
    taken.terminate().await?.expect(0)?;
    ensure!(!pod.member.data_dir.exists());
    Ok(())
}

/// Each call, as a person makes it; the same request id twice does nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn every_call_can_be_made() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store))?;
    pod.tls = Some(Certificates::issue(&dir.path().join("certificates"))?);
    pod.more = "snapshots: {deltaPeriod: 1h}\n".into();
    let serving = pod.start_serve().await?;
    let call = async |arguments: &[&str], code| pod.ctl(arguments).run().await?.expect(code);
    call(&["get-etcd-config"], 12).await?;
    let told = call(&["initialize"], 0).await?.stdout;
    let last = told.lines().last().unwrap_or_default();
    ensure!(last.contains("ACTION_BOOTSTRAP") && last.contains("CAUSE_NO_DATA"), "{told}");
    ensure!(call(&["get-etcd-config"], 0).await?.stdout.contains("data-dir"));
    call(&["take-snapshot", "full"], 12).await?;
    let (launched, mut client) = pod.start_etcd().await?;
    Workload::of(1).run(&mut client).await?;
    backed_up(&pod).await?;
    let full =
        || async { Ok(pod.ctl(["take-snapshot", "full", "--request-id", "one"]).run().await?.expect(0)?.stdout) };
    let full = eventually(LONG, full).await?;
    ensure!(full.contains("KIND_FULL"), "{full}");
    Workload::of(2).run(&mut client).await?;
    tests::workload::expire(&mut client).await?;
    let again = call(&["take-snapshot", "full", "--request-id", "one"], 0).await?.stdout;
    ensure!(again == full, "{again} instead of {full}");
    call(&["take-snapshot", "delta", "--request-id", "one"], 2).await?;
    let table = call(&["status", "-o", "table"], 0).await?.stdout;
    ensure!(table.lines().any(|line| line.starts_with("initialized.reason  ")), "{table}");
    let delta = call(&["take-snapshot", "delta"], 0).await?.json()?;
    ensure!(delta["snapshots"][0]["kind"] == "KIND_DELTA", "{delta}");
    let listed = call(&["list-snapshots"], 0).await?.stdout;
    ensure!(listed.lines().count() >= 3, "{listed}");
    let as_table = call(&["list-snapshots", "-o", "table"], 0).await?.stdout;
    ensure!(as_table.lines().count() == listed.lines().count() + 1, "{as_table}");
    ensure!(as_table.lines().next().is_some_and(|names| names.contains("lastRevision")), "{as_table}");
    let nothing = call(&["take-snapshot", "delta", "-o", "table"], 0).await?.stdout;
    ensure!(nothing.trim() == "nothing has changed since the last backup", "{nothing}");
    let latest = call(&["get-latest"], 0).await?.json()?;
    ensure!(latest["deltas"].as_array().is_some_and(|deltas| !deltas.is_empty()), "{latest}");
    let verified = call(&["verify", "--level", "replay"], 0).await?.stdout;
    ensure!(verified.lines().last().is_some_and(|last| last.contains("\"problems\":0")), "{verified}");
    let compacted = call(&["compact", "--request-id", "two"], 0).await?.json()?;
    ensure!(compacted["name"].as_str().is_some_and(|name| name.contains("/full/")), "{compacted}");
    ensure!(call(&["compact", "--request-id", "two"], 0).await?.json()? == compacted);
    // It refuses while etcd is slow to answer.
    let sizes = eventually(LONG, || async { call(&["defragment"], 0).await?.json() }).await?;
    ensure!(sizes["after"].as_i64() > Some(0) && sizes["after"].as_i64() <= sizes["before"].as_i64(), "{sizes}");
    Workload::of(3).run(&mut client).await?;
    let prepared = call(&["prepare-shutdown"], 0).await?.json()?;
    ensure!(prepared["snapshots"][0]["kind"] == "KIND_DELTA" && prepared["leaderId"] == "", "{prepared}");
    let told = call(&["status"], 0).await?.json()?;
    ensure!(told["phase"] == "PHASE_READY" && told["role"] == "ROLE_LEADER", "{told}");
    call(&["report-exit", "0"], 0).await?;
    damage_store(&pod)?;
    call(&["verify"], 10).await?;
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// One that is restarted beside an etcd that it cannot reach says so, though nobody has asked it for anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_sidecar_says_what_it_cannot_reach() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(Store::directory(&dir.path().join("store"))))?;
    let serving = pod.start_serve().await?;
    let (launched, _) = pod.start_etcd().await?;
    backed_up(&pod).await?;
    serving.terminate().await?.expect(0)?;
    let mut serving = pod.serve()?.args(["--set", "etcd.endpoints=http://127.0.0.1:1"]).spawn()?;
    serving.logs("cannot be reached: nothing is backed up from here", LONG).await?;
    let error = pod.status().await?.backup.map(|backup| backup.error).unwrap_or_default();
    ensure!(error.contains("etcd cannot be reached"), "{error}");
    launched.terminate().await?.expect(STOPPED)?;
    serving.terminate().await?.expect(0)?;
    Ok(())
}

/// An empty member of another cluster gets the store of one that lives: it restores from there and begins a timeline. The other
/// loses nothing, and hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_another_cluster_begins_to_use_is_told() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = Store::directory(&dir.path().join("store"));
    let pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    let mut serving = pod.start_serve().await?;
    let (launched, mut client) = pod.start_etcd().await?;
    Workload::of(1).run(&mut client).await?;
    backed_up(&pod).await?;
    let other = Pod::new(&dir.path().join("other"), "3.6", Some(store.clone()))?;
    let other_serving = other.start_serve().await?;
    // Each looks every 30 s.
    let other_has_looked = tokio::time::Instant::now() + Duration::from_secs(33);
    let (other_launched, _) = other.start_etcd().await?;
    eventually(LONG, || async {
        let listed = store.list().await?;
        ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 2), "{listed}");
        Ok(())
    })
    .await?;
    serving.logs("was begun after ours by cluster", 2 * LONG).await?;
    eventually(LONG, || async {
        let error = pod.status().await?.backup.map(|backup| backup.error).unwrap_or_default();
        ensure!(error.contains("a restore takes the newest"), "{error}");
        Ok(())
    })
    .await?;
    tokio::time::sleep_until(other_has_looked).await;
    ensure!(!other_serving.log().contains("was begun after ours"), "{}", other_serving.log());
    client.put("still", "backed up", None).await?;
    pod.back_up(api::Kind::Delta).await?;
    for launched in [launched, other_launched] {
        launched.terminate().await?.expect(STOPPED)?;
    }
    for serving in [serving, other_serving] {
        serving.terminate().await?.expect(0)?;
    }
    Ok(())
}

/// The store of another cluster, given to a sidecar beside an etcd that runs already: nothing is put there, until somebody says
/// by hand that it is to be.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_another_cluster_is_not_backed_up_to() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (place, stranger) = (dir.path().join("store"), Member::single("3.6", &dir.path().join("stranger"))?);
    let store = Store::directory(&place);
    let mut etcd = stranger.start().await?;
    etcd.client().await?.put("theirs", "1", None).await?;
    store.once("full", &stranger).run().await?.expect(0)?;
    etcd.client().await?.put("theirs", "2", None).await?;
    // Retention would take the first of them.
    store.once("full", &stranger).run().await?.expect(0)?;
    etcd.stop()?;
    let mut pod = Pod::new(&dir.path().join("pod"), "3.6", Some(store.clone()))?;
    pod.more = "snapshots: {deltaPeriod: 1s}\nretention: {policy: LimitBased, maxBackups: 1, period: 1s}\n".into();
    let etcd = pod.member.start().await?;
    let said = "nothing shows that cluster";
    let mut serving = pod.start_serve().await?;
    serving.logs(said, LONG).await?;
    eventually(LONG, || async {
        let told = pod.status().await?.backup.context("no status of the backup")?;
        ensure!(told.error.contains(said) && told.full.is_some(), "{told:?}");
        Ok(())
    })
    .await?;
    let doctor = pod.doctor()?.run().await?.expect(12)?.stdout;
    ensure!(doctor.contains("nothing shows that it was restored from there"), "{doctor}");
    // And after a restart.
    serving.terminate().await?.expect(0)?;
    let serving = pod.start_serve().await?;
    eventually(LONG, || async {
        ensure!(pod.take(api::Kind::Full, "").await.is_err_and(|error| error.to_string().contains("nothing shows")));
        Ok(())
    })
    .await?;
    ensure!(tests::objects(&place)?.len() == 2, "{:?}", tests::objects(&place)?);
    // What would be lost now grows all the while.
    eventually(LONG, || async {
        let unsaved = pod.status().await?.backup.and_then(|backup| backup.unsaved_seconds);
        ensure!(unsaved > Some(18.0), "{unsaved:?}");
        Ok(())
    })
    .await?;
    store.once("full", &pod.member).run().await?.expect(0)?;
    pod.back_up(api::Kind::Delta).await?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 2), "{listed}");
    eventually(LONG, || async {
        let told = pod.status().await?.backup.context("no status of the backup")?;
        ensure!(told.error.is_empty() && told.window.is_some_and(|window| window.last_revision > 0), "{told:?}");
        Ok(())
    })
    .await?;
    serving.terminate().await?.expect(0)?;
    drop(etcd);
    Ok(())
}
