//! The Walsh-Hadamard transform: a rotation that spreads what a few numbers of a row hold over all of them, so that a
//! format with few bits loses less (Ashkboos et al., `QuaRot`, arXiv 2404.00456; it is its own inverse).
//!
//! Products of two rows stay what they were if both are rotated. Not for: knowing which rows are: the keys of
//! [`attend`](super::attend) that are stored in blocks.

use super::simd::{LANES, Lanes};

/// Rotates rows in place, each in pieces of the largest power of two that divides it.
///
/// * `rows`: `[num_rows, width]`
#[inline(always)]
pub(crate) fn rotate(rows: &mut [f32], width: usize) {
    let turn = |left: &mut f32, right: &mut f32| (*left, *right) = (*left + *right, *left - *right);
    rotate_with(rows, width, turn, |number, factor| *number *= factor);
}

/// As [`rotate`], of sixteen rows whose numbers lie side by side; the same numbers, bit by bit.
///
/// * `columns`: `[width]`
#[inline(always)]
pub(crate) fn rotate_columns<L: Lanes>(columns: &mut [[f32; LANES]]) {
    let turn = |left: &mut [f32; LANES], right: &mut [f32; LANES]| {
        let (a, b) = (L::load(left), L::load(right));
        a.add(b).store(left);
        a.sub(b).store(right);
    };
    rotate_with(columns, columns.len(), turn, |column, factor| L::load(column).mul(L::splat(factor)).store(column));
}

/// Rotates rows of whatever numbers.
///
/// * `turn`: puts the sum of two in the place of the first, and their difference in that of the second
/// * `scale`: multiplies one by a factor
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "a power of two")]
fn rotate_with<T>(rows: &mut [T], width: usize, turn: impl Fn(&mut T, &mut T), scale: impl Fn(&mut T, f32)) {
    if width == 0 {
        return;
    }
    let size = 1 << width.trailing_zeros();
    let factor = 1.0 / (size as f32).sqrt();
    for piece in rows.chunks_exact_mut(size) {
        let mut half = 1;
        while half < size {
            for pair in piece.chunks_exact_mut(2 * half) {
                let (left, right) = pair.split_at_mut(half);
                left.iter_mut().zip(right).for_each(|(left, right)| turn(left, right));
            }
            half *= 2;
        }
        for number in piece {
            scale(number, factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The transform by its definition: the sign of an element is the parity of the bits that its row and column share.
    fn by_definition(row: &[f32], size: usize) -> Vec<f64> {
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let piece = |piece: &[f32]| -> Vec<f64> {
            let sum = |i| piece.iter().enumerate().map(|(j, &number)| sign(i, j) * f64::from(number)).sum::<f64>();
            (0..size).map(|i| sum(i) / f64::from(u32::try_from(size).unwrap()).sqrt()).collect()
        };
        row.chunks(size).flat_map(piece).collect()
    }

    #[test]
    fn it_is_the_definitions_and_its_own_inverse() {
        for (width, size) in [(1, 1), (32, 32), (64, 64), (80, 16), (96, 32), (128, 128), (160, 32), (256, 256)] {
            let number = |i: usize| f32::from(u8::try_from((i * 37 + 11) % 101).unwrap()) / 7.0 - 7.0;
            let row: Vec<f32> = (0..2 * width).map(number).collect();
            let mut rotated = row.clone();
            rotate(&mut rotated, width);
            for (got, expected) in rotated.iter().zip(by_definition(&row, size)) {
                assert!((f64::from(*got) - expected).abs() < 1e-4, "{width}: {got} for {expected}");
            }
            rotate(&mut rotated, width);
            assert!(rotated.iter().zip(&row).all(|(got, number)| (got - number).abs() < 1e-5), "{width}");
        }
    }
}
