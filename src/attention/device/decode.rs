//! Attention from one new token over heads that are grouped by how many rows they keep.
//!
//! Scores of all heads come into one tensor, as long as the longest head: of scores, padding costs little. So masking and
//! softmax are one operation each for the whole layer, and only the products with keys and values are per group.
//! Operations are at most a constant and another constant for each group, whatever heads and rows there are. Rows in f16
//! are widened group by group as they are read.
//!
//! Where a layer's rows come with [`RaggedRows`], these take the place of all that: one launch, whatever the heads keep, and
//! rows in f16 are read as they are.

use candle_core::{DType, Tensor};

use super::super::HeadLayout;
use super::groups::Slots;
use crate::attention::ragged::RaggedRows;
use crate::error::{Error, Result};
use crate::ops::Ops;

/// A layer's rows, as attention reads them. Slots are [`Slots`]', and so is the order of heads in everything here.
#[derive(Debug)]
pub struct GroupedRows<'a> {
    /// Groups of heads.
    pub slots: &'a Slots,
    /// Keys and values that were kept of prompts, `[slots.num_rows(), head_dim]`; `None` if there are none.
    pub kept: Option<(&'a Tensor, &'a Tensor)>,
    /// Keys and values of tokens since, the same for all heads, `[num_kv_heads, tail_len, head_dim]`: at least one token.
    pub tail: (Tensor, Tensor),
    /// `[num_kv_heads, 1, slots.longest() + tail_len or more]` 1 where there is a row and 0 where a shorter head has none,
    /// u8: first kept rows, then those of the tail; `None` if all heads are equally long.
    pub visible: Option<&'a Tensor>,
    /// `[num_kv_heads]` the head in each slot, u32; `None` if each is in the slot of its own index.
    pub order: Option<&'a Tensor>,
    /// `[num_kv_heads]` the slot of each head, u32; present if `order` is.
    pub restore: Option<&'a Tensor>,
    /// The same kept rows for one launch: slots are then [ungrouped](Slots::ungrouped), and there is neither a mask nor an
    /// order. `None` if groups are attended to.
    pub ragged: Option<&'a RaggedRows>,
}

/// Attends from one token over every head's rows.
///
/// * `queries`: `[num_heads, head_dim]`, f32, rotated
///
/// Returns `[num_heads, head_dim]`, f32.
///
/// # Errors
/// [`Error::Shape`] if there are no rows, [`Error::Tensor`] if sizes do not fit.
pub fn decode(ops: &Ops, layout: HeadLayout, queries: &Tensor, rows: &GroupedRows<'_>) -> Result<Tensor> {
    let HeadLayout { num_heads, num_kv_heads, head_dim } = layout;
    let group_size = layout.group_size();
    let (tail_keys, tail_values) = &rows.tail;
    let (longest, tail_len) = (rows.slots.longest(), tail_keys.dim(1)?);
    if tail_len == 0 {
        return Err(Error::shape("cached rows", "the newest token's at least", 0));
    }
    if let Some(ragged) = rows.ragged {
        ops.count(1);
        return ragged.attend(&ops.contiguous(queries)?, Some((tail_keys, tail_values)));
    }
    let queries = ops.scale(queries, f64::from(layout.scale()))?.reshape((num_kv_heads, group_size, head_dim))?;
    let queries = match rows.order {
        Some(order) => ops.index_select(&queries, order, 0)?,
        None => queries,
    };
    let products = |queries: &Tensor, keys: &Tensor| -> Result<Tensor> {
        ops.matmul(queries, &ops.cast(keys, DType::F32)?.transpose(1, 2)?)
    };
    let tail_scores = products(&queries, tail_keys)?; // [num_kv_heads, group_size, tail_len]

    let groups = || rows.slots.groups.iter().filter(|group| group.len > 0);
    let Some((keys, values)) = rows.kept.filter(|_| longest > 0) else {
        let out = ops.matmul(&ops.softmax(&tail_scores)?, &ops.cast(tail_values, DType::F32)?)?;
        return restored(ops, &out, rows.restore)?.reshape((num_heads, head_dim)).map_err(Error::from);
    };
    let of_group = |x: &Tensor, group: &super::HeadGroup| -> Result<Tensor> {
        let rows = x.narrow(0, group.first_row, group.num_heads * group.len)?;
        Ok(rows.reshape((group.num_heads, group.len, head_dim))?)
    };
    let scores = ops.zeros((num_kv_heads, group_size, longest + tail_len), DType::F32)?;
    for group in groups() {
        let queries = queries.narrow(0, group.first_slot, group.num_heads)?;
        let scores = scores.narrow(0, group.first_slot, group.num_heads)?;
        ops.write(&scores, &products(&queries, &of_group(keys, group)?)?, 2, 0)?;
    }
    ops.write(&scores, &tail_scores, 2, longest)?;
    let scores = match rows.visible {
        Some(visible) => ops.mask(&scores, &visible.narrow(2, 0, longest + tail_len)?)?,
        None => scores,
    };
    let weights = ops.softmax(&scores)?;
    let tail_weights = ops.contiguous(&weights.narrow(2, longest, tail_len)?)?;
    let of_tail = ops.matmul(&tail_weights, &ops.cast(tail_values, DType::F32)?)?;
    let mut parts = Vec::with_capacity(rows.slots.groups.len());
    for group in &rows.slots.groups {
        parts.push(if group.len == 0 {
            ops.zeros((group.num_heads, group_size, head_dim), DType::F32)?
        } else {
            let weights = weights.narrow(0, group.first_slot, group.num_heads)?.narrow(2, 0, group.len)?;
            ops.matmul(&ops.contiguous(&weights)?, &ops.cast(&of_group(values, group)?, DType::F32)?)?
        });
    }
    let out = ops.add(&ops.cat(&parts, 0)?, &of_tail)?; // [num_kv_heads, group_size, head_dim]
    Ok(restored(ops, &out, rows.restore)?.reshape((num_heads, head_dim))?)
}

/// Puts heads back in the order of their indices.
fn restored(ops: &Ops, out: &Tensor, restore: Option<&Tensor>) -> Result<Tensor> {
    match restore {
        Some(restore) => ops.index_select(out, restore, 0),
        None => Ok(out.clone()),
    }
}
