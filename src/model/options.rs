//! How a prompt is processed.

use std::num::NonZeroUsize;

/// How a prompt is processed. Nothing here changes what is computed, only when, and so speed and scratch memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillOptions {
    /// The most prompt rows that go through a layer at a time; default [`DEFAULT_CHUNK`](Self::DEFAULT_CHUNK). Scratch
    /// grows with it; small chunks keep matrix products less busy, and widen the weights more often.
    pub chunk: NonZeroUsize,
}

impl PrefillOptions {
    /// Rows that keep matrix products busy.
    pub const DEFAULT_CHUNK: NonZeroUsize = NonZeroUsize::new(512).unwrap();

    /// Rows of each chunk of a prompt but the last, which may be shorter: as many chunks as it takes, and about equally
    /// long, since a few rows left over would cost nearly as much as many.
    pub(super) fn rows(self, prompt_len: usize) -> usize {
        let chunks = prompt_len.div_ceil(self.chunk.get()).max(1);
        prompt_len.div_ceil(chunks).max(1)
    }
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { chunk: Self::DEFAULT_CHUNK }
    }
}
