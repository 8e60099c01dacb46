//! Files that a person or a machine wrote to be read whole: configurations, certificates, secrets. None is large, and what has no
//! end is no such file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

const MOST_BYTES: u64 = 4 << 20;

/// Reads one.
pub(crate) fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let (path, mut bytes) = (path.as_ref(), Vec::new());
    // To open what is none may take for ever.
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        let what = format!("it is larger than {MOST_BYTES} bytes, which no file of its kind is");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    Ok(bytes)
}

/// Reads one that is text.
pub(crate) fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_refused() {
        assert!(read("/dev/zero").is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput));
        let large = tempfile::NamedTempFile::new().unwrap();
        large.as_file().set_len(MOST_BYTES + 1).unwrap();
        assert!(read(large.path()).is_err_and(|error| error.kind() == io::ErrorKind::FileTooLarge));
        large.as_file().set_len(2).unwrap();
        assert!(read_text(large.path()).is_ok_and(|text| text == "\0\0"));
    }
}
