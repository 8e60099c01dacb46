//! `cargo tools`, `cargo demo`, `cargo suite`: fetch what is missing, then run.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use tools::{INSTALLED, Result, TOOLS, Tool, lay_out_protoc, need, tool};

const USAGE: &str = "\
usage:
  cargo demo                  the main job, end to end, on a real etcd
  cargo suite [FILTER …]      every check and every test; FILTERs go to cargo test
  cargo tools [list]          the pinned external programs, and where they are
  cargo tools fetch [NAME …]  get those that are missing, or what tests need of them
  cargo bench-restore [ARG …] measure; see --help";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["tools"] | ["tools", "list"] => {
            list();
            Ok(())
        }
        ["tools", "fetch", names @ ..] => fetch(names),
        ["demo"] => demo(),
        ["suite", filters @ ..] => suite(filters),
        ["bench", rest @ ..] => bench(rest),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

#[expect(clippy::print_stdout, reason = "a listing is the result")]
fn list() {
    for tool in TOOLS {
        for program in tool.programs {
            let place = tool
                .program(program)
                .map_or_else(|| "missing; `cargo tools fetch` gets it".to_owned(), |path| path.display().to_string());
            println!("{:<11} {:<9} {:<10} {place}", tool.name, tool.version, program);
        }
    }
}

/// Gets the tools named, or all that tests need; tries every one and says which failed.
fn fetch(names: &[&str]) -> Result<()> {
    lay_out_protoc(&workspace())?;
    let wanted: Vec<&Tool> = if names.is_empty() {
        TOOLS.iter().collect()
    } else {
        // protoc is no tool of the tests; it was laid out above.
        names.iter().filter(|name| **name != "protoc").map(|name| tool(name)).collect::<Result<_>>()?
    };
    let mut failed: Vec<String> = wanted
        .iter()
        .filter_map(|tool| tool.fetch().err().map(|error| format!("  {} {}: {error}", tool.name, tool.version)))
        .collect();
    if names.is_empty() {
        let needed = INSTALLED.iter().filter_map(|(program, package)| need(program, package).err());
        failed.extend(needed.map(|error| format!("  {error}")));
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("some tools could not be had:\n{}", failed.join("\n"))) }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace()).stdin(Stdio::null());
    let protoc = workspace().join("target/protoc");
    command.env("PROTOC", protoc.join("bin/protoc")).env("PROTOC_INCLUDE", protoc.join("include"));
    command
}

fn step(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("== {name}");
    let started = Instant::now();
    let status = command.status().map_err(|error| format!("run {name}: {error}"))?;
    if !status.success() {
        return Err(format!("{name} failed with {status}"));
    }
    eprintln!("== {name}: {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn demo() -> Result<()> {
    fetch(&["etcd-3.6"])?;
    eprintln!("building (the first time takes some minutes)");
    step("build", &mut cargo(&["build", "--quiet", "--package", "sidecar", "--package", "tests", "--bins"]))?;
    let status = cargo(&["run", "--quiet", "--package", "tests", "--bin", "demo"])
        .status()
        .map_err(|error| format!("run the demo: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the demo failed with {status}")) }
}

fn suite(filters: &[&str]) -> Result<()> {
    let started = Instant::now();
    components()?;
    fetch(&[])?;
    step("fmt", &mut cargo(&["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", FEATURES, "--", "-D", "warnings"];
    step("clippy", &mut cargo(&clippy))?;
    step("doc", cargo(&["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    let deny = tool("cargo-deny")?.program("cargo-deny").ok_or("cargo-deny is missing")?;
    step(
        "deny",
        Command::new(deny)
            .args(["check", "--hide-inclusion-graph", "bans", "licenses", "sources"])
            .current_dir(workspace()),
    )?;
    // Two tests take it, and none of them for speed.
    let quickly = ["--config", "profile.dev.package.'*'.opt-level=0"];
    let static_one = ["build", "--quiet", "--package", "sidecar", "--bin", "sidecar", "--target", STATIC];
    step("static", cargo(&static_one).args(quickly))?;
    step("build", &mut cargo(&["build", "--quiet", "--workspace", "--bins", "--features", FEATURES]))?;
    let mut test = cargo(&["test", "--workspace", "--no-fail-fast", "--features", FEATURES]);
    step("test", test.args(["--"]).args(filters))?;
    eprintln!("== suite passed in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// What the static program is built for.
const STATIC: &str =
    if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-musl" } else { "x86_64-unknown-linux-musl" };
/// What tests have the program do beside its defaults, which the static one has.
const FEATURES: &str = "sidecar/otlp";

/// rustfmt, clippy and the target of the static program come with the toolchain, or are added to it.
fn components() -> Result<()> {
    let targets = Command::new("rustup").args(["target", "list", "--installed"]).output();
    let targets = targets.map_err(|error| format!("run rustup: {error}"))?;
    if !String::from_utf8_lossy(&targets.stdout).lines().any(|target| target == STATIC) {
        step(&format!("rustup target add {STATIC}"), Command::new("rustup").args(["target", "add", STATIC]))?;
    }
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        let there = cargo(&[probe, "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !there {
            step(
                &format!("rustup component add {component}"),
                Command::new("rustup").args(["component", "add", component]),
            )?;
        }
    }
    Ok(())
}

fn bench(rest: &[&str]) -> Result<()> {
    fetch(&["etcd-3.6"])?;
    for (scenario, tool) in [("compression", "kubernetes"), ("outage", "minio")] {
        if rest.contains(&scenario) {
            fetch(&[tool])?;
        }
    }
    step(
        "build",
        &mut cargo(&["build", "--quiet", "--release", "--package", "sidecar", "--package", "tests", "--bins"]),
    )?;
    let status =
        cargo(&["run", "--quiet", "--release", "--package", "tests", "--bin", "bench", "--"]).args(rest).status();
    let status = status.map_err(|error| format!("run the benchmark: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the benchmark failed with {status}")) }
}
