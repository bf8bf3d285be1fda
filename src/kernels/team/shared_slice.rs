//! A slice that the threads of a team share, each with parts of its own.

use std::ops::Range;

/// A slice that the threads of a team write to in disjoint parts.
#[derive(Debug)]
pub struct SharedSlice<'a, T> {
    data: *mut T,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access is through unsafe functions, whose callers see to it that parts do not overlap.
unsafe impl<T: Send + Sync> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Takes a slice over for as long as the view lives.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), owner: std::marker::PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part to read.
    ///
    /// # Panics
    /// If `range` is not inside.
    ///
    /// # Safety
    /// No thread writes to it in this phase.
    #[must_use]
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a shared slice");
        let first = self.data.wrapping_add(range.start);
        // SAFETY: inside, and not written to (the caller's promise).
        unsafe { std::slice::from_raw_parts(first, range.len()) }
    }

    /// A part to write.
    ///
    /// # Panics
    /// If `range` is not inside.
    ///
    /// # Safety
    /// No other thread reads or writes it in this phase, and this one has no other view of it.
    #[must_use]
    #[expect(clippy::mut_from_ref, reason = "that is what it is for; disjointness is the caller's promise")]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a shared slice");
        let first = self.data.wrapping_add(range.start);
        // SAFETY: inside, and of this caller alone (its promise).
        unsafe { std::slice::from_raw_parts_mut(first, range.len()) }
    }
}
