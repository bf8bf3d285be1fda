//! Mapped files, and which file's bytes lie at an address.
//!
//! A mapped file that is cut short, or whose disk fails, is met as a signal (SIGBUS) at whatever instruction reads the bytes
//! that are gone. The signal's handler is the program's; it finds the file's name here. So what it needs is reached without
//! locks, and without memory that may be freed under it.
//!
//! Not for: what the bytes mean.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::foreign;

/// A file, mapped read-only, whose name is known to [`with_file_at`].
#[derive(Debug)]
pub(crate) struct MappedFile {
    /// Goes first: the range is forgotten before it is unmapped and may become something else's.
    _entry: Entry,
    mmap: Mmap,
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// * `hint`: what should be given instead of what can't be mapped
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened; [`Error::Unsupported`], with `hint`, if it is a folder or no regular file;
    /// [`Error::BadFile`] if it is a Git LFS pointer or a page of the web.
    pub(crate) fn open(path: &Path, hint: &str) -> Result<Self> {
        // Asked before the file is opened: opening a pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(|source| Error::io("open", path, source).with_hint(hint))?;
        if !metadata.is_file() {
            let kind = if metadata.is_dir() { "a folder" } else { "what is not a regular file" };
            return Err(Error::unsupported(format!("loading {kind} (`{}`)", path.display())).with_hint(hint));
        }
        let file = File::open(path).map_err(|source| Error::io("open", path, source))?;
        let mapped = Self::new(&file, path).map_err(|source| Error::io("map", path, source))?;
        foreign::refuse(path, &mapped)?;
        Ok(mapped)
    }

    /// * `path`: of `file`, for messages
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn new(file: &File, path: &Path) -> io::Result<Self> {
        // SAFETY: the mapping is read-only. If somebody shortens the file meanwhile, what is gone cannot be read any more:
        // that ends the process by a signal, and never gives other bytes than the file's.
        let mmap = unsafe { Mmap::map(file) }?;
        let start = mmap.as_ptr() as usize;
        Ok(Self { _entry: Entry::new(start..start + mmap.len(), path), mmap })
    }

    /// Tells the operating system that bytes are not needed in memory for now. They stay readable; a refusal only costs
    /// memory.
    #[cfg(unix)]
    pub(crate) fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is read-only and backed by the file; pages that are read again have the same bytes.
        let _ =
            unsafe { self.mmap.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.mmap
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.mmap
    }
}

/// Passes the name of the file whose bytes are mapped at `address` to `use_name`, control characters escaped; `false` if
/// there is none.
///
/// May be called from a handler of a fault at `address`: it takes no lock, allocates nothing, and the thread that reads there
/// keeps the mapping, and with it the name, alive.
pub fn with_file_at(address: usize, use_name: &mut dyn FnMut(&[u8])) -> bool {
    let mut node = NODES.load(Ordering::Acquire);
    // SAFETY: nodes are never freed, and complete before they are in the list.
    while let Some(current) = unsafe { node.as_ref() } {
        let start = current.start.load(Ordering::Acquire);
        if start <= address && address < current.end.load(Ordering::Acquire) {
            let name = current.name.load(Ordering::Acquire);
            // SAFETY: a name is dropped after its range is forgotten, which its mapping's owner outlives.
            if let Some(name) = unsafe { name.as_ref() } {
                use_name(name.as_bytes());
                return true;
            }
        }
        node = current.next;
    }
    false
}

/// Tells the operating system that bytes are not needed in memory for now, if they lie in a mapped file. They stay readable; a
/// refusal only costs memory.
pub(crate) fn release(bytes: &[u8]) {
    #[cfg(unix)]
    if with_file_at(bytes.as_ptr() as usize, &mut |_| {}) {
        // SAFETY: `sysconf` reads a constant.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
        let before = bytes.as_ptr() as usize % page;
        let start = bytes.as_ptr().wrapping_sub(before);
        // SAFETY: the pages are of one mapping, which is read-only, backed by its file and kept alive by whoever lends the
        // bytes; pages that are read again have the same bytes.
        let _ = unsafe { libc::madvise(start.cast_mut().cast(), before + bytes.len(), libc::MADV_DONTNEED) };
    }
    #[cfg(not(unix))]
    let _ = bytes;
}

/// The list of all ranges: it grows, and what is no longer needed of it is used again.
static NODES: AtomicPtr<Node> = AtomicPtr::new(null_mut());

struct Node {
    is_taken: AtomicBool,
    start: AtomicUsize,
    /// Not above `start` if there is no range.
    end: AtomicUsize,
    name: AtomicPtr<String>,
    next: *mut Node,
}

/// A range in the list; forgotten with this value.
#[derive(Debug)]
struct Entry(&'static Node);

// SAFETY: all of a node that changes is atomic, and `next` never does once the node is in the list.
unsafe impl Sync for Node {}

impl std::fmt::Debug for Node {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:#x}..{:#x}", self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed))
    }
}

impl Entry {
    fn new(range: Range<usize>, path: &Path) -> Self {
        let name = path.display().to_string().chars().map(escaped).collect();
        let node = Self::free_node().unwrap_or_else(Self::new_node);
        node.name.store(Box::into_raw(Box::new(name)), Ordering::Release);
        node.start.store(range.start, Ordering::Release);
        node.end.store(range.end, Ordering::Release);
        Self(node)
    }

    /// A node that is no longer needed.
    fn free_node() -> Option<&'static Node> {
        let mut node = NODES.load(Ordering::Acquire);
        // SAFETY: as in `with_file_at`.
        while let Some(current) = unsafe { node.as_ref() } {
            if !current.is_taken.swap(true, Ordering::AcqRel) {
                return Some(current);
            }
            node = current.next;
        }
        None
    }

    fn new_node() -> &'static Node {
        let node = Box::into_raw(Box::new(Node {
            is_taken: AtomicBool::new(true),
            start: AtomicUsize::new(usize::MAX),
            end: AtomicUsize::new(0),
            name: AtomicPtr::new(null_mut()),
            next: null_mut(),
        }));
        let mut first = NODES.load(Ordering::Acquire);
        loop {
            // SAFETY: nobody else knows the node yet.
            unsafe { (*node).next = first };
            match NODES.compare_exchange_weak(first, node, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: it is never freed.
                Ok(_) => return unsafe { &*node },
                Err(now) => first = now,
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.start.store(usize::MAX, Ordering::Release);
        let name = self.0.name.swap(null_mut(), Ordering::AcqRel);
        if !name.is_null() {
            // SAFETY: it came from a box in `new`, and nobody else has taken it.
            drop(unsafe { Box::from_raw(name) });
        }
        self.0.is_taken.store(false, Ordering::Release);
    }
}

fn escaped(c: char) -> String {
    if c.is_control() { c.escape_default().collect() } else { c.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_at(address: usize) -> Option<String> {
        let mut name = None;
        with_file_at(address, &mut |bytes| name = Some(String::from_utf8(bytes.to_vec()).unwrap()));
        name
    }

    #[test]
    fn released_bytes_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers");
        let numbers: Vec<u8> = (0..50_000_u32).map(|at| (at % 251) as u8).collect();
        std::fs::write(&path, &numbers).unwrap();
        let file = MappedFile::new(&File::open(&path).unwrap(), &path).unwrap();
        for range in [0..50_000, 4_097..4_098, 5_000..49_999, 0..0] {
            assert!(file[range.clone()] == numbers[range.clone()]);
            release(&file[range]);
            assert!(*file == numbers[..]);
        }
        // Memory that is no file's is left alone.
        let memory = numbers.clone();
        release(&memory);
        assert!(memory == numbers);
    }

    #[test]
    fn a_range_is_known_as_long_as_it_is_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let map = |name: &str, len: usize| {
            let path = folder.path().join(name);
            std::fs::write(&path, vec![7; len]).unwrap();
            (MappedFile::new(&File::open(&path).unwrap(), &path).unwrap(), path.display().to_string())
        };
        let (a, path_a) = map("a", 10_000);
        let (b, path_b) = map("b", 5);
        for _ in 0..3 {
            // What is given back is used again.
            let (c, path_c) = map("c", 100);
            let start = c.as_ptr() as usize;
            assert_eq!((c.len(), c[99]), (100, 7));
            assert_eq!((name_at(start), name_at(start + 99)), (Some(path_c.clone()), Some(path_c)));
            assert_eq!(name_at(start + 100), None);
            drop(c);
            assert_eq!(name_at(start), None);
        }
        let start = a.as_ptr() as usize;
        assert_eq!((name_at(start + 9_999), name_at(start - 1)), (Some(path_a), None));
        assert_eq!(name_at(b.as_ptr() as usize), Some(path_b));
        assert_eq!((name_at(0), name_at(usize::MAX)), (None, None));
        let (line, _) = map("two\nlines", 1);
        assert!(name_at(line.as_ptr() as usize).unwrap().ends_with("two\\nlines"));
    }
}
