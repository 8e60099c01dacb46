//! What the program says of itself.

use anyhow::{Context, Result, ensure};
use tests::program::Sidecar;

#[tokio::test(flavor = "multi_thread")]
async fn completions_are_shell_and_know_every_command() -> Result<()> {
    let help = Sidecar::new(["--help"]).run().await?.expect(0)?.stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<String> =
        commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned)).collect();
    ensure!(["restore", "verify", "serve"].iter().all(|name| commands.iter().any(|command| command == name)), "{help}");
    for shell in ["bash", "zsh", "fish"] {
        let script = Sidecar::new(["completions", shell]).run().await?.expect(0)?.stdout;
        for command in commands.iter().filter(|command| !command.is_empty()) {
            ensure!(script.contains(command.as_str()), "{shell} does not know {command}");
        }
        if shell == "bash" {
            let dir = tempfile::tempdir()?;
            let path = dir.path().join("completions.bash");
            std::fs::write(&path, script)?;
            tests::succeed(tokio::process::Command::new("bash").arg("-n").arg(path)).await?;
        }
    }
    Sidecar::new(["completions", "cmd.exe"]).run().await?.expect(2)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manual_has_a_page_for_every_command() -> Result<()> {
    let whole = Sidecar::new(["man"]).run().await?.expect(0)?.stdout;
    ensure!(whole.contains(".TH") && whole.contains("sidecar"), "{whole}");
    let dir = tempfile::tempdir()?;
    Sidecar::new(["man"]).arg(dir.path()).run().await?.expect(0)?;
    for page in ["sidecar", "sidecar-restore", "sidecar-verify", "sidecar-gc", "sidecar-serve"] {
        let text = std::fs::read_to_string(dir.path().join(format!("{page}.1")))?;
        ensure!(text.contains(".SH NAME") && text.contains("OPTIONS"), "{page}: {text}");
    }
    Ok(())
}

/// Configurations as they are shown, each of which must be one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_shown_is_understood() -> Result<()> {
    let deploy = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar/deploy");
    for name in ["reference.yaml", "cluster/sidecar.yaml", "systemd/sidecar.yaml", "kubeadm/sidecar.yaml"] {
        let print = Sidecar::new(["serve", "--print-config", "--config"]).arg(deploy.join(name));
        print.run().await?.expect(0)?;
    }
    let reference = std::fs::read_to_string(deploy.join("reference.yaml"))?;
    let printed = Sidecar::new(["serve", "--print-config", "--config"]).arg(deploy.join("reference.yaml"));
    let printed = printed.run().await?.expect(0)?.json()?;
    for field in proto::config::FIELDS {
        let name = field.rsplit('.').next().unwrap_or_default();
        ensure!(reference.contains(&format!("  {name}: ")), "{field} is not in the reference");
        let pointer = format!("/{}", field.replace('.', "/"));
        ensure!(printed.pointer(&pointer).is_some(), "{field} is not read from the reference");
    }
    // What it says are defaults.
    let read = proto::config::SidecarConfig::parse(&reference)?;
    ensure!(
        read.snapshots == proto::config::Snapshots::default()
            && read.background == proto::config::Background::default()
    );
    ensure!(read.retention == Some(proto::config::Retention::default()), "{:?}", read.retention);
    ensure!(read.compaction == Some(proto::config::Compaction::default()), "{:?}", read.compaction);
    ensure!(read.verification == Some(proto::config::Verification::default()), "{:?}", read.verification);
    ensure!(read.defragmentation == Some(proto::config::Defragmentation::default()), "{:?}", read.defragmentation);
    ensure!(
        read.etcd.endpoints == proto::config::Etcd::default().endpoints
            && read.safety == proto::config::Safety::default()
    );
    let (server, default) = (read.server, proto::config::Server::default());
    ensure!(
        (server.listen, server.insecure, server.etcd_wrapper, server.open_snapshots)
            == (default.listen, default.insecure, default.etcd_wrapper, default.open_snapshots)
    );
    let (kubernetes, default) = (read.kubernetes.context("no section")?, proto::config::Kubernetes::default());
    ensure!((kubernetes.namespace, kubernetes.heartbeat_period) == (default.namespace, default.heartbeat_period));
    // One file for all members.
    let dir = tempfile::tempdir()?;
    let etcd = dir.path().join("etcd.yaml");
    std::fs::copy(deploy.join("cluster/etcd.yaml"), &etcd)?;
    for (pod, code) in [("a", 12), ("d", 2)] {
        let doctor = Sidecar::new(["doctor", "--config"]).arg(deploy.join("cluster/sidecar.yaml")).env("POD_NAME", pod);
        let set = format!("member.etcdConfig={}", etcd.display());
        let ended = doctor.args(["--set", &set, "--set", "store.url=file:///nowhere"]).run().await?.expect(code)?;
        ensure!(code == 2 || ended.stdout.contains("a, in a cluster of 3"), "{}", ended.stdout);
    }
    Ok(())
}
