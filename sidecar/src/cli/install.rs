//! `sidecar install`.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::{Error, Result};

/// Copy this program to another place, for a container that has none of its own.
///
/// What a pod's init container does: it needs no shell, and neither do the images that then run it. What is there is replaced
/// as a whole.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to, such as /steward/sidecar on a volume that the containers of a pod share.
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<u8> {
    let fail = |error| Error::io("install to", args.to.display())(error);
    let own = std::env::current_exe().map_err(fail)?;
    let dir = args.to.parent().filter(|_| args.to.file_name().is_some());
    let dir = dir.ok_or_else(|| Error::invalid(format!("{} is not the path of a file", args.to.display())))?;
    let mut copy =
        tempfile::NamedTempFile::new_in(if dir.as_os_str().is_empty() { ".".as_ref() } else { dir }).map_err(fail)?;
    io::copy(&mut File::open(&own).map_err(Error::io("read", own.display()))?, &mut copy).map_err(fail)?;
    copy.as_file().set_permissions(std::fs::Permissions::from_mode(0o755)).map_err(fail)?;
    copy.as_file().sync_all().map_err(fail)?;
    copy.persist(&args.to).map_err(|error| fail(error.error))?;
    tracing::info!(path = %args.to.display(), "installed");
    Ok(0)
}
