//! What values make in the residual stream: each behind the part of the output projection of each query head that reads it.
//!
//! Squared lengths alone are in [`super::replay`]. Not for: judging values by it ([`crate::compress::budget::methods`]).

use std::ops::Range;

use rayon::prelude::*;

use super::replay::WidenedRows;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};

/// Numbers of a projection's rows that are widened at a time: they stay in a core's cache.
const PANEL_NUMBERS: usize = 256 * 1024;

/// Values that are multiplied at a time, so that scratch does not grow with the prompt.
const VALUES: usize = 256;

/// Widens a projection, some rows at a time, and shows it to `look`: `[rows, num_heads * head_dim]`.
fn panels(
    layout: HeadLayout,
    hidden_size: usize,
    weights: &WidenedRows<'_>,
    values: &[Vec<f32>],
    mut look: impl FnMut(&[f32]),
) -> Result<()> {
    layout.check()?;
    if values.len() != layout.num_kv_heads {
        return Err(Error::shape("values", layout.num_kv_heads, values.len()));
    }
    let step = (PANEL_NUMBERS / layout.query_width()).max(1);
    let mut buffer = Vec::new();
    for first in (0..hidden_size).step_by(step) {
        let rows: Range<usize> = first..(first + step).min(hidden_size);
        weights(rows.clone(), &mut buffer);
        expect_len("an output projection", &buffer, &[rows.len(), layout.query_width()])?;
        look(&buffer);
    }
    Ok(())
}

/// The sum of absolute numbers of what each query head of its group would write if it attended to nothing but one value:
/// `[num_heads]` of `[len]`.
///
/// * `weights`: of the output projection, `[hidden_size, num_heads * head_dim]`
/// * `values`: `[num_kv_heads]` of `[len, head_dim]`
///
/// # Errors
/// [`Error::Shape`] if the projection is of other heads.
pub fn absolute_outputs(
    layout: HeadLayout,
    hidden_size: usize,
    weights: &WidenedRows<'_>,
    values: &[Vec<f32>],
) -> Result<Vec<Vec<f32>>> {
    let (head_dim, width, group) = (layout.head_dim, layout.query_width(), layout.group_size().max(1));
    let lens = (0..layout.num_heads).map(|head| values.get(head / group).map_or(0, |own| own.len() / head_dim.max(1)));
    let mut heads: Vec<Vec<f32>> = lens.map(|len| vec![0.0; len]).collect();
    panels(layout, hidden_size, weights, values, |panel| {
        let rows = panel.len() / width;
        heads.par_iter_mut().enumerate().for_each(|(head, sums)| {
            let own = Matrix::new(&panel[head * head_dim..], rows, head_dim, width);
            let mut outputs = Vec::new();
            let values = values[head / group].chunks(VALUES * head_dim);
            for (sums, values) in sums.chunks_mut(VALUES).zip(values) {
                outputs.resize(sums.len() * rows, 0.0);
                let values = Matrix::new(values, sums.len(), head_dim, head_dim);
                MatrixMut::new(&mut outputs, sums.len(), rows, rows).set_product(values, own.transposed(), 1.0);
                for (sum, output) in sums.iter_mut().zip(outputs.chunks_exact(rows)) {
                    *sum += output.iter().map(|number| number.abs()).sum::<f32>();
                }
            }
        });
    })?;
    Ok(heads)
}

/// Products of what two query heads of a group would write if each attended to nothing but the same value, for every pair of
/// them: `[num_heads * group_size]` of `[len]`, those of the head `h` with all of its group from `h * group_size` on.
///
/// * `weights`, `values`: as of [`absolute_outputs`]
///
/// # Errors
/// As [`absolute_outputs`].
pub fn output_products(
    layout: HeadLayout,
    hidden_size: usize,
    weights: &WidenedRows<'_>,
    values: &[Vec<f32>],
) -> Result<Vec<Vec<f32>>> {
    let (head_dim, width, group) = (layout.head_dim, layout.query_width(), layout.group_size());
    // Numbers of a group's heads beside one another, as they lie in the projection.
    let side = group * head_dim;
    let mut grams = vec![vec![0.0; side * side]; layout.num_kv_heads];
    panels(layout, hidden_size, weights, values, |panel| {
        grams.par_iter_mut().enumerate().for_each(|(kv_head, gram)| {
            let own = Matrix::new(&panel[kv_head * side..], panel.len() / width, side, width);
            MatrixMut::new(gram, side, side, side).add_product(own.transposed(), own);
        });
    })?;
    let set = instruction_set();
    let of_head = |head: usize| -> Vec<Vec<f32>> {
        let (gram, values) = (&grams[head / group], &values[head / group]);
        let len = values.len() / head_dim;
        let all = Matrix::new(values, len, head_dim, head_dim);
        // Rows of this head, columns of all heads of the group.
        let own = Matrix::new(&gram[head % group * head_dim * side..], head_dim, side, side);
        let mut made = vec![0.0; len * side];
        MatrixMut::new(&mut made, len, side, side).set_product(all, own, 1.0);
        let with = |other: usize| {
            let pairs = made.chunks_exact(side).zip(values.chunks_exact(head_dim));
            let product = |(made, value): (&[f32], &[f32])| {
                vector::dot(set, &made[other * head_dim..(other + 1) * head_dim], value)
            };
            pairs.map(product).collect()
        };
        (0..group).map(with).collect()
    };
    Ok((0..layout.num_heads).into_par_iter().flat_map_iter(of_head).collect())
}
