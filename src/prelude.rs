//! What most programs that use the library name: `use adaptive_kvcache::prelude::*;`.
//!
//! Its [`Result`] takes the place of the standard library's, which it equals where two types are given.

pub use crate::backend::BackendKind;
pub use crate::cache::{AdaptiveKvCache, CacheBytes, HeadSummary, KvDtype, LayerSummary, Retention};
pub use crate::checkpoint::{Loaded, WeightDtype, load};
pub use crate::compress::{
    AdaptiveConfig, Budget, FastGen, METHODS, Method, MethodFacts, Needs, Policy, method_by_name,
};
pub use crate::error::{Error, Result};
pub use crate::generate::{
    Batch, BatchLimits, BatchPrompt, Conversation, FinishReason, Generation, GenerationOptions, SamplingOptions, Step,
    Turn,
};
pub use crate::model::{Llama, Prefill, PrefillObserver, PrefillOptions};
pub use crate::tokenizer::{ChatMessage, Tokenizer};
