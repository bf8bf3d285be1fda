//! The ragged KV cache: every KV head of every layer keeps its own rows, in buffers of its own length.
//!
//! [`AdaptiveKvCache`] holds all layers and the one count of tokens seen; a [`CacheLayer`] a layer's books, the [`Ledger`],
//! and the [`Rows`] that a backend keeps by them. What is not kept is not allocated: the full keys and values of a layer
//! exist only while that layer processes the prompt.
//!
//! Not for: choosing (see [`crate::compress`]), attending (see [`crate::attention`]), or holding keys and values (see
//! [`crate::backend`]).

mod bounds;
mod cut;
mod dtype;
mod eviction;
mod growth;
mod layer;
mod layers;
mod ledger;
mod summary;

use std::sync::Arc;

pub use bounds::{Bounds, Overflow, PROTECTED};
pub use dtype::KvDtype;
pub use eviction::HeadStep;
pub use growth::growth;
pub use layer::{CacheLayer, Rows};
pub use ledger::{EVICTING_NOTE_BYTES, HeadPlan, Ledger, NOTE_BYTES, Plan};
pub use summary::{HeadSummary, LayerSummary};

use layers::Layers;

use crate::arch::HeadLayout;
use crate::compress::{AdaptiveConfig, Budget, Eviction};
use crate::error::{Error, Result};
use crate::records::{Sink, Source};
use crate::tokens::{RepeatWords, TokenClass, TokenClassifier};

/// What a cache keeps of the prompt.
#[derive(Debug, Clone)]
pub enum Retention {
    /// Every position of every head: the plain path, and the oracle of the other.
    Full,
    /// What the profile of each head asks for.
    Adaptive {
        /// What says what that is.
        config: Arc<AdaptiveConfig>,
        /// Which tokens are special, and which are punctuation.
        classifier: TokenClassifier,
        /// What asks the model to repeat a prompt, or why it can't be said; for methods that [say
        /// so](crate::compress::budget::methods::Repetition::instruction).
        words: Option<Arc<Result<RepeatWords, String>>>,
    },
}

impl Retention {
    /// What goes on evicting while tokens are generated; `None` if every new token is kept.
    #[must_use]
    pub fn eviction(&self) -> Option<Eviction> {
        match self {
            Self::Full => None,
            Self::Adaptive { config, .. } => Eviction::new(config),
        }
    }

    /// Whether values are fitted, see [`refit`](crate::attention::refit).
    #[must_use]
    pub fn refits(&self) -> bool {
        matches!(self, Self::Adaptive { config, .. } if config.refit)
    }

    /// Refuses a model that a [profile of heads](crate::compress::HeadProfile) does not fit.
    ///
    /// # Errors
    /// As [`HeadPrior::expect_model`](crate::compress::HeadPrior::expect_model).
    pub fn expect_model(&self, num_layers: usize, heads: HeadLayout) -> Result<()> {
        let Self::Adaptive { config, .. } = self else { return Ok(()) };
        let prior = config.budgeted().and_then(|method| method.prior.as_ref());
        prior.map_or(Ok(()), |prior| prior.expect_model(num_layers, heads))
    }

    /// How many rows a head holds at most because of `tokens` that are generated.
    #[must_use]
    pub fn most_new_rows(&self, tokens: usize) -> usize {
        tokens.min(self.eviction().and_then(|eviction| eviction.most_new_rows()).unwrap_or(tokens))
    }
}

/// Bytes of a cache or of a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheBytes {
    /// What a full cache of the same tokens needs.
    pub raw: usize,
    /// Keys and values that are kept.
    pub kept: usize,
    /// What is allocated for keys, values, positions and what tells which row goes next, slack included.
    pub allocated: usize,
    /// Keys and values that lie in a mapped file, and so are not allocated: those of a saved cache, as long as nothing of
    /// them goes.
    pub mapped: usize,
}

impl CacheBytes {
    /// Share of the raw bytes that is not kept, in 0..=1; 0 for an empty cache.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn saved_ratio(&self) -> f64 {
        if self.raw == 0 { 0.0 } else { 1.0 - self.kept as f64 / self.raw as f64 }
    }
}

impl std::iter::Sum for CacheBytes {
    fn sum<I: Iterator<Item = Self>>(bytes: I) -> Self {
        bytes.fold(Self::default(), |sum, bytes| Self {
            raw: sum.raw + bytes.raw,
            kept: sum.kept + bytes.kept,
            allocated: sum.allocated + bytes.allocated,
            mapped: sum.mapped + bytes.mapped,
        })
    }
}

/// Keys and values of all layers of one sequence.
///
/// A cache is filled by [`Llama::prefill`](crate::model::Llama::prefill) and grows by
/// [`Llama::decode`](crate::model::Llama::decode); cloning it forks the sequence.
#[derive(Debug)]
pub struct AdaptiveKvCache {
    layers: Box<dyn Layers>,
    retention: Retention,
    /// All tokens that were given.
    ids: Vec<u32>,
    /// How many of them, the last, no profile has decided about: those since the last prompt. Not counted for a full cache,
    /// and where heads go on evicting.
    undecided: usize,
    /// How many more tokens there were than positions are taken.
    shifted: usize,
    bounds: Bounds,
}

impl Clone for AdaptiveKvCache {
    fn clone(&self) -> Self {
        Self {
            layers: self.layers.boxed_clone(),
            retention: self.retention.clone(),
            ids: self.ids.clone(),
            undecided: self.undecided,
            shifted: self.shifted,
            bounds: self.bounds,
        }
    }
}

impl AdaptiveKvCache {
    /// An empty cache.
    ///
    /// * `rows`: an empty layer's, of the kind that the model's backend reads
    #[must_use]
    pub fn new<R: Rows>(num_layers: usize, rows: &R, retention: Retention) -> Self {
        let layers: Vec<_> = (0..num_layers).map(|layer| CacheLayer::new(layer, rows)).collect();
        Self {
            layers: Box::new(layers),
            retention,
            ids: Vec::new(),
            undecided: 0,
            shifted: 0,
            bounds: Bounds::default(),
        }
    }

    /// Sets what happens at its bounds.
    #[must_use]
    pub fn with_bounds(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// Sets what happens at its bounds.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// What happens at its bounds.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Sets how many of the first tokens stay in any case, if it is more than before.
    pub fn pin(&mut self, tokens: usize) {
        self.bounds.pinned = self.bounds.pinned.max(tokens);
    }

    /// Lets rows go that no later token looks at, in layers with a sliding window.
    ///
    /// * `windows`: `[num_layers]` how many tokens a token looks at, itself included, if there is a limit
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of layers, or if their rows are of another kind.
    pub fn with_windows<R: Rows>(mut self, windows: &[Option<usize>]) -> Result<Self> {
        let layers = self.layers_mut::<R>()?;
        if layers.len() != windows.len() {
            return Err(Error::shape("layers with windows", layers.len(), windows.len()));
        }
        for (layer, &window) in layers.iter_mut().zip(windows) {
            *layer = layer.clone().limited_to(window);
        }
        Ok(self)
    }

    /// An empty cache of the same kind.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self {
            layers: self.layers.emptied(),
            retention: self.retention.clone(),
            ids: Vec::new(),
            undecided: 0,
            shifted: 0,
            bounds: self.bounds,
        }
    }

    /// The position of the next token: tokens given so far, those included that no head keeps, but for the positions that
    /// were won when what is kept [moved together](Overflow::Shift).
    #[must_use]
    pub fn seen(&self) -> usize {
        self.ids.len() - self.shifted
    }

    /// How many positions were won so.
    #[must_use]
    pub fn shifted(&self) -> usize {
        self.shifted
    }

    /// The tokens given so far, those included that no head keeps.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Whether all layers have got the same tokens; they have not after a prompt that failed halfway.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.layers.ledgers().iter().all(|ledger| ledger.seen() == self.seen())
    }

    /// Checks that the cache is of a model's shape and rows, and that all layers have got the same tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not.
    pub fn expect_shape<R: Rows>(&self, num_layers: usize, layout: HeadLayout) -> Result<()> {
        let ledgers = self.ledgers();
        if ledgers.len() != num_layers {
            return Err(Error::shape("cache layers", num_layers, ledgers.len()));
        }
        let mut shapes = ledgers.iter().map(|ledger| (ledger.layout(), ledger.seen()));
        match shapes.find(|&shape| shape != (layout, self.seen())) {
            Some(shape) => Err(Error::shape("a cache's layer", (layout, self.seen()), shape)),
            None => self.layers::<R>().map(drop),
        }
    }

    /// The books of all layers, from the first.
    #[must_use]
    pub fn ledgers(&self) -> Vec<&Ledger> {
        self.layers.ledgers()
    }

    /// The layers, from the first.
    ///
    /// # Errors
    /// [`Error::Shape`] if their rows are of another kind.
    pub fn layers<R: Rows>(&self) -> Result<&[CacheLayer<R>]> {
        self.layers.as_any().downcast_ref::<Vec<CacheLayer<R>>>().map(Vec::as_slice).ok_or_else(other_rows::<R>)
    }

    /// The layers, to write to.
    ///
    /// # Errors
    /// As [`layers`](Self::layers).
    pub fn layers_mut<R: Rows>(&mut self) -> Result<&mut [CacheLayer<R>]> {
        let layers = self.layers.as_any_mut().downcast_mut::<Vec<CacheLayer<R>>>();
        layers.map(Vec::as_mut_slice).ok_or_else(other_rows::<R>)
    }

    /// How many layers there are.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.ledgers().len()
    }

    /// Kept rows of all heads as a share of all tokens seen, in 0..=1.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn kept_ratio(&self) -> f64 {
        self.mean_rows() / self.seen().max(1) as f64
    }

    /// Kept rows of a head, the mean over all heads.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn mean_rows(&self) -> f64 {
        let ledgers = self.ledgers();
        let heads: usize = ledgers.iter().map(|ledger| ledger.layout().num_kv_heads).sum();
        ledgers.iter().map(|ledger| ledger.num_rows()).sum::<usize>() as f64 / heads.max(1) as f64
    }

    /// What is kept of the prompt.
    #[must_use]
    pub fn retention(&self) -> &Retention {
        &self.retention
    }

    /// Bytes of one stored key and its value, of a head, that a prompt leaves.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.layers.token_bytes()
    }

    /// Bytes of all layers.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        let bytes = self.layers.bytes();
        let heads: usize = self.ledgers().iter().map(|ledger| ledger.layout().num_kv_heads).sum();
        CacheBytes { raw: bytes.raw + self.shifted * heads * self.token_bytes(), ..bytes }
    }

    /// The tokens that a profile of this prompt decides about: those that were decoded since the last prompt (unless heads
    /// go on evicting), then the prompt's. Empty for a full cache, which does not ask for them.
    #[must_use]
    pub fn segment_ids(&self, prompt: &[u32]) -> Vec<u32> {
        match &self.retention {
            Retention::Full => Vec::new(),
            Retention::Adaptive { .. } => [&self.ids[self.ids.len() - self.undecided..], prompt].concat(),
        }
    }

    /// The classes of the tokens that a profile of this prompt decides about, see [`segment_ids`](Self::segment_ids).
    #[must_use]
    pub fn segment_classes(&self, prompt: &[u32]) -> Vec<TokenClass> {
        self.segment_ids(prompt).into_iter().map(|id| self.class(id)).collect()
    }

    /// Counts the tokens of a prompt that all layers have stored.
    pub fn settle(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.undecided = 0;
    }

    /// The class of a token that is about to be decoded; none for a full cache, which does not ask for it.
    #[must_use]
    pub fn class(&self, id: u32) -> TokenClass {
        match &self.retention {
            Retention::Full => TokenClass::default(),
            Retention::Adaptive { classifier, .. } => classifier.classify(id),
        }
    }

    /// Counts a token that was appended to all layers.
    pub fn advance(&mut self, id: u32) {
        self.ids.push(id);
        if matches!(&self.retention, Retention::Adaptive { .. }) && self.retention.eviction().is_none() {
            self.undecided += 1;
        }
    }

    /// Uncounts the newest tokens, which have gone from all layers.
    ///
    /// * `count`: of the tokens since the last prompt
    pub(crate) fn retreat(&mut self, count: usize) {
        self.ids.truncate(self.ids.len() - count);
        self.undecided = self.undecided.saturating_sub(count);
    }

    /// Lets the newest tokens go, which no prompt has decided about, and returns them.
    ///
    /// # Errors
    /// As [`CacheLayer::forget`]; the cache is of no use then.
    pub(crate) fn forget_undecided(&mut self) -> Result<Vec<u32>> {
        self.layers.forget(self.undecided)?;
        let ids = self.ids.split_off(self.ids.len() - self.undecided);
        self.undecided = 0;
        Ok(ids)
    }

    /// Counts positions that were won.
    ///
    /// * `undecided`: tokens that no prompt has decided about
    pub(crate) fn shift(&mut self, positions: usize, undecided: usize) {
        self.shifted += positions;
        self.undecided = self.undecided.min(undecided);
    }

    /// Bytes that the sequence may come to; `None` without a [budget](crate::compress::Budget::Bytes).
    #[must_use]
    pub fn budget(&self) -> Option<usize> {
        match &self.retention {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => match config.budget() {
                Some(Budget::Bytes(bytes)) => Some(bytes),
                _ => None,
            },
        }
    }

    /// How many tokens all heads may take in before the sequence comes to more bytes than its budget; no limit without one.
    #[must_use]
    pub fn room(&self) -> usize {
        let Some(budget) = self.budget() else { return usize::MAX };
        self.layers.room(budget)
    }

    /// Bytes that are noted of a row between prompts: its position, and where heads go on evicting also what it received, and
    /// its token's class.
    pub(crate) fn note_bytes(&self) -> usize {
        self.retention.eviction().map_or(size_of::<u32>(), |_| EVICTING_NOTE_BYTES + size_of::<TokenClass>())
    }

    /// Bytes that all heads take whatever they hold.
    pub(crate) fn head_bytes(&self) -> usize {
        self.layers.head_bytes()
    }

    /// Allocates exactly what so many more rows of every head need.
    pub(crate) fn make_room(&mut self, rows: usize) {
        self.layers.make_room(rows);
    }

    /// Sees to it that the next tokens, for which there is [room](Self::room), do not let buffers grow beyond the budget.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        if let Some(budget) = self.budget() {
            self.layers.reserve(tokens, budget);
        }
    }

    /// Tokens that no profile has decided about, see [`segment_ids`](Self::segment_ids).
    pub(crate) fn undecided(&self) -> usize {
        self.undecided
    }

    /// Whether [`save_layer`](Self::save_layer) is possible: if the CPU kernels read it.
    pub(crate) fn can_save(&self) -> bool {
        self.layers.can_save()
    }

    /// Writes what a layer holds.
    pub(crate) fn save_layer(&self, layer: usize, sink: &mut Sink<'_>) {
        self.layers.save(layer, sink);
    }

    /// Takes in what was written.
    ///
    /// * `ids`: tokens that were given, of which `undecided` no profile has decided about
    /// * `shifted`: how many more they are than positions are taken; at most as many
    /// * `layers`: `[num_layers]`
    ///
    /// # Errors
    /// As [`Ledger::load`] and [`Rows::load`]; the cache is of no use then.
    pub(crate) fn load(
        &mut self,
        ids: Vec<u32>,
        (undecided, shifted): (usize, usize),
        layers: Vec<Source>,
    ) -> Result<()> {
        let seen = ids.len().saturating_sub(shifted);
        self.layers.load((seen, undecided), self.retention.eviction().as_ref(), layers)?;
        (self.ids, self.undecided, self.shifted) = (ids, undecided, shifted);
        Ok(())
    }
}

/// Says that a cache is not of the kind that a backend reads.
fn other_rows<R>() -> Error {
    let wanted = std::any::type_name::<R>().rsplit("::").next().unwrap_or_default();
    Error::shape("a cache's rows", wanted, "those of another backend")
}
