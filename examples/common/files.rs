//! Files that are either there whole or not there: written under another name, then renamed.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Writes `bytes` to `path`, replacing what is there. A reader never sees half a file, and a crash leaves the old one.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".part");
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Makes a directory and those above it.
pub fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make the directory {}", path.display()))
}
