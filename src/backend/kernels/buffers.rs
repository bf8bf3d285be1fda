//! Memory that the layers of a prompt compute in, one after the other.
//!
//! Fresh memory is cleared and mapped by one thread, while the others wait: with two threads, a tenth of the time that a
//! prompt takes.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory;

/// Memory that nobody uses.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<f32>>>>);

/// Numbers in borrowed memory, which goes back when they are dropped.
#[derive(Debug)]
pub struct Buffer {
    numbers: Vec<f32>,
    owner: Buffers,
}

impl Buffers {
    fn free(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for numbers, which may be any.
    pub fn take(&self, len: usize) -> Buffer {
        let mut free = self.free();
        // Not half empty: a later one might need it.
        let fitting = free.iter().enumerate().filter(|(_, numbers)| (len..=2 * len).contains(&numbers.capacity()));
        let smallest = fitting.min_by_key(|(_, numbers)| numbers.capacity()).map(|(index, _)| index);
        let numbers = smallest.map(|index| free.swap_remove(index));
        drop(free);
        let Some(mut numbers) = numbers else {
            let mut numbers = vec![0.0; len];
            memory::prefer_large_pages(&mut numbers);
            return self.holding(numbers);
        };
        numbers.resize(len, 0.0);
        self.holding(numbers)
    }

    /// A copy of numbers.
    pub fn copy(&self, numbers: &[f32]) -> Buffer {
        let mut copy = self.take(numbers.len());
        copy.copy_from_slice(numbers);
        copy
    }

    /// Numbers that are there, whose memory is kept afterwards.
    pub fn holding(&self, numbers: Vec<f32>) -> Buffer {
        Buffer { numbers, owner: self.clone() }
    }

    /// Frees what nobody uses.
    pub fn clear(&self) {
        *self.free() = Vec::new();
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        self.owner.free().push(numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_again_if_it_fits_and_is_not_too_large() {
        let buffers = Buffers::default();
        let (large, small) = (buffers.take(100), buffers.take(10));
        let (large_at, small_at) = (large.as_ptr(), small.as_ptr());
        drop((large, small));
        assert_eq!(buffers.take(9).as_ptr(), small_at);
        let most = buffers.take(97);
        assert_eq!((most.len(), most.as_ptr()), (97, large_at));
        let other = buffers.take(100);
        assert_ne!(other.as_ptr(), large_at, "it is in use");
        let few = buffers.take(30);
        assert_eq!(few.len(), 30);
        drop((most, other, few));
        assert_eq!(buffers.free().len(), 4);
        let one = buffers.copy(&[1.0, 2.0]);
        buffers.clear();
        assert!(buffers.free().is_empty());
        assert_eq!(one[..], [1.0, 2.0]);
    }
}
