//! Kernels on rows of f32: dot products, softmax, sums.

use super::element::Element;
pub use super::simd::instruction_set;
use super::simd::{self, Lanes, ROUND, fma, multiversion};

/// How many partial sums a reduction keeps: enough to fill the vector units and to hide their latency.
const LANES: usize = 32;

multiversion! {
    /// Dot product of two slices of the same length; a longer one is cut.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body;
}

#[inline(always)]
fn dot_body<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    dot_stored_body::<L, f32>(a, b)
}

multiversion! {
    /// Dot product of activations with a row of stored numbers, which are widened in registers; a longer one is cut.
    pub fn dot_stored<T: Element>(x: &[f32], row: &[T]) -> f32 = dot_stored_body;
}

#[inline(always)]
fn dot_stored_body<L: Lanes, T: Element>(x: &[f32], row: &[T]) -> f32 {
    let len = x.len().min(row.len());
    let (x, x_rest) = x[..len].as_chunks::<{ simd::LANES }>();
    let (row, row_rest) = row[..len].as_chunks();
    // Two sets of sums hide some of the latency of the multiply-add.
    let mut sums = [L::splat(0.0); 2];
    let ((x_pairs, x), (row_pairs, row)) = (x.as_chunks::<2>(), row.as_chunks::<2>());
    for (x, row) in x_pairs.iter().zip(row_pairs) {
        for half in 0..2 {
            sums[half] = L::load(&x[half]).mul_add(T::load(&row[half]), sums[half]);
        }
    }
    for (x, row) in x.iter().zip(row) {
        sums[0] = L::load(x).mul_add(T::load(row), sums[0]);
    }
    let sum = sums[0].add(sums[1]).sum();
    x_rest.iter().zip(row_rest).fold(sum, |sum, (&x, &row)| fma::<L>(x, row.widen(), sum))
}

multiversion! {
    /// Widens stored numbers to f32, exactly; a longer slice is cut.
    pub fn widen<T: Element>(source: &[T], out: &mut [f32]) = widen_body;
}

/// Adds up partial sums as a tree, the same way on every instruction set.
#[inline(always)]
fn sum_lanes(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

multiversion! {
    /// Turns a row of scores into `softmax(row)`, in place. An empty row stays empty.
    pub fn softmax(row: &mut [f32]) = softmax_body;
}

#[inline(always)]
fn softmax_body<L: Lanes>(row: &mut [f32]) {
    let max = max_body::<L>(row);
    let sum = exp_body::<L>(row, max);
    let scale = 1.0 / sum;
    for value in row {
        *value *= scale;
    }
}

multiversion! {
    /// The largest value of a row; minus infinity if it is empty. NaN is ignored.
    pub fn max(row: &[f32]) -> f32 = max_body;
}

#[inline(always)]
fn max_body<L: Lanes>(row: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            best[lane] = if chunk[lane] > best[lane] { chunk[lane] } else { best[lane] };
        }
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &value| if value > best { value } else { best })
}

multiversion! {
    /// Replaces each value by `exp(value - max)` and returns the sum; `max` must not be below any value.
    pub fn exp_minus_max(row: &mut [f32], max: f32) -> f32 = exp_body;
}

#[inline(always)]
fn exp_body<L: Lanes>(row: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp_nonpositive::<L>(chunk[lane] - max);
            sums[lane] += chunk[lane];
        }
    }
    for (lane, value) in rest.iter_mut().enumerate() {
        *value = exp_nonpositive::<L>(*value - max);
        sums[lane] += *value;
    }
    sum_lanes(sums)
}

/// `exp(x)` for `x <= 0`, to about two units in the last place: range reduction to `2^k * exp(r)`, `|r| <= ln(2)/2`,
/// and the Taylor polynomial of degree 7. Below -87.3 (where the result leaves the normal numbers) it is 0.
#[inline(always)]
fn exp_nonpositive<L: Lanes>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512: exact products with small integers
    const LN2_LOW: f32 = -2.121_944_4e-4; // ln(2) - LN2_HIGH

    let clamped = if x < -87.3 { -87.3 } else { x };
    let rounded = fma::<L>(clamped, std::f32::consts::LOG2_E, ROUND);
    let k = rounded - ROUND;
    let r = fma::<L>(k, -LN2_LOW, fma::<L>(k, -LN2_HIGH, clamped));
    let mut p = 1.0 / 5040.0;
    p = fma::<L>(p, r, 1.0 / 720.0);
    p = fma::<L>(p, r, 1.0 / 120.0);
    p = fma::<L>(p, r, 1.0 / 24.0);
    p = fma::<L>(p, r, 1.0 / 6.0);
    p = fma::<L>(p, r, 0.5);
    p = fma::<L>(p, r, 1.0);
    p = fma::<L>(p, r, 1.0);
    // The integer sits in the low bits of `rounded`; moved to the exponent field it multiplies by 2^k.
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000));
    let result = p * power;
    if x < -87.3 { 0.0 } else { result }
}

multiversion! {
    /// `sums[i] += row[i]` for every index that both have.
    pub fn add_assign(sums: &mut [f32], row: &[f32]) = add_assign_body;
}

#[inline(always)]
fn add_assign_body<L: Lanes>(sums: &mut [f32], row: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(row) {
        *sum += value;
    }
}

multiversion! {
    /// Adds `scale * row` to `sums`.
    pub fn add_scaled(sums: &mut [f32], row: &[f32], scale: f32) = add_scaled_body;
}

#[inline(always)]
fn add_scaled_body<L: Lanes>(sums: &mut [f32], row: &[f32], scale: f32) {
    for (sum, &number) in sums.iter_mut().zip(row) {
        *sum = fma::<L>(number, scale, *sum);
    }
}

multiversion! {
    /// `sums[i] += scale * row[i]^2` over the shorter of the two.
    pub fn add_scaled_squares(sums: &mut [f32], row: &[f32], scale: f32) = add_scaled_squares_body;
}

#[inline(always)]
fn add_scaled_squares_body<L: Lanes>(sums: &mut [f32], row: &[f32], scale: f32) {
    for (sum, &number) in sums.iter_mut().zip(row) {
        *sum = fma::<L>(number * number, scale, *sum);
    }
}

multiversion! {
    /// The sum and the largest value of a row's entries where `mask` is 1 (it holds 0 and 1); entries must not be
    /// negative, and the largest of none is 0.
    pub fn masked_sum_and_max(row: &[f32], mask: &[f32]) -> (f32, f32) = masked_sum_and_max_body;
}

#[inline(always)]
fn masked_sum_and_max_body<L: Lanes>(row: &[f32], mask: &[f32]) -> (f32, f32) {
    let len = row.len().min(mask.len());
    let (row, mask) = (&row[..len], &mask[..len]);
    let mut sums = [0.0f32; LANES];
    let mut best = [0.0f32; LANES];
    let mut step = |lane: usize, value: f32| {
        sums[lane] += value;
        best[lane] = if value > best[lane] { value } else { best[lane] };
    };
    let (row_chunks, row_rest) = row.as_chunks::<LANES>();
    let (mask_chunks, mask_rest) = mask.as_chunks::<LANES>();
    for (row, mask) in row_chunks.iter().zip(mask_chunks) {
        for lane in 0..LANES {
            step(lane, row[lane] * mask[lane]);
        }
    }
    for (lane, (&value, &mask)) in row_rest.iter().zip(mask_rest).enumerate() {
        step(lane, value * mask);
    }
    (sum_lanes(sums), best.iter().fold(0.0, |best, &value| if value > best { value } else { best }))
}

multiversion! {
    /// `row[i] *= weight[i] / sqrt(mean(row^2) + eps)`, in place: the root-mean-square norm. An empty row stays empty.
    pub fn rms_norm(row: &mut [f32], weight: &[f32], eps: f32) = rms_norm_body;
}

#[inline(always)]
fn rms_norm_body<L: Lanes>(row: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale_body::<L>(row, eps);
    scale_by_body::<L>(row, weight, scale);
}

multiversion! {
    /// `1 / sqrt(mean(row^2) + eps)`: what [`rms_norm`] multiplies a row and its weights by.
    pub fn rms_scale(row: &[f32], eps: f32) -> f32 = rms_scale_body;
}

#[inline(always)]
fn rms_scale_body<L: Lanes>(row: &[f32], eps: f32) -> f32 {
    #[expect(clippy::cast_precision_loss)]
    let mean = dot_body::<L>(row, row) / row.len() as f32;
    1.0 / (mean + eps).sqrt()
}

multiversion! {
    /// `row[i] *= scale * weight[i]`, in place: part of a row of [`rms_norm`], whose whole row has this
    /// [scale](rms_scale).
    pub fn scale_by(row: &mut [f32], weight: &[f32], scale: f32) = scale_by_body;
}

#[inline(always)]
fn scale_by_body<L: Lanes>(row: &mut [f32], weight: &[f32], scale: f32) {
    for (value, &weight) in row.iter_mut().zip(weight) {
        *value *= scale * weight;
    }
}

multiversion! {
    /// `up[i] *= silu(gate[i])`: the gated activation of LLaMA's MLP, in place.
    pub fn silu_mul(gate: &[f32], up: &mut [f32]) = silu_mul_body;
}

#[inline(always)]
fn silu_mul_body<L: Lanes>(gate: &[f32], up: &mut [f32]) {
    for (up, &gate) in up.iter_mut().zip(gate) {
        // sigmoid(x) = 1 / (1 + e^-x) for x >= 0, and e^x / (1 + e^x) below: never overflows.
        let e = exp_nonpositive::<L>(-gate.abs());
        let numerator = if gate >= 0.0 { 1.0 } else { e };
        *up *= gate * (numerator / (1.0 + e));
    }
}

multiversion! {
    /// The sum and the largest value of a row; entries must not be negative, and the largest of none is 0.
    pub fn sum_and_max(row: &[f32]) -> (f32, f32) = sum_and_max_body;
}

#[inline(always)]
fn sum_and_max_body<L: Lanes>(row: &[f32]) -> (f32, f32) {
    let mut sums = [0.0f32; LANES];
    let mut best = [0.0f32; LANES];
    let mut step = |lane: usize, value: f32| {
        sums[lane] += value;
        best[lane] = if value > best[lane] { value } else { best[lane] };
    };
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in chunk.iter().enumerate() {
            step(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        step(lane, value);
    }
    (sum_lanes(sums), best.iter().fold(0.0, |best, &value| if value > best { value } else { best }))
}

multiversion! {
    /// `out[j] = scales[0] * rows[j] + scales[1] * rows[stride + j] + ..`: the sums of the columns of a matrix whose rows
    /// are scaled. Each sum is written once, whatever the number of rows.
    ///
    /// # Panics
    /// If there are columns, and `rows` ends before the last row's last number.
    pub fn scaled_column_sums(rows: &[f32], stride: usize, scales: &[f32], out: &mut [f32]) = scaled_column_sums_body;
}

#[inline(always)]
fn scaled_column_sums_body<L: Lanes>(rows: &[f32], stride: usize, scales: &[f32], out: &mut [f32]) {
    let (chunks, rest) = out.as_chunks_mut::<LANES>();
    let first_of_rest = chunks.len() * LANES;
    for (index, out) in chunks.iter_mut().enumerate() {
        let mut sums = [0.0f32; LANES];
        for (row, &scale) in scales.iter().enumerate() {
            let start = row * stride + index * LANES;
            let row = &rows[start..start + LANES];
            for lane in 0..LANES {
                sums[lane] = fma::<L>(scale, row[lane], sums[lane]);
            }
        }
        *out = sums;
    }
    if rest.is_empty() {
        return;
    }
    rest.fill(0.0);
    let width = rest.len();
    for (row, &scale) in scales.iter().enumerate() {
        let start = row * stride + first_of_rest;
        for (sum, &value) in rest.iter_mut().zip(&rows[start..start + width]) {
            *sum = fma::<L>(scale, value, *sum);
        }
    }
}

/// The largest head dimension that decoding accepts.
pub const MAX_HEAD_DIM: usize = 512;

#[inline(always)]
fn widen_body<L: Lanes, T: Element>(source: &[T], out: &mut [f32]) {
    let (source_chunks, source_rest) = source.as_chunks();
    let (out_chunks, out_rest) = out.as_chunks_mut();
    for (source, out) in source_chunks.iter().zip(out_chunks) {
        T::load::<L>(source).store(out);
    }
    for (source, out) in source_rest.iter().zip(out_rest) {
        *out = source.widen();
    }
}

/// Merges the partial results of two row ranges of the same query, `a` becoming the union.
///
/// * `a`, `b`: largest score and sum of exponentials
/// * `a_out`, `b_out`: `[head_dim]` unnormalised sums
pub fn merge_partial(a: &mut (f32, f32), a_out: &mut [f32], b: (f32, f32), b_out: &[f32]) {
    let max = a.0.max(b.0);
    // All scores may be minus infinity: any finite number keeps their differences defined.
    let base = max.max(f32::MIN);
    let (a_scale, b_scale) = ((a.0 - base).exp(), (b.0 - base).exp());
    *a = (max, a.1 * a_scale + b.1 * b_scale);
    for (a, &b) in a_out.iter_mut().zip(b_out) {
        *a = *a * a_scale + b * b_scale;
    }
}
