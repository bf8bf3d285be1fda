//! The ragged KV cache: every KV head of every layer keeps its own rows, in buffers of its own length.
//!
//! [`AdaptiveKvCache`] holds all layers and the one count of tokens seen; [`LayerCacheManager`] a layer's heads and what
//! was chosen for them; [`HeadCache`] one head's keys, values and positions. What is not kept is not allocated: the full
//! keys and values of a layer exist only while that layer processes the prompt.
//!
//! Not for: choosing (see [`crate::profile`]) or attending (see [`crate::attention`]).

mod device;
mod eviction;
mod head;
mod layer;
mod storage;

pub use device::DeviceLayer;
pub use eviction::HeadStep;
pub use head::HeadCache;
pub use layer::{HeadSummary, LayerCacheManager, LayerSummary};
pub use storage::KvDtype;

use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::ops::Ops;
use crate::profile::{Eviction, Profiler};
use crate::tokens::{TokenClass, TokenClassifier};

/// What a cache keeps of the prompt.
#[derive(Debug, Clone)]
pub enum Retention {
    /// Every position of every head: the plain path, and the oracle of the other.
    Full,
    /// What the profile of each head asks for.
    Adaptive {
        /// The search.
        profiler: Profiler,
        /// Which tokens are special, and which are punctuation.
        classifier: TokenClassifier,
    },
}

impl Retention {
    /// What goes on evicting while tokens are generated; `None` if every new token is kept.
    #[must_use]
    pub fn eviction(&self) -> Option<Eviction> {
        match self {
            Self::Full => None,
            Self::Adaptive { profiler, .. } => profiler.eviction(),
        }
    }

    /// How many rows a head holds at most because of `tokens` that are generated.
    #[must_use]
    pub fn most_new_rows(&self, tokens: usize) -> usize {
        if self.eviction().is_some_and(|eviction| eviction.holds_budget()) { tokens.min(1) } else { tokens }
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
        })
    }
}

/// Keys and values of all layers of one sequence.
///
/// A cache is filled by [`Llama::prefill`](crate::model::Llama::prefill) and grows by
/// [`Llama::decode`](crate::model::Llama::decode); cloning it forks the sequence.
#[derive(Debug, Clone)]
pub struct AdaptiveKvCache {
    layers: Layers,
    retention: Retention,
    seen: usize,
    /// Tokens since the last prompt, which no profile has decided about; not collected for a full cache, and where heads
    /// go on evicting.
    recent: Vec<TokenClass>,
}

/// Where keys and values are.
#[derive(Debug, Clone)]
enum Layers {
    /// In memory, as the CPU kernels read them.
    Host(Vec<LayerCacheManager>),
    /// In tensors, as candle operations read them.
    Device(Vec<DeviceLayer>),
}

impl AdaptiveKvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// As [`KvDtype::check`].
    pub fn new(num_layers: usize, layout: HeadLayout, dtype: KvDtype, retention: Retention) -> Result<Self> {
        let layers = (0..num_layers).map(|layer| LayerCacheManager::new(layer, layout, dtype));
        Ok(Self { layers: Layers::Host(layers.collect::<Result<_>>()?), retention, seen: 0, recent: Vec::new() })
    }

    /// An empty cache whose keys and values are tensors, for attention made of candle operations.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a quantised format, or where heads go on evicting while tokens are generated.
    pub fn on_device(
        num_layers: usize,
        layout: HeadLayout,
        dtype: KvDtype,
        retention: Retention,
        ops: &Ops,
    ) -> Result<Self> {
        if retention.eviction().is_some() {
            return Err(Error::unsupported("`\"decode\": \"evict\"` with attention made of candle operations")
                .with_hint("use `\"decode\": \"append\"`, or --attention cpu"));
        }
        let layers = (0..num_layers).map(|layer| DeviceLayer::new(layer, layout, dtype, ops));
        Ok(Self { layers: Layers::Device(layers.collect::<Result<_>>()?), retention, seen: 0, recent: Vec::new() })
    }

    /// An empty cache of the same kind.
    #[must_use]
    pub fn emptied(&self) -> Self {
        let layers = match &self.layers {
            Layers::Host(layers) => Layers::Host(layers.iter().map(LayerCacheManager::emptied).collect()),
            Layers::Device(layers) => Layers::Device(layers.iter().map(DeviceLayer::emptied).collect()),
        };
        Self { layers, retention: self.retention.clone(), seen: 0, recent: Vec::new() }
    }

    /// Tokens given so far, those included that no head keeps: the position of the next token.
    #[must_use]
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Whether all layers have got the same tokens; they have not after a prompt that failed halfway.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.shapes().iter().all(|&(_, seen)| seen == self.seen)
    }

    /// Heads and tokens seen of each layer.
    fn shapes(&self) -> Vec<(HeadLayout, usize)> {
        match &self.layers {
            Layers::Host(layers) => layers.iter().map(|layer| (layer.layout(), layer.seen())).collect(),
            Layers::Device(layers) => layers.iter().map(|layer| (layer.layout(), layer.seen())).collect(),
        }
    }

    /// Checks that the cache is of a model's shape, and that all layers have got the same tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not.
    pub fn expect_shape(&self, num_layers: usize, layout: HeadLayout) -> Result<()> {
        let shapes = self.shapes();
        if shapes.len() != num_layers {
            return Err(Error::shape("cache layers", num_layers, shapes.len()));
        }
        match shapes.into_iter().find(|&shape| shape != (layout, self.seen)) {
            Some(shape) => Err(Error::shape("a cache's layer", (layout, self.seen), shape)),
            None => Ok(()),
        }
    }

    /// The layers, from the first; none if they are [tensors](Self::device_layers).
    #[must_use]
    pub fn layers(&self) -> &[LayerCacheManager] {
        match &self.layers {
            Layers::Host(layers) => layers,
            Layers::Device(_) => &[],
        }
    }

    /// The layers, from the first, if they are tensors; else none.
    #[must_use]
    pub fn device_layers(&self) -> &[DeviceLayer] {
        match &self.layers {
            Layers::Host(_) => &[],
            Layers::Device(layers) => layers,
        }
    }

    /// How many layers there are, wherever they are.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        match &self.layers {
            Layers::Host(layers) => layers.len(),
            Layers::Device(layers) => layers.len(),
        }
    }

    /// Kept rows of all heads as a share of all tokens seen, in 0..=1.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn kept_ratio(&self) -> f64 {
        self.mean_rows() / self.seen.max(1) as f64
    }

    /// Kept rows of a head, the mean over all heads.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn mean_rows(&self) -> f64 {
        let lens: Vec<usize> = match &self.layers {
            Layers::Host(layers) => layers.iter().flat_map(LayerCacheManager::heads).map(HeadCache::len).collect(),
            Layers::Device(layers) => layers.iter().flat_map(DeviceLayer::positions).map(Vec::len).collect(),
        };
        lens.iter().sum::<usize>() as f64 / lens.len().max(1) as f64
    }

    /// What is kept of the prompt.
    #[must_use]
    pub fn retention(&self) -> &Retention {
        &self.retention
    }

    /// Bytes of all layers.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        match &self.layers {
            Layers::Host(layers) => layers.iter().map(LayerCacheManager::bytes).sum(),
            Layers::Device(layers) => layers.iter().map(DeviceLayer::bytes).sum(),
        }
    }

    /// The classes of the tokens that a profile of this prompt decides about: those that were decoded since the last
    /// prompt (unless heads go on evicting), then the prompt's. Empty for a full cache, which does not ask for them.
    #[must_use]
    pub fn segment_classes(&self, prompt: &[u32]) -> Vec<TokenClass> {
        match &self.retention {
            Retention::Full => Vec::new(),
            Retention::Adaptive { classifier, .. } => {
                let mut classes = self.recent.clone();
                classes.extend(classifier.classify_all(prompt));
                classes
            }
        }
    }

    /// The layer to write to.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such layer, or the layers are tensors.
    pub fn layer_mut(&mut self, layer: usize) -> Result<&mut LayerCacheManager> {
        let num_layers = self.num_layers();
        let Layers::Host(layers) = &mut self.layers else {
            return Err(Error::shape("a cache's layers", "in memory", "tensors"));
        };
        layers.get_mut(layer).ok_or_else(|| Error::shape("cache layers", format!("below {num_layers}"), layer))
    }

    /// The layer to write to, as tensors.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such layer, or the layers are not tensors.
    pub fn device_layer_mut(&mut self, layer: usize) -> Result<&mut DeviceLayer> {
        let num_layers = self.num_layers();
        let Layers::Device(layers) = &mut self.layers else {
            return Err(Error::shape("a cache's layers", "tensors", "in memory"));
        };
        layers.get_mut(layer).ok_or_else(|| Error::shape("cache layers", format!("below {num_layers}"), layer))
    }

    /// Counts the tokens of a prompt that all layers have stored.
    pub fn settle(&mut self, num_tokens: usize) {
        self.seen += num_tokens;
        self.recent = Vec::new();
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
        self.seen += 1;
        if matches!(&self.retention, Retention::Adaptive { .. }) && self.retention.eviction().is_none() {
            self.recent.push(self.class(id));
        }
    }
}
