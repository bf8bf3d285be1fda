//! The rows that products are taken with: what they are made of, and who makes them.
//!
//! Every thread needs all of them, prepared for the format of the weights. Where that is little work, each thread makes
//! them for itself, at its first piece of the product; what one thread needs for it, many need at the same time, so that
//! it costs as much as on one thread. Where it is more, threads share it out in a phase of its own: each makes and prepares
//! some columns, and copies what the others have made. Numbers are the same either way: norms are over whole rows, and
//! formats round blocks of columns by themselves.

use std::ops::Range;

use super::own::Own;
use super::work::CacheRange;
use super::{KernelLinear, Step};
use crate::arch::HeadLayout;
use crate::kernels::quant::{Activations, WeightFormat};
use crate::kernels::simd::InstructionSet;
use crate::kernels::team::Worker;
use crate::kernels::vector;

/// The least work, in picoseconds, that a thread must be spared for a phase of its own: a phase costs about a microsecond
/// where threads share a cache, and must win as much again to be worth it. With AVX-512 VNNI and 4-bit weights, a row of
/// 11,008 or 8,960 numbers is shared out from two threads on, a normalised one of 4,096 from four on, and one of 1,536
/// or 576 never.
const LEAST_SPARED: usize = 2_000_000;

/// About how long a number takes to scale by a norm, in picoseconds: measured as [`Activations::picoseconds`].
const NORM_PICOSECONDS: usize = 100;

/// The same for a number of a range of a head that is put together with others.
const MERGE_PICOSECONDS: usize = 300;

/// Formats of the matrices of one product, at most.
pub(super) const MOST_FORMATS: usize = 3;

/// What rows are made of.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// The hidden states, normalised with this weight: `[batch, hidden_size]`.
    Normed(&'a [f32]),
    /// The ranges of each head of a layer: `[batch, num_heads * head_dim]`.
    Merged(usize),
    /// What the MLP's first half left: `[batch, intermediate_size]`.
    Activated,
}

/// Rows for the product of the phase that follows.
pub(super) struct Inputs<'a> {
    source: Source<'a>,
    linears: &'a [&'a KernelLinear],
    /// Columns of a part, if threads have made them together.
    part: Option<usize>,
}

impl Inputs<'_> {
    /// The formats of the matrices, each once.
    fn dtypes(&self) -> impl Iterator<Item = WeightFormat> {
        let dtype = |linear: &&KernelLinear| linear.matrix.dtype();
        let is_first = move |&(index, linear): &(usize, &&KernelLinear)| {
            !self.linears[..index].iter().any(|other| dtype(other) == dtype(linear))
        };
        self.linears.iter().enumerate().filter(is_first).map(move |(_, linear)| dtype(linear))
    }
}

/// What a thread is spared if work that each would do for itself is shared out.
fn spared(work: usize, threads: usize) -> usize {
    work - work / threads
}

impl Step<'_, '_> {
    /// Begins rows for products with some matrices: makes them in a phase, if that pays.
    pub(super) fn inputs<'a>(
        &self,
        set: InstructionSet,
        source: Source<'a>,
        linears: &'a [&'a KernelLinear],
        worker: &mut Worker<'_>,
        own: &mut Own,
    ) -> Inputs<'a> {
        own.start_rows();
        let mut inputs = Inputs { source, linears, part: None };
        let cols = self.cols(source);
        let Some(part) = self.shared_part(set, &inputs, cols, worker.team_size()) else { return inputs };
        let (parts, compute) = (cols.div_ceil(part), self.kernels.compute);
        self.phase(worker, self.batch * parts, |chunk| {
            let (row, first) = (chunk / parts, chunk % parts * part);
            own.rows.clear();
            self.make(set, source, row, first..(first + part).min(cols), own);
            for (index, dtype) in inputs.dtypes().enumerate() {
                let at = chunk * MOST_FORMATS + index;
                // SAFETY: each chunk is claimed once, and has places of its own.
                let part = unsafe { &mut self.parts.write(at..at + 1)[0] };
                own.prepare_part(set, compute, dtype, part);
            }
        });
        inputs.part = Some(part);
        inputs
    }

    /// Gives the thread its rows; to be called inside of a piece.
    pub(super) fn take(&self, set: InstructionSet, inputs: &Inputs<'_>, own: &mut Own) {
        let cols = self.cols(inputs.source);
        let Some(part) = inputs.part else {
            own.rows.clear();
            for row in 0..self.batch {
                self.make(set, inputs.source, row, 0..cols, own);
            }
            return;
        };
        for (index, dtype) in inputs.dtypes().enumerate() {
            let chunks = 0..self.batch * cols.div_ceil(part);
            // SAFETY: written in the phase before.
            let parts =
                chunks.map(|chunk| chunk * MOST_FORMATS + index).map(|at| unsafe { &self.parts.read(at..at + 1)[0] });
            own.join(dtype, self.batch, parts);
        }
    }

    /// Columns that a thread makes at a time, if rows are to be shared out: in as many parts as there are threads, or
    /// fewer.
    fn shared_part(&self, set: InstructionSet, inputs: &Inputs<'_>, cols: usize, threads: usize) -> Option<usize> {
        let numbers = self.batch * cols;
        let making = match inputs.source {
            Source::Normed(_) => NORM_PICOSECONDS * numbers,
            Source::Merged(layer) => {
                let HeadLayout { head_dim, .. } = self.kernels.layout;
                MERGE_PICOSECONDS * self.cache_work[layer].ranges.len() * self.kernels.layout.group_size() * head_dim
            }
            Source::Activated => 0,
        };
        let preparing = |dtype| numbers * Activations::picoseconds(set, self.kernels.compute, dtype);
        let work = making + inputs.dtypes().map(preparing).sum::<usize>();
        let (parts, formats) = (threads.div_ceil(self.batch), inputs.dtypes().count());
        let part = cols.div_ceil(parts).next_multiple_of(Activations::PART);
        let is_parted = threads > 1 && (self.batch > 1 || part < cols) && formats <= MOST_FORMATS;
        (is_parted && spared(work, threads) >= self.least_spared).then_some(part)
    }

    /// Numbers of a row.
    fn cols(&self, source: Source<'_>) -> usize {
        match source {
            Source::Normed(weight) => weight.len(),
            Source::Merged(_) => self.kernels.layout.query_width(),
            Source::Activated => self.intermediate_size,
        }
    }

    /// Makes some columns of a row, behind what is in the thread's own rows.
    fn make(&self, set: InstructionSet, source: Source<'_>, row: usize, columns: Range<usize>, own: &mut Own) {
        let first = row * self.cols(source);
        match source {
            Source::Normed(weight) => {
                // SAFETY: nobody writes hidden states in phases that read them so.
                let whole = unsafe { self.hidden.read(first..first + weight.len()) };
                let scale = vector::rms_scale(set, whole, self.kernels.eps);
                let start = own.rows.len();
                own.rows.extend_from_slice(&whole[columns.clone()]);
                vector::scale_by(set, &mut own.rows[start..], &weight[columns.clone()], scale);
                #[cfg(test)]
                {
                    own.counts.normed += columns.len();
                }
            }
            Source::Merged(layer) => self.merge(layer, row, columns, own),
            Source::Activated => {
                // SAFETY: written in the phase before.
                let row = unsafe { self.activated.read(first + columns.start..first + columns.end) };
                own.rows.extend_from_slice(row);
            }
        }
    }

    /// Puts the ranges of heads together, as far as they are among these columns of a sequence's `[num_heads, head_dim]`.
    fn merge(&self, layer: usize, sequence: usize, columns: Range<usize>, own: &mut Own) {
        let HeadLayout { head_dim, .. } = self.kernels.layout;
        let group_size = self.kernels.layout.group_size();
        let start = own.rows.len();
        own.rows.resize(start + columns.len(), 0.0);
        own.merged.resize(group_size, (0.0, 0.0));
        // They are in the order of sequences, heads and rows.
        let ranges = &self.cache_work[layer].ranges;
        let kv_head = columns.start / (group_size * head_dim);
        let first = ranges.partition_point(|range| (range.sequence, range.kv_head) < (sequence, kv_head));
        let is_wanted =
            |range: &CacheRange| range.sequence == sequence && range.kv_head * group_size * head_dim < columns.end;
        for (index, range) in ranges.iter().enumerate().skip(first).take_while(|(_, range)| is_wanted(range)) {
            for (member, merged) in own.merged.iter_mut().enumerate() {
                let head = (range.kv_head * group_size + member) * head_dim;
                let wanted = columns.start.max(head)..columns.end.min(head + head_dim);
                if wanted.is_empty() {
                    continue;
                }
                let at = index * group_size + member;
                let numbers = at * head_dim + wanted.start - head..at * head_dim + wanted.end - head;
                // SAFETY: written in the phase before.
                let (partial, max_and_sum) =
                    unsafe { (self.partial.read(numbers), self.max_and_sum.read(at..at + 1)[0]) };
                let out = &mut own.rows[start + wanted.start - columns.start..start + wanted.end - columns.start];
                if range.rows.start == 0 {
                    *merged = max_and_sum;
                    out.copy_from_slice(partial);
                } else {
                    vector::merge_partial(merged, out, max_and_sum, partial);
                }
                if range.last {
                    let scale = 1.0 / merged.1;
                    for value in out {
                        *value *= scale;
                    }
                }
                #[cfg(test)]
                {
                    own.counts.merged += partial.len();
                }
            }
        }
    }

    /// See [`LEAST_SPARED`]; tests may want it to be another.
    pub(super) fn least_spared() -> usize {
        #[cfg(test)]
        if let Some(least) = super::tests::LEAST_SPARED.get() {
            return least;
        }
        LEAST_SPARED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quant::Compute;

    #[test]
    fn a_phase_must_spare_more_than_it_costs() {
        let digits = NORM_PICOSECONDS + 600;
        for (width, threads, pays) in [
            (576, 64, false),
            (1536, 64, false),
            (4096, 1, false),
            (4096, 2, false),
            (4096, 4, true),
            (4096, 64, true),
            (11_008, 1, false),
            (11_008, 2, true),
            (16 * 576, 4, true),
        ] {
            assert_eq!(spared(width * digits, threads) >= LEAST_SPARED, pays, "{width} numbers, {threads} threads");
        }
    }

    /// What is said of the processor with the most demanding form.
    #[test]
    fn plain_numbers_are_the_cheapest() {
        for set in InstructionSet::available() {
            let cost = |dtype| Activations::picoseconds(set, Compute::Fast, dtype);
            assert!(
                cost(WeightFormat::F16) < cost(WeightFormat::Q5_0)
                    && cost(WeightFormat::Q5_0) <= cost(WeightFormat::Q4_0)
            );
        }
    }
}
