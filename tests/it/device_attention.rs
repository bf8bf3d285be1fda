//! Attention made of candle operations against the kernels', where a prompt is so long that it is taken in several blocks.

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::device::{self, DeviceStats, PromptBlock, PromptTensors};
use adaptive_kvcache::attention::prefill::{QueryBlock, largest_differences, prefill};
use adaptive_kvcache::attention::prompt_rows::PromptRows;
use adaptive_kvcache::compress::stats::MassRequest;
use adaptive_kvcache::compress::{LayerStats, StatsRequest};
use adaptive_kvcache::ops::Ops;
use candle_core::{Device, Tensor};

use crate::support::max_difference;

const LAYOUT: HeadLayout = HeadLayout { num_heads: 8, num_kv_heads: 2, head_dim: 8 };

/// 2,000 rows of 8 heads over as many keys are twice as many weights as exist at a time.
const LEN: usize = 2000;

/// Between two orders of f32 additions: outputs and single weights, and sums over all rows.
const TOLERANCE: f32 = 1e-5;
const SUM_TOLERANCE: f32 = 2e-3;

/// Rows `[LEN, heads, head_dim]`, of which some keys are looked at much more than others.
fn rows(heads: usize, seed: u64) -> Vec<f32> {
    let mut number = seed;
    (0..LEN * heads * LAYOUT.head_dim)
        .map(|_| {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (number >> 40) as f32 / (1 << 23) as f32 * 2.5 - 2.5
        })
        .collect()
}

/// `[heads, LEN, head_dim]` on the device.
fn by_heads(rows: &[f32], heads: usize) -> Tensor {
    let rows = Tensor::from_slice(rows, (LEN, heads, LAYOUT.head_dim), &Device::Cpu).unwrap();
    rows.transpose(0, 1).unwrap().contiguous().unwrap()
}

#[test]
fn outputs_statistics_and_differences_of_several_blocks_equal_the_kernels() {
    let ops = Ops::new(Device::Cpu).unwrap();
    let [queries, keys, values] = [(8, 1), (2, 2), (2, 3)].map(|(heads, seed)| rows(heads, seed));
    let mask = |step: usize| (0..LEN).map(|i| f32::from(u8::from(i % step == 0))).collect::<Vec<f32>>();
    let request = StatsRequest {
        column_sums: true,
        // Rows 1,700 and above count: a border within a block.
        mass: Some(MassRequest { first_row: 1700, window: Some(130) }),
        masks: vec![mask(3), mask(7)],
        recent: 0,
        log_sums: true,
    };
    let pending = [(1, vec![mask(5), mask(11)])];

    let mut own = [PromptRows::with_capacity(LAYOUT, LEN), PromptRows::with_capacity(LAYOUT, LEN)];
    own[0].push(&keys).unwrap();
    own[1].push(&values).unwrap();
    let block = QueryBlock { queries: &queries, first_row: 0 };
    let mut expected = LayerStats::new(request.clone(), [LEN; 8]);
    let expected_out = prefill(LAYOUT, block, &own[0], &own[1], Some(&mut expected), None).unwrap();
    let expected_differences = largest_differences(LAYOUT, block, &own[0], &pending).unwrap();

    let mut prompt = PromptTensors::new(&ops, LAYOUT, None, vec![0, 0], LEN).unwrap();
    prompt.push(&ops, &by_heads(&keys, 2), &by_heads(&values, 2)).unwrap();
    let mut stats = DeviceStats::new(&ops, &request, &prompt).unwrap();
    let block = PromptBlock { queries: by_heads(&queries, 8), first_row: 0 };
    let out = device::prefill(&ops, LAYOUT, &block, &prompt, Some(&mut stats), None).unwrap();
    let mut got = LayerStats::new(request, [LEN; 8]);
    stats.finish(&ops, &prompt, &mut got).unwrap();
    let differences = device::largest_differences(&ops, LAYOUT, &[block], &prompt, &pending).unwrap();

    assert_eq!(out.dims(), [LEN, 64]);
    let difference = max_difference(&out.flatten_all().unwrap().to_vec1::<f32>().unwrap(), &expected_out);
    assert!(difference < TOLERANCE, "outputs: {difference}");
    for (head, (got, expected)) in got.heads.iter().zip(&expected.heads).enumerate() {
        for (what, got, expected, tolerance) in [
            ("column sums", &got.column_sums, &expected.column_sums, SUM_TOLERANCE),
            ("profiled sums", &got.profiled_sums, &expected.profiled_sums, SUM_TOLERANCE),
            ("window sums", &got.window_sums, &expected.window_sums, SUM_TOLERANCE),
            ("differences", &got.differences, &expected.differences, TOLERANCE),
            ("log sums", &got.log_sums, &expected.log_sums, TOLERANCE),
        ] {
            let difference = max_difference(got, expected);
            assert!(!expected.is_empty() && difference < tolerance, "{what} of head {head}: {difference}");
        }
        let all: f32 = got.column_sums.iter().sum();
        assert!((all - LEN as f32).abs() < 0.1, "weights of {LEN} rows add up to {all}");
    }
    for (got, expected) in differences.iter().zip(&expected_differences) {
        assert!(max_difference(got, expected) < TOLERANCE, "{got:?}, {expected:?}");
    }
}
