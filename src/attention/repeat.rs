//! What a repetition of some tokens looks at: for each of the tokens, the largest weight that any row of the repetition
//! pays it (Kim et al., arXiv 2505.23416).
//!
//! A row sees attention sinks, the originals of what is repeated, and the repetition up to itself; the softmax is over
//! these alone, though the model itself attended to everything.
//!
//! Scratch is a block of rows for each thread. Not for: running the model (see [`crate::model`]), or judging keys
//! ([`crate::compress::budget::methods`]).

use std::ops::Range;

use rayon::prelude::*;

use super::prompt_rows::PromptRows;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::stop;

/// Rows of the repetition whose scores exist at a time, in each query head of a group.
const BLOCK_ROWS: usize = 32;

/// Parts of the blocks that threads take, for each KV head.
const SECTIONS: usize = 16;

/// Tokens that are read a second time.
#[derive(Debug, Clone, Copy)]
pub struct Repeated<'a> {
    /// The heads.
    pub layout: HeadLayout,
    /// `[rows, num_heads, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// `[rows]` keys of the repetition, behind what each head holds.
    pub keys: &'a PromptRows,
    /// `[rows]` what each row's weights are multiplied with.
    pub factors: &'a [f32],
    /// `[num_kv_heads]` how many of a head's first rows are sinks.
    pub sinks: &'a [usize],
    /// `[num_kv_heads]` which rows of a head are the originals: all of one number, behind the sinks.
    pub originals: &'a [Range<usize>],
}

/// The largest weight, times the row's factor, that each original gets from any row: `[num_heads]` of `[originals]`.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit; [`Error::NotANumber`] if weights are none; [`Error::Interrupted`] if a [stop] is
/// requested.
pub fn largest_weights(repeated: Repeated<'_>) -> Result<Vec<Vec<f32>>> {
    let Repeated { layout, queries, keys, factors, sinks, originals } = repeated;
    layout.check()?;
    keys.expect_layout("keys of a repetition", layout)?;
    let rows = keys.len();
    expect_len("queries of a repetition", queries, &[rows, layout.num_heads, layout.head_dim])?;
    expect_len("factors of a repetition", factors, &[rows])?;
    let count = originals.first().map_or(0, ExactSizeIterator::len);
    let fits = |(kv_head, (&sinks, originals)): (usize, (&usize, &Range<usize>))| {
        sinks <= originals.start && originals.end <= keys.past_len(kv_head) && originals.len() == count
    };
    if sinks.len() != layout.num_kv_heads
        || originals.len() != layout.num_kv_heads
        || !sinks.iter().zip(originals).enumerate().all(fits)
    {
        return Err(Error::shape("originals of a repetition", layout.num_kv_heads, (sinks, originals)));
    }
    let blocks = rows.div_ceil(BLOCK_ROWS);
    let tasks: Vec<(usize, usize)> =
        (0..layout.num_kv_heads).flat_map(|kv_head| (0..SECTIONS.min(blocks)).map(move |s| (kv_head, s))).collect();
    let section = |&(kv_head, section): &(usize, usize)| -> Result<Vec<Vec<f32>>> {
        let mut largest = vec![vec![0.0; count]; layout.group_size()];
        let mut scratch = (Vec::new(), Vec::new());
        // Later rows see more: each section gets some of all.
        for block in (section..blocks).step_by(SECTIONS) {
            stop::check()?;
            let rows = block * BLOCK_ROWS..((block + 1) * BLOCK_ROWS).min(rows);
            repeated.add_block(kv_head, rows, &mut scratch, &mut largest)?;
        }
        Ok(largest)
    };
    let parts: Vec<Vec<Vec<f32>>> = tasks.par_iter().with_max_len(1).map(section).collect::<Result<_>>()?;
    let mut heads = vec![vec![0.0; count]; layout.num_heads];
    for ((kv_head, _), parts) in tasks.into_iter().zip(parts) {
        for (largest, part) in heads[kv_head * layout.group_size()..].iter_mut().zip(parts) {
            raise(largest, &part, 1.0);
        }
    }
    Ok(heads)
}

impl Repeated<'_> {
    /// Raises the largest weights of a KV head's group, `[group_size]` of `[originals]`, to what some rows pay.
    ///
    /// * `scratch`: queries and scores
    fn add_block(
        &self,
        kv_head: usize,
        rows: Range<usize>,
        (queries, scores): &mut (Vec<f32>, Vec<f32>),
        largest: &mut [Vec<f32>],
    ) -> Result<()> {
        let HeadLayout { num_heads, head_dim, .. } = self.layout;
        let group_size = self.layout.group_size();
        queries.clear();
        for head in kv_head * group_size..(kv_head + 1) * group_size {
            for row in rows.clone() {
                let start = (row * num_heads + head) * head_dim;
                queries.extend_from_slice(&self.queries[start..start + head_dim]);
            }
        }
        let (sinks, originals) = (self.sinks[kv_head], &self.originals[kv_head]);
        let past = self.keys.past_len(kv_head);
        let own = sinks + originals.len(); // keys before those of the repetition
        let (num_rows, width) = (group_size * rows.len(), own + rows.end);
        scores.resize(num_rows * width, 0.0); // what a block before left is overwritten
        let mut column = 0;
        for keys in [0..sinks, originals.clone(), past..past + rows.end] {
            let num_keys = keys.len();
            if num_keys > 0 {
                MatrixMut::new(&mut scores[column..], num_rows, num_keys, width).set_product(
                    Matrix::new(queries, num_rows, head_dim, head_dim),
                    self.keys.matrix(kv_head, keys).transposed(),
                    self.layout.scale(),
                );
            }
            column += num_keys;
        }
        let set = instruction_set();
        for (index, scores) in scores.chunks_exact_mut(width).enumerate() {
            let (head, row) = (index / rows.len(), rows.start + index % rows.len());
            let seen = &mut scores[..=own + row];
            let max = vector::max(set, seen);
            let sum = vector::exp_minus_max(set, seen, max);
            if !sum.is_finite() {
                return Err(Error::not_a_number(format!("the attention of a repetition in KV head {kv_head}")));
            }
            raise(&mut largest[head], &seen[sinks..own], self.factors[row] / sum);
        }
        Ok(())
    }
}

/// Raises numbers to others that are larger, which are multiplied with a factor first.
fn raise(largest: &mut [f32], numbers: &[f32], factor: f32) {
    for (largest, number) in largest.iter_mut().zip(numbers) {
        *largest = largest.max(number * factor);
    }
}
