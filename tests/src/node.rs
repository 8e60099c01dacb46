//! A node without a control plane: a real kubelet and containerd, which run the static pods that they are given.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

use crate::machine::remove_cgroups;
use crate::{eventually, program, succeed};

/// A running node; ended, with all its containers, when dropped. It must be in a network namespace of its own.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    containerd: Child,
    kubelet: Option<Child>,
}

/// Waits for a start.
const LONG: Duration = Duration::from_secs(60);

/// The programs of containerd, with the libraries that they came with.
fn containerd(name: &str) -> Result<Command> {
    let path = program("containerd", name)?;
    let dir = path.parent().context("no parent")?;
    let mut command = Command::new(&path);
    let before = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{before}", dir.display()));
    if dir.join("lib").is_dir() {
        command.env("LD_LIBRARY_PATH", dir.join("lib"));
    }
    Ok(command)
}

impl Node {
    /// Starts containerd below a directory, which should have a short path: sockets are in it.
    pub async fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("manifests"))?;
        let here = dir.display();
        let runc = program("containerd", "runc")?;
        std::fs::write(
            dir.join("containerd.toml"),
            format!(
                "version = 2\nroot = '{here}/root'\nstate = '{here}/state'\n[grpc]\naddress = '{here}/containerd.sock'\n\
                 [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'docker.io/steward/pause:1'\n\
                 restrict_oom_score_adj = true\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'overlayfs'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nBinaryName = '{}'\n",
                runc.display()
            ),
        )?;
        let log = File::create(dir.join("containerd.log"))?;
        let containerd = containerd("containerd")?
            .arg("--config")
            .arg(dir.join("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        let this = Self { dir: dir.to_owned(), containerd, kubelet: None };
        eventually(LONG, || async { this.ctr(&["version"]).await.map(drop) }).await.with_context(|| this.log())?;
        Ok(this)
    }

    /// What its programs logged.
    pub fn log(&self) -> String {
        let logs = ["containerd.log", "kubelet.log"].map(|name| {
            let log = std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            log.lines().rev().take(30).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
        });
        logs.join("\n----\n")
    }

    async fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = containerd("ctr")?;
        command.arg("--address").arg(self.dir.join("containerd.sock")).args(["--namespace", "k8s.io"]).args(arguments);
        succeed(&mut command.into()).await
    }

    /// Makes an image of a Containerfile that begins with nothing, copies files and names what is run; `from` says where each
    /// file is.
    pub async fn image(&self, name: &str, containerfile: &str, from: &[(&str, &Path)]) -> Result<()> {
        let build = self.dir.join("build");
        let _ = std::fs::remove_dir_all(&build);
        let (content, layer) = (build.join("content"), build.join("layer.tar"));
        std::fs::create_dir_all(&content)?;
        let mut entrypoint = serde_json::json!([]);
        for line in containerfile.lines() {
            match line.split_whitespace().collect::<Vec<_>>().as_slice() {
                ["COPY", file, to] => {
                    let (_, path) = from.iter().find(|(name, _)| name == file).context("a file that is not given")?;
                    let to = content.join(to.trim_start_matches('/'));
                    std::fs::create_dir_all(to.parent().context("no parent")?)?;
                    std::fs::copy(path, &to)?;
                }
                ["ENTRYPOINT", ..] => {
                    entrypoint = serde_json::from_str(line.trim_start_matches("ENTRYPOINT").trim())?;
                }
                _ => {}
            }
        }
        let tar = |to: &Path, dir: &Path| {
            let mut command = tokio::process::Command::new("tar");
            command.args(["--owner=0", "--group=0", "-cf"]).arg(to).arg("-C").arg(dir).arg(".");
            command
        };
        succeed(&mut tar(&layer, &content)).await?;
        std::fs::remove_dir_all(&content)?;
        let digest = bytes::Bytes::copy_from_slice(&Sha256::digest(std::fs::read(&layer)?));
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest:x}")]},
        });
        std::fs::write(build.join("config.json"), config.to_string())?;
        let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
        std::fs::write(build.join("manifest.json"), manifest.to_string())?;
        let archive = self.dir.join("image.tar");
        succeed(&mut tar(&archive, &build)).await?;
        self.ctr(&["images", "import", &archive.display().to_string()]).await?;
        Ok(std::fs::remove_file(&archive)?)
    }

    /// Where manifests of static pods go.
    pub fn manifests(&self) -> PathBuf {
        self.dir.join("manifests")
    }

    /// Starts the kubelet.
    pub fn start_kubelet(&mut self, address: &str) -> Result<()> {
        let here = self.dir.display();
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nstaticPodPath: {here}/manifests\n\
             authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
             authorization: {{mode: AlwaysAllow}}\ncgroupDriver: cgroupfs\nfailSwapOn: false\nfailCgroupV1: false\n\
             enforceNodeAllocatable: []\ncontainerRuntimeEndpoint: unix://{here}/containerd.sock\n\
             evictionHard: {{memory.available: 1Mi}}\nlocalStorageCapacityIsolation: false\n\
             fileCheckFrequency: 1s\nsyncFrequency: 5s\nshutdownGracePeriod: 0s\n"
        );
        std::fs::write(self.dir.join("kubelet.yaml"), config)?;
        let log = File::create(self.dir.join("kubelet.log"))?;
        let kubelet = Command::new(program("kubernetes", "kubelet")?)
            .arg(format!("--config={here}/kubelet.yaml"))
            .arg(format!("--root-dir={here}/kubelet"))
            .arg(format!("--cert-dir={here}/pki"))
            .arg(format!("--node-ip={address}"))
            .arg("--hostname-override=node")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.kubelet = Some(kubelet);
        Ok(())
    }

    /// Kills a container's process with SIGKILL, by a word of its command line.
    pub async fn kill(&self, word: &str) -> Result<()> {
        let tasks = self.ctr(&["tasks", "list"]).await?;
        for line in tasks.lines().skip(1) {
            let Some(pid) = line.split_whitespace().nth(1).and_then(|pid| Pid::from_raw(pid.parse().ok()?)) else {
                continue;
            };
            // One may have ended since.
            let command =
                std::fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            if command.contains(word) {
                return Ok(kill_process(pid, Signal::KILL)?);
            }
        }
        anyhow::bail!("nothing with {word} runs:\n{tasks}")
    }
}

/// SIGTERM, and if need be SIGKILL.
fn end(child: &mut Child) {
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    for _ in 0..100 {
        if child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(kubelet) = &mut self.kubelet {
            end(kubelet);
        }
        // Shims, and the containers below them, know where their containerd is.
        let socket = self.dir.join("containerd.sock").display().to_string();
        let mut shims = Vec::new();
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = std::fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            let pid = process.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?));
            if let (true, Some(pid)) = (command.contains("containerd-shim") && command.contains(&socket), pid) {
                shims.push(pid);
            }
        }
        for shim in &shims {
            let id = shim.as_raw_nonzero();
            let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                let _ = kill_process(child, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        end(&mut self.containerd);
        for shim in shims {
            let _ = kill_process(shim, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(500));
        // The deepest first: what is bound must not be deleted with the directory.
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let below = self.dir.display().to_string();
        let mut mounted: Vec<_> =
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(&below)).collect();
        mounted.sort_by_key(|at| std::cmp::Reverse(at.len()));
        for at in mounted {
            let _ = Command::new("umount").args(["--lazy", at]).stdin(Stdio::null()).stderr(Stdio::null()).status();
        }
        remove_cgroups(&["kubepods"]);
    }
}
