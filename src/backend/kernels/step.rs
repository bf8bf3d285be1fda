//! One decoding step of one or several sequences, on a team of threads, straight on the stored weights.
//!
//! Every thread goes through the phases of the whole step, and claims pieces of each: rows of weights, or ranges of cached
//! rows. With several sequences each piece of weights is read once for all of them, while each attends to its own cache.
//! How phases are cut into pieces depends on the number of threads, but no row's or range's result depends on who computes
//! it, on its piece, or on what else is in the batch: neither do a step's. Buffers are kept from step to step.
//!
//! The rows of a step may also be several tokens of one sequence, each of which attends to those before it, too: see
//! [`tokens`].
//!
//! The slow path, [`plain`](crate::backend::plain), is its oracle.

#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one claim of a chunk, or one phase before, gives all parts of shared slices that are taken together"
)]

mod inputs;
mod own;
#[cfg(test)]
mod tests;
mod tokens;
mod work;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Kernels;
use super::linear::KernelLinear;
use super::rows::{KernelLayer, KernelRows};
use crate::attention::HeadLayout;
use crate::backend::{Block, Weights};
use crate::cache::{AdaptiveKvCache, HeadStep};
use crate::error::{Error, Result};
use crate::kernels::attend::{attend_range, row_weights};
use crate::kernels::quant::Activations;
use crate::kernels::simd::InstructionSet;
use crate::kernels::team::{SharedSlice, Team, Worker};
use crate::kernels::vector::{self, instruction_set};
use crate::stop::Watch;
use crate::tokens::TokenClass;
use inputs::{MOST_FORMATS, Source};
use own::Own;
use tokens::TokenRun;
pub(super) use tokens::run_tokens;
use work::{CacheRange, CacheWork, each_piece};

/// Buffers of a step that its threads share.
#[derive(Debug, Default)]
struct Shared {
    /// `[batch, hidden_size]`
    hidden: Vec<f32>,
    /// `[batch, query width + 2 * kv width]`
    qkv: Vec<f32>,
    /// `[batch, intermediate_size]`
    activated: Vec<f32>,
    /// `[ranges, group_size * head_dim]`, unnormalised
    partial: Vec<f32>,
    /// `[ranges, group_size]`
    max_and_sum: Vec<(f32, f32)>,
    /// `[layers]`
    cache_work: Vec<CacheWork>,
    /// `[batch, num_kv_heads]`
    head_steps: Vec<HeadStep>,
    /// Parts of rows that threads prepare for one another, [`MOST_FORMATS`] for each.
    parts: Vec<Activations>,
}

thread_local! {
    static SHARED: RefCell<Shared> = RefCell::default();
    static OWN: RefCell<Own> = RefCell::default();
}

/// Gives each sequence one token, and computes the logits of the next.
///
/// * `ids`: `[batch]`
/// * `angles`: `[batch, rope dim / 2]` of the tokens' positions
/// * `caches`: `[batch]`, of this model's shape; every layer gets the token
/// * `logits`: overwritten with `[batch, vocab_size]`
pub(super) fn run(
    kernels: &Kernels,
    weights: &Weights<Kernels>,
    ids: &[u32],
    angles: &[(f32, f32)],
    caches: &mut [&mut AdaptiveKvCache],
    logits: &mut Vec<f32>,
) -> Result<()> {
    run_rows(kernels, weights, ids, angles, caches, false, logits)
}

/// As [`run`]; or, if `is_run`, gives one sequence several tokens. Its heads get their rows then, and its books do not.
fn run_rows(
    kernels: &Kernels,
    weights: &Weights<Kernels>,
    ids: &[u32],
    angles: &[(f32, f32)],
    caches: &mut [&mut AdaptiveKvCache],
    is_run: bool,
    logits: &mut Vec<f32>,
) -> Result<()> {
    SHARED.with_borrow_mut(|shared| {
        let layout = kernels.layout;
        let batch = ids.len();
        let width = layout.query_width() + 2 * layout.kv_width();
        let intermediate_size = weights.blocks.first().map_or(0, |block| block.gate_proj.rows());
        weights.embed_tokens.look_up(ids, &mut shared.hidden)?;
        shared.qkv.resize(batch * width, 0.0);
        shared.activated.resize(batch * intermediate_size, 0.0);
        let threads = rayon::current_num_threads();
        let positions: Vec<usize> = caches.iter().map(|cache| cache.seen()).collect();
        let classes: Vec<TokenClass> = caches.iter().zip(ids).map(|(cache, &id)| cache.class(id)).collect();
        let mut layers: Vec<&mut [KernelLayer]> =
            caches.iter_mut().map(|cache| cache.layers_mut::<KernelRows>()).collect::<Result<_>>()?;
        shared.cache_work.resize_with(weights.blocks.len(), CacheWork::default);
        let tokens = is_run.then(|| TokenRun::cut(layers.pop(), batch, threads, &mut shared.cache_work));
        if tokens.is_none() {
            for (layer, work) in shared.cache_work.iter_mut().enumerate() {
                work.cut(&layers, layer, threads);
            }
        }
        shared.head_steps.resize(batch * layout.num_kv_heads, HeadStep::default());
        let ranges = shared.cache_work.iter().map(|work| work.ranges.len()).max().unwrap_or(0);
        shared.partial.resize(ranges * layout.group_size() * layout.head_dim, 0.0);
        shared.max_and_sum.resize(ranges * layout.group_size(), (0.0, 0.0));
        logits.resize(batch * weights.lm_head.rows(), 0.0);
        // A row is in no more parts than there are threads for it.
        let parts = batch * threads.div_ceil(batch) * MOST_FORMATS;
        if shared.parts.len() < parts {
            shared.parts.resize_with(parts, Activations::default);
        }
        let step = Step {
            kernels,
            weights,
            intermediate_size,
            batch,
            positions: &positions,
            classes: &classes,
            hidden: SharedSlice::new(&mut shared.hidden),
            qkv: SharedSlice::new(&mut shared.qkv),
            activated: SharedSlice::new(&mut shared.activated),
            partial: SharedSlice::new(&mut shared.partial),
            max_and_sum: SharedSlice::new(&mut shared.max_and_sum),
            angles,
            cache_work: &shared.cache_work,
            head_steps: SharedSlice::new(&mut shared.head_steps),
            caches: SharedSlice::new(&mut layers),
            tokens,
            parts: SharedSlice::new(&mut shared.parts),
            least_spared: Step::least_spared(),
            logits: SharedSlice::new(logits),
            failure: Mutex::new(None),
            stop: Watch::default(),
            is_stopped: AtomicBool::new(false),
            #[cfg(test)]
            counting: tests::counting(threads),
        };
        Team::run_on(threads, &|worker| {
            OWN.with_borrow_mut(|own| {
                step.run(worker, own);
                #[cfg(test)]
                step.count(own);
            });
        });
        if step.is_stopped.into_inner() {
            return Err(Error::Interrupted);
        }
        step.failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    })
}

/// What the threads of one step share.
struct Step<'a, 'c> {
    kernels: &'a Kernels,
    weights: &'a Weights<Kernels>,
    intermediate_size: usize,
    batch: usize,
    /// `[batch]`
    positions: &'a [usize],
    /// `[batch]`
    classes: &'a [TokenClass],
    hidden: SharedSlice<'a, f32>,
    qkv: SharedSlice<'a, f32>,
    activated: SharedSlice<'a, f32>,
    partial: SharedSlice<'a, f32>,
    max_and_sum: SharedSlice<'a, (f32, f32)>,
    /// `[batch, rope dim / 2]`
    angles: &'a [(f32, f32)],
    /// `[layers]`
    cache_work: &'a [CacheWork],
    head_steps: SharedSlice<'a, HeadStep>,
    /// `[batch]` of `[layers]`; empty if the rows are tokens of one sequence.
    caches: SharedSlice<'a, &'c mut [KernelLayer]>,
    /// Present if the rows are tokens of one sequence.
    tokens: Option<TokenRun<'c>>,
    parts: SharedSlice<'a, Activations>,
    /// From how much spared work on, in picoseconds, threads make rows together.
    least_spared: usize,
    logits: SharedSlice<'a, f32>,
    failure: Mutex<Option<Error>>,
    stop: Watch,
    /// Whether work was left out: from then on all of it is.
    is_stopped: AtomicBool,
    #[cfg(test)]
    counting: Option<tests::Counting>,
}

/// Where a thread writes products: columns of a shared `[batch, width]`.
#[derive(Clone, Copy)]
struct Target<'a> {
    slice: &'a SharedSlice<'a, f32>,
    width: usize,
    first: usize,
}

impl Step<'_, '_> {
    /// What every thread does.
    ///
    /// Shared buffers are looked at inside of claimed pieces only: a late thread may be in a phase that is over.
    fn run(&self, worker: &mut Worker<'_>, own: &mut Own) {
        let set = instruction_set();
        let hidden = Target { slice: &self.hidden, width: self.kernels.hidden_size, first: 0 };
        let activated = Target { slice: &self.activated, width: self.intermediate_size, first: 0 };
        for (index, block) in self.weights.blocks.iter().enumerate() {
            self.project(set, block, worker, own);
            if let Some(tokens) = &self.tokens {
                self.append_and_attend(set, tokens, index, worker);
            } else {
                self.phase(worker, self.batch, |sequence| self.rotate_and_append(index, sequence));
                self.attend(set, index, worker, own);
                if !self.cache_work[index].evicting.is_empty() {
                    self.phase(worker, self.batch, |sequence| self.evict(index, sequence));
                }
            }
            let linears = [&block.o_proj];
            let inputs = self.inputs(set, Source::Merged(index), &linears, worker, own);
            self.each_piece(worker, block.o_proj.rows(), |rows| {
                own.with_rows(|own| self.take(set, &inputs, own));
                own.apply(set, &block.o_proj, rows.clone());
                // SAFETY: the piece is this thread's.
                unsafe { hidden.add(set, &own.products, rows) };
            });

            let linears = [&block.gate_proj, &block.up_proj];
            let inputs = self.inputs(set, Source::Normed(&block.post_attention_layernorm), &linears, worker, own);
            self.each_piece(worker, block.gate_proj.rows(), |rows| {
                own.with_rows(|own| self.take(set, &inputs, own));
                own.apply(set, &block.gate_proj, rows.clone());
                std::mem::swap(&mut own.products, &mut own.more_products);
                own.apply(set, &block.up_proj, rows.clone());
                vector::silu_mul(set, &own.more_products, &mut own.products);
                // SAFETY: the piece is this thread's.
                unsafe { activated.write(&own.products, rows) };
            });

            let linears = [&block.down_proj];
            let inputs = self.inputs(set, Source::Activated, &linears, worker, own);
            self.each_piece(worker, block.down_proj.rows(), |rows| {
                own.with_rows(|own| self.take(set, &inputs, own));
                own.apply(set, &block.down_proj, rows.clone());
                // SAFETY: the piece is this thread's.
                unsafe { hidden.add(set, &own.products, rows) };
            });
        }
        let lm_head = &self.weights.lm_head;
        let logits = Target { slice: &self.logits, width: lm_head.rows(), first: 0 };
        let linears = [lm_head];
        let inputs = self.inputs(set, Source::Normed(&self.weights.norm), &linears, worker, own);
        self.each_piece(worker, lm_head.rows(), |rows| {
            own.with_rows(|own| self.take(set, &inputs, own));
            own.apply(set, lm_head, rows.clone());
            // SAFETY: the piece is this thread's.
            unsafe { logits.write(&own.products, rows) };
        });
    }

    /// Whether the step's work is to be left out from now on.
    fn is_stopped(&self) -> bool {
        if self.is_stopped.load(Ordering::Relaxed) {
            return true;
        }
        let is_over = self.stop.is_over();
        if is_over {
            self.is_stopped.store(true, Ordering::Relaxed);
        }
        is_over
    }

    /// [`Worker::phase`], whose work is left out once the step is stopped.
    fn phase(&self, worker: &mut Worker<'_>, count: usize, mut work: impl FnMut(usize)) {
        #[cfg(test)]
        let mut meeting = self.meeting(worker, count);
        worker.phase(count, |index| {
            #[cfg(test)]
            meeting.wait();
            if !self.is_stopped() {
                work(index);
            }
        });
    }

    /// [`each_piece`], whose work is left out once the step is stopped.
    fn each_piece(&self, worker: &mut Worker<'_>, rows: usize, mut work: impl FnMut(Range<usize>)) {
        #[cfg(test)]
        let mut meeting = self.meeting(worker, work::weight_pieces(rows, worker.team_size()).count());
        each_piece(worker, rows, |piece| {
            #[cfg(test)]
            meeting.wait();
            if !self.is_stopped() {
                work(piece);
            }
        });
    }

    /// Queries, keys and values.
    fn project(&self, set: InstructionSet, block: &Block<Kernels>, worker: &mut Worker<'_>, own: &mut Own) {
        // Their outputs lie one after the other.
        let linears = [&block.q_proj, &block.k_proj, &block.v_proj];
        let width = linears.iter().map(|linear| linear.rows()).sum();
        let inputs = self.inputs(set, Source::Normed(&block.input_layernorm), &linears, worker, own);
        self.each_piece(worker, width, |piece| {
            own.with_rows(|own| self.take(set, &inputs, own));
            let mut first = 0;
            for linear in linears {
                // A piece may be of more than one of them.
                let rows = piece.start.max(first) - first..piece.end.min(first + linear.rows()).saturating_sub(first);
                if !rows.is_empty() {
                    own.apply(set, linear, rows.clone());
                    let target = Target { slice: &self.qkv, width, first };
                    // SAFETY: the piece is this thread's.
                    unsafe { target.write(&own.products, rows) };
                }
                first += linear.rows();
            }
        });
    }

    /// Rotates one sequence's queries and key, and gives its cache the key and the value.
    fn rotate_and_append(&self, layer: usize, sequence: usize) {
        let (query_width, kv_width, head_dim) =
            (self.kernels.layout.query_width(), self.kernels.layout.kv_width(), self.kernels.layout.head_dim);
        let width = query_width + 2 * kv_width;
        // SAFETY: each sequence is claimed once in this phase; nobody else looks at it.
        let (row, cache) = unsafe {
            (
                self.qkv.write(sequence * width..(sequence + 1) * width),
                &mut self.caches.write(sequence..sequence + 1)[0],
            )
        };
        let half = self.angles.len() / self.batch;
        let angles = &self.angles[sequence * half..(sequence + 1) * half];
        let (queries, rest) = row.split_at_mut(query_width);
        let (keys, values) = rest.split_at_mut(kv_width);
        let block = &self.weights.blocks[layer];
        self.kernels.norm_heads(queries, block.q_norm.as_ref());
        self.kernels.norm_heads(keys, block.k_norm.as_ref());
        self.kernels.rope.rotate(queries, query_width, head_dim, angles);
        self.kernels.rope.rotate(keys, kv_width, head_dim, angles);
        let scale = self.kernels.layout.scale();
        for query in queries {
            *query *= scale;
        }
        let appended = cache[layer].append(keys, values, self.positions[sequence], self.classes[sequence]);
        if let Err(error) = appended {
            self.fail(error);
        }
    }

    fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// Every head's range results; and of heads that evict, what goes.
    fn attend(&self, set: InstructionSet, layer: usize, worker: &mut Worker<'_>, own: &mut Own) {
        let HeadLayout { head_dim, .. } = self.kernels.layout;
        let group_size = self.kernels.layout.group_size();
        let group = group_size * head_dim;
        let width = self.qkv.len() / self.batch;
        let CacheWork { ranges, pieces, evicting } = &self.cache_work[layer];
        self.phase(worker, evicting.len() + pieces.len(), |index| {
            // These are the longer pieces of work.
            let Some(index) = index.checked_sub(evicting.len()) else {
                let (sequence, kv_head) = evicting[index];
                return self.decide(set, layer, sequence, kv_head, own);
            };
            for index in pieces[index].clone() {
                let CacheRange { sequence, kv_head, rows, .. } = ranges[index].clone();
                let first = sequence * width + kv_head * group;
                // SAFETY: caches and queries were written in the phase before; each range is claimed once, and has a place
                // of its own.
                let (cache, queries, out, max_and_sum) = unsafe {
                    (
                        &self.caches.read(sequence..sequence + 1)[0],
                        self.qkv.read(first..first + group),
                        self.partial.write(index * group..(index + 1) * group),
                        self.max_and_sum.write(index * group_size..(index + 1) * group_size),
                    )
                };
                let head = cache[layer].rows().heads()[kv_head].rows();
                attend_range(set, head, rows, queries, out, max_and_sum);
            }
        });
    }

    /// Which rows of a head go after this step.
    fn decide(&self, set: InstructionSet, layer: usize, sequence: usize, kv_head: usize, own: &mut Own) {
        let HeadLayout { head_dim, num_kv_heads, .. } = self.kernels.layout;
        let group = self.kernels.layout.group_size() * head_dim;
        let first = sequence * (self.qkv.len() / self.batch) + kv_head * group;
        let index = sequence * num_kv_heads + kv_head;
        // SAFETY: caches and queries were written in the phase before; each head is claimed once.
        let (cache, queries, step) = unsafe {
            (
                &self.caches.read(sequence..sequence + 1)[0],
                self.qkv.read(first..first + group),
                &mut self.head_steps.write(index..index + 1)[0],
            )
        };
        let layer = &cache[layer];
        if layer.ledger().reads_weights(kv_head) {
            row_weights(set, layer.rows().heads()[kv_head].rows(), queries, &mut own.products, &mut step.weights);
        }
        if layer.ledger().reads_queries(kv_head) {
            queries.clone_into(&mut step.queries);
        }
        if layer.ledger().reads_keys(kv_head) {
            step.keys = layer.rows().heads()[kv_head].keys();
        }
        layer.ledger().decide(kv_head, step);
    }

    /// Evicts what was decided for the heads of one sequence.
    fn evict(&self, layer: usize, sequence: usize) {
        let num_kv_heads = self.kernels.layout.num_kv_heads;
        // SAFETY: each sequence is claimed once in this phase; nobody else looks at it.
        let (cache, steps) = unsafe {
            (
                &mut self.caches.write(sequence..sequence + 1)[0],
                self.head_steps.write(sequence * num_kv_heads..(sequence + 1) * num_kv_heads),
            )
        };
        if let Err(error) = cache[layer].evict(steps) {
            self.fail(error);
        }
    }
}

impl Target<'_> {
    /// Writes products `[batch, rows.len()]`.
    ///
    /// # Safety
    /// As for [`SharedSlice::write`]: these rows are this thread's in this phase.
    unsafe fn write(&self, products: &[f32], rows: Range<usize>) {
        for (n, products) in products.chunks_exact(rows.len()).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.part(n, &rows) }.copy_from_slice(products);
        }
    }

    /// Adds products `[batch, rows.len()]`.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    unsafe fn add(&self, set: InstructionSet, products: &[f32], rows: Range<usize>) {
        for (n, products) in products.chunks_exact(rows.len()).enumerate() {
            // SAFETY: the caller's promise.
            vector::add_assign(set, unsafe { self.part(n, &rows) }, products);
        }
    }

    #[expect(clippy::mut_from_ref, reason = "as SharedSlice::write")]
    unsafe fn part(&self, n: usize, rows: &Range<usize>) -> &mut [f32] {
        let start = n * self.width + self.first;
        // SAFETY: the caller's promise.
        unsafe { self.slice.write(start + rows.start..start + rows.end) }
    }
}
