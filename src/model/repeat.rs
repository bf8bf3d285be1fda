//! The second pass over a prompt, for methods that ask for a [`Repetition`]: what was read is read once more, on top of the
//! full cache of all layers, which it leaves as it is.
//!
//! The chunks go through all layers one after the other, each as a further prompt would, behind copies of what a layer
//! holds; nothing of it is stored. Positions go on behind the prompt: the last ones may lie beyond the model's context, by
//! a chunk and the words that ask for it.
//!
//! Not for: judging positions by what is seen (see [`crate::compress::budget::methods`]).

use std::ops::Range;

use super::Model;
use super::options::PrefillOptions;
use crate::attention::repeat::{Repeated, largest_weights};
use crate::attention::replay::squared_outputs;
use crate::backend::{Backend, Block, PromptRequest, Wanted};
use crate::cache::{AdaptiveKvCache, Ledger, Retention};
use crate::compress::budget::methods::Repetition;
use crate::compress::{LayerRepeat, Segment};
use crate::error::{Error, Result};
use crate::kernels::vector::{self, instruction_set};
use crate::tokens::RepeatWords;

/// Last tokens of a chunk that the next repetition is told to start with, as the authors of `KVzip` have it.
const LAST_WORDS: usize = 8;

/// What is to be read a second time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RepeatPlan {
    repetition: Repetition,
    chunks: Vec<RepeatChunk>,
}

/// A part of the tokens, and what is read for it.
#[derive(Debug, PartialEq, Eq)]
struct RepeatChunk {
    /// Which of the tokens.
    originals: Range<usize>,
    /// The words that ask for them, and the tokens.
    ids: Vec<u32>,
}

impl RepeatPlan {
    /// What is to be read after a prompt; `None` if nothing is.
    ///
    /// * `prompt`: the tokens that come behind what the cache has seen
    /// * `has_window`: whether a layer of the model has a sliding window
    ///
    /// # Errors
    /// [`Error::Input`] if words are missing that the method asks with; [`Error::Unsupported`] if heads go on evicting, or
    /// lose what a window has passed.
    pub fn new(cache: &AdaptiveKvCache, prompt: &[u32], has_window: bool) -> Result<Option<Self>> {
        let Retention::Adaptive { config, words, .. } = cache.retention() else { return Ok(None) };
        let Some(repetition) = config.budgeted().and_then(|method| method.needs().repetition) else { return Ok(None) };
        let method = config.method_name();
        if cache.retention().eviction().is_some() {
            return Err(Error::unsupported(format!("evicting while decoding by the method `{method}`")));
        }
        if has_window {
            return Err(Error::unsupported(format!(
                "a second pass, which the method `{method}` is, over a sliding window"
            )));
        }
        let words = match (repetition.instruction, words.as_deref()) {
            (false, _) => None,
            (true, Some(Ok(words))) => Some(words),
            (true, other) => {
                let reason = match other {
                    Some(Err(reason)) => reason,
                    _ => "the cache was made without a tokenizer",
                };
                return Err(Error::input(format!(
                    "the method `{method}` asks the model to repeat the prompt, and can't: {reason}"
                ))
                .with_hint("set `instruction` to false in the configuration: the prompt is then repeated without being asked for"));
            }
        };
        let chunks = chunks(&cache.segment_ids(prompt), words, repetition.chunk_tokens);
        Ok(Some(Self { repetition, chunks }))
    }

    /// Rows that go through every layer.
    pub fn num_rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.ids.len()).sum()
    }
}

/// Parts of some tokens, with the words that ask for each.
fn chunks(tokens: &[u32], words: Option<&RepeatWords>, chunk_tokens: usize) -> Vec<RepeatChunk> {
    let size = chunk_tokens.max(1);
    let chunk = |(index, chunk): (usize, &[u32])| {
        let start = index * size;
        let mut ids = Vec::new();
        if let Some(words) = words {
            if index == 0 {
                ids.extend(&words.from_start);
            } else {
                ids.extend(&words.from_words);
                ids.extend(&tokens[start - LAST_WORDS.min(size)..start]);
            }
            ids.extend(&words.turn);
        }
        ids.extend(chunk);
        RepeatChunk { originals: start..start + chunk.len(), ids }
    };
    tokens.chunks(size).enumerate().map(chunk).collect()
}

/// Rows of a repetition in one layer, as they come.
struct LayerRows {
    /// `[rows, num_heads, head_dim]`
    queries: Vec<f32>,
    /// `[rows]`
    factors: Vec<f32>,
}

impl<B: Backend> Model<B> {
    /// Reads the tokens of a segment once more; what each layer sees of them.
    ///
    /// * `cache`: holds all of the segment
    /// * `step`: called with each number of rows that came through a layer; may end it
    ///
    /// # Errors
    /// As [`prefill_with`](super::Llama::prefill_with); what `step` returns.
    pub(super) fn repeat(
        &self,
        plan: &RepeatPlan,
        cache: &AdaptiveKvCache,
        segment: Segment<'_>,
        options: PrefillOptions,
        step: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<LayerRepeat>> {
        let empty = |wanted: bool| {
            let heads = if wanted { self.config.heads.num_heads } else { 0 };
            vec![Vec::with_capacity(segment.len()); heads]
        };
        let layer = || LayerRepeat { largest_weights: empty(true), squared_outputs: empty(plan.repetition.relative) };
        let mut seen: Vec<LayerRepeat> = (0..self.config.num_layers).map(|_| layer()).collect();
        for chunk in &plan.chunks {
            self.repeat_chunk((plan.repetition, chunk), cache, segment, options, &mut seen, step)?;
        }
        Ok(seen)
    }

    /// Reads one chunk, and adds what each layer sees of its originals.
    fn repeat_chunk(
        &self,
        (repetition, chunk): (Repetition, &RepeatChunk),
        cache: &AdaptiveKvCache,
        segment: Segment<'_>,
        options: PrefillOptions,
        seen: &mut [LayerRepeat],
        step: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let (backend, ids, first) = (&self.backend, &chunk.ids[..], segment.first_position + segment.len());
        let chunk_rows = options.rows(ids.len());
        let mut hidden = self.embed(ids, first, chunk_rows)?;
        let rotations = backend.rotations(self.rope.angles(first, ids.len()))?;
        for (index, (block, seen)) in self.weights.blocks.iter().zip(seen).enumerate() {
            let layer = &cache.layers::<B::Rows>()?[index];
            let request = PromptRequest { prompt_len: ids.len(), stats: None, again: false, window: None };
            let mut prompt = backend.prompt(layer.rows(), request)?;
            let mut rows = LayerRows { queries: Vec::new(), factors: Vec::new() };
            for (part, hidden) in hidden.iter_mut().enumerate() {
                let first_row = part * chunk_rows;
                let projected = backend.project(block, hidden, &rotations, first_row, false)?;
                let attended = backend.attend(&mut prompt, &projected, first_row, None, None)?;
                let wanted = Wanted { queries: true, ..Wanted::default() };
                backend.show(&projected, hidden, wanted, &mut |shown| {
                    rows.queries.extend_from_slice(shown.queries);
                    Ok(())
                })?;
                rows.add_factors(repetition, self.config.hidden_size, || backend.attention_input(block, hidden))?;
                // What the last layer puts out is asked for by nobody.
                if index + 1 < self.config.num_layers {
                    *hidden = backend.finish(block, hidden, attended)?;
                }
                step(chunk_rows.min(ids.len() - first_row))?;
            }
            rows.factors.resize(ids.len(), 1.0);
            self.check_layer(&hidden, index, (first, ids.len()), chunk_rows)?;
            self.look(block, (repetition, chunk), (layer.ledger(), segment), &prompt, &rows, seen)?;
        }
        Ok(())
    }

    /// Adds what a layer sees of a chunk's originals.
    fn look(
        &self,
        block: &Block<B>,
        (repetition, chunk): (Repetition, &RepeatChunk),
        (ledger, segment): (&Ledger, Segment<'_>),
        prompt: &B::Prompt,
        rows: &LayerRows,
        seen: &mut LayerRepeat,
    ) -> Result<()> {
        let (layout, kv) = (self.config.heads, self.backend.prompt_kv(prompt)?);
        // Sinks that are among the originals are seen as such.
        let end_of_sinks = repetition.sink_tokens.min(segment.first_position + chunk.originals.start);
        let is_sink = |&position: &u32| (position as usize) < end_of_sinks;
        let held = ledger.positions();
        let sinks: Vec<usize> = held.iter().map(|positions| positions.partition_point(is_sink)).collect();
        let originals = |positions: &Vec<u32>| {
            let first = positions.len().saturating_sub(segment.len());
            first + chunk.originals.start..first + chunk.originals.end
        };
        let originals: Vec<Range<usize>> = held.iter().map(originals).collect();
        let LayerRows { queries, factors } = rows;
        let weights = largest_weights(Repeated {
            layout,
            queries,
            keys: &kv.keys,
            factors,
            sinks: &sinks,
            originals: &originals,
        })?;
        for (all, chunk) in seen.largest_weights.iter_mut().zip(weights) {
            all.extend(chunk);
        }
        if repetition.relative {
            let values: Vec<Vec<f32>> =
                originals.iter().enumerate().map(|(kv_head, rows)| kv.values.rows(kv_head, rows.clone())).collect();
            let weights = self.backend.widened(&block.o_proj)?;
            let outputs = squared_outputs(layout, self.config.hidden_size, &*weights, &values)?;
            for (all, chunk) in seen.squared_outputs.iter_mut().zip(outputs) {
                all.extend(chunk);
            }
        }
        Ok(())
    }
}

impl LayerRows {
    /// What some rows' weights are multiplied with, if they are relative.
    ///
    /// * `input`: the rows that attention reads, `[rows, hidden_size]`
    fn add_factors(
        &mut self,
        repetition: Repetition,
        hidden_size: usize,
        input: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<()> {
        if repetition.relative {
            let (input, set) = (input()?, instruction_set());
            let length = |row: &[f32]| vector::dot(set, row, row).sqrt();
            // Rows of zeros have weights, too.
            let rows = input.chunks_exact(hidden_size.max(1));
            self.factors.extend(rows.map(|row| 1.0 / length(row).max(f32::MIN_POSITIVE)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_asked_for_by_the_last_words_before_it() {
        let tokens: Vec<u32> = (0..25).collect();
        let words = RepeatWords { from_start: vec![100, 101], from_words: vec![102], turn: vec![103, 104] };
        let expected = [
            (0..10, [&[100, 101, 103, 104][..], &tokens[..10]].concat()),
            (10..20, [&[102][..], &tokens[2..10], &[103, 104], &tokens[10..20]].concat()),
            (20..25, [&[102][..], &tokens[12..20], &[103, 104], &tokens[20..]].concat()),
        ];
        let expected = expected.map(|(originals, ids)| RepeatChunk { originals, ids });
        assert_eq!(chunks(&tokens, Some(&words), 10), expected);
        let bare = chunks(&tokens, None, 24);
        let expected = [(0..24, tokens[..24].to_vec()), (24..25, vec![24])];
        assert_eq!(bare, expected.map(|(originals, ids)| RepeatChunk { originals, ids }));
        // Chunks of fewer tokens than are said of them.
        assert_eq!(chunks(&tokens[..4], Some(&words), 3)[1].ids, [102, 0, 1, 2, 103, 104, 3]);
        assert!(chunks(&[], Some(&words), 5).is_empty());
    }
}
