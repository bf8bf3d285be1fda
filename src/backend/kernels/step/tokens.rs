//! A step whose rows are several tokens of one sequence: weights are read once for all of them, and each token attends to
//! the rows that decoding would show it, in the layout and the ranges that it would find them in.
//!
//! How a row is scored depends on where it is stored: in a whole tile or behind the last one. So a head's last range is
//! gone over as decoding does, a token's row added, then its attention; the ranges before it are the same for all tokens.
//!
//! Heads get their rows while the step goes on, their books when it is over: a step that fails leaves no trace.

use std::ops::Range;

use super::work::{CacheRange, CacheWork, pieces};
use super::{KernelLayer, Kernels, Step, run_rows};
use crate::attention::HeadLayout;
use crate::attention::decode::{RANGE_ROWS, ranges as cut};
use crate::backend::kernels::head::HeadCache;
use crate::backend::kernels::rows::KernelRows;
use crate::backend::{Block, Weights};
use crate::cache::AdaptiveKvCache;
use crate::error::Result;
use crate::kernels::attend::{HeadRows, attend_range};
use crate::kernels::simd::InstructionSet;
use crate::kernels::team::{SharedSlice, Worker};
use crate::tokens::TokenClass;

/// Gives a sequence several tokens, see [`Backend::decode_run`](crate::backend::Backend::decode_run).
pub(in crate::backend::kernels) fn run_tokens(
    kernels: &Kernels,
    weights: &Weights<Kernels>,
    ids: &[u32],
    angles: &[(f32, f32)],
    cache: &mut AdaptiveKvCache,
    logits: &mut Vec<f32>,
) -> Result<()> {
    let (seen, classes): (_, Vec<TokenClass>) = (cache.seen(), ids.iter().map(|&id| cache.class(id)).collect());
    let layers = cache.layers::<KernelRows>()?;
    layers.iter().try_for_each(|layer| layer.ledger().check_run(seen, ids.len()))?;
    let result = run_rows(kernels, weights, ids, angles, &mut [&mut *cache], true, logits);
    let classes = if result.is_ok() { &classes[..] } else { &[] };
    for layer in cache.layers_mut::<KernelRows>()? {
        layer.settle_run(classes);
    }
    result
}

/// What the threads of a step share of the one sequence whose tokens its rows are.
pub(super) struct TokenRun<'c> {
    /// `[layers]`
    layers: Vec<RunLayer<'c>>,
}

struct RunLayer<'c> {
    /// `[num_kv_heads]`
    heads: SharedSlice<'c, HeadCache>,
    /// `[tokens, num_kv_heads]` of the layer's ranges, which ones are of a token and a head.
    ranges: Vec<Range<usize>>,
    /// `[num_kv_heads]` ranges before the last that was begun: they are whole, and the same for all tokens.
    whole: Vec<usize>,
    /// All whole ranges, as a head and a number.
    shared: Vec<(usize, usize)>,
    /// Of `shared`, which ones are claimed together.
    pieces: Vec<Range<usize>>,
}

impl<'c> TokenRun<'c> {
    /// Cuts the work of all layers.
    ///
    /// * `tokens`: how many there are
    /// * `work`: `[layers]`, gets the ranges of all tokens
    pub fn cut(layers: Option<&'c mut [KernelLayer]>, tokens: usize, threads: usize, work: &mut [CacheWork]) -> Self {
        let layers = layers.into_iter().flatten().zip(work);
        Self { layers: layers.map(|(layer, work)| RunLayer::cut(layer, tokens, threads, work)).collect() }
    }
}

impl<'c> RunLayer<'c> {
    fn cut(layer: &'c mut KernelLayer, tokens: usize, threads: usize, work: &mut CacheWork) -> Self {
        let heads = layer.parts_mut().1.heads_mut();
        let CacheWork { ranges: all, pieces: claimed, evicting } = work;
        all.clear();
        claimed.clear();
        evicting.clear();
        let mut ranges = Vec::with_capacity(tokens * heads.len());
        for token in 0..tokens {
            for (kv_head, head) in heads.iter().enumerate() {
                let (first, len) = (all.len(), head.len() + token + 1);
                all.extend(cut(head.num_settled(), len).map(|rows| {
                    let last = rows.end == len;
                    CacheRange { sequence: token, kv_head, rows, last }
                }));
                ranges.push(first..all.len());
            }
        }
        let whole = |head: &HeadCache| {
            let num_settled = head.num_settled();
            num_settled.div_ceil(RANGE_ROWS) + (head.len() - num_settled) / RANGE_ROWS
        };
        let whole: Vec<usize> = heads.iter().map(whole).collect();
        let shared: Vec<(usize, usize)> =
            whole.iter().enumerate().flat_map(|(kv_head, &count)| (0..count).map(move |n| (kv_head, n))).collect();
        let pieces = pieces(shared.len(), threads, 1, usize::MAX).collect();
        Self { heads: SharedSlice::new(heads), ranges, whole, shared, pieces }
    }

    fn ranges(&self, token: usize, kv_head: usize) -> Range<usize> {
        self.ranges[token * self.heads.len() + kv_head].clone()
    }
}

impl Step<'_, '_> {
    /// Rotates what the tokens were projected to, gives the heads their rows, and attends from all tokens.
    pub(super) fn append_and_attend(
        &self,
        set: InstructionSet,
        tokens: &TokenRun<'_>,
        layer: usize,
        worker: &mut Worker<'_>,
    ) {
        let run = &tokens.layers[layer];
        self.phase(worker, run.heads.len(), |kv_head| {
            for token in 0..self.batch {
                self.append(&self.weights.blocks[layer], run, token, kv_head);
                // SAFETY: each head is claimed once in this phase, and the view of it that wrote is gone.
                let rows = unsafe { &run.heads.read(kv_head..kv_head + 1)[0] }.rows();
                for index in run.ranges(token, kv_head).skip(run.whole[kv_head]) {
                    self.attend_from(set, layer, index, &rows);
                }
            }
        });
        self.phase(worker, run.pieces.len(), |piece| {
            for &(kv_head, number) in &run.shared[run.pieces[piece].clone()] {
                // SAFETY: heads were written in the phase before.
                let rows = unsafe { &run.heads.read(kv_head..kv_head + 1)[0] }.rows();
                for token in 0..self.batch {
                    self.attend_from(set, layer, run.ranges(token, kv_head).start + number, &rows);
                }
            }
        });
    }

    /// Rotates a token's queries and key of one head, and gives the head the key and the value.
    fn append(&self, block: &Block<Kernels>, run: &RunLayer<'_>, token: usize, kv_head: usize) {
        let HeadLayout { head_dim, .. } = self.kernels.layout;
        let (query_width, kv_width) = (self.kernels.layout.query_width(), self.kernels.layout.kv_width());
        let group = self.kernels.layout.group_size() * head_dim;
        let first = token * (query_width + 2 * kv_width);
        let key = first + query_width + kv_head * head_dim;
        let queries = first + kv_head * group;
        // SAFETY: each head is claimed once in this phase; nobody else looks at it, or at what tokens are projected to for it.
        let (queries, key, value, head) = unsafe {
            (
                self.qkv.write(queries..queries + group),
                self.qkv.write(key..key + head_dim),
                self.qkv.read(key + kv_width..key + kv_width + head_dim),
                &mut run.heads.write(kv_head..kv_head + 1)[0],
            )
        };
        let half = self.angles.len() / self.batch;
        let angles = &self.angles[token * half..(token + 1) * half];
        self.kernels.norm_heads(queries, block.q_norm.as_ref());
        self.kernels.norm_heads(key, block.k_norm.as_ref());
        self.kernels.rope.rotate(queries, group, head_dim, angles);
        self.kernels.rope.rotate(key, head_dim, head_dim, angles);
        let scale = self.kernels.layout.scale();
        for query in queries {
            *query *= scale;
        }
        if let Err(error) = head.push(key, value) {
            self.fail(error);
        }
    }

    /// Attends from a token to one of its ranges.
    fn attend_from(&self, set: InstructionSet, layer: usize, index: usize, head: &HeadRows<'_>) {
        let group_size = self.kernels.layout.group_size();
        let group = group_size * self.kernels.layout.head_dim;
        let CacheRange { sequence: token, kv_head, rows, .. } = self.cache_work[layer].ranges[index].clone();
        let first = token * (self.qkv.len() / self.batch) + kv_head * group;
        // SAFETY: queries were written in the phase before, or by this thread, which alone has claimed the head; each range
        // is gone over once, and has a place of its own.
        let (queries, out, max_and_sum) = unsafe {
            (
                self.qkv.read(first..first + group),
                self.partial.write(index * group..(index + 1) * group),
                self.max_and_sum.write(index * group_size..(index + 1) * group_size),
            )
        };
        attend_range(set, *head, rows, queries, out, max_and_sum);
    }
}
