//! How far caches can go back exactly, in memory and in files.

use std::sync::Arc;

use super::layout::ModelSide;
use super::{Description, SavedCache};
use crate::cache::{AdaptiveKvCache, Retention};
use crate::checkpoint::Loaded;
use crate::compress::Eviction;
use crate::error::{Error, Result};

/// The fewest tokens that a cache can go back to exactly.
///
/// * `undecided`: tokens that came since a profile has decided what stays; `None` of a full cache
/// * `is_bound`: where what was before is not known any more, whatever the rest
fn fewest(tokens: usize, undecided: Option<usize>, is_bound: bool) -> usize {
    if is_bound { tokens } else { undecided.map_or(0, |undecided| tokens.saturating_sub(undecided)) }
}

impl Loaded {
    /// The fewest tokens that a cache of this model can go back to exactly: none of a full one; of a compressed one those up
    /// to the end of its last prompt; all where rows go while tokens are generated or have [moved](crate::cache::Overflow::Shift), or rotations depend on a
    /// text's length.
    #[must_use]
    pub fn fewest_tokens(&self, cache: &AdaptiveKvCache) -> usize {
        let has_windows = cache.ledgers().iter().any(|ledger| ledger.window().is_some());
        let is_bound = has_windows
            || cache.shifted() > 0
            || cache.retention().eviction().is_some()
            || self.model.config().rope.dynamic.is_some();
        let undecided = (!matches!(cache.retention(), Retention::Full)).then(|| cache.undecided());
        fewest(cache.ids().len(), undecided, is_bound)
    }
}

impl SavedCache {
    /// As [`Loaded::fewest_tokens`], of the cache in the file.
    ///
    /// # Errors
    /// As [`config`](Self::config).
    pub fn fewest_tokens(&self) -> Result<usize> {
        let config = self.config()?.map(Arc::new);
        let Description { model: ModelSide { windows, rope, .. }, tokens, undecided, shifted, .. } = &self.description;
        let evicts = config.as_ref().is_some_and(|config| Eviction::new(config).is_some());
        let is_bound = evicts || *shifted > 0 || windows.is_some() || !rope["dynamic"].is_null();
        Ok(fewest(*tokens, config.is_some().then_some(*undecided), is_bound))
    }

    /// The [cache](Self::cache) as it was when it held the first tokens only.
    ///
    /// * `tokens`: from [`fewest_tokens`](Self::fewest_tokens) on
    ///
    /// # Errors
    /// As [`cache`](Self::cache); [`Error::Unsupported`] if it can't go back so far.
    pub fn first(&self, loaded: &Loaded, tokens: usize) -> Result<AdaptiveKvCache> {
        if tokens < self.fewest_tokens()? || tokens > self.num_tokens() {
            return Err(Error::unsupported(format!(
                "going back to {tokens} of the {} tokens of a cache",
                self.num_tokens()
            )));
        }
        let mut cache = self.cache(loaded)?;
        match (cache.retention(), self.num_tokens() - tokens) {
            (_, 0) => {}
            (Retention::Full, _) => cache.keep_first(tokens)?,
            (Retention::Adaptive { .. }, behind) => loaded.model.take_back(behind, &mut cache)?,
        }
        Ok(cache)
    }
}
