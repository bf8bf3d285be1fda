//! Steps on small and on real widths: what threads share changes no bit, and how much of the work each of them repeats.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Barrier, Mutex};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::own::{Counts, Own};
use super::*;
use crate::arch::{Architecture, LlamaConfig, RopeLayout, RopeSettings};
use crate::backend::kernels::HeadCache;
use crate::backend::{Backend, Embedding};
use crate::cache::{KvDtype, Retention};
use crate::kernels::quant::{Compute, WeightMatrix};

thread_local! {
    /// From how much spared work on threads make rows together; `None`: as always.
    pub(super) static LEAST_SPARED: Cell<Option<usize>> = const { Cell::new(None) };
    /// Where the threads of a step put what they have counted.
    static COUNTED: RefCell<Option<Arc<Mutex<Vec<Counts>>>>> = const { RefCell::new(None) };
}

/// A step whose threads all take part in each phase that has chunks for all, as they do on as many cores, and count.
pub(super) struct Counting {
    everybody: Barrier,
    size: usize,
    counted: Arc<Mutex<Vec<Counts>>>,
}

pub(super) fn counting(size: usize) -> Option<Counting> {
    let counted = COUNTED.with_borrow(Clone::clone)?;
    Some(Counting { everybody: Barrier::new(size), size, counted })
}

/// Where a thread waits with its first chunk of a phase until all have one.
pub(super) struct Meeting<'a>(Option<&'a Barrier>);

impl Meeting<'_> {
    pub fn wait(&mut self) {
        if let Some(everybody) = self.0.take() {
            everybody.wait();
        }
    }
}

impl Step<'_, '_> {
    pub(super) fn meeting(&self, worker: &Worker<'_>, count: usize) -> Meeting<'_> {
        let has_all = |counting: &&Counting| worker.team_size() == counting.size && count >= counting.size;
        Meeting(self.counting.as_ref().filter(has_all).map(|counting| &counting.everybody))
    }

    pub(super) fn count(&self, own: &mut Own) {
        let counts = std::mem::take(&mut own.counts);
        if let Some(counting) = &self.counting {
            counting.counted.lock().unwrap().push(counts);
        }
    }
}

/// Sizes of a model of one layer, and the formats of its matrices.
#[derive(Clone, Copy)]
struct Shape {
    hidden_size: usize,
    intermediate_size: usize,
    heads: HeadLayout,
    /// Of `q`, `k`, `v`, `o`, `gate`, `up`, `down` and the output.
    dtypes: [GgmlDType; 8],
}

const VOCAB: usize = 640;

/// Numbers of both signs.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    #[expect(clippy::cast_precision_loss)]
    let number = |index: usize| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0;
    (0..len).map(number).collect()
}

/// A matrix, the same few rows again and again.
fn matrix(dtype: GgmlDType, rows: usize, cols: usize) -> Arc<WeightMatrix> {
    const FEW: usize = 8;
    let scaled: Vec<f32> = numbers(FEW * cols, cols).iter().map(|number| number / 16.0).collect();
    let tensor = Tensor::from_vec(scaled, (FEW, cols), &Device::Cpu).unwrap();
    let few = QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned();
    let bytes = few.repeat(rows / FEW);
    let range = 0..bytes.len();
    Arc::new(WeightMatrix::new(Arc::new(bytes), range, dtype.into(), rows, cols).unwrap())
}

impl Shape {
    fn new(hidden_size: usize, intermediate_size: usize, heads: [usize; 3], dtype: GgmlDType) -> Self {
        let [num_heads, num_kv_heads, head_dim] = heads;
        let heads = HeadLayout { num_heads, num_kv_heads, head_dim };
        Self { hidden_size, intermediate_size, heads, dtypes: [dtype; 8] }
    }

    fn model(&self) -> (Kernels, Weights<Kernels>) {
        let Self { hidden_size, intermediate_size, heads, dtypes } = *self;
        let config = LlamaConfig {
            architecture: Architecture::Qwen3,
            hidden_size,
            intermediate_size,
            num_layers: 1,
            heads,
            vocab_size: VOCAB,
            rms_norm_eps: 1e-5,
            context_length: 1 << 16,
            sliding_window: None,
            rope: RopeSettings::plain(10_000.0, heads.head_dim, RopeLayout::Halves),
        };
        let kernels = Kernels::new(&config, Compute::Fast);
        let linear = |dtype, rows, cols| kernels.linear(matrix(dtype, rows, cols), None).unwrap();
        let norm = |seed| kernels.vector(numbers(hidden_size, seed)).unwrap();
        let (queries, kv) = (heads.query_width(), heads.kv_width());
        let [q, k, v, o, gate, up, down, head] = dtypes;
        let block = Block {
            input_layernorm: norm(1),
            q_norm: Some(kernels.vector(numbers(heads.head_dim, 4)).unwrap()),
            k_norm: Some(kernels.vector(numbers(heads.head_dim, 5)).unwrap()),
            q_proj: linear(q, queries, hidden_size),
            k_proj: linear(k, kv, hidden_size),
            v_proj: linear(v, kv, hidden_size),
            o_proj: linear(o, hidden_size, queries),
            post_attention_layernorm: norm(2),
            gate_proj: linear(gate, intermediate_size, hidden_size),
            up_proj: linear(up, intermediate_size, hidden_size),
            down_proj: linear(down, hidden_size, intermediate_size),
        };
        let weights = Weights {
            embed_tokens: Embedding::new(matrix(GgmlDType::F32, VOCAB, hidden_size)),
            blocks: vec![block],
            norm: norm(3),
            lm_head: linear(head, VOCAB, hidden_size),
        };
        (kernels, weights)
    }

    /// A cache that holds so many tokens.
    fn cache(&self, len: usize) -> AdaptiveKvCache {
        let rows = KernelRows::new(self.heads, KvDtype::F16).unwrap();
        let mut cache = AdaptiveKvCache::new(1, &rows, Retention::Full);
        let width = self.heads.kv_width();
        for position in 0..len {
            let (keys, values) = (numbers(width, 2 * position), numbers(width, 2 * position + 1));
            let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
            layer.append(&keys, &values, position, TokenClass::default()).unwrap();
            cache.advance(0);
        }
        cache
    }
}

/// What a step leaves.
#[derive(PartialEq)]
struct Outcome {
    logits: Vec<f32>,
    heads: Vec<Vec<HeadCache>>,
}

/// Steps on so many threads.
///
/// * `lens`: tokens in the cache of each sequence
/// * `run`: if not 0, how many tokens of the one sequence are given at once
fn step(shape: &Shape, model: &(Kernels, Weights<Kernels>), lens: &[usize], run: usize, threads: usize) -> Outcome {
    let (kernels, weights) = model;
    let mut caches: Vec<_> = lens.iter().map(|&len| shape.cache(len)).collect();
    let mut logits = Vec::new();
    let angles = |first: usize, count| kernels.rope.angles(first, count);
    if run > 0 {
        let ids: Vec<u32> = (5..).take(run).collect();
        run_tokens(kernels, weights, &ids, &angles(lens[0], run), &mut caches[0], &mut logits).unwrap();
    } else {
        let ids: Vec<u32> = (5..).take(lens.len()).collect();
        let angles: Vec<_> = lens.iter().flat_map(|&len| angles(len, 1)).collect();
        let mut caches: Vec<&mut AdaptiveKvCache> = caches.iter_mut().collect();
        super::run(kernels, weights, &ids, &angles, &mut caches, &mut logits).unwrap();
    }
    assert!(logits.iter().all(|logit| logit.is_finite()), "{threads} threads");
    let heads = |cache: &AdaptiveKvCache| cache.layers::<KernelRows>().unwrap()[0].rows().heads().to_vec();
    Outcome { logits, heads: caches.iter().map(heads).collect() }
}

/// Does something with so many threads to compute on, which make rows together from so much spared work on.
fn with<T: Send>(threads: usize, least_spared: Option<usize>, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        LEAST_SPARED.set(least_spared);
        work()
    })
}

#[test]
fn what_threads_make_together_is_bit_for_bit_what_each_would_make() {
    let [single, f16, q4_0, q4_1] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::Q4_0, GgmlDType::Q4_1];
    let [q5_0, q8_0, q4_k, q6_k] = [GgmlDType::Q5_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K];
    let shapes = [
        // Not whole parts, and heads that are no whole parts either.
        Shape::new(576, 1504, [9, 3, 64], q4_0),
        Shape::new(544, 864, [5, 1, 96], q8_0),
        Shape { dtypes: [q4_0, q8_0, q5_0, q4_1, f16, q8_0, q5_0, single], ..Shape::new(576, 1536, [6, 2, 96], q4_0) },
        Shape { dtypes: [q4_k, q4_k, q6_k, q4_k, q4_k, q4_k, q6_k, q6_k], ..Shape::new(512, 768, [8, 2, 64], q4_k) },
        Shape { dtypes: [f16, single, f16, single, f16, f16, f16, f16], ..Shape::new(320, 600, [5, 5, 64], f16) },
    ];
    for (index, shape) in shapes.iter().enumerate() {
        let model = shape.model();
        // One range, several, the last of one row; several sequences; tokens of one.
        for (lens, run) in [(&[3][..], 0), (&[1100], 0), (&[600, 0, 512], 0), (&[1023], 4)] {
            let alone = with(1, None, || step(shape, &model, lens, run, 1));
            for threads in [2, 3, 8] {
                for least_spared in [Some(0), Some(usize::MAX), None] {
                    let outcome = with(threads, least_spared, || step(shape, &model, lens, run, threads));
                    let case = format!("shape {index}, {lens:?} and {run}, {threads} threads, {least_spared:?}");
                    assert!(outcome == alone, "{case}");
                }
            }
        }
    }
}

/// All threads' counts of a step. A team that another test keeps busy lets a step go without it; then it is taken again.
fn counts(
    shape: &Shape,
    model: &(Kernels, Weights<Kernels>),
    len: usize,
    threads: usize,
    least: Option<usize>,
) -> Vec<Counts> {
    let counts = || {
        with(threads, least, || {
            let counted = Arc::new(Mutex::new(Vec::new()));
            COUNTED.set(Some(Arc::clone(&counted)));
            step(shape, model, &[len], 0, threads);
            COUNTED.set(None);
            counted.lock().unwrap().clone()
        })
    };
    let all = (0..100).map(|_| counts()).find(|counts| counts.len() == threads);
    all.expect("all threads take part")
}

fn sum(counts: &[Counts]) -> Counts {
    counts.iter().fold(Counts::default(), |sum, counts| Counts {
        normed: sum.normed + counts.normed,
        merged: sum.merged + counts.merged,
        prepared: sum.prepared + counts.prepared,
    })
}

/// Numbers that threads normalise, merge and prepare in a layer and the output, each for itself and together, on as many
/// cores as threads: `cargo test -- --nocapture` prints them.
#[test]
fn what_each_thread_repeats_is_counted() {
    let smollm2 = Shape::new(576, 1536, [9, 3, 64], GgmlDType::Q4_0);
    let llama = Shape::new(4096, 11_008, [32, 32, 128], GgmlDType::Q4_0);
    for (name, shape, len) in
        [("SmolLM2", smollm2, 40_usize), ("SmolLM2", smollm2, 2100), ("7B", llama, 40), ("7B", llama, 2100)]
    {
        let model = shape.model();
        let Shape { hidden_size, intermediate_size, heads, .. } = shape;
        let width = heads.query_width();
        let once = Counts {
            normed: 3 * hidden_size,
            merged: width * (len + 1).div_ceil(crate::attention::decode::RANGE_ROWS),
            prepared: 3 * hidden_size + width + intermediate_size,
        };
        for threads in [1, 2, 4, 8] {
            let each = counts(&shape, &model, len, threads, Some(usize::MAX));
            let now = counts(&shape, &model, len, threads, None);
            let shared = counts(&shape, &model, len, threads, Some(0));
            for (how, counts) in [("each", &each), ("now", &now), ("shared", &shared)] {
                let most = |of: fn(&Counts) -> usize| counts.iter().map(of).max().unwrap_or_default();
                println!(
                    "{name} after {len}, {threads} threads, {how}: all {:?}; the busiest {} {} {}",
                    sum(counts),
                    most(|counts| counts.normed),
                    most(|counts| counts.merged),
                    most(|counts| counts.prepared),
                );
            }
            assert!(each.iter().all(|counts| *counts == once), "{name}: {each:?}");
            // Shared out, all together do what one would do.
            assert_eq!(sum(&shared), once, "{name}, {threads} threads");
            let prepared: usize = sum(&now).prepared;
            assert!((once.prepared..=threads * once.prepared).contains(&prepared));
        }
        // Where the widest row is this narrow, a phase costs more than it spares, whatever the processor's instructions.
        let is_wide = intermediate_size > 8192;
        let eight = sum(&counts(&shape, &model, len, 8, None)).prepared;
        assert_eq!(eight < 8 * once.prepared, is_wide, "{name}: {eight}");
    }
}
