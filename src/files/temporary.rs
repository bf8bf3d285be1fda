//! Temporary files: one beside each file that is written, until it is complete.
//!
//! Each is locked as long as its process lives. So a later run can tell those that a killed one has left, whatever
//! process has its number now, and removes them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a file's name that its temporary file's name repeats: names are limited to 255.
const MAX_NAME_BYTES: usize = 100;

/// A temporary file, which goes away with this value unless it has taken another's place.
struct Temporary {
    path: PathBuf,
    /// Locked.
    file: File,
    is_placed: bool,
}

impl Temporary {
    /// * `name`: of the file that it is for
    fn create(folder: &Path, name: &OsStr) -> io::Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = name.to_string_lossy();
        let end = (0..=name.len().min(MAX_NAME_BYTES)).rev().find(|&end| name.is_char_boundary(end));
        let name = &name[..end.unwrap_or(0)];
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".{name}.{}-{count}.tmp", std::process::id()));
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other?,
            };
            match file.try_lock() {
                // Some network drives know no locks; then nobody can take it for one that was left, either.
                Ok(()) | Err(TryLockError::Error(_)) => {}
                Err(TryLockError::WouldBlock) => continue, // somebody is about to remove it
            }
            let temporary = Self { path, file, is_placed: false };
            if is_at(&temporary.file, &temporary.path) {
                return Ok(temporary);
            }
        }
    }

    fn place(mut self, target: &Path) -> io::Result<()> {
        // Else, after a power failure, the name may be there before the content.
        self.file.sync_all()?;
        std::fs::rename(&self.path, target)?;
        self.is_placed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.is_placed {
            // Nothing more can be done about one that stays; the next run removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Puts a file in the place of what is there.
///
/// * `write`: gives it its content
pub(super) fn replace(target: &Path, write: &mut dyn FnMut(&mut File) -> io::Result<()>) -> io::Result<()> {
    let Some(name) = target.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
    };
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    remove_abandoned_once(folder);
    let mut temporary = Temporary::create(folder, name)?;
    write(&mut temporary.file)?;
    keep_owner_and_mode(&temporary.file, target);
    temporary.place(target)
}

/// Makes a file in a folder, and removes it.
pub(super) fn probe(folder: &Path) -> io::Result<()> {
    remove_abandoned_once(folder);
    Temporary::create(folder, OsStr::new("probe")).map(drop)
}

/// Gives a new file owner, group and mode of the one whose place it takes, as far as the system lets us.
fn keep_owner_and_mode(file: &File, old: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
        let (Ok(old), Ok(new)) = (old.metadata(), file.metadata()) else { return };
        let mut mode = old.mode() & 0o7777;
        if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
            let kept = fchown(file, Some(old.uid()), Some(old.gid())).is_ok();
            if !kept {
                // A mode that lends rights of its owner is not to lend another's.
                mode &= 0o1777;
                let _ = fchown(file, None, Some(old.gid()));
            }
        }
        let _ = file.set_permissions(std::fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = (file, old);
}

/// Removes what killed runs have left in a folder; once for each folder, since nobody leaves more while this run lives but
/// those that are killed meanwhile.
fn remove_abandoned_once(folder: &Path) {
    static DONE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    if DONE.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.clone()) {
        remove_abandoned(&folder);
    }
}

fn remove_abandoned(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(process_of) else { continue };
        // Most of those that live are seen at a glance. This process has the number of a dead one if it is the first of
        // its container, say; what is its own is locked.
        if process != std::process::id() && is_alive(process) {
            continue;
        }
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::open(&path)
            && file.try_lock().is_ok()
            && is_at(&file, &path)
        {
            // It may be another's, in a folder that all write to.
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// The process that a temporary file's name tells: `.NAME.PROCESS-COUNT.tmp`, with or without an extension.
fn process_of(name: &str) -> Option<u32> {
    let name = name.strip_prefix('.')?;
    let (head, end) = name.rsplit_once(".tmp")?;
    if !end.is_empty() && !end.starts_with('.') {
        return None;
    }
    let (_, numbers) = head.rsplit_once('.')?;
    let (process, count) = numbers.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(process) && is_number(count)).then(|| process.parse().ok())?
}

#[cfg(unix)]
fn is_alive(process: u32) -> bool {
    let Ok(process) = libc::pid_t::try_from(process) else { return false };
    // SAFETY: signal 0 asks whether there is such a process, and does nothing.
    process > 0
        && (unsafe { libc::kill(process, 0) } == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM))
}

#[cfg(not(unix))]
fn is_alive(_: u32) -> bool {
    false // its lock tells
}

/// Whether an open file is the one that has this path now.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        matches!((file.metadata().map(identity), path.symlink_metadata().map(identity)), (Ok(a), Ok(b)) if a == b)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn names_tell_their_process() {
        for (name, process) in [
            (".r.json.12-0.tmp", Some(12)),
            (".r.json.12-0.tmp.json", Some(12)),
            (".a.tmp.b.7-3.tmp", Some(7)),
            ("r.json.12-0.tmp", None),
            (".r.json.12.tmp", None),
            (".r.json.12-.tmp", None),
            (".r.json.x-0.tmp", None),
            (".r.json.12-0.tmpx", None),
            (".12-0.tmp", None),
            (".r.99999999999-0.tmp", None),
        ] {
            assert_eq!(process_of(name), process, "{name}");
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a");
        std::fs::write(&target, "old").unwrap();
        let mut temporary = Temporary::create(folder.path(), OsStr::new("a")).unwrap();
        temporary.file.write_all(b"half").unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        drop(temporary);
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn what_dead_processes_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let dead = {
            let mut child = std::process::Command::new("true").spawn().unwrap();
            child.wait().unwrap();
            child.id()
        };
        let own = Temporary::create(folder.path(), OsStr::new("own")).unwrap();
        let left = [format!(".r.json.{dead}-0.tmp"), format!(".p.png.{dead}-12.tmp.png")];
        let mine = [format!("r.json.{dead}-0.tmp"), ".r.json.1-0.tmp".to_owned(), format!(".vimrc.{dead}.tmp")];
        let locked_name = format!(".l.{dead}-1.tmp");
        for name in left.iter().chain(&mine).chain([&locked_name]) {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        std::fs::create_dir(folder.path().join(format!(".d.{dead}-0.tmp"))).unwrap();
        let locked = File::open(folder.path().join(&locked_name)).unwrap();
        locked.lock().unwrap();
        remove_abandoned(folder.path());
        for name in &left {
            assert!(!folder.path().join(name).exists(), "{name}");
        }
        for name in mine.iter().chain([&locked_name, &format!(".d.{dead}-0.tmp")]) {
            assert!(folder.path().join(name).exists(), "{name}");
        }
        assert!(own.path.exists());
    }
}
