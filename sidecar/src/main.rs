//! The `sidecar` program: parses, sets up logging and TLS, runs, and turns the result into an exit code.

use std::process::ExitCode;

use clap::Parser;
use sidecar::cli::Cli;

fn main() -> ExitCode {
    sidecar::allocator::share_arenas();
    let cli = Cli::parse();
    // Everything that tells the time counts from then.
    if std::time::SystemTime::now() < std::time::UNIX_EPOCH {
        eprintln!("error: the clock of this machine is before 1970: set it");
        return ExitCode::from(sidecar::Class::Precondition.exit_code());
    }
    // Backups and data directories hold every secret of a cluster: they are for their owner alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Explicitly the one provider there is: nothing in the process picks one by accident.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // Two workers carry any load this has; the work that takes time runs on threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(cli.run());
            // A blocked thread must not hold up the exit: what it did is either committed or undone by the next run.
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("error: start the runtime: {error}");
            ExitCode::from(1)
        }
    }
}
