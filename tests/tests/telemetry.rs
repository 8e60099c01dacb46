//! What the program tells of itself: spans to a real collector of OpenTelemetry, and log lines.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::etcd::Member;
use tests::store::Store;
use tests::{eventually, free_port, program};

/// Ended when dropped.
struct Collector(Child);

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_the_spans() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (port, log) = (free_port()?, dir.path().join("collector.log"));
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let etcd = member.start().await?;
    etcd.client().await?.put("x", "1", None).await?;
    let store = Store::directory(&dir.path().join("store"));
    let endpoint = format!("http://127.0.0.1:{port}");
    let full = || store.once("full", &member).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    // Without a collector it does what it is to do.
    full().run().await?.expect(0)?;
    let config = format!(
        "yaml:{{receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '127.0.0.1:{port}'}}}}}}}}, exporters: {{debug: {{verbosity: detailed}}}}, service: {{telemetry: {{metrics: {{level: none}}}}, pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}}}}}"
    );
    let out = File::create(&log)?;
    let collector = Command::new(program("otel", "otelcol")?)
        .args(["--config", &config])
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()?;
    let _collector = Collector(collector);
    let told = || std::fs::read_to_string(&log);
    let ready = || async {
        ensure!(told()?.contains("Everything is ready"), "{}", told()?);
        Ok(())
    };
    eventually(Duration::from_secs(180), ready).await?;
    full().run().await?.expect(0)?;
    let has = || async {
        let told = told()?;
        for said in
            ["service.name: Str(etcd-sidecar)", "Name           : full", "Name           : store", "operation: Str("]
        {
            ensure!(
                told.contains(said),
                "{said} is not told; was the program built with the feature otlp, as `cargo suite` does? {told}"
            );
        }
        Ok(())
    };
    eventually(Duration::from_secs(20), has).await?;
    store.once("full", &member).env("OTEL_EXPORTER_OTLP_ENDPOINT", "no url").run().await?.expect(2)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_are_json_when_asked_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let member = Member::single("3.6", &dir.path().join("data"))?;
    let _etcd = member.start().await?;
    let store = Store::directory(&dir.path().join("store"));
    let ended = store.once("full", &member).args(["--log-format", "json"]).run().await?.expect(0)?;
    let lines: Vec<serde_json::Value> = ended.stderr.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(
        lines.iter().any(|line| line["level"] == "INFO" && line["fields"]["revision"].is_number()),
        "{}",
        ended.stderr
    );
    Ok(())
}
