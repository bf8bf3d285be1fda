//! Writing files so that a reader never meets half of one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes a file by way of a temporary one in the same folder, which takes its place when it is complete.
///
/// * `write`: writes the whole content to the path that it is given; that path has `path`'s extension
///
/// # Errors
/// [`Error::Io`] with `path`; an existing file is then as it was.
pub fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let target = follow_links(path);
    if target.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
        // A device or a pipe has no content that could be half-written, and must not be replaced by a file.
        return write(&target).map_err(|source| Error::io("write", path, source));
    }
    let Some(name) = target.file_name() else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file");
        return Err(Error::io("write", path, source));
    };
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut temporary = format!(".{}.{}-{count}.tmp", name.to_string_lossy(), std::process::id());
    if let Some(extension) = target.extension() {
        temporary.push('.');
        temporary += &extension.to_string_lossy();
    }
    let temporary = target.with_file_name(temporary);
    write(&temporary).and_then(|()| std::fs::rename(&temporary, &target)).map_err(|source| {
        // It may never have come to be; nothing more can be done about it.
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path, source)
    })
}

/// Where a chain of symbolic links leads, whether or not there is a file.
fn follow_links(path: &Path) -> PathBuf {
    /// Longer chains are circles.
    const MAX_LINKS: usize = 16;
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(link) = std::fs::read_link(&path) else { break };
        path = path.parent().map_or_else(|| link.clone(), |folder| folder.join(&link));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        replace(&path, |temporary| std::fs::write(temporary, "old")).unwrap();
        let failing = |temporary: &Path| {
            std::fs::write(temporary, "half")?;
            Err(io::Error::other("full disk"))
        };
        let error = replace(&path, failing).unwrap_err();
        assert_eq!(error.to_string(), format!("failed to write `{}`: full disk", path.display()));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(replace(Path::new("/"), |_| Ok(())).is_err());
    }
}
