//! Blocks and products that tests of several kernels need.

/// Blocks of pseudo-random bytes, the f16 numbers at `halves` in each made small and finite.
pub fn random_blocks(count: usize, bytes: usize, halves: &[usize]) -> Vec<u8> {
    let mut state = 1u32;
    let mut data: Vec<u8> = (0..count * bytes)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        })
        .collect();
    for block in data.chunks_exact_mut(bytes) {
        for &half in halves {
            block[half + 1] = 0x20 | (block[half + 1] & 0x8f); // exponent far from both ends, any sign
        }
    }
    data
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
