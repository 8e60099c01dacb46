//! What backups of a Kubernetes cluster take, ours and in the layout of the predecessor: a real kube-apiserver writes what a
//! cluster of some size writes.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};
use tests::etcd::Member;
use tests::kubernetes::{ApiServer, Client};
use tests::program;

const NODES: u64 = 200;
const PODS: u64 = 1000;
const SERVICES: u64 = 50;
/// What a cluster of 1,000 nodes writes, whose leases alone are 100 updates a second.
const UPDATES_PER_SECOND: u64 = 250;
const SECONDS: u64 = 80;
const WRITERS: u64 = 16;

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn micros() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// A number that looks random and is the same in each run.
fn mixed(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 8
}

fn pod_name(n: u64) -> String {
    format!("app-{:02}-{:010x}-{:05x}", n % 40, mixed(n % 40) & 0xff_ffff_ffff, mixed(n) & 0xf_ffff)
}

fn namespace(n: u64) -> String {
    format!("team-{}", n % 5)
}

fn node_name(n: u64) -> String {
    format!("node-{}.zone-{}.example.internal", n % NODES, n % 3)
}

fn pod(n: u64) -> Value {
    let app = format!("app-{:02}", n % 40);
    let digest = format!("{:016x}{:016x}{:016x}{:016x}", mixed(n), mixed(n + 1), mixed(n + 2), mixed(n + 3));
    let probe =
        |path: &str| json!({"httpGet": {"path": path, "port": "http"}, "periodSeconds": 10, "failureThreshold": 3});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod_name(n), "namespace": namespace(n),
            "labels": {"app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop", "pod-template-hash": format!("{:010x}", mixed(n % 40) & 0xff_ffff_ffff)},
            "annotations": {"checksum/config": digest, "prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
        },
        "spec": {
            "nodeName": node_name(n), "automountServiceAccountToken": false,
            "containers": [{
                "name": "main", "image": format!("registry.example.internal/shop/{app}@sha256:{digest}"),
                "args": ["--log-format=json", "--listen=:8080", format!("--shard={}", n % 16)],
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": format!("{app}-database"), "key": "url"}}},
                    {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector.monitoring.svc:4317"},
                ],
                "ports": [{"name": "http", "containerPort": 8080}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "livenessProbe": probe("/healthz"), "readinessProbe": probe("/readyz"),
                "volumeMounts": [{"name": "config", "mountPath": "/etc/app"}, {"name": "cache", "mountPath": "/var/cache"}],
            }],
            "volumes": [{"name": "config", "configMap": {"name": format!("{app}-config")}}, {"name": "cache", "emptyDir": {}}],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        },
    })
}

fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": format!("kubelet: {reason}"), "lastTransitionTime": now(), "lastHeartbeatTime": now()})
}

fn node(n: u64) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(n), "labels": {
        "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": format!("zone-{}", n % 3),
        "node.kubernetes.io/instance-type": "m5.xlarge"}}})
}

fn node_status(n: u64) -> Value {
    let images: Vec<Value> = (0..20)
        .map(|image| {
            let digest = format!("{:016x}{:016x}{:016x}{:016x}", mixed(image), mixed(image + 9), mixed(image + 7), mixed(image + 5));
            json!({"names": [format!("registry.example.internal/shop/app-{image:02}@sha256:{digest}")], "sizeBytes": mixed(image) % 300_000_000})
        })
        .collect();
    json!({"status": {
        "conditions": [condition("Ready", "True", "KubeletReady"), condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"), condition("PIDPressure", "False", "KubeletHasSufficientPID")],
        "capacity": {"cpu": "4", "memory": "16384Mi", "pods": "110"},
        "addresses": [{"type": "InternalIP", "address": format!("10.250.{}.{}", n / 250, n % 250)}],
        "images": images,
    }})
}

fn lease(n: u64) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": node_name(n), "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": node_name(n), "leaseDurationSeconds": 40, "renewTime": micros()}})
}

fn endpoint_slice(n: u64, turn: u64) -> Value {
    let endpoints: Vec<Value> = (0..20)
        .map(|pod| {
            let pod = n + pod * SERVICES;
            json!({"addresses": [format!("100.64.{}.{}", pod / 250, pod % 250 + 1)], "nodeName": node_name(pod),
                "conditions": {"ready": !mixed(turn + pod).is_multiple_of(20), "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": namespace(pod), "name": pod_name(pod)}})
        })
        .collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("service-{n}-abcde"), "namespace": namespace(n), "labels": {"kubernetes.io/service-name": format!("service-{n}")}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints})
}

fn event(n: u64) -> Value {
    let (reason, message) = [
        ("Scheduled", "Successfully assigned the pod to its node"),
        ("Pulled", "Container image already present on machine"),
        ("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503"),
        ("BackOff", "Back-off restarting failed container main in pod"),
    ][(n % 4) as usize];
    let pod = mixed(n) % PODS;
    json!({"apiVersion": "v1", "kind": "Event", "type": "Normal", "reason": reason, "message": format!("{message} {}", pod_name(pod)),
        "metadata": {"name": format!("{}.{:x}", pod_name(pod), Utc::now().timestamp_nanos_opt().unwrap_or_default()), "namespace": namespace(pod)},
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": pod_name(pod), "namespace": namespace(pod)},
        "source": {"component": "kubelet", "host": node_name(pod)}, "count": 1, "firstTimestamp": now(), "lastTimestamp": now()})
}

fn pod_status(n: u64, turn: u64) -> Value {
    let ready = if mixed(turn).is_multiple_of(5) { "False" } else { "True" };
    // A container that restarts is another; one update in fifty is of that.
    let restarts = if mixed(turn + 1).is_multiple_of(50) { turn } else { 0 };
    let id = mixed(n + restarts);
    json!({"status": {
        "phase": "Running", "podIP": format!("100.64.{}.{}", n / 250, n % 250 + 1), "startTime": now(),
        "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": now()}, {"type": "ContainersReady", "status": ready, "lastTransitionTime": now()},
            {"type": "Initialized", "status": "True", "lastTransitionTime": now()}, {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}],
        "containerStatuses": [{"name": "main", "ready": ready == "True", "started": true, "restartCount": restarts % 7, "image": "main", "imageID": format!("sha256:{:016x}", mixed(n)),
            "containerID": format!("containerd://{:016x}{:016x}{:016x}{:016x}", id, mixed(id), mixed(id + 1), mixed(id + 2)),
            "state": {"running": {"startedAt": now()}}}],
    }})
}

async fn create_all(client: &Client) -> Result<()> {
    for name in (0..5).map(namespace).chain(["kube-node-lease".to_owned()]) {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        // The apiserver itself makes one of them.
        let _ = client.create("/api/v1/namespaces", &object).await;
    }
    for n in 0..NODES {
        client.create("/api/v1/nodes", &node(n)).await?;
        client.patch(&format!("/api/v1/nodes/{}/status", node_name(n)), &node_status(n)).await?;
        client.create("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", &lease(n)).await?;
    }
    for n in 0..PODS {
        client.create(&format!("/api/v1/namespaces/{}/pods", namespace(n)), &pod(n)).await?;
    }
    for n in 0..SERVICES {
        let slices = format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", namespace(n));
        client.create(&slices, &endpoint_slice(n, 0)).await?;
    }
    Ok(())
}

/// One update, of the kinds and in the shares that a cluster sees.
async fn update(client: &Client, turn: u64) -> Result<()> {
    let of = mixed(turn);
    match of % 20 {
        0..=9 => {
            let n = of / 20 % NODES;
            let path = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{}", node_name(n));
            client.patch(&path, &json!({"spec": {"renewTime": micros()}})).await
        }
        10..=13 => {
            let event = event(turn);
            let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
            client.create(&format!("/api/v1/namespaces/{namespace}/events"), &event).await
        }
        14..=17 => {
            let n = of / 20 % PODS;
            let path = format!("/api/v1/namespaces/{}/pods/{}/status", namespace(n), pod_name(n));
            client.patch(&path, &pod_status(n, turn)).await
        }
        18 => {
            let n = of / 20 % NODES;
            client.patch(&format!("/api/v1/nodes/{}/status", node_name(n)), &node_status(n)).await
        }
        _ => {
            let n = of / 20 % SERVICES;
            let slices = format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", namespace(n));
            let endpoints = endpoint_slice(n, turn)["endpoints"].take();
            client.patch(&format!("{slices}/service-{n}-abcde"), &json!({"endpoints": endpoints})).await
        }
    }
}

/// Bytes of the files whose path has a part in it.
fn bytes(dir: &Path, part: &str) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sum += bytes(&path, part)?;
        } else if path.to_string_lossy().contains(part) {
            sum += path.metadata()?.len();
        }
    }
    Ok(sum)
}

/// Records a workload with ours, copies that to the predecessor's layout, and prints the bytes of both.
pub(crate) async fn run(dir: &Path) -> Result<()> {
    let dir = dir.join("compression");
    super::fresh(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let member = Member::single("3.6", &dir.join("data"))?.flag("--unsafe-no-fsync");
    let _etcd = member.start().await?;
    let endpoint = member.client_url();
    let server = ApiServer::start(&dir.join("apiserver"), &endpoint).await?;
    create_all(&server.client()).await?;
    let (ours, theirs) = (dir.join("ours"), dir.join("theirs"));
    let mut command = Command::new(program::path()?);
    command.args(["snapshot", "--endpoints", &endpoint, "--store", &tests::file_url(&ours), "--delta-period", "20s"]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let client = server.client();
        writers.spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 * WRITERS / UPDATES_PER_SECOND));
            for turn in 0..SECONDS * UPDATES_PER_SECOND / WRITERS {
                tick.tick().await;
                update(&client, 1_000_000 + turn * WRITERS + writer).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)?;
    ensure!(child.wait()?.success(), "the backup failed");
    let status = Command::new(program::path()?)
        .args([
            "copy",
            "--layout",
            "gardener-v2",
            "--store",
            &tests::file_url(&ours),
            "--to",
            &tests::file_url(&theirs),
        ])
        .stdout(Stdio::null())
        .status()
        .context("copy")?;
    ensure!(status.success(), "the copy failed");
    println!("\ncompression: {} updates by a kube-apiserver, a delta every 20 s", SECONDS * UPDATES_PER_SECOND);
    for (what, our_part, their_part) in [("full snapshot", "/full/", "/Full-"), ("deltas", "/delta/", "/Incr-")] {
        let (ours, theirs) = (bytes(&ours, our_part)? as f64, bytes(&theirs, their_part)? as f64);
        println!(
            "{what:<34} {:>7.2} MB  as the predecessor stores it {:>7.2} MB   ratio {:>5.1}",
            ours / 1e6,
            theirs / 1e6,
            theirs / ours
        );
    }
    drop(server);
    super::fresh(&dir)
}
