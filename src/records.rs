//! Numbers and runs of bytes in a file, one after the other: little-endian, and in sections of which each has a checksum.
//!
//! A [`Sink`] writes them, a [`Source`] reads them back from a section that is in memory, and never beyond its end. Not for: what
//! they mean (see [`crate::saved`] for the one format that is made of them).

use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::quant::SharedBytes;

/// What sections, and runs of bytes that are read where they lie, begin at a multiple of.
pub const ALIGN: usize = 64;

/// Where a section is, and what its bytes add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Of its first byte, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes, zeros up to the next multiple of [`ALIGN`] included.
    pub length: u64,
    /// CRC-32 (IEEE 802.3) of them.
    pub crc32: u32,
}

/// Writes sections. A failure is kept until a section ends.
pub struct Sink<'a> {
    out: &'a mut dyn Write,
    /// Bytes written so far.
    position: u64,
    start: u64,
    hasher: crc32fast::Hasher,
    failed: Option<io::Error>,
}

impl std::fmt::Debug for Sink<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").field("position", &self.position).field("start", &self.start).finish_non_exhaustive()
    }
}

impl<'a> Sink<'a> {
    /// Begins a section.
    ///
    /// * `position`: bytes of the file that are before it, a multiple of [`ALIGN`]
    pub fn new(out: &'a mut dyn Write, position: u64) -> Self {
        Self { out, position, start: position, hasher: crc32fast::Hasher::new(), failed: None }
    }

    /// Writes bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.out.write_all(bytes).err();
        }
        self.hasher.update(bytes);
        self.position += bytes.len() as u64;
    }

    /// Writes a number.
    pub fn u32(&mut self, number: u32) {
        self.bytes(&number.to_le_bytes());
    }

    /// Writes a number.
    ///
    /// # Panics
    /// If it has more than 32 bits; nothing that is counted here has.
    pub fn count(&mut self, number: usize) {
        self.u32(u32::try_from(number).expect("counts of a cache have at most 32 bits"));
    }

    /// Writes numbers, without how many.
    pub fn u32s(&mut self, numbers: &[u32]) {
        for &number in numbers {
            self.u32(number);
        }
    }

    /// Writes numbers, without how many.
    pub fn f32s(&mut self, numbers: &[f32]) {
        for number in numbers {
            self.bytes(&number.to_le_bytes());
        }
    }

    /// Writes zeros up to a multiple of `align`, at most [`ALIGN`].
    pub fn align(&mut self, align: usize) {
        let zeros = self.position.next_multiple_of(align as u64) - self.position;
        #[expect(clippy::cast_possible_truncation, reason = "less than `ALIGN`")]
        self.bytes(&[0; ALIGN][..zeros as usize]);
    }

    /// Writes a run of bytes, in parts, that can be read where it lies.
    pub fn aligned(&mut self, parts: &[&[u8]]) {
        self.align(ALIGN);
        for part in parts {
            self.bytes(part);
        }
    }

    /// Ends a section, and begins the next.
    ///
    /// # Errors
    /// The first that writing met.
    pub fn end_section(&mut self) -> io::Result<Section> {
        self.align(ALIGN);
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let crc32 = std::mem::take(&mut self.hasher).finalize();
        let section = Section { offset: self.start, length: self.position - self.start, crc32 };
        self.start = self.position;
        Ok(section)
    }
}

/// Reads a section.
#[derive(Clone)]
pub struct Source {
    owner: SharedBytes,
    /// What is still to be read.
    left: Range<usize>,
    path: Arc<Path>,
    /// What the section is called in messages.
    name: String,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Source");
        shown.field("path", &self.path).field("name", &self.name).field("left", &self.left).finish_non_exhaustive()
    }
}

impl Source {
    /// A section of somebody's bytes.
    ///
    /// * `range`: within the bytes
    /// * `path`, `name`: of the file and of the section, for messages
    #[must_use]
    pub fn new(owner: SharedBytes, range: Range<usize>, path: Arc<Path>, name: String) -> Self {
        Self { owner, left: range, path, name }
    }

    /// Says that something in the section can't be.
    #[must_use]
    pub fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::bad_file(&self.path, format!("{}: {reason}", self.name))
    }

    /// The next bytes.
    ///
    /// # Errors
    /// [`Error::BadFile`] if there are not as many.
    pub fn bytes(&mut self, count: usize) -> Result<&[u8]> {
        let range = self.take(count)?;
        Ok(&(*self.owner).as_ref()[range])
    }

    fn take(&mut self, count: usize) -> Result<Range<usize>> {
        if count > self.left.len() {
            return Err(self.error(format_args!("it ends too early: {count} bytes expected, {} left", self.left.len())));
        }
        let range = self.left.start..self.left.start + count;
        self.left.start = range.end;
        Ok(range)
    }

    /// The next number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u32(&mut self) -> Result<u32> {
        let bytes = self.bytes(size_of::<u32>())?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte)))
    }

    /// The next number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn count(&mut self) -> Result<usize> {
        Ok(self.u32()? as usize)
    }

    /// The next `count` numbers.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u32s(&mut self, count: usize) -> Result<Vec<u32>> {
        let bytes = self.bytes(count.saturating_mul(size_of::<u32>()))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
    }

    /// The next `count` numbers.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn f32s(&mut self, count: usize) -> Result<Vec<f32>> {
        let bytes = self.bytes(count.saturating_mul(size_of::<f32>()))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    /// Goes on at a multiple of `align`.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes); [`Error::BadFile`] if what is left out is not zeros.
    pub fn align(&mut self, align: usize) -> Result<()> {
        let count = self.left.start.next_multiple_of(align) - self.left.start;
        if self.bytes(count)?.iter().any(|&byte| byte != 0) {
            return Err(self.error("padding that is not zero"));
        }
        Ok(())
    }

    /// A run of bytes as it lies in the file, which begins at a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// As [`align`](Self::align).
    pub fn aligned(&mut self, count: usize) -> Result<(SharedBytes, Range<usize>)> {
        self.align(ALIGN)?;
        Ok((Arc::clone(&self.owner), self.take(count)?))
    }

    /// Checks that nothing is left but zeros up to a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// [`Error::BadFile`] if there is.
    pub fn expect_end(mut self) -> Result<()> {
        self.align(ALIGN)?;
        if self.left.is_empty() { Ok(()) } else { Err(self.error(format_args!("{} bytes too many", self.left.len()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_not_more() {
        let mut file = vec![0; ALIGN];
        let mut sink = Sink::new(&mut file, ALIGN as u64);
        sink.u32(7);
        sink.u32s(&[1, 2]);
        sink.f32s(&[0.5, -2.0]);
        sink.aligned(&[b"abc", b"de"]);
        let first = sink.end_section().unwrap();
        let second = sink.end_section().unwrap();
        assert_eq!((first.offset, first.length, second.offset, second.length), (64, 128, 192, 0));
        assert_eq!(file.len(), 192);
        assert_eq!(crc32fast::hash(&file[64..]), first.crc32);

        let source = |file: &[u8]| {
            Source::new(Arc::new(file.to_vec()), 64..file.len(), Path::new("f").into(), "section 1".to_owned())
        };
        let read = |mut source: Source| -> Result<()> {
            let numbers = (source.u32()?, source.u32s(2)?, source.f32s(2)?);
            let (owner, range) = source.aligned(5)?;
            source.expect_end()?;
            assert_eq!(numbers, (7, vec![1, 2], vec![0.5, -2.0]));
            assert_eq!((*owner).as_ref()[range], *b"abcde");
            Ok(())
        };
        read(source(&file)).unwrap();
        for len in 64..192 {
            let error = read(source(&file[..len])).unwrap_err().to_string();
            assert!(error.contains("`f`") && error.contains("section 1"), "{error}");
        }
        assert!(source(&file).u32s(usize::MAX).is_err());
        let longer = [&file[..], &[0; 64]].concat();
        assert!(read(source(&longer)).unwrap_err().to_string().contains("64 bytes too many"));
        for at in [64 + 20, 64 + 64 + 5] {
            let mut bad = file.clone();
            bad[at] = 1;
            assert!(read(source(&bad)).unwrap_err().to_string().contains("not zero"), "{at}");
        }
    }

    #[test]
    fn a_failure_is_told_when_the_section_ends() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut full = Full;
        let mut sink = Sink::new(&mut full, 0);
        sink.u32(1);
        sink.u32(2);
        assert_eq!(sink.end_section().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
