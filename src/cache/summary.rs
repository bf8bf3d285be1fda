//! What a layer keeps, right after a prompt.

use super::CacheBytes;
use crate::compress::HeadChoice;

/// What one KV head got, right after a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSummary {
    /// Index of the KV head.
    pub kv_head: usize,
    /// Index of the level in the search order, 0 if a method with a budget chose; `None` if the cache is full by
    /// request and nothing was chosen.
    pub level: Option<usize>,
    /// The value of each level tried, see [`HeadChoice::recovered`].
    pub recovered: Vec<f64>,
    /// Kept positions of what was decided about, ascending.
    pub positions: Vec<u32>,
}

impl From<HeadChoice> for HeadSummary {
    fn from(choice: HeadChoice) -> Self {
        let HeadChoice { kv_head, level, recovered, positions } = choice;
        Self { kv_head, level: Some(level), recovered, positions }
    }
}

/// What one layer keeps, right after a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSummary {
    /// Index of the layer.
    pub layer: usize,
    /// Tokens that were decided about: the prompt, and what was generated since the prompt before it.
    pub prompt_len: usize,
    /// One for each KV head.
    pub heads: Vec<HeadSummary>,
    /// Sizes of the layer's whole cache.
    pub bytes: CacheBytes,
}
