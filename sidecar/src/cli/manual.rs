//! `sidecar completions` and `sidecar man`: made from the flags themselves, so they cannot differ.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, write_out};
use crate::{Error, Result};

/// Print what a shell needs to complete commands and flags.
///
/// Such as: sidecar completions bash > /etc/bash_completion.d/sidecar
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// For which shell.
    shell: Shell,
}

/// Print the manual page, or write one of each command into a directory.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Write sidecar.1, sidecar-restore.1 and so on there.
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sidecar", &mut text);
    write_out(&text)?;
    Ok(0)
}

pub(super) fn man(args: &ManArgs) -> Result<u8> {
    if let Some(dir) = &args.dir {
        clap_mangen::generate_to(Cli::command(), dir).map_err(Error::io("write to", dir.display()))?;
    } else {
        let mut text = Vec::new();
        let page = clap_mangen::Man::new(Cli::command());
        page.render(&mut text).map_err(Error::io("render", "the manual page"))?;
        write_out(&text)?;
    }
    Ok(0)
}
