//! Blocks and products that tests of several kernels need.

use half::f16;

use super::WeightFormat;

/// Where f16 numbers are in a block.
fn halves(format: WeightFormat) -> &'static [usize] {
    match format {
        WeightFormat::Q4_1 | WeightFormat::Q5_1 | WeightFormat::Q4K | WeightFormat::Q5K => &[0, 2],
        WeightFormat::Q2K => &[80, 82],
        WeightFormat::Q3K => &[108],
        WeightFormat::Q6K => &[208],
        WeightFormat::Mxfp4 => &[],
        _ => &[0],
    }
}

/// Blocks of pseudo-random bytes, but for their scales of f16 or with an exponent only, which are small and finite.
pub fn random_blocks(format: WeightFormat, count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut data: Vec<u8> = (0..count * format.block_bytes())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        })
        .collect();
    for block in data.chunks_exact_mut(format.block_bytes()) {
        for &half in halves(format) {
            block[half + 1] = 0x20 | (block[half + 1] & 0x8f); // exponent far from both ends, any sign
        }
        if format == WeightFormat::Mxfp4 {
            block[0] = 0x70 | (block[0] & 0x0f);
        }
    }
    data
}

/// Makes the scales of f16 or with an exponent only 1.
pub fn set_scales_to_one(format: WeightFormat, block: &mut [u8]) {
    for &half in halves(format) {
        block[half..half + 2].copy_from_slice(&f16::ONE.to_le_bytes());
    }
    if format == WeightFormat::Mxfp4 {
        block[0] = 128; // quants are doubled
    }
}

/// Expects `out` to be `[count, rows]` products of weights and activations, to what f32 can say of their sums.
pub fn expect_products(case: &str, out: &[f32], weights: &[f32], x: &[f32], cols: usize) {
    let rows = weights.len() / cols;
    for (index, &out) in out.iter().enumerate() {
        let (n, row) = (index / rows, index % rows);
        let weights = &weights[row * cols..(row + 1) * cols];
        let products = weights.iter().zip(&x[n * cols..]).map(|(&w, &x)| f64::from(w) * f64::from(x));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
        assert!((f64::from(out) - sum).abs() <= 2e-6 * size, "{case}, {n} {row}: {out} for {sum}");
    }
}
