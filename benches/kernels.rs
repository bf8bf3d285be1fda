//! Speed of the kernels that prefill and decoding are made of: `cargo bench`, or `cargo bench -- matvec/Q4_1` for some.
//!
//! On all cores, or as many as `RAYON_NUM_THREADS` says. Throughput is in bytes where a kernel reads each number once, and
//! in multiply-adds ("elements") where it computes on what it has read. Not for the speed of whole models: that is
//! `adaptive-kvcache bench`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::decode::decode;
use adaptive_kvcache::attention::prefill::{QueryBlock, prefill};
use adaptive_kvcache::attention::prompt_rows::PromptRows;
use adaptive_kvcache::backend::KernelRows;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::compress::stats::MassRequest;
use adaptive_kvcache::compress::{LayerStats, StatsRequest};
use adaptive_kvcache::kernels::quant::{Compute, Inputs, WeightFormat, WeightMatrix};
use adaptive_kvcache::kernels::vector::{instruction_set, softmax};
use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const WEIGHT_DTYPES: [WeightFormat; 6] = [
    WeightFormat::Q4_1,
    WeightFormat::Q8_0,
    WeightFormat::Q4_0,
    WeightFormat::Q4K,
    WeightFormat::Q6K,
    WeightFormat::F16,
];
const KV_DTYPES: [KvDtype; 8] = KvDtype::ALL;

/// Output and input features: a layer of SmolLM2-135M, which fits in a core's cache, and one of Llama-2-7B.
const SHAPES: [(usize, usize); 2] = [(576, 1536), (4096, 4096)];

/// Rows of a block of a prompt.
const BLOCK: usize = 512;

/// One KV head of SmolLM2-135M, and all of them.
const ONE_HEAD: HeadLayout = HeadLayout { num_heads: 3, num_kv_heads: 1, head_dim: 64 };
const ALL_HEADS: HeadLayout = HeadLayout { num_heads: 9, num_kv_heads: 3, head_dim: 64 };

/// Numbers of both signs, the same in every run.
fn numbers(len: usize) -> Vec<f32> {
    let mut state = 20_240_514_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 32_768.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn weights(dtype: WeightFormat, rows: usize, cols: usize) -> WeightMatrix {
    let tensor = Tensor::from_vec(numbers(rows * cols), (rows, cols), &Device::Cpu).unwrap();
    let bytes = QTensor::quantize(&tensor, dtype.candle().unwrap()).unwrap().data().unwrap().into_owned();
    let range = 0..bytes.len();
    WeightMatrix::new(Arc::new(bytes), range, dtype, rows, cols).unwrap()
}

fn matvec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matvec");
    for dtype in WEIGHT_DTYPES {
        for (rows, cols) in SHAPES {
            let (weights, x) = (weights(dtype, rows, cols), numbers(cols));
            let mut out = vec![0.0; rows];
            group.throughput(Throughput::Bytes(weights.bytes() as u64));
            let id = BenchmarkId::new(format!("{dtype:?}"), format!("{rows}x{cols}"));
            group.bench_function(id, |bencher| {
                bencher.iter(|| weights.matvec(Compute::Fast, black_box(&x), black_box(&mut out)));
            });
        }
    }
}

fn matmul(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul of 512 rows");
    for dtype in WEIGHT_DTYPES {
        for (rows, cols) in SHAPES {
            let (weights, x) = (weights(dtype, rows, cols), numbers(BLOCK * cols));
            let mut out = vec![0.0; BLOCK * rows];
            group.throughput(Throughput::Elements((BLOCK * rows * cols) as u64));
            let id = BenchmarkId::new(format!("{dtype:?}"), format!("{rows}x{cols}"));
            group.bench_function(id, |bencher| {
                bencher.iter(|| weights.matmul(&Inputs::new(Compute::Fast, black_box(&x), cols), black_box(&mut out)));
            });
        }
    }
}

fn decode_attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode attention of a head");
    let queries = numbers(ONE_HEAD.query_width());
    for dtype in KV_DTYPES {
        for len in [2048, 7680] {
            let empty = KernelRows::new(ONE_HEAD, dtype).unwrap();
            let mut cache = AdaptiveKvCache::new(1, &empty, Retention::Full);
            let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
            let mut prompt = layer.rows().prompt(len).unwrap();
            prompt.keys.push(&numbers(len * ONE_HEAD.kv_width())).unwrap();
            prompt.values.push(&numbers(len * ONE_HEAD.kv_width())).unwrap();
            layer.store_prompt(&prompt, None).unwrap();
            let rows = layer.rows().for_attention();
            group.throughput(Throughput::Bytes(layer.bytes().kept as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), len), |bencher| {
                bencher.iter(|| decode(ONE_HEAD, black_box(&queries), black_box(&rows)).unwrap());
            });
        }
    }
}

fn prefill_attention(criterion: &mut Criterion) {
    const NUM_KEYS: usize = 2048;
    let mut group = criterion.benchmark_group("prefill attention, 512 rows on 2048 keys");
    let rows = |len: usize| {
        let mut rows = PromptRows::with_capacity(ALL_HEADS, len);
        rows.push(&numbers(len * ALL_HEADS.kv_width())).unwrap();
        rows
    };
    let (keys, values, queries) = (rows(NUM_KEYS), rows(NUM_KEYS), numbers(BLOCK * ALL_HEADS.query_width()));
    let block = || QueryBlock { queries: &queries, first_row: NUM_KEYS - BLOCK };
    let request = StatsRequest {
        column_sums: true,
        mass: Some(MassRequest { first_row: 0, window: Some(NUM_KEYS * 3 / 10) }),
        ..StatsRequest::default()
    };
    let pairs: usize = (NUM_KEYS - BLOCK + 1..=NUM_KEYS).sum();
    group.throughput(Throughput::Elements((2 * pairs * ALL_HEADS.query_width()) as u64));
    group.bench_function("without statistics", |bencher| {
        bencher.iter(|| prefill(ALL_HEADS, black_box(block()), &keys, &values, None, None).unwrap());
    });
    let mut stats = LayerStats::new(request, (0..ALL_HEADS.num_heads).map(|_| NUM_KEYS));
    group.bench_function("with the mass's statistics", |bencher| {
        bencher.iter(|| prefill(ALL_HEADS, black_box(block()), &keys, &values, Some(&mut stats), None).unwrap());
    });
}

fn softmax_of_a_row(criterion: &mut Criterion) {
    const LEN: usize = 2048;
    let mut group = criterion.benchmark_group("softmax");
    let mut row = numbers(LEN);
    group.throughput(Throughput::Bytes((LEN * size_of::<f32>()) as u64));
    // A softmax of a softmax, and so on, is as much work each time.
    group.bench_function(LEN.to_string(), |bencher| bencher.iter(|| softmax(instruction_set(), black_box(&mut row))));
}

criterion_group! {
    name = kernels;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
        .sample_size(20);
    targets = matvec, matmul, decode_attention, prefill_attention, softmax_of_a_row
}
criterion_main!(kernels);
