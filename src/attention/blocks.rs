//! Attention that looks both ways, within blocks of a prompt: which keys do the queries around them ask for, those before
//! them, too (Chari and Van Durme, arXiv 2507.08143)?
//!
//! Not for: judging keys by it ([`crate::compress::budget::methods`]).

use std::ops::Range;

use rayon::prelude::*;

use super::prompt_rows::PromptRows;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::stop;

/// What each of the last keys receives from the queries of its block, the mean over the query heads of a KV head:
/// `[num_kv_heads]` of `[num_keys]`, 0 outside of blocks.
///
/// As kvpress computes it: each query gives away 1 in all, by a softmax of its products with the block's keys, not divided by
/// anything; and what the last block lacks counts as queries and keys of zeros. Keys that are no part of the prompt have
/// none to ask.
///
/// * `queries`: `[prompt_len, num_heads, head_dim]`, rotated
/// * `keys`: of the whole prompt, behind what was kept before it
/// * `num_keys`: how many of the last keys of every KV head it is about; at least the prompt's
/// * `inner`: which of them are in blocks, by index; `block` of them in each, at least 1
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit; [`Error::Interrupted`] if a [stop] is requested.
pub fn block_attention(
    layout: HeadLayout,
    queries: &[f32],
    keys: &PromptRows,
    num_keys: usize,
    (inner, block): (Range<usize>, usize),
) -> Result<Vec<Vec<f32>>> {
    layout.check()?;
    keys.expect_layout("prompt keys", layout)?;
    let (width, head_dim, group) = (layout.query_width(), layout.head_dim, layout.group_size());
    expect_len("queries", queries, &[keys.len(), layout.num_heads, head_dim])?;
    let fits = (0..layout.num_kv_heads).all(|head| num_keys <= keys.past_len(head) + keys.len());
    if block == 0 || inner.end > num_keys || num_keys < keys.len() || !fits {
        return Err(Error::shape("blocks of a prompt", num_keys, (inner.end, keys.len())));
    }
    // Keys before the prompt's first.
    let recent = num_keys - keys.len();
    let of_head = |kv_head: usize| {
        let mut sums = vec![0.0f32; num_keys];
        let settled = keys.past_len(kv_head) + keys.len() - num_keys;
        for start in inner.clone().step_by(block) {
            if stop::is_requested() {
                break;
            }
            let columns = start..(start + block).min(inner.end);
            let rows = columns.start.max(recent) - recent..columns.end.max(recent) - recent;
            let heads = kv_head * group..(kv_head + 1) * group;
            let own: Vec<f32> = heads
                .flat_map(|head| rows.clone().map(move |row| row * width + head * head_dim))
                .flat_map(|first| &queries[first..first + head_dim])
                .copied()
                .collect();
            let block_keys = keys.matrix(kv_head, settled + columns.start..settled + columns.end);
            add_block(&own, head_dim, block_keys, block, &mut sums[columns.clone()]);
            let missing = block - columns.len();
            #[expect(clippy::cast_precision_loss)]
            if missing > 0 {
                // Queries of zeros give the same to all keys of a whole block.
                let each = (missing * group) as f32 / block as f32;
                sums[columns].iter_mut().for_each(|sum| *sum += each);
            }
        }
        #[expect(clippy::cast_precision_loss)]
        sums.into_iter().map(|sum| sum / group as f32).collect()
    };
    let heads = (0..layout.num_kv_heads).into_par_iter().map(of_head).collect();
    stop::check()?;
    Ok(heads)
}

/// Adds what some queries give to a block's keys.
///
/// * `queries`: `[rows, head_dim]`
/// * `keys`: `[sums.len(), head_dim]`
/// * `block`: how many keys there were, were it whole
fn add_block(queries: &[f32], head_dim: usize, keys: Matrix<'_>, block: usize, sums: &mut [f32]) {
    let (rows, set) = (queries.len() / head_dim, instruction_set());
    let mut scores = vec![0.0; rows * sums.len()];
    let queries = Matrix::new(queries, rows, head_dim, head_dim);
    MatrixMut::new(&mut scores, rows, sums.len(), sums.len()).set_product(queries, keys.transposed(), 1.0);
    #[expect(clippy::cast_precision_loss)]
    let missing = (block - sums.len()) as f32;
    for row in scores.chunks_exact_mut(sums.len()) {
        // Of keys that lack, the products are 0. Where none does, `-largest` may be too large for `exp`.
        let (largest, of_missing) = match vector::max(set, row) {
            largest if missing > 0.0 => (largest.max(0.0), missing * (-largest.max(0.0)).exp()),
            largest => (largest, 0.0),
        };
        let total = vector::exp_minus_max(set, row, largest) + of_missing;
        sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += *weight / total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole blocks lack no key, so the weight of those that lack must not be looked at: here it is infinite.
    #[test]
    fn products_far_below_zero_are_no_trouble() {
        let (query, keys) = ([10.0, 0.0], [-20.0, 1.0, -20.0, 5.0]);
        let mut sums = [0.0; 2];
        add_block(&query, 2, Matrix::new(&keys, 2, 2, 2), 2, &mut sums);
        assert_eq!(sums, [0.5, 0.5]);
    }
}
