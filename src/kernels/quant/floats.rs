//! Products of many rows of activations with rows of weights as f32: what reads prompts on plain floats, and on blocks where
//! exact products are asked for.
//!
//! Rows of activations lie in the lanes ([`PackedRows`]), put there once for all matrices that have them as input. Weights
//! are widened a piece of some rows and [`PIECE`] columns at a time, in a core's cache, and read from there number by number,
//! each for all lanes: so they stay as they are stored, row after row, and widening costs little even for few rows of
//! activations.
//!
//! With `vdpbf16ps` bf16 weights would need half as many instructions, but a Sapphire Rapids has a quarter of their rate: 44
//! against 90 thousand million products a second on one thread.
//!
//! Not for: few rows (see [`super::dot`]); products in whole numbers (see [`super::many`]).

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::gemm::MatrixMut;
use crate::kernels::simd::{InstructionSet, LANES, Lanes, multiversion};

/// Columns of a piece of weights: whole blocks of every format. Sums over a piece are added up by themselves, which also
/// loses less than one sum over all columns.
const PIECE: usize = 256;

/// Rows of weights in a panel, at most: whole tiles of every instruction set. Its piece and its sums stay in a core's
/// second cache.
const PANEL_ROWS: usize = 96;

/// Vectors of activations that a panel is multiplied with before the next ones.
const VECTORS: usize = 32;

/// Rows of weights in a tile where there are registers for two sums of each, and where there are fewer.
const WIDE_ROWS: usize = 12;
const NARROW_ROWS: usize = 6;

/// Rows of activations, for products with the rows of any matrix.
pub(super) struct PackedRows {
    set: InstructionSet,
    count: usize,
    cols: usize,
    /// `[vectors, cols]`: a number of each of the vector's rows; rows after the last are 0.
    numbers: Vec<[f32; LANES]>,
}

impl PackedRows {
    /// Over threads.
    ///
    /// * `x`: `[count, cols]`
    pub fn new(set: InstructionSet, x: &[f32], cols: usize) -> Self {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} activations in rows of {cols}", x.len());
        let count = x.len() / cols;
        let mut numbers = vec![[0.0; LANES]; count.div_ceil(LANES) * cols];
        numbers.par_chunks_mut(cols).zip(x.par_chunks(LANES * cols)).for_each(|(numbers, x)| {
            // In parts that stay in the first cache.
            for first in (0..cols).step_by(PIECE) {
                let numbers = &mut numbers[first..(first + PIECE).min(cols)];
                for (lane, x) in x.chunks_exact(cols).enumerate() {
                    for (numbers, &x) in numbers.iter_mut().zip(&x[first..]) {
                        numbers[lane] = x;
                    }
                }
            }
        });
        Self { set, count, cols, numbers }
    }

    /// Rows of activations.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Rows of weights that are best taken at a time, for a matrix of so many.
    pub fn panel_rows(rows: usize, threads: usize) -> usize {
        // As many panels for each thread, of about the same size.
        let panels = rows.div_ceil(PANEL_ROWS).next_multiple_of(threads.max(1)).max(1);
        rows.div_ceil(panels).next_multiple_of(WIDE_ROWS).clamp(WIDE_ROWS, PANEL_ROWS)
    }

    /// Overwrites `out`, `[count, rows]`, with products with some rows of weights, on the calling thread.
    ///
    /// * `widen`: writes some columns of one of the rows
    ///
    /// # Panics
    /// If these are more rows than a panel has.
    pub fn multiply(
        &self,
        rows: usize,
        widen: impl Fn(usize, Range<usize>, &mut [f32]),
        buffers: &mut Buffers,
        out: &mut MatrixMut<'_>,
    ) {
        assert!(rows <= PANEL_ROWS, "{rows} rows of a panel");
        let Buffers { weights, sums } = buffers;
        let padded = rows.next_multiple_of(WIDE_ROWS);
        weights.resize(padded, [0.0; PIECE]);
        for (group, numbers) in self.numbers.chunks(VECTORS * self.cols).enumerate() {
            sums.clear();
            sums.resize(numbers.len() / self.cols * padded, [0.0; LANES]);
            for first in (0..self.cols).step_by(PIECE) {
                let columns = first..(first + PIECE).min(self.cols);
                for (row, weights) in weights[..rows].iter_mut().enumerate() {
                    widen(row, columns.clone(), &mut weights[..columns.len()]);
                }
                add_products(self.set, Piece { numbers, cols: self.cols, columns, weights, sums });
            }
            for (vector, sums) in sums.chunks_exact(padded).enumerate() {
                let first = (group * VECTORS + vector) * LANES;
                for row in first..(first + LANES).min(self.count) {
                    for (out, sums) in out.row(row).iter_mut().zip(sums) {
                        *out = sums[row - first];
                    }
                }
            }
        }
    }
}

/// Where weights are widened and products summed up; kept for reuse.
#[derive(Default)]
pub(super) struct Buffers {
    /// A piece of each row; rows after the last may be anything.
    weights: Vec<[f32; PIECE]>,
    /// `[vectors, weights]`
    sums: Vec<[f32; LANES]>,
}

/// Some columns of a panel, and the activations that they are multiplied with.
struct Piece<'a> {
    /// `[vectors, cols]`
    numbers: &'a [[f32; LANES]],
    cols: usize,
    columns: Range<usize>,
    weights: &'a [[f32; PIECE]],
    /// `[vectors, weights]`
    sums: &'a mut [[f32; LANES]],
}

multiversion! {
    /// Adds the products of a piece to the sums.
    fn add_products(piece: Piece<'_>) = add_products_body;
}

#[inline(always)]
fn add_products_body<L: Lanes>(piece: Piece<'_>) {
    match L::ACCUMULATORS {
        24.. => add_tiles::<L, WIDE_ROWS, 2>(piece),
        _ => add_tiles::<L, NARROW_ROWS, 1>(piece),
    }
}

/// In tiles of `ROWS` rows of weights and `WIDTH` vectors of activations.
#[inline(always)]
fn add_tiles<L: Lanes, const ROWS: usize, const WIDTH: usize>(piece: Piece<'_>) {
    let Piece { numbers, cols, columns, weights, sums } = piece;
    let numbers = numbers.chunks(WIDTH * cols).zip(sums.chunks_mut(WIDTH * weights.len()));
    for (numbers, sums) in numbers {
        // The last one may be half as wide.
        if numbers.len() == WIDTH * cols {
            add_vectors::<L, ROWS, WIDTH>(numbers, &columns, weights, sums);
        } else {
            add_vectors::<L, ROWS, 1>(numbers, &columns, weights, sums);
        }
    }
}

/// * `numbers`: `[WIDTH, cols]`
/// * `sums`: `[WIDTH, weights]`
#[inline(always)]
fn add_vectors<L: Lanes, const ROWS: usize, const WIDTH: usize>(
    numbers: &[[f32; LANES]],
    columns: &Range<usize>,
    weights: &[[f32; PIECE]],
    sums: &mut [[f32; LANES]],
) {
    let cols = numbers.len() / WIDTH;
    let mut vectors = [&numbers[columns.clone()]; WIDTH];
    for (vector, numbers) in vectors.iter_mut().zip(numbers.chunks_exact(cols)) {
        *vector = &numbers[columns.clone()];
    }
    for (tile, tile_weights) in weights.as_chunks::<ROWS>().0.iter().enumerate() {
        let products = multiply_tile::<L, ROWS, WIDTH>(&vectors, tile_weights);
        for (sums, vector) in sums.chunks_exact_mut(weights.len()).zip(0..WIDTH) {
            for (sums, products) in sums[tile * ROWS..].iter_mut().zip(&products) {
                L::load(sums).add(products[vector]).store(sums);
            }
        }
    }
}

/// The products of some rows of weights with vectors of activations.
#[inline(always)]
fn multiply_tile<L: Lanes, const ROWS: usize, const WIDTH: usize>(
    vectors: &[&[[f32; LANES]]; WIDTH],
    weights: &[[f32; PIECE]; ROWS],
) -> [[L; WIDTH]; ROWS] {
    let mut sums = [[L::splat(0.0); WIDTH]; ROWS];
    let len = vectors[0].len();
    assert!(len <= PIECE && vectors.iter().all(|vector| vector.len() == len));
    for column in 0..len {
        let mut numbers = [L::splat(0.0); WIDTH];
        for vector in 0..WIDTH {
            numbers[vector] = L::load(&vectors[vector][column]);
        }
        for row in 0..ROWS {
            let weight = L::splat(weights[row][column]);
            for vector in 0..WIDTH {
                sums[row][vector] = weight.mul_add(numbers[vector], sums[row][vector]);
            }
        }
    }
    sums
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss)] // small
mod tests {
    use super::*;
    use crate::kernels::quant::samples::expect_products;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|at| ((at * 37 + seed * 11) % 101) as f32 / 64.0 - 0.7).collect()
    }

    /// `[count, rows]`
    fn products(set: InstructionSet, weights: &[f32], x: &[f32], cols: usize, panel_rows: usize) -> Vec<f32> {
        let rows = weights.len() / cols;
        let x = PackedRows::new(set, x, cols);
        let mut buffers = Buffers::default();
        let mut out = vec![f32::NAN; x.count() * rows];
        let views = MatrixMut::new(&mut out, x.count(), rows, rows).split_columns(panel_rows);
        for (weights, mut view) in weights.chunks(panel_rows * cols).zip(views) {
            let widen = |row: usize, columns: Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&weights[row * cols..(row + 1) * cols][columns]);
            };
            x.multiply(weights.len() / cols, widen, &mut buffers, &mut view);
        }
        out
    }

    #[test]
    fn products_equal_plain_sums_on_every_instruction_set() {
        for set in InstructionSet::available() {
            for (count, rows, cols) in
                [(1, 1, 1), (3, 11, 32), (16, 12, 255), (17, 13, 256), (33, 100, 300), (48, 25, 576), (525, 14, 520)]
            {
                let (weights, x) = (numbers(rows * cols, 1), numbers(count * cols, 2));
                for panel_rows in [PackedRows::panel_rows(rows, 1), 12] {
                    let out = products(set, &weights, &x, cols, panel_rows);
                    expect_products(&format!("{set:?} {count} {rows} {cols}"), &out, &weights, &x, cols);
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_among_others() {
        let (count, rows, cols) = (40, 15, 700);
        let (weights, x) = (numbers(rows * cols, 3), numbers(count * cols, 4));
        for set in InstructionSet::available() {
            let all = products(set, &weights, &x, cols, 96);
            for (row, x) in x.chunks(cols).enumerate() {
                assert_eq!(products(set, &weights, x, cols, 12), all[row * rows..(row + 1) * rows], "{set:?} {row}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row() {
        let (count, rows, cols) = (20, 14, 300);
        let (mut weights, mut x) = (numbers(rows * cols, 5), numbers(count * cols, 6));
        (x[17 * cols + 299], weights[13 * cols]) = (f32::NAN, f32::INFINITY);
        for set in InstructionSet::available() {
            for (at, out) in products(set, &weights, &x, cols, 96).into_iter().enumerate() {
                let is_finite = at / rows != 17 && at % rows != 13;
                assert_eq!(out.is_finite(), is_finite, "{set:?} {at}: {out}");
            }
        }
    }

    #[test]
    fn panels_cover_all_rows_about_equally() {
        for (rows, threads, expected) in
            [(0, 2, 12), (1, 1, 12), (96, 1, 96), (96, 2, 48), (100, 2, 60), (1536, 2, 96), (1536, 7, 84)]
        {
            assert_eq!(PackedRows::panel_rows(rows, threads), expected, "{rows} rows, {threads} threads");
        }
    }
}
