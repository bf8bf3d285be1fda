//! Sizes of 0, and sizes whose products overflow, at every door of the kernels and of attention: an empty result or an
//! error, or the panic that the door promises, never another one.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::decode::{decode, plain_row_weights};
use adaptive_kvcache::attention::prefill::{QueryBlock, largest_differences, prefill};
use adaptive_kvcache::attention::prompt_rows::PromptRows;
use adaptive_kvcache::attention::replay::{Replay, squared_attention};
use adaptive_kvcache::backend::HeadCache;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::kernels::attend::{attend_range, row_weights};
use adaptive_kvcache::kernels::quant::{Activations, Compute, Inputs, WeightFormat, WeightMatrix};
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::kernels::vector;

/// Zeros, `rows` of 256 numbers.
fn matrix(dtype: WeightFormat, rows: usize) -> WeightMatrix {
    let len = rows * 256 / dtype.block_size() * dtype.block_bytes();
    let bytes = vec![0_u8; len + 4];
    let first = bytes.as_ptr().align_offset(4);
    WeightMatrix::new(Arc::new(bytes), first..first + len, dtype, rows, 256).unwrap()
}

fn panics(work: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(work)).is_err()
}

#[test]
fn a_matrix_without_rows_gives_products_without_numbers() {
    for dtype in WeightFormat::ALL {
        for rows in [0, 3] {
            let matrix = matrix(dtype, rows);
            for set in InstructionSet::available() {
                for (count, compute) in (0..6).flat_map(|count| [(count, Compute::Exact), (count, Compute::Fast)]) {
                    let mut x = Activations::default();
                    x.prepare(set, compute, dtype, &vec![0.5; count * 256], 256);
                    matrix.dot_rows(rows..rows, &x, &mut []);
                    let mut out = vec![f32::NAN; count * rows];
                    matrix.dot_rows(0..rows, &x, &mut out);
                    assert!(out.iter().all(|&number| number == 0.0), "{dtype:?} {set:?} {count}");
                }
            }
            matrix.dequantize_rows(0..0, &mut []);
            for seq_len in [0, 1, 2, 40] {
                for compute in [Compute::Exact, Compute::Fast] {
                    let mut out = vec![f32::NAN; seq_len * rows];
                    matrix.matmul(&Inputs::new(compute, &vec![0.5; seq_len * 256], 256), &mut out);
                    assert!(out.iter().all(|&number| number == 0.0), "{dtype:?} {seq_len}");
                }
            }
        }
    }
}

#[test]
fn rows_that_a_matrix_does_not_have_are_refused_however_large_their_numbers() {
    const MAX: usize = usize::MAX;
    for dtype in WeightFormat::ALL {
        let matrix = matrix(dtype, 4);
        let row_bytes = matrix.bytes() / 4;
        let mut x = Activations::default();
        x.prepare(InstructionSet::PORTABLE, Compute::Fast, dtype, &[], 256);
        // Numbers whose products with a row's bytes or numbers wrap around to 0 or to a place inside.
        let wrapping = 1_usize << (usize::BITS - row_bytes.trailing_zeros());
        #[expect(clippy::reversed_empty_ranges, reason = "to be refused")]
        let ranges: [Range<usize>; 6] = [0..5, 4..5, 3..2, MAX - 1..MAX, wrapping..wrapping + 1, 0..wrapping];
        for rows in ranges {
            assert!(panics(|| matrix.dot_rows(rows.clone(), &x, &mut [])), "{dtype:?} {rows:?}");
            assert!(panics(|| matrix.dequantize_rows(rows.clone(), &mut [])), "{dtype:?} {rows:?}");
        }
        let mut none = [0.0; 3];
        let x_of_zeros = Inputs::new(Compute::Fast, &[0.0; 256], 256);
        assert!(panics(|| matrix.matmul(&x_of_zeros, &mut none)), "{dtype:?}: results for 3 of 4 rows");
        // Activations that nobody prepared, or for another format.
        assert!(panics(|| matrix.dot_rows(0..4, &Activations::default(), &mut [])), "{dtype:?}");
        let other = if dtype == WeightFormat::F32 { WeightFormat::F16 } else { WeightFormat::F32 };
        x.prepare(InstructionSet::PORTABLE, Compute::Fast, other, &[0.0; 256], 256);
        assert!(panics(|| matrix.dot_rows(0..4, &x, &mut [0.0; 4])), "{dtype:?}");
    }
}

#[test]
fn rows_without_numbers_go_through_every_kernel() {
    for set in InstructionSet::available() {
        assert_eq!((vector::dot(set, &[], &[]), vector::dot_stored::<f32>(set, &[], &[1.0])), (0.0, 0.0));
        assert_eq!(vector::max(set, &[]), f32::NEG_INFINITY);
        assert_eq!(vector::exp_minus_max(set, &mut [], 0.0), 0.0);
        assert_eq!(
            (vector::sum_and_max(set, &[]), vector::masked_sum_and_max(set, &[], &[1.0])),
            ((0.0, 0.0), (0.0, 0.0))
        );
        vector::softmax(set, &mut []);
        vector::rms_norm(set, &mut [], &[1.0], 1e-5);
        vector::silu_mul(set, &[], &mut []);
        vector::widen::<half::f16>(set, &[], &mut []);
        // No columns of many rows, wherever these are.
        vector::scaled_column_sums(set, &[], 7, &[1.0; 3], &mut []);
        let mut out = [f32::NAN; 40];
        vector::scaled_column_sums(set, &[], 7, &[], &mut out);
        assert_eq!(out, [0.0; 40]);
        vector::scaled_column_sums(set, &[2.0; 40], 0, &[1.0; 3], &mut out);
        assert_eq!(out, [6.0; 40]);
        for columns in [1, 32, 40] {
            let short = || vector::scaled_column_sums(set, &[0.0; 40], 1, &[1.0; 3], &mut vec![0.0; columns]);
            assert_eq!(panics(short), columns == 40, "{columns}");
        }
    }
}

#[test]
fn heads_without_rows_are_asked_for_nothing() {
    for dtype in KvDtype::ALL {
        let head = HeadCache::new(32, dtype).unwrap();
        for set in InstructionSet::available() {
            let (mut scratch, mut weights) = (Vec::new(), vec![1.0; 5]);
            row_weights(set, head.rows(), &[0.5; 64], &mut scratch, &mut weights);
            assert!(weights.is_empty());
            assert!(panics(|| attend_range(set, head.rows(), 0..0, &[0.5; 32], &mut [0.0; 32], &mut [(0.0, 0.0)])));
            assert!(panics(|| attend_range(set, head.rows(), 0..16, &[0.5; 32], &mut [0.0; 32], &mut [(0.0, 0.0)])));
        }
        let layout = HeadLayout { num_heads: 2, num_kv_heads: 1, head_dim: 32 };
        assert!(matches!(decode(layout, &[0.5; 64], &[head.rows()]), Err(Error::Shape { .. })));
        assert!(plain_row_weights(layout, &[0.5; 64], head.rows()).unwrap().is_empty());
        let other = HeadLayout { head_dim: 16, ..layout };
        assert!(matches!(plain_row_weights(other, &[0.5; 32], head.rows()), Err(Error::Shape { .. })));
    }
}

#[test]
fn layouts_that_are_none_are_errors() {
    let good = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
    let rows = PromptRows::with_capacity(good, 3);
    let block = QueryBlock { queries: &[], first_row: 0 };
    let is_shape = |result: Result<(), Error>| matches!(result, Err(Error::Shape { .. }));
    for layout in [
        HeadLayout { num_heads: 0, ..good },
        HeadLayout { num_kv_heads: 0, ..good },
        HeadLayout { head_dim: 0, ..good },
        HeadLayout { num_kv_heads: 3, ..good },
        HeadLayout { num_heads: 0, num_kv_heads: 0, head_dim: 0 },
    ] {
        let case = format!("{layout:?}");
        assert!(is_shape(decode(layout, &[], &[]).map(drop)), "{case}");
        assert!(is_shape(PromptRows::after(layout, 3, &[]).map(drop)), "{case}");
        assert!(is_shape(PromptRows::whole(layout, vec![], &[], 0).map(drop)), "{case}");
        assert!(is_shape(prefill(layout, block, &rows, &rows, None, None).map(drop)), "{case}");
        assert!(is_shape(largest_differences(layout, block, &rows, &[]).map(drop)), "{case}");
        let replay = Replay { layout, queries: &[], keys: &rows, log_sums: &[], turn: &|_, _| {} };
        assert!(is_shape(squared_attention(replay).map(drop)), "{case}");
        assert!(panics(|| drop(PromptRows::with_capacity(layout, 3))), "{case}");
    }
    // Right by itself, and another than that of the keys.
    let other = HeadLayout { num_kv_heads: 4, ..good };
    assert!(is_shape(prefill(other, block, &rows, &rows, None, None).map(drop)));
    assert!(is_shape(PromptRows::whole(good, vec![vec![], vec![]], &[1 << 61, 0], 0).map(drop)));
}

#[test]
fn a_prompt_without_tokens_attends_to_nothing() {
    let layout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
    let mut rows = PromptRows::with_capacity(layout, 0);
    rows.push(&[]).unwrap();
    let block = QueryBlock { queries: &[], first_row: 0 };
    assert!(prefill(layout, block, &rows, &rows, None, None).unwrap().is_empty());
    let far = QueryBlock { queries: &[0.0; 32], first_row: usize::MAX };
    assert!(matches!(prefill(layout, far, &rows, &rows, None, None), Err(Error::Shape { .. })));
    // Keys that more came before than before the values.
    let keys = PromptRows::whole(layout, vec![vec![0.0; 24], vec![0.0; 8]], &[2, 0], 1).unwrap();
    let values = PromptRows::whole(layout, vec![vec![0.0; 8], vec![0.0; 8]], &[0, 0], 1).unwrap();
    let block = QueryBlock { queries: &[0.0; 32], first_row: 0 };
    assert!(matches!(prefill(layout, block, &keys, &values, None, None), Err(Error::Shape { .. })));
    assert!(prefill(layout, block, &keys, &keys, None, None).is_ok());
}
