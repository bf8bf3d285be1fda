//! Products of every format on every instruction set.

use super::*;
use crate::kernels::quant::dequantize;
use crate::kernels::quant::samples::{expect_products, random_blocks, set_scales_to_one};

const FORMATS: [WeightFormat; 13] = [
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q5_0,
    WeightFormat::Q5_1,
    WeightFormat::Q8_0,
    WeightFormat::Q2K,
    WeightFormat::Q3K,
    WeightFormat::Q4K,
    WeightFormat::Q5K,
    WeightFormat::Q6K,
    WeightFormat::Iq4Nl,
    WeightFormat::Iq4Xs,
    WeightFormat::Mxfp4,
];

/// `[count, rows]` products by way of panels, and the weights as f32.
fn products(set: InstructionSet, dtype: WeightFormat, rows: usize, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let data = random_blocks(dtype, rows * COLS / dtype.block_size());
    let mut wide = vec![0.0; rows * COLS];
    dequantize(dtype, &data, &mut wide);
    let format = ManyFormat::new(set, dtype).unwrap();
    let x = format.round(Source::Rows(x), COLS);
    let mut out = vec![f32::NAN; x.count() * rows];
    let (row_bytes, mut buffers) = (data.len() / rows, PanelBuffers::default());
    for panel_rows in [x.panel_rows(rows, 1), STRIP] {
        out.fill(f32::NAN);
        let views = MatrixMut::new(&mut out, x.count(), rows, rows).split_columns(panel_rows);
        for (data, mut view) in data.chunks(panel_rows * row_bytes).zip(views) {
            let rows = Rows { data, row_bytes, count: data.len() / row_bytes };
            format.multiply(&x, rows, &mut buffers, &mut view);
        }
    }
    (out, wide)
}

const COLS: usize = 512;

/// Activations that bytes hold as they are: products must be exact.
#[test]
fn products_of_whole_numbers_are_exact_in_every_format_and_on_every_instruction_set() {
    let number = |i: usize| if i % 16 == 5 { -127_i8 } else { [-113, -42, 29, 0, 71, -6, 117][i * 5 % 7] };
    for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
        for (count, rows) in [(1, 1), (2, 15), (3, 16), (7, 33), (8, 70), (20, 32)] {
            let x: Vec<f32> = (0..count * COLS).map(|i| f32::from(number(i)) / 64.0).collect();
            let (out, wide) = products(set, dtype, rows, &x);
            expect_products(&format!("{set:?} {dtype:?}"), &out, &wide, &x, COLS);
        }
    }
}

/// The error is that of rounding to 127 steps of a group's largest number.
#[test]
fn activations_are_rounded_to_the_nearest_byte() {
    let (count, rows) = (3, 5);
    let x: Vec<f32> = (0..count * COLS).map(|i| [-11.3, -4.2, 2.9, 0.03, 7.1, -0.6, 0.7][i * 5 % 7]).collect();
    for set in InstructionSet::available() {
        let (out, wide) = products(set, WeightFormat::Q4_1, rows, &x);
        for (index, &out) in out.iter().enumerate() {
            let (weights, x) = (&wide[index % rows * COLS..][..COLS], &x[index / rows * COLS..][..COLS]);
            let sum: f32 = weights.iter().zip(x).map(|(w, x)| w * x).sum();
            let bound = 0.5 * 11.3 / 127.0 * weights.iter().map(|w| w.abs()).sum::<f32>();
            assert!((out - sum).abs() <= bound && out != sum, "{set:?} {index}: {out} for {sum}, within {bound}");
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row_and_zeros_are_zeros() {
    let mut x = vec![0.0; 3 * COLS];
    (x[7], x[2 * COLS + 500]) = (f32::INFINITY, f32::NAN);
    for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
        let (out, _) = products(set, dtype, 20, &x);
        let rows: Vec<_> = out.chunks(20).collect();
        assert!(rows[0].iter().chain(rows[2]).all(|out| out.is_nan()), "{set:?} {dtype:?}: {out:?}");
        assert!(rows[1].iter().all(|&out| out == 0.0), "{set:?} {dtype:?}: {out:?}");
    }
}

/// The largest bytes on both sides, where sums of 16 bits must not overflow.
#[test]
fn the_largest_sums_fit() {
    for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
        for (byte, sign) in [(0xff, 1.0), (0xff, -1.0), (0, 1.0), (0x80, -1.0)] {
            // Scales of NaN or 0 say nothing: 1 in their place.
            let mut block = vec![byte; dtype.block_bytes()];
            set_scales_to_one(dtype, &mut block);
            let rows = 16;
            let data = block.repeat(rows * COLS / dtype.block_size());
            let mut wide = vec![0.0; rows * COLS];
            dequantize(dtype, &data, &mut wide);
            let x = vec![sign * 127.0; COLS];
            let format = ManyFormat::new(set, dtype).unwrap();
            let x_bytes = format.round(Source::Rows(&x), COLS);
            let mut out = vec![f32::NAN; rows];
            let panel = Rows { data: &data, row_bytes: data.len() / rows, count: rows };
            format.multiply(
                &x_bytes,
                panel,
                &mut PanelBuffers::default(),
                &mut MatrixMut::new(&mut out, 1, rows, rows),
            );
            let expected: f64 = wide[..COLS].iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            let tolerance = 1e-5 * expected.abs().max(1.0);
            for &out in &out {
                assert!(
                    (f64::from(out) - expected).abs() <= tolerance,
                    "{set:?} {dtype:?} {byte}: {out} for {expected}"
                );
            }
        }
    }
}

#[test]
fn panels_cover_all_rows_about_equally() {
    let x =
        ManyFormat::new(InstructionSet::PORTABLE, WeightFormat::Q4_0).unwrap().round(Source::Rows(&[0.0; 1536]), 1536);
    for (rows, threads, expected) in
        [(1, 1, 32), (256, 2, 128), (1536, 2, 256), (8960, 2, 256), (8960, 64, 160), (0, 2, 32)]
    {
        let panel = x.panel_rows(rows, threads);
        assert_eq!(panel, expected, "{rows} rows, {threads} threads");
    }
}

#[test]
fn formats_without_panels_have_none() {
    for dtype in [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16, WeightFormat::Q8_1, WeightFormat::Q8K] {
        assert!(ManyFormat::new(InstructionSet::PORTABLE, dtype).is_none(), "{dtype:?}");
    }
}
