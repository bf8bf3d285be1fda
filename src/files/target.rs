//! What a path to be written leads to.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

/// Longer chains of links are circles, for the system as well.
const MAX_LINKS: usize = 40;

/// What a path leads to.
pub(super) enum Target {
    /// What this process has open already; a handle that shares its position.
    Descriptor(File),
    /// A pipe or a device.
    Stream(PathBuf),
    /// A regular file, or nothing yet.
    File(PathBuf),
}

impl Target {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is empty"));
        }
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let end = End::of(path)?;
        match end {
            #[cfg(unix)]
            End::Descriptor(number) => own::open(number).map(Self::Descriptor),
            End::Foreign(path) => Ok(Self::Stream(path)),
            End::Path(path) => match std::fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
                Ok(metadata) if metadata.is_file() => {
                    Ok(own::standard(&metadata).map_or(Self::File(path), Self::Descriptor))
                }
                Ok(metadata) if is_socket(&metadata) => {
                    Err(io::Error::new(io::ErrorKind::Unsupported, "it is a socket"))
                }
                Ok(_) => Ok(Self::Stream(path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound && path.file_name().is_some() => {
                    Ok(Self::File(path))
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// Where a chain of symbolic links ends.
enum End {
    #[cfg(unix)]
    Descriptor(std::os::fd::RawFd),
    /// What the system shows of another process, and what has no path of its own.
    Foreign(PathBuf),
    /// Whether or not there is a file.
    Path(PathBuf),
}

impl End {
    fn of(path: &Path) -> io::Result<Self> {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if let (Ok(folder), Some(name)) = (folder.canonicalize(), path.file_name()) {
                #[cfg(unix)]
                if own::is_descriptors(&folder)
                    && let Some(number) = name.to_str().and_then(|name| name.parse().ok())
                {
                    return Ok(Self::Descriptor(number));
                }
                if folder.starts_with("/proc") && path.is_symlink() {
                    return Ok(Self::Foreign(folder.join(name)));
                }
            }
            let Ok(link) = std::fs::read_link(&path) else { return Ok(Self::Path(path)) };
            path = path.parent().map_or_else(|| link.clone(), |folder| folder.join(&link));
        }
        Err(io::Error::other("too many levels of symbolic links"))
    }
}

/// Keeps the descriptor that a path leads to, so that no other file can take its number before it is written to.
pub(super) fn hold(path: &Path) -> io::Result<()> {
    match End::of(path)? {
        #[cfg(unix)]
        End::Descriptor(number) => own::hold(number),
        _ => Ok(()),
    }
}

/// Whether the system lets this process write to what is there.
pub(super) fn check_access(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: the string ends in NUL and outlives the call.
        if unsafe { libc::access(path.as_ptr(), libc::W_OK) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    #[cfg(not(unix))]
    if path.metadata()?.permissions().readonly() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

#[cfg(unix)]
fn is_socket(metadata: &Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type())
}

#[cfg(not(unix))]
fn is_socket(_: &Metadata) -> bool {
    false
}

/// Descriptors of this process.
#[cfg(unix)]
mod own {
    use std::collections::BTreeMap;
    use std::fs::{File, Metadata};
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::sync::{Mutex, PoisonError};

    /// Copies of those that are to be written to later, by number.
    static HELD: Mutex<BTreeMap<RawFd, OwnedFd>> = Mutex::new(BTreeMap::new());

    /// Whether a folder, without links, is that of this process's descriptors.
    pub fn is_descriptors(folder: &Path) -> bool {
        let process = Path::new("/proc").join(std::process::id().to_string());
        let Ok(rest) = folder.strip_prefix(process) else { return folder == Path::new("/dev/fd") };
        let parts: Vec<_> = rest.iter().collect();
        parts == ["fd"] || (parts.len() == 3 && parts[0] == "task" && parts[2] == "fd")
    }

    /// Another handle of a descriptor, at the same position.
    pub fn open(number: RawFd) -> io::Result<File> {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        match held.get(&number) {
            Some(held) => held.try_clone().map(File::from),
            None => copy(number).map(File::from),
        }
    }

    pub fn hold(number: RawFd) -> io::Result<()> {
        let copy = copy(number)?;
        HELD.lock().unwrap_or_else(PoisonError::into_inner).entry(number).or_insert(copy);
        Ok(())
    }

    fn copy(number: RawFd) -> io::Result<OwnedFd> {
        if number < 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: it only asks the system about a number; one that is not open is answered by an error.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is open for reading only"));
        }
        // SAFETY: it was open just now, and is only asked to be copied; one that is not open is answered by an error.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        borrowed.try_clone_to_owned()
    }

    /// Standard output or error, if it goes to this very file: to replace that would lose what was written to it.
    pub fn standard(metadata: &Metadata) -> Option<File> {
        let numbers = [io::stdout().as_raw_fd(), io::stderr().as_raw_fd()];
        let files = numbers.into_iter().filter_map(|number| copy(number).ok()).map(File::from);
        let is_same = |file: &File| {
            file.metadata().is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino()))
        };
        let mut files = files.filter(is_same);
        files.next()
    }
}

#[cfg(not(unix))]
mod own {
    use std::fs::{File, Metadata};

    pub fn standard(_: &Metadata) -> Option<File> {
        None
    }
}
