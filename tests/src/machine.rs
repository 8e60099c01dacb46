//! A machine of its own, as far as systemd can tell: it is the first process of its namespaces, and what it sees of `/etc`,
//! `/var/lib`, `/var/cache` and `/usr/local/bin` lies in a directory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;

/// A running systemd, with the units and files that it was given; ended, with all that it runs, when dropped.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    unshare: Child,
    /// Its first process, as this machine numbers it, once that has begun.
    first: Option<Pid>,
}

/// Hierarchies of cgroups, where systemd leaves its own.
const CGROUPS: &str = "/sys/fs/cgroup";

impl Machine {
    /// Boots one in a directory. `etc` are files below `/etc`, `programs` those of `/usr/local/bin`; a user `etcd` is there.
    pub async fn boot(dir: &Path, units: &[PathBuf], etc: &[(&str, PathBuf)], programs: &[PathBuf]) -> Result<Self> {
        for place in ["units", "etc", "etc.work", "lib", "cache", "bin"] {
            std::fs::create_dir_all(dir.join(place))?;
        }
        for (into, files) in [("units", units), ("bin", programs)] {
            for file in files {
                std::fs::copy(file, dir.join(into).join(file.file_name().context("no name")?))?;
            }
        }
        let wanted: Vec<_> = units.iter().filter_map(|unit| unit.file_name()?.to_str()).collect();
        let target = format!("[Unit]\nDescription=what is tried\nWants={}\n", wanted.join(" "));
        std::fs::write(dir.join("units/default.target"), target)?;
        // What every unit waits for; there is nothing to wait for here.
        for name in ["sysinit", "basic", "shutdown", "network-online"] {
            std::fs::write(dir.join(format!("units/{name}.target")), "[Unit]\nDefaultDependencies=no\n")?;
        }
        for (name, from) in etc {
            let to = dir.join("etc").join(name);
            std::fs::create_dir_all(to.parent().context("no parent")?)?;
            std::fs::copy(from, &to)?;
        }
        for (file, line) in [("passwd", "etcd:x:990:990::/nonexistent:/usr/sbin/nologin\n"), ("group", "etcd:x:990:\n")]
        {
            let text = std::fs::read_to_string(Path::new("/etc").join(file))?;
            std::fs::write(dir.join("etc").join(file), text + line)?;
        }
        let here = dir.display();
        let script = format!(
            "set -e\nmount --make-rprivate /\n\
             mount -t overlay overlay -o lowerdir=/etc,upperdir={here}/etc,workdir={here}/etc.work /etc\n\
             mount --bind {here}/bin /usr/local/bin\nmount --bind {here}/lib /var/lib\n\
             mount --bind {here}/cache /var/cache\n\
             chown -R 990:990 /etc/etcd-steward\nmount -t tmpfs tmpfs /run\n\
             export SYSTEMD_UNIT_PATH={here}/units container=steward SYSTEMD_LOG_TARGET=console\n\
             exec /lib/systemd/systemd --system --unit=default.target --show-status=no\n"
        );
        let boot = dir.join("boot.sh");
        std::fs::write(&boot, script)?;
        let log = std::fs::File::create(dir.join("systemd.log"))?;
        let unshare = Command::new("unshare")
            .args(["--fork", "--pid", "--mount", "--uts", "--ipc", "--mount-proc", "sh"])
            .arg(&boot)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut this = Self { dir: dir.to_owned(), unshare, first: None };
        let pid = this.unshare.id();
        let children = move || async move {
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let first = children.split_whitespace().next().context("it has not begun")?;
            Pid::from_raw(first.parse()?).context("no pid")
        };
        this.first = Some(eventually(Duration::from_secs(10), children).await?);
        eventually(Duration::from_secs(120), || async { this.systemctl(&["is-active", "default.target"]).await })
            .await
            .with_context(|| std::fs::read_to_string(dir.join("systemd.log")).unwrap_or_default())?;
        Ok(this)
    }

    /// What is below `/var/lib` there.
    pub fn lib(&self) -> PathBuf {
        self.dir.join("lib")
    }

    /// Runs `systemctl` in it; what it prints, when it succeeds.
    pub async fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        let first = self.first.context("it has not begun")?.as_raw_nonzero().to_string();
        let mut command = tokio::process::Command::new("nsenter");
        command.args(["--target", &first, "--mount", "--pid", "systemctl", "--no-pager"]).args(arguments);
        let output = command.stdin(Stdio::null()).output().await?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(output.status.success(), "systemctl {arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
        Ok(text)
    }

    /// A property of a unit.
    pub async fn property(&self, unit: &str, property: &str) -> Result<String> {
        self.systemctl(&["show", "--property", property, "--value", unit]).await
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All that is in its namespace goes with it.
        match self.first {
            Some(first) => drop(kill_process(first, Signal::KILL)),
            None => drop(self.unshare.kill()),
        }
        let _ = self.unshare.wait();
        remove_cgroups(&["system.slice", "init.scope"]);
    }
}

/// Removes cgroups, with those in them, from every hierarchy. Those that somebody is in stay.
pub(crate) fn remove_cgroups(names: &[&str]) {
    for hierarchy in std::fs::read_dir(CGROUPS).into_iter().flatten().flatten() {
        for name in names {
            remove_cgroup(&hierarchy.path().join(name));
        }
    }
}

fn remove_cgroup(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
}
