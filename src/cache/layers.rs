//! All layers of a cache, whatever their rows are.

use std::any::Any;
use std::fmt;

use rayon::prelude::*;

use super::{CacheBytes, CacheLayer, Ledger, Rows};
use crate::compress::Eviction;
use crate::error::Result;
use crate::records::{Sink, Source};

/// Layers whose rows are of some kind.
pub(super) trait Layers: fmt::Debug + Send + Sync {
    fn ledgers(&self) -> Vec<&Ledger>;
    fn bytes(&self) -> CacheBytes;
    fn emptied(&self) -> Box<dyn Layers>;
    fn boxed_clone(&self) -> Box<dyn Layers>;
    fn token_bytes(&self) -> usize;
    fn can_save(&self) -> bool;
    fn save(&self, layer: usize, sink: &mut Sink<'_>);
    fn load(&mut self, tokens: (usize, usize), eviction: Option<&Eviction>, sources: Vec<Source>) -> Result<()>;
    fn expect_first(&self, len: usize) -> Result<()>;
    fn keep_first(&mut self, len: usize) -> Result<()>;
    fn forget(&mut self, count: usize) -> Result<()>;
    fn room(&self, budget: usize) -> usize;
    fn reserve(&mut self, tokens: usize, budget: usize);
    fn head_bytes(&self) -> usize;
    fn make_room(&mut self, rows: usize);
    fn as_any(&self) -> &dyn Any;
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

impl<R: Rows> Layers for Vec<CacheLayer<R>> {
    fn ledgers(&self) -> Vec<&Ledger> {
        self.iter().map(CacheLayer::ledger).collect()
    }

    fn bytes(&self) -> CacheBytes {
        self.iter().map(CacheLayer::bytes).sum()
    }

    fn emptied(&self) -> Box<dyn Layers> {
        Box::new(self.iter().map(CacheLayer::emptied).collect::<Self>())
    }

    fn boxed_clone(&self) -> Box<dyn Layers> {
        Box::new(self.clone())
    }

    fn token_bytes(&self) -> usize {
        self.first().map_or(0, CacheLayer::token_bytes)
    }

    fn can_save(&self) -> bool {
        R::can_save()
    }

    fn save(&self, layer: usize, sink: &mut Sink<'_>) {
        self[layer].save(sink);
    }

    fn load(&mut self, tokens: (usize, usize), eviction: Option<&Eviction>, sources: Vec<Source>) -> Result<()> {
        self.par_iter_mut().zip(sources).try_for_each(|(layer, source)| layer.load(tokens, eviction, source))
    }

    fn expect_first(&self, len: usize) -> Result<()> {
        self.iter().try_for_each(|layer| layer.expect_first(len))
    }

    fn keep_first(&mut self, len: usize) -> Result<()> {
        self.par_iter_mut().try_for_each(|layer| layer.keep_first(len))
    }

    fn forget(&mut self, count: usize) -> Result<()> {
        self.iter_mut().try_for_each(|layer| layer.forget(count))
    }

    fn room(&self, budget: usize) -> usize {
        let (held, a_token) =
            self.iter().map(CacheLayer::needed).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        budget.saturating_sub(held) / a_token.max(1)
    }

    fn reserve(&mut self, tokens: usize, budget: usize) {
        if self.iter().all(|layer| layer.rows().spare() >= tokens) {
            return;
        }
        let bytes =
            |layer: &CacheLayer<R>| layer.bytes().allocated + layer.bytes().mapped + layer.rows().growth_bytes();
        if self.iter().map(bytes).sum::<usize>() > budget {
            Layers::make_room(self, Layers::room(self, budget));
        }
    }

    fn head_bytes(&self) -> usize {
        self.iter().map(|layer| layer.ledger().layout().num_kv_heads * layer.rows().head_bytes()).sum()
    }

    fn make_room(&mut self, rows: usize) {
        for layer in self {
            layer.parts_mut().1.make_room(rows);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
