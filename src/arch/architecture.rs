//! Which model it is: LLaMA, or one that differs from it by little.

use std::fmt;

/// An architecture that is computed. A new one is a variant here, with what it differs by, and is read in
/// [`crate::checkpoint::gguf_config`] and [`crate::checkpoint::hf_config`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3.2 and all that are alike.
    Llama,
    /// Mistral: its layers may have a sliding window. In GGUF it is a [`Llama`](Self::Llama).
    Mistral,
    /// Qwen 2 and 2.5: biases of queries, keys and values.
    Qwen2,
    /// Qwen 3, dense: norms of query heads and keys.
    Qwen3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The name in files (`model_type`, `general.architecture`) and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether queries and keys are normalised, head by head, before they are rotated.
    #[must_use]
    pub fn has_head_norms(self) -> bool {
        self == Self::Qwen3
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
