//! The files of a store: how they are called, which go, and how processes keep out of each other's way.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::PrefixStore;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

/// How names of entries begin and end.
const START: &str = "prefix-";
const END: &str = ".kv";

/// Digits of a fingerprint.
const DIGITS: usize = 32;

/// The file that is locked while entries are removed. It stays.
const LOCK: &str = "prefix-store.lock";

/// How often, and how long apart, a lock is asked for that another process has.
const TRIES: usize = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// A file of a store.
#[derive(Debug)]
pub(super) struct Entry {
    pub path: PathBuf,
    pub bytes: u64,
    /// When it was stored or used last.
    used: SystemTime,
}

/// The name of an entry.
///
/// * `kind`: a fingerprint
/// * `ids`: the tokens that were read
pub(super) fn name(kind: &str, ids: &[u32]) -> String {
    let mut fingerprint = Fingerprint::default();
    for id in ids {
        fingerprint.add(id.to_le_bytes());
    }
    format!("{START}{kind}-{}{END}", fingerprint.finish())
}

/// The kind of cache that an entry's name tells; `None` if it is not the name of one.
fn kind_of(name: &str) -> Option<&str> {
    let (kind, ids) = name.strip_prefix(START)?.strip_suffix(END)?.split_once('-')?;
    let is_fingerprint =
        |text: &str| text.len() == DIGITS && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    (is_fingerprint(kind) && is_fingerprint(ids)).then_some(kind)
}

/// Takes down that a file was used now.
pub(super) fn touch(path: &Path) {
    // Whoever may not do so, or comes too late, has used it all the same.
    let _ = OpenOptions::new().write(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

impl PrefixStore {
    /// All entries, those first that were not used for the longest time.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder can't be read.
    pub(super) fn entries(&self) -> Result<Vec<Entry>> {
        let failed = |source| Error::io("read", &self.folder, source);
        let mut entries = Vec::new();
        for file in std::fs::read_dir(&self.folder).map_err(failed)? {
            let file = file.map_err(failed)?;
            if file.file_name().to_str().and_then(kind_of).is_none() {
                continue;
            }
            // It may be gone by now.
            let Ok(metadata) = file.metadata() else { continue };
            if metadata.is_file() {
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                entries.push(Entry { path: file.path(), bytes: metadata.len(), used });
            }
        }
        entries.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
        Ok(entries)
    }

    /// The entries of a kind, in the same order.
    ///
    /// # Errors
    /// As [`entries`](Self::entries).
    pub(super) fn entries_of(&self, kind: &str) -> Result<Vec<PathBuf>> {
        let is_of_kind = |path: &PathBuf| path.file_name().and_then(|name| kind_of(name.to_str()?)) == Some(kind);
        Ok(self.entries()?.into_iter().map(|entry| entry.path).filter(is_of_kind).collect())
    }

    /// Removes entries, and then those that were not used for the longest time, until the rest comes to at most `limit` bytes.
    /// Where another process does so for long, that has to do.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder can't be read, or written to.
    pub(super) fn trim(&self, superseded: &[PathBuf], limit: u64) -> Result<()> {
        let Some(_lock) = self.lock()? else { return Ok(()) };
        for path in superseded {
            // What can't be removed stays: it is somebody else's, in a folder that all write to.
            let _ = std::fs::remove_file(path);
        }
        let entries = self.entries()?;
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries {
            if bytes <= limit {
                break;
            }
            if std::fs::remove_file(&entry.path).is_ok() {
                bytes -= entry.bytes;
            }
        }
        Ok(())
    }

    /// A file that only one process has locked at a time; `None` if another keeps it.
    fn lock(&self) -> Result<Option<File>> {
        let path = self.folder.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        // Another user's can be locked, too.
        let file = file
            .or_else(|error| File::open(&path).map_err(|_| error))
            .map_err(|source| Error::io("write", &path, source))?;
        for _ in 0..TRIES {
            match file.try_lock() {
                // Some network drives know no locks.
                Ok(()) | Err(TryLockError::Error(_)) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
        Ok(None)
    }
}

/// Whether a file is not there.
pub(super) fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_kinds_and_nothing_else_is_an_entry() {
        let kind = "0123456789abcdef0123456789abcdef";
        let one = name(kind, &[1, 2]);
        assert_eq!(kind_of(&one), Some(kind));
        assert!(one != name(kind, &[1, 2, 0]) && one == name(kind, &[1, 2]));
        for other in ["a.kv", "prefix-.kv", "prefix-store.lock", &one[1..], &one[..one.len() - 1], &one.to_uppercase()]
        {
            assert_eq!(kind_of(other), None, "{other}");
        }
        assert_eq!(kind_of(&format!("{}-x.kv", &one[..40])), None);
    }

    #[test]
    fn the_longest_unused_go_and_other_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = PrefixStore::open(folder.path(), 100).unwrap();
        let kind = "0".repeat(DIGITS);
        let paths: Vec<PathBuf> = (0..5).map(|id| folder.path().join(name(&kind, &[id]))).collect();
        for (path, age) in paths.iter().zip([5, 1, 4, 2, 3]) {
            std::fs::write(path, [0; 30]).unwrap();
            let used = SystemTime::now() - Duration::from_secs(age * 60);
            File::options().write(true).open(path).unwrap().set_modified(used).unwrap();
        }
        std::fs::write(folder.path().join("book.kv"), [0; 300]).unwrap();
        std::fs::create_dir(folder.path().join(name(&kind, &[9]))).unwrap();
        assert_eq!(store.bytes().unwrap(), 150);
        touch(&paths[0]);
        store.trim(&paths[3..4], 60).unwrap();
        let left: Vec<bool> = paths.iter().map(|path| path.exists()).collect();
        assert_eq!(left, [true, true, false, false, false]);
        assert_eq!(store.entries_of(&kind).unwrap(), [paths[1].clone(), paths[0].clone()]);
        assert_eq!(store.entries_of(&"1".repeat(DIGITS)).unwrap(), Vec::<PathBuf>::new());
        assert!(folder.path().join("book.kv").exists() && folder.path().join(name(&kind, &[9])).exists());
        // Another that has the lock for long does the work.
        let lock = store.lock().unwrap();
        store.trim(&[], 0).unwrap();
        drop(lock);
        assert_eq!(store.bytes().unwrap(), 60);
        store.trim(&[], 0).unwrap();
        assert_eq!(store.bytes().unwrap(), 0);
    }
}
