//! Panels of weights times all rows of activations, a tile of products at a time, whose sums stay in registers.
//!
//! Not for: how either side is stored (see [`super::activations`] and [`super::strips`]).

use super::super::Rows;
use super::activations::RoundedRows;
use super::strips::{Format, Fours, Strip, Strips};
use super::{Kind, NARROW_ROWS, START, STRIP, VECTORS, WIDE_ROWS, tile_rows};
use crate::kernels::gemm::MatrixMut;
use crate::kernels::simd::{LANES, Lanes, ROUND, fetch, multiversion};

/// Steps of four columns that are taken at a time.
const STEPS: usize = 4;

/// Overwrites `out`, `[count, rows]`, with products with some rows of weights.
///
/// # Panics
/// If the activations are rounded for another kind of format, or the rows are not as long.
pub(super) fn multiply<F: Format>(x: &RoundedRows, rows: Rows<'_>, strips: &mut Strips, out: &mut MatrixMut<'_>) {
    let row_bytes = x.cols / F::BLOCK * F::BYTES;
    assert!(x.kind == Kind::of::<F>() && rows.row_bytes == row_bytes, "activations rounded for {:?}", x.kind);
    if rows.count > 0 && x.count() > 0 {
        multiply_panel::<F>(x.set, x, rows, strips, out);
    }
}

multiversion! {
    /// Unpacks a panel and multiplies it with all rows of activations.
    fn multiply_panel<F: Format>(x: &RoundedRows, rows: Rows<'_>, strips: &mut Strips, out: &mut MatrixMut<'_>)
        = multiply_panel_body, quants;
}

#[inline(always)]
fn multiply_panel_body<L: Lanes, F: Format>(
    x: &RoundedRows,
    rows: Rows<'_>,
    strips: &mut Strips,
    out: &mut MatrixMut<'_>,
) {
    strips.unpack::<L, F>(rows, x.cols);
    if L::WIDE {
        multiply_strips::<L, F, WIDE_ROWS, VECTORS>(x, strips, out);
    } else {
        multiply_strips::<L, F, NARROW_ROWS, 1>(x, strips, out);
    }
}

/// In tiles of `ROWS` rows of activations and `WIDTH` vectors of weights.
#[inline(always)]
fn multiply_strips<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    x: &RoundedRows,
    strips: &Strips,
    out: &mut MatrixMut<'_>,
) {
    assert_eq!(tile_rows(x.set), ROWS, "rows of a tile");
    for (index, strip) in strips.iter().enumerate() {
        for first in (0..VECTORS).step_by(WIDTH) {
            for tile in 0..x.count().div_ceil(ROWS) {
                let (rows, column) = (tile * ROWS..((tile + 1) * ROWS).min(x.count()), index * STRIP + first * LANES);
                // They are written when the tile is done; until then the lines can come.
                for row in rows.clone() {
                    let place = out.row(row).as_ptr().wrapping_add(column);
                    (0..WIDTH).for_each(|vector| fetch::<true>(place.wrapping_add(vector * LANES).cast()));
                }
                let totals = multiply_tile::<L, F, ROWS, WIDTH>(x, tile, strip, first);
                for (row, totals) in rows.zip(totals) {
                    let row = &mut out.row(row);
                    for (vector, totals) in totals.into_iter().enumerate() {
                        totals.store_some(row.get_mut(column + vector * LANES..).unwrap_or_default());
                    }
                }
            }
        }
    }
}

/// The products of a tile of activations with a strip, or with some vectors of it.
#[inline(always)]
fn multiply_tile<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    x: &RoundedRows,
    tile: usize,
    strip: Strip<'_>,
    first: usize,
) -> [[L; WIDTH]; ROWS] {
    let groups = x.cols / F::RUN;
    let of_tile = tile * groups..(tile + 1) * groups;
    let scales = &x.scales.as_chunks::<ROWS>().0[of_tile.clone()];
    let starts = &x.starts.as_chunks::<ROWS>().0[of_tile.clone()];
    let sums = if F::HAS_OFFSETS { &x.sums.as_chunks::<ROWS>().0[of_tile] } else { &[] };
    let bytes = &x.bytes.as_chunks::<ROWS>().0[tile * x.cols / 4..(tile + 1) * x.cols / 4];
    let weights = &strip.bytes.as_chunks::<VECTORS>().0[..x.cols / 4];
    let weight_scales = &strip.scales.as_chunks::<VECTORS>().0[..groups];
    let weight_offsets = if F::HAS_OFFSETS { &strip.offsets.as_chunks::<VECTORS>().0[..groups] } else { &[] };
    // Steps in the text of the program: short loops within short loops are hard to foresee.
    let (bytes, weights) = (bytes.as_chunks::<STEPS>().0, weights.as_chunks::<STEPS>().0);
    let size = F::RUN / 4 / STEPS;

    let mut totals = [[L::splat(0.0); WIDTH]; ROWS];
    for group in 0..groups {
        let place = group * size..(group + 1) * size;
        let products =
            multiply_group::<L, F, ROWS, WIDTH>(&starts[group], &bytes[place.clone()], &weights[place], first);
        let mut own_scales = [L::splat(0.0); WIDTH];
        for vector in 0..WIDTH {
            own_scales[vector] = L::load(&weight_scales[group][first + vector]);
        }
        for row in 0..ROWS {
            let [factor, term] = scales[group][row].map(L::splat);
            for vector in 0..WIDTH {
                let moved = L::as_floats(products[row][vector]);
                let product =
                    if L::FUSED { moved.mul_add(factor, term) } else { moved.sub(L::splat(ROUND)).mul(factor) };
                totals[row][vector] = product.mul_add(own_scales[vector], totals[row][vector]);
            }
        }
        if F::HAS_OFFSETS {
            for vector in 0..WIDTH {
                let offset = L::load(&weight_offsets[group][first + vector]);
                for row in 0..ROWS {
                    totals[row][vector] = offset.mul_add(L::splat(sums[group][row]), totals[row][vector]);
                }
            }
        }
    }
    totals
}

/// The sums of a group's products, as whole numbers behind the bits of [`ROUND`].
///
/// * `starts`: what they begin with
#[inline(always)]
fn multiply_group<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    starts: &[i32; ROWS],
    bytes: &[[[[u8; 4]; ROWS]; STEPS]],
    weights: &[[[Fours; VECTORS]; STEPS]],
    first: usize,
) -> [[L::Whole; WIDTH]; ROWS] {
    let mut sums = [[L::whole(START); WIDTH]; ROWS];
    if L::DOTS || F::LARGEST < 128 {
        for row in 0..ROWS {
            sums[row] = [L::whole(starts[row]); WIDTH];
        }
    }
    if L::DOTS {
        for (bytes, weights) in bytes.iter().zip(weights) {
            for step in 0..STEPS {
                let mut quants = [L::load_bytes(&weights[step][first].0); WIDTH];
                for vector in 1..WIDTH {
                    quants[vector] = L::load_bytes(&weights[step][first + vector].0);
                }
                for row in 0..ROWS {
                    for vector in 0..WIDTH {
                        sums[row][vector] = L::add_dots(sums[row][vector], quants[vector], &bytes[step][row]);
                    }
                }
            }
        }
        return sums;
    }
    let (bytes, weights) = (bytes.as_flattened(), weights.as_flattened());
    if F::LARGEST < 128 {
        // Sums of so many products fit 16 bits; more than four at a time are compiled to more than 16 registers hold.
        let fitting = (i16::MAX as usize / (2 * 127 * F::LARGEST as usize)).min(4);
        for (bytes, weights) in bytes.chunks(fitting).zip(weights.chunks(fitting)) {
            let mut pairs = [[L::no_pairs(); WIDTH]; ROWS];
            for (bytes, weights) in bytes.iter().zip(weights) {
                for vector in 0..WIDTH {
                    let quants = L::load_bytes(&weights[first + vector].0);
                    for row in 0..ROWS {
                        pairs[row][vector] = L::add_pairs(pairs[row][vector], quants, &bytes[row]);
                    }
                }
            }
            for row in 0..ROWS {
                for vector in 0..WIDTH {
                    sums[row][vector] = L::add_both(sums[row][vector], pairs[row][vector]);
                }
            }
        }
        return sums;
    }
    for (bytes, weights) in bytes.iter().zip(weights) {
        for vector in 0..WIDTH {
            let quants = L::load_bytes(&weights[first + vector].0);
            for row in 0..ROWS {
                sums[row][vector] = L::add_centred(sums[row][vector], quants, &bytes[row]);
            }
        }
    }
    sums
}
