//! Caches for a model that was loaded: in one call, with what its tokenizer knows of its tokens.

use std::sync::Arc;

use super::Loaded;
use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::compress::AdaptiveConfig;
use crate::error::Result;

impl Loaded {
    /// An empty cache that keeps of each prompt what a configuration says, for one sequence.
    ///
    /// ```no_run
    /// use adaptive_kvcache::prelude::*;
    ///
    /// # fn main() -> adaptive_kvcache::Result<()> {
    /// let loaded = load("model.gguf", WeightDtype::Auto)?;
    /// let config = AdaptiveConfig::from_file("configs/best.json")?;
    /// let mut cache = loaded.cache(KvDtype::F16, &config)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Llama::new_cache`](crate::model::Llama::new_cache).
    pub fn cache(&self, dtype: KvDtype, config: &AdaptiveConfig) -> Result<AdaptiveKvCache> {
        self.model.new_cache(dtype, self.retention(config))
    }

    /// An empty cache that keeps everything, for one sequence.
    ///
    /// # Errors
    /// As [`Llama::new_cache`](crate::model::Llama::new_cache).
    pub fn full_cache(&self, dtype: KvDtype) -> Result<AdaptiveKvCache> {
        self.model.new_cache(dtype, Retention::Full)
    }

    /// What a cache of this model keeps under a configuration: for what makes caches of its own, such as a
    /// [`Conversation`](crate::generate::Conversation) or a [`Batch`](crate::generate::Batch).
    #[must_use]
    pub fn retention(&self, config: &AdaptiveConfig) -> Retention {
        let (classifier, words) = (self.tokenizer.classifier(config), self.tokenizer.words_for(config));
        Retention::Adaptive { config: Arc::new(config.clone()), classifier, words }
    }
}
