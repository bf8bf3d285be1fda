//! Writing files so that a reader never meets half of one, whatever the path leads to.
//!
//! A file is written beside its place and then put there whole. Pipes, devices and the process's own descriptors
//! (`/dev/stdout`, `/dev/fd/63`) cannot be replaced: what is written to them comes behind what they were given before.
//!
//! Not for: reading, and not for logs, whose lines are added one by one (but see [`open_to_append`]).

mod target;
mod temporary;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::error::{Error, Result};
use target::Target;

/// What helps against a path that cannot be written to.
const HINT: &str = "choose a folder that you may write to";

/// Writes a whole file, by way of a temporary one in the same folder, which takes its place when it is complete. Mode and,
/// where the system lets us, owner of a file that was there stay; links are followed.
///
/// To a stream (see [`is_stream`]) `content` is written as it is.
///
/// # Errors
/// [`Error::Io`] with `path`; an existing file is then as it was.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let write = || match Target::of(path)? {
        Target::Descriptor(mut file) => file.write_all(content),
        Target::Stream(path) => open_stream(&path)?.write_all(content),
        Target::File(path) => temporary::replace(&path, &mut |file| file.write_all(content)),
    };
    write().map_err(|source| Error::io("write", path, source))
}

/// As [`replace`], with content that is written bit by bit, not always behind what was written before.
///
/// # Errors
/// [`Error::Io`] with `path`, for a [stream](is_stream), too; an existing file is then as it was.
pub fn replace_with(path: &Path, write: &mut dyn FnMut(&mut File) -> io::Result<()>) -> Result<()> {
    let replaced = Target::of(path).and_then(|target| match target {
        Target::File(path) => temporary::replace(&path, write),
        _ => Err(io::Error::new(io::ErrorKind::NotSeekable, "it is no regular file")),
    });
    replaced.map_err(|source| Error::io("write", path, source))
}

/// Whether a path leads to what cannot be replaced: a pipe, a device, or a descriptor of this process. What is written
/// there once stays, so that a content that is still to grow should wait until it is complete.
#[must_use]
pub fn is_stream(path: &Path) -> bool {
    matches!(Target::of(path), Ok(Target::Descriptor(_) | Target::Stream(_)))
}

/// Opens a file, or a stream, to write behind what is there. The folder is made if it is missing.
///
/// # Errors
/// The operating system's.
pub fn open_to_append(path: &Path) -> io::Result<File> {
    match Target::of(path)? {
        Target::Descriptor(file) => Ok(file),
        Target::Stream(path) => open_stream(&path),
        Target::File(path) => {
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                std::fs::create_dir_all(folder)?;
            }
            OpenOptions::new().create(true).append(true).open(path)
        }
    }
}

fn open_stream(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).open(path)
}

/// Finds out whether a file can be written, before anything is done for it; makes its folder if that is missing, and
/// clears away what killed runs have left there.
///
/// # Errors
/// [`Error::Input`] for an empty path; [`Error::Io`] if it cannot be written, with a hint.
pub fn check(path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Err(Error::input("the name of a file to write is empty").with_hint("name a file"));
    }
    let failed = |source: io::Error| {
        let hint = if source.kind() == io::ErrorKind::IsADirectory { "name a file in it" } else { HINT };
        Error::io("write", path, source).with_hint(hint)
    };
    let target = match Target::of(path) {
        // The folder is what is wrong.
        Err(source) if source.kind() == io::ErrorKind::NotADirectory => {
            path.parent().map_or(Ok(()), check_folder)?;
            return Err(failed(source));
        }
        target => target.map_err(failed)?,
    };
    match target {
        Target::Descriptor(_) => target::hold(path).map_err(failed),
        Target::Stream(target) => target::check_access(&target).map_err(failed),
        Target::File(target) => {
            if target.exists() {
                target::check_access(&target).map_err(failed)?;
            }
            match target.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => check_folder(folder),
                _ => check_folder(Path::new(".")),
            }
        }
    }
}

/// Makes a folder if it is missing, and finds out whether files can be made in it; clears away what killed runs have left
/// there.
///
/// # Errors
/// [`Error::Io`] with `folder`, and a hint.
pub fn check_folder(folder: &Path) -> Result<()> {
    let probe = || {
        if folder.exists() && !folder.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        std::fs::create_dir_all(folder)?;
        temporary::probe(folder)
    };
    probe().map_err(|source| Error::io("write to folder", folder, source).with_hint(HINT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        replace(&path, b"old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        for path in [Path::new("/"), Path::new(""), folder.path()] {
            assert!(replace(path, b"x").is_err() && check(path).is_err(), "{path:?}");
        }
    }

    /// The longest name that a file can have leaves no room for a longer one.
    #[test]
    fn names_may_be_as_long_as_the_system_lets_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("\u{e9}".repeat(127));
        check(&path).unwrap();
        replace(&path, b"x").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        let error = check(&folder.path().join("n".repeat(256))).unwrap_err().to_string();
        assert!(error.contains("nnn") && error.contains("too long"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn mode_and_links_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("real"), "old").unwrap();
        std::fs::set_permissions(at("real"), PermissionsExt::from_mode(0o640)).unwrap();
        symlink("real", at("one")).unwrap();
        symlink(at("one"), at("two")).unwrap();
        replace(&at("two"), b"new").unwrap();
        assert!(at("one").is_symlink() && at("two").is_symlink());
        assert_eq!(std::fs::read(at("real")).unwrap(), b"new");
        assert_eq!(std::fs::metadata(at("real")).unwrap().permissions().mode() & 0o7777, 0o640);
        symlink("circle", at("circle")).unwrap();
        assert!(check(&at("circle")).is_err());
        symlink("new/later", at("dangling")).unwrap();
        check(&at("dangling")).unwrap();
        replace(&at("dangling"), b"x").unwrap();
        assert_eq!(std::fs::read(at("new/later")).unwrap(), b"x");
    }

    /// A name need not be text.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_name_may_be_any_bytes() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(std::ffi::OsStr::from_bytes(b"r\xff.json"));
        check(&path).unwrap();
        replace(&path, b"x").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }

    /// A descriptor's earlier content stays, and the later one comes behind it.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_descriptor_is_written_to_where_it_stands() {
        use std::os::fd::AsRawFd;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"text\n").unwrap();
        let fd = file.as_file().as_raw_fd();
        for path in [format!("/dev/fd/{fd}"), format!("/proc/self/fd/{fd}"), format!("/proc/thread-self/fd/{fd}")] {
            let path = Path::new(&path);
            assert!(is_stream(path), "{path:?}");
            check(path).unwrap();
            replace(path, b"report\n").unwrap();
        }
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "text\nreport\nreport\nreport\n");
        let reading = File::open(file.path()).unwrap();
        let path = format!("/dev/fd/{}", reading.as_raw_fd());
        assert!(check(Path::new(&path)).is_err(), "it is open for reading only");
        assert!(check(Path::new("/dev/fd/987654")).is_err(), "it is not open");
    }
}
