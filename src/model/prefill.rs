//! The forward pass of a prompt, into one cache or several.

use std::ops::ControlFlow;
use std::time::Duration;

use super::Model;
use super::forks::{Done, Forks};
use super::keeper::Brief;
use super::observer::PrefillObserver;
use super::options::PrefillOptions;
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
    pub profile_time: Duration,
}

/// What a prompt left behind that was read into several caches.
#[derive(Debug, Clone, PartialEq)]
pub struct ForkedPrefill {
    /// `[vocab_size]` logits of the next token, the same for all.
    pub logits: Vec<f32>,
    /// How many times attention was computed.
    pub attentions: usize,
}

/// What a prompt left behind in all of its caches.
struct Read {
    logits: Vec<f32>,
    /// For each cache what its layers keep, and the time that choosing and storing took.
    kept: Vec<(Vec<LayerSummary>, Duration)>,
    attentions: usize,
}

/// Hands on progress, and nothing else.
struct ProgressOnly<'a>(&'a mut dyn PrefillObserver);

impl PrefillObserver for ProgressOnly<'_> {
    fn progress(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.0.progress(done, total)
    }
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
        let Read { logits, mut kept, .. } = self.read(ids, std::slice::from_mut(cache), options, observer)?;
        let (layers, profile_time) = kept.pop().unwrap_or_default();
        Ok(Prefill { logits, layers, profile_time })
    }

    /// See [`Llama::prefill_forks`](super::Llama::prefill_forks).
    ///
    /// * `ids`: at least one, and within the context
    /// * `caches`: at least one, empty
    pub fn prefill_forks(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill> {
        let Read { logits, attentions, .. } = self.read(ids, caches, options, &mut ProgressOnly(observer))?;
        Ok(ForkedPrefill { logits, attentions })
    }

    /// * `caches`: one, or several that are empty
    fn read(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Read> {
        let read = self.read_layers(ids, caches, options, observer);
        self.backend.release();
        memory::release_unused();
        read
    }

    fn read_layers(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Read> {
        let (backend, seen) = (&self.backend, caches.first().map_or(0, AdaptiveKvCache::seen));
        let map_side = observer.map_side();
        let briefs: Vec<Brief> = caches.iter().map(|cache| Brief::new(cache, ids, map_side)).collect();
        let chunk_rows = options.rows(ids.len());
        let mut hidden = self.embed(ids, seen, chunk_rows)?;
        let rotations = backend.rotations(self.rope.angles(seen, ids.len()))?;
        let mut forks = Forks::new(&briefs, caches, ids, self.has_window())?;
        let mut done = Done::new((ids.len() + forks.repeated_rows()) * self.config.num_layers, observer);
        // Of what it puts out, only the last row is asked for.
        let last_layer = self.config.num_layers.saturating_sub(1);
        let mut attentions = 0;
        for (index, block) in self.weights.blocks.iter().enumerate() {
            let mut groups = self.groups(index, caches, &forks)?;
            attentions = groups.len();
            for (chunk, rows) in hidden.iter_mut().enumerate() {
                let first_row = chunk * chunk_rows;
                let attended = self.attend_all(block, rows, &rotations, first_row, &mut groups)?;
                if index < last_layer {
                    *rows = backend.finish(block, rows, attended)?;
                } else if first_row + chunk_rows >= ids.len() {
                    let (row, attended) = backend.last_row(rows, attended)?;
                    *rows = backend.finish(block, &row, attended)?;
                }
                done.add(chunk_rows.min(ids.len() - first_row))?;
            }
            let mut place = (seen, ids.len());
            if index == last_layer {
                hidden.drain(..hidden.len() - 1);
                place = (seen + ids.len() - 1, 1);
            }
            self.check_layer(&hidden, index, place, chunk_rows)?;
            self.keep_all(index, groups, caches, &mut forks, done.observer)?;
        }
        self.repeat_for_all(caches, &mut forks, options, &mut done)?;
        let kept = forks.finish::<B>(caches, done.observer)?;
        for cache in caches {
            cache.settle(ids);
        }
        let last = hidden.pop().ok_or_else(|| Error::input("the prompt is empty"))?;
        drop(hidden);
        let logits = backend.logits(&self.weights, &last)?;
        check_logits(&logits, seen + ids.len())?;
        Ok(Read { logits, kept, attentions })
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
