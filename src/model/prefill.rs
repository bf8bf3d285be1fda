//! The forward pass of a prompt.

use super::Model;
use super::keeper::{Brief, Keeper};
use super::observer::PrefillObserver;
use super::options::PrefillOptions;
use super::repeat::RepeatPlan;
use crate::backend::Backend;
use crate::cache::{AdaptiveKvCache, LayerSummary};
use crate::error::{Error, Result};
use crate::memory;
use crate::numbers::{all_finite, check_logits};

/// What a prompt left behind.
#[derive(Debug)]
pub struct Prefill {
    /// `[vocab_size]` logits of the next token.
    pub logits: Vec<f32>,
    /// What each layer keeps.
    pub layers: Vec<LayerSummary>,
    /// Time that choosing and storing took, apart from collecting statistics, which is part of attention.
    pub profile_time: std::time::Duration,
}

impl<B: Backend> Model<B> {
    /// See [`Llama::prefill_with`](super::Llama::prefill_with).
    ///
    /// * `ids`: at least one, and within the context
    pub fn prefill(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill> {
        let prefill = self.prefill_layers(ids, cache, options, observer);
        self.backend.release();
        memory::release_unused();
        prefill
    }

    fn prefill_layers(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill> {
        let (backend, seen) = (&self.backend, cache.seen());
        let brief = Brief::new(cache, ids, observer.map_side());
        let mut keeper = Keeper::new(&brief);
        let chunk_rows = options.rows(ids.len());
        let mut hidden = self.embed(ids, seen, chunk_rows)?;
        let rotations = backend.rotations(self.rope.angles(seen, ids.len()))?;
        let repeat = RepeatPlan::new(cache, ids, self.has_window())?;
        let rows = ids.len() + repeat.as_ref().map_or(0, RepeatPlan::num_rows);
        let (mut done, total) = (0, rows * self.config.num_layers);
        // Of what it puts out, only the last row is asked for.
        let last_layer = self.config.num_layers.saturating_sub(1);
        for (index, block) in self.weights.blocks.iter().enumerate() {
            let layer = &cache.layers::<B::Rows>()?[index];
            let mut watch = brief.layer(self, layer);
            let mut prompt = backend.prompt(layer.rows(), watch.request())?;
            for (chunk, rows) in hidden.iter_mut().enumerate() {
                let first_row = chunk * chunk_rows;
                let projected = backend.project(block, rows, &rotations, first_row, watch.wanted().unrotated)?;
                let (stats, maps) = watch.collectors();
                let attended = backend.attend(&mut prompt, &projected, first_row, stats, maps)?;
                watch.look(backend, &projected, rows)?;
                if index < last_layer {
                    *rows = backend.finish(block, rows, attended)?;
                } else if first_row + chunk_rows >= ids.len() {
                    let (row, attended) = backend.last_row(rows, attended)?;
                    *rows = backend.finish(block, &row, attended)?;
                }
                done += chunk_rows.min(ids.len() - first_row);
                if observer.progress(done, total).is_break() {
                    return Err(Error::Interrupted);
                }
            }
            let mut place = (seen, ids.len());
            if index == last_layer {
                hidden.drain(..hidden.len() - 1);
                place = (seen + ids.len() - 1, 1);
            }
            self.check_layer(&hidden, index, place, chunk_rows)?;
            keeper.layer_done(self, index, watch, &prompt, cache, observer)?;
        }
        if let Some(repeat) = &repeat {
            let mut step = |rows: usize| {
                done += rows;
                if observer.progress(done, total).is_break() { Err(Error::Interrupted) } else { Ok(()) }
            };
            let seen = self.repeat(repeat, cache, brief.segment(None), options, &mut step)?;
            keeper.repeated(self, seen, cache, observer)?;
        }
        let (layers, profile_time) = keeper.finish::<B>(cache, observer)?;
        cache.settle(ids.len());
        let last = hidden.pop().ok_or_else(|| Error::input("the prompt is empty"))?;
        drop(hidden);
        let logits = backend.logits(&self.weights, &last)?;
        check_logits(&logits, cache.seen())?;
        Ok(Prefill { logits, layers, profile_time })
    }

    /// The vectors of a prompt's tokens, in chunks.
    ///
    /// * `first`: position of the first token
    pub(super) fn embed(&self, ids: &[u32], first: usize, chunk_rows: usize) -> Result<Vec<B::Hidden>> {
        let embed = |(ids, first): (&[u32], usize)| {
            let mut embedded = Vec::new();
            self.weights.embed_tokens.look_up(ids, &mut embedded)?;
            let rows = embedded.chunks_exact(self.config.hidden_size.max(1));
            if let Some(row) = rows.into_iter().position(|row| !all_finite(row)) {
                let (id, position) = (ids[row], first + row);
                return Err(Error::not_a_number(format!("the vector of token {id}, which is at position {position}")));
            }
            self.backend.hidden(embedded)
        };
        ids.chunks(chunk_rows).zip((first..).step_by(chunk_rows)).map(embed).collect()
    }

    /// Refuses what a layer made of a prompt if any of it is not a number: what follows would be made of it, and what heads
    /// keep be chosen by it.
    ///
    /// * `hidden`: rows of the layer's output, in chunks
    /// * `seen`, `len`: positions before these rows, and how many they are
    pub(super) fn check_layer(
        &self,
        hidden: &[B::Hidden],
        layer: usize,
        (seen, len): (usize, usize),
        chunk_rows: usize,
    ) -> Result<()> {
        let mut bad = Vec::new();
        for (chunk, rows) in hidden.iter().enumerate() {
            bad.extend(self.backend.bad_rows(rows)?.into_iter().map(|row| seen + chunk * chunk_rows + row));
        }
        // Rows are multiplied with one another, those that are masked with 0: what one has may be found in all.
        let place = match bad[..] {
            [] => return Ok(()),
            [position] => format!("position {position}"),
            [first, ..] => format!("{} of {len} positions, the first {first}", bad.len()),
        };
        Err(Error::not_a_number(format!("the output of layer {layer} at {place}")))
    }
}
