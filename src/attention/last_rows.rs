//! What a prompt's last rows attend to, row by row: for methods that need more of a row than its share in a sum.
//!
//! Not for: sums over rows, which are collected while a prompt is attended to (see [`super::prefill`]).

use super::prompt_rows::PromptKv;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};

/// Attention of the query heads of one KV head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LastRows {
    /// `[group_size]` of `[rows, num_keys]`; 0 beyond each row's own key.
    pub weights: Vec<Vec<f32>>,
    /// `[group_size]` of `[rows, head_dim]`
    pub outputs: Vec<Vec<f32>>,
}

/// Asks the last rows of a prompt again, on the calling thread.
///
/// * `queries`: `[rows, num_heads, head_dim]` of the prompt's last rows, rotated
/// * `kv`: of the whole prompt, behind what was kept before it
/// * `num_keys`: the weights of so many of the last keys are returned; all count in each row's sum
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit.
pub fn last_rows(
    layout: HeadLayout,
    kv_head: usize,
    queries: &[f32],
    kv: &PromptKv,
    num_keys: usize,
) -> Result<LastRows> {
    layout.check()?;
    kv.keys.expect_layout("prompt keys", layout)?;
    let (width, head_dim) = (layout.query_width(), layout.head_dim);
    let rows = queries.len() / width;
    expect_len("queries", queries, &[rows, layout.num_heads, head_dim])?;
    let all_keys = kv.keys.past_len(kv_head) + kv.keys.len();
    if rows > kv.keys.len() || num_keys > all_keys || kv.values.len() != kv.keys.len() {
        return Err(Error::shape("a prompt's last rows", (kv.keys.len(), all_keys), (rows, num_keys)));
    }
    let (keys, values) = (kv.keys.matrix(kv_head, 0..all_keys), kv.values.matrix(kv_head, 0..all_keys));
    let mut last = LastRows::default();
    let group = layout.group_size();
    for head in kv_head * group..(kv_head + 1) * group {
        let own: Vec<f32> =
            queries.chunks_exact(width).flat_map(|row| &row[head * head_dim..(head + 1) * head_dim]).copied().collect();
        let mut weights = vec![0.0; rows * all_keys];
        let own = Matrix::new(&own, rows, head_dim, head_dim);
        MatrixMut::new(&mut weights, rows, all_keys, all_keys).set_product(own, keys.transposed(), layout.scale());
        for (row, weights) in weights.chunks_exact_mut(all_keys.max(1)).enumerate() {
            let (seen, hidden) = weights.split_at_mut(all_keys - (rows - 1 - row));
            vector::softmax(instruction_set(), seen);
            hidden.fill(0.0);
        }
        let mut outputs = vec![0.0; rows * head_dim];
        let all = Matrix::new(&weights, rows, all_keys, all_keys);
        MatrixMut::new(&mut outputs, rows, head_dim, head_dim).set_product(all, values, 1.0);
        if num_keys < all_keys {
            let rows = weights.chunks_exact(all_keys.max(1));
            weights = rows.flat_map(|row| &row[all_keys - num_keys..]).copied().collect();
        }
        last.weights.push(weights);
        last.outputs.push(outputs);
    }
    Ok(last)
}
