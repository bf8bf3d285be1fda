//! The candle-operations path on the CPU device against the CPU kernels: logits, choices, conversations, memory, and how
//! many operations a token takes.

use std::num::NonZeroUsize;

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::backend::{BackendKind, CandleLayer, CandleRows};
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, load, open};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::memory;
use adaptive_kvcache::model::PrefillOptions;
use adaptive_kvcache::ops::Ops;
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use crate::support::fixture::{Fixture, check_transformers_case};
use crate::support::{adaptive, candle_on_cpu, data, in_own_process, max_difference, ragged_on_cpu};

const FIXTURES: [&str; 4] = ["mha", "gqa-tied", "head-dim", "llama3-rope"];

/// Between two orders of the same f32 additions, relative to the largest logit.
pub const TOLERANCE: f32 = 1e-5;

/// Rows of a cache in f16, rounded alike from numbers that differ in their last digits.
pub const HALF_CACHE_TOLERANCE: f32 = 1e-3;

/// Products of f16 or bf16 weights take rounded inputs here, and exact ones in the kernels.
const F16_TOLERANCE: f32 = 0.01;
const BF16_TOLERANCE: f32 = 0.05;

/// Products of quantised weights take inputs that are rounded to 8 bits, block by block.
const QUANTISED_TOLERANCE: f32 = 0.1;

/// A level's value is a mean or a difference of weights in 0..=1.
const VALUE_TOLERANCE: f64 = 1e-5;

/// Every criterion and every method that needs other facts; budgets and thresholds at which heads of random weights end at
/// different levels.
pub const CONFIGS: [&str; 19] = [
    r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
    r#"{"frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.8}"#,
    r#"{"policies": ["punctuation", "locality", "special", "full"], "locality_ratio": 0.5, "recovery_threshold": 0.5}"#,
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
    r#"{"criterion": "mass", "gqa": "mean", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.75}"#,
    r#"{"criterion": "mass", "profile_rows": 40, "frequency_ratio": 0.2, "locality_ratio": 0.5, "recovery_threshold": 0.7}"#,
    r#"{"method": "h2o"}"#,
    r#"{"method": "tova"}"#,
    r#"{"method": "snapkv", "kept_ratio": 0.4}"#,
    r#"{"method": "adakv", "kept_ratio": 0.3}"#,
    r#"{"method": "expected_attention", "kept_ratio": 0.6}"#,
    r#"{"method": "replay", "kept_ratio": 0.4}"#,
    r#"{"method": "streaming_llm", "kept_ratio": 0.2}"#,
    r#"{"method": "criticaladakv", "kept_ratio": 0.4, "observation_window": 20}"#,
    r#"{"method": "dropkv", "kept_ratio": 0.4, "observation_window": 20}"#,
    r#"{"method": "laprox", "kept_ratio": 0.3, "observation_window": 20}"#,
    r#"{"method": "compactor", "kept_ratio": 0.4}"#,
    r#"{"method": "duo_attention", "kept_ratio": 0.5, "sink_tokens": 8, "recent_tokens": 30}"#,
    r#"{"method": "h2o", "kept_ratio": 0}"#,
];

/// Tokens of the first prompt, decoded after it, and of the second prompt.
pub const FIRST: usize = 301;
pub const DECODED: u32 = 20;
const SECOND: usize = 93;

/// What two turns gave.
pub struct Turns {
    pub logits: Vec<Vec<f32>>,
    pub layers: Vec<LayerSummary>,
    pub cache: AdaptiveKvCache,
}

pub fn two_turns(loaded: &Loaded, dtype: KvDtype, retention: &Retention, ids: &[u32], chunk: usize) -> Turns {
    let mut cache = loaded.model.new_cache(dtype, retention.clone()).unwrap();
    let (mut logits, mut layers) = (Vec::new(), Vec::new());
    let options = PrefillOptions { chunk: NonZeroUsize::new(chunk).unwrap() };
    for prompt in [&ids[..FIRST], &ids[FIRST..FIRST + SECOND]] {
        let prefill = loaded.model.prefill_with(prompt, &mut cache, options, &mut ()).unwrap();
        logits.push(prefill.logits);
        layers.extend(prefill.layers);
        logits.extend((50..50 + DECODED).map(|id| loaded.model.decode(id, &mut cache).unwrap()));
    }
    Turns { logits, layers, cache }
}

/// Positions that every head holds, wherever the cache is.
fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<u32>> {
    cache.ledgers().iter().flat_map(|ledger| ledger.positions().to_vec()).collect()
}

pub fn relative_difference(got: &[f32], expected: &[f32]) -> f32 {
    max_difference(got, expected) / expected.iter().fold(0.0, |largest: f32, logit| largest.max(logit.abs()))
}

pub fn text_ids(loaded: &Loaded) -> Vec<u32> {
    let text = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    loaded.tokenizer.encode(text.get(..4000).unwrap()).unwrap()
}

pub fn assert_same(turns: &Turns, expected: &Turns, tolerance: f32, case: &str) {
    for (step, (logits, expected)) in turns.logits.iter().zip(&expected.logits).enumerate() {
        let difference = relative_difference(logits, expected);
        assert!(difference < tolerance, "{case}, step {step}: {difference}");
    }
    assert_eq!(turns.layers.len(), expected.layers.len(), "{case}");
    for (layer, expected) in turns.layers.iter().zip(&expected.layers) {
        assert_eq!((layer.layer, layer.prompt_len), (expected.layer, expected.prompt_len), "{case}");
        assert_eq!((layer.bytes.raw, layer.bytes.kept), (expected.bytes.raw, expected.bytes.kept), "{case}");
        for (head, expected) in layer.heads.iter().zip(&expected.heads) {
            let place = format!("{case}, layer {}, head {}", layer.layer, head.kv_head);
            assert_eq!((head.level, &head.positions), (expected.level, &expected.positions), "{place}");
            assert_eq!(head.recovered.len(), expected.recovered.len(), "{place}");
            for (value, expected) in head.recovered.iter().zip(&expected.recovered) {
                assert!((value - expected).abs() < VALUE_TOLERANCE, "{place}: {value}, {expected}");
            }
        }
    }
    assert_eq!(positions(&turns.cache), positions(&expected.cache), "{case}");
    assert_eq!(turns.cache.seen(), expected.cache.seen(), "{case}");
    assert!((turns.cache.kept_ratio() - expected.cache.kept_ratio()).abs() < 1e-9, "{case}");
}

#[test]
fn logits_and_greedy_tokens_equal_transformers() {
    for name in FIXTURES {
        let fixture = Fixture::read(name);
        let loaded = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::Auto);
        for case in fixture.expected.as_array().unwrap() {
            check_transformers_case(name, &loaded.model, case);
        }
    }
}

#[test]
fn logits_choices_and_positions_of_two_turns_are_those_of_the_kernels() {
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let kernels = fixture.load(GgmlDType::F32, WeightDtype::F32);
        let candle = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
        let ids = text_ids(&kernels);
        let retentions = CONFIGS.map(|config| adaptive(&kernels.tokenizer, config));
        let cases = retentions.into_iter().zip(CONFIGS).chain([(Retention::Full, "full")]);
        for (retention, config) in cases {
            let expected = two_turns(&kernels, KvDtype::F32, &retention, &ids, usize::MAX);
            let evicts = expected.cache.bytes().kept < expected.cache.bytes().raw;
            assert_eq!(evicts, config != "full", "{name}, {config}");
            for chunk in [7, 64, usize::MAX] {
                let turns = two_turns(&candle, KvDtype::F32, &retention, &ids, chunk);
                assert_same(&turns, &expected, TOLERANCE, &format!("{name}, {config}, chunks of {chunk}"));
            }
        }
    }
}

#[test]
fn half_precision_is_near_the_kernels() {
    for name in ["mha", "gqa-tied"] {
        let fixture = Fixture::read(name);
        for (weights, kv_dtype, tolerance) in [
            (WeightDtype::F32, KvDtype::F16, HALF_CACHE_TOLERANCE),
            (WeightDtype::F16, KvDtype::F16, F16_TOLERANCE),
            (WeightDtype::Bf16, KvDtype::F16, BF16_TOLERANCE),
        ] {
            let kernels = fixture.load(GgmlDType::F32, weights);
            let candle = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, weights);
            let ids = text_ids(&kernels);
            let case = format!("{name}, {weights:?}, {kv_dtype:?}");
            let expected = two_turns(&kernels, kv_dtype, &Retention::Full, &ids, usize::MAX);
            assert_same(&two_turns(&candle, kv_dtype, &Retention::Full, &ids, 64), &expected, tolerance, &case);
            // Choices hang on thresholds, which rounded activations may cross: what is kept is alike all the same.
            let retention = adaptive(&kernels.tokenizer, CONFIGS[3]);
            let expected = two_turns(&kernels, kv_dtype, &retention, &ids, usize::MAX).cache.kept_ratio();
            let kept = two_turns(&candle, kv_dtype, &retention, &ids, 64).cache.kept_ratio();
            assert!(expected < 1.0 && (kept - expected).abs() < 0.1, "{case}: {kept} kept, {expected} by the kernels");
        }
    }
}

#[test]
fn quantised_weights_are_near_the_kernels() {
    for name in ["mha", "gqa-tied"] {
        let fixture = Fixture::read(name);
        for blocks in [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::Q4_0] {
            let kernels = fixture.load(blocks, WeightDtype::F32);
            let ids = text_ids(&kernels);
            let expected = two_turns(&kernels, KvDtype::F32, &Retention::Full, &ids, usize::MAX);
            for (weights, tolerance) in [(WeightDtype::Auto, QUANTISED_TOLERANCE), (WeightDtype::F32, TOLERANCE)] {
                let candle = fixture.load_for(&candle_on_cpu(), blocks, weights);
                let turns = two_turns(&candle, KvDtype::F32, &Retention::Full, &ids, 64);
                assert_same(&turns, &expected, tolerance, &format!("{name}, {blocks:?}, {weights:?}"));
            }
        }
    }
}

/// Every layout of checkpoints, with biases, partial rotation and each kind of rope scaling.
#[test]
fn checkpoints_of_every_kind_are_computed_alike() {
    let folders = ["biases", "dynamic", "linear", "mistral", "yarn", "yarn-mscale", "bf16", "f16", "old-spelling"];
    let folders = folders.map(|name| data("checkpoints").join(name));
    let fixtures = ["mha", "meta-1shard", "meta-2shard"].map(|name| data("fixtures").join(name));
    let mut compared = 0;
    for folder in folders.into_iter().chain(fixtures) {
        // The weights alone: some of these folders have no tokenizer.
        let open = || adaptive_kvcache::checkpoint::open(&folder).unwrap();
        let kernels = open().model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap();
        let candle = open().model(&candle_on_cpu(), WeightDtype::Auto, &mut |_, _| {}).unwrap();
        let vocab = u32::try_from(kernels.config().vocab_size).unwrap();
        let len = kernels.config().context_length.min(90) - 4;
        let prompt: Vec<u32> = (0..u32::try_from(len).unwrap()).map(|i| (i * 37 + 5) % vocab).collect();
        let run = |model: &adaptive_kvcache::model::Llama| -> Vec<Vec<f32>> {
            let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
            let mut logits = vec![model.prefill(&prompt, &mut cache, &mut ()).unwrap().logits];
            logits.extend((0..4).map(|id| model.decode(id, &mut cache).unwrap()));
            logits
        };
        for (got, expected) in run(&candle).iter().zip(&run(&kernels)) {
            let difference = relative_difference(got, expected);
            assert!(difference < TOLERANCE, "`{}`: {difference}", folder.display());
            compared += 1;
        }
    }
    assert_eq!(compared, 12 * 5);
}

#[test]
fn forks_go_on_by_themselves() {
    let fixture = Fixture::read("gqa-tied");
    for (backend, config) in [
        (candle_on_cpu(), CONFIGS[3]),
        (candle_on_cpu(), CONFIGS[9]),
        (ragged_on_cpu(), CONFIGS[3]),
        (ragged_on_cpu(), CONFIGS[9]),
    ] {
        let loaded = fixture.load_for(&backend, GgmlDType::F32, WeightDtype::F32);
        let ids = text_ids(&loaded);
        let start = || {
            let mut cache = loaded.model.new_cache(KvDtype::F16, adaptive(&loaded.tokenizer, config)).unwrap();
            loaded.model.prefill(&ids[..100], &mut cache, &mut ()).unwrap();
            loaded.model.decode(7, &mut cache).unwrap();
            cache
        };
        let go_on = |cache: &mut AdaptiveKvCache, first: u32| -> Vec<Vec<f32>> {
            (first..first + 3).map(|id| loaded.model.decode(id, cache).unwrap()).collect()
        };
        let (mut original, mut apart) = (start(), start());
        let mut fork = original.clone();
        let (one, other) = (go_on(&mut original, 10), go_on(&mut fork, 20));
        assert_eq!(go_on(&mut apart, 20), other, "{config}");
        assert_ne!(one, other);
        let mut emptied = fork.emptied();
        assert_eq!((emptied.seen(), emptied.bytes().kept), (0, 0));
        loaded.model.prefill(&ids[..100], &mut emptied, &mut ()).unwrap();
        loaded.model.decode(7, &mut emptied).unwrap();
        assert_eq!(go_on(&mut emptied, 10), one, "{config}");
    }
}

/// Operations of one token outside of the layers; within each, and more of them for each group of heads, with a cache in
/// f32 and in f16, which is widened to be computed with.
pub const OUTSIDE: u64 = 6;
const PER_LAYER_AND_GROUP: [(KvDtype, u64, u64); 2] = [(KvDtype::F32, 30, 5), (KvDtype::F16, 34, 7)];
/// When a tail is full, each layer makes a larger one.
pub const PER_GROWTH: u64 = 5;

#[test]
fn operations_of_a_token_are_bounded_by_groups_of_heads() {
    let mut most_groups = 0;
    let mut full_counts = Vec::new();
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let loaded = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
        let (model, ids) = (&loaded.model, text_ids(&loaded));
        let layers = model.config().num_layers as u64;
        let retentions = CONFIGS.map(|config| adaptive(&loaded.tokenizer, config));
        for (retention, config) in retentions.into_iter().zip(CONFIGS).chain([(Retention::Full, "full")]) {
            let lens = [30, 300].into_iter();
            for (prompt_len, (dtype, per_layer, per_group)) in
                lens.flat_map(|len| PER_LAYER_AND_GROUP.map(|bounds| (len, bounds)))
            {
                let mut cache = model.new_cache(dtype, retention.clone()).unwrap();
                model.prefill(&ids[..prompt_len], &mut cache, &mut ()).unwrap();
                let mut counts: Vec<u64> = (0..40)
                    .map(|id| {
                        let before = model.ops().unwrap().launches();
                        model.decode(id, &mut cache).unwrap();
                        model.ops().unwrap().launches() - before
                    })
                    .collect();
                let of_layers = cache.layers::<CandleRows>().unwrap().iter().map(|layer| layer.rows().num_groups());
                let groups: usize = of_layers.clone().sum();
                let bound = OUTSIDE + layers * per_layer + per_group * groups as u64;
                counts.sort_unstable();
                let case = format!("{name}, {config}, {dtype:?}, {prompt_len} tokens, {groups} groups: {counts:?}");
                assert!(counts[counts.len() / 2] <= bound, "{case}, bound {bound}");
                assert!(counts[counts.len() - 1] <= bound + PER_GROWTH * layers, "{case}, bound {bound}");
                most_groups = most_groups.max(of_layers.max().unwrap());
                if config == "full" && dtype == KvDtype::F32 {
                    assert_eq!(groups as u64, layers, "{case}");
                    full_counts.push((counts[0] - OUTSIDE) / layers);
                }
            }
        }
    }
    assert!(most_groups > 1, "no layer had heads of different lengths");
    // Neither heads nor tokens make more of them.
    assert!(full_counts.len() == 6 && full_counts.iter().all(|&count| count == full_counts[0]), "{full_counts:?}");
}

/// Numbers of the storage that a tensor is in, whatever part of it the tensor is.
fn stored_numbers(x: &Tensor) -> usize {
    match &*x.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(numbers)) => numbers.len(),
        Storage::Cpu(CpuStorage::F16(numbers)) => numbers.len(),
        _ => panic!("unexpected storage"),
    }
}

#[test]
fn bytes_are_those_of_the_tensors_and_slack_is_bounded() {
    for backend in [candle_on_cpu(), ragged_on_cpu()] {
        check_bytes(&backend);
    }
}

fn check_bytes(backend: &BackendKind) {
    let fixture = Fixture::read("mha");
    let loaded = fixture.load_for(backend, GgmlDType::F32, WeightDtype::F32);
    let ids = text_ids(&loaded);
    let mut kept_ratios = Vec::new();
    for config in CONFIGS {
        let mut cache = loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, config)).unwrap();
        let prefill = loaded.model.prefill(&ids[..FIRST], &mut cache, &mut ()).unwrap();
        let bytes = cache.bytes();
        let positions: usize = positions(&cache).iter().map(|head| 4 * head.len()).sum();
        assert_eq!(prefill.layers.iter().map(|layer| layer.bytes.allocated).sum::<usize>(), bytes.allocated);
        kept_ratios.push(cache.kept_ratio());
        // Padding and the order of heads; the mask of shorter heads comes with the first token.
        let slack = bytes.allocated - bytes.kept - positions;
        let orders = 8 * cache.ledgers().iter().map(|ledger| ledger.positions().len()).sum::<usize>();
        assert!(slack <= bytes.kept / 40 + orders, "{config}: {slack} of {}", bytes.kept);
        for id in 0..40 {
            loaded.model.decode(id, &mut cache).unwrap();
        }
        for layer in cache.layers::<CandleRows>().unwrap() {
            let rows = layer.rows().for_attention().unwrap();
            let mut numbers = 0;
            for x in rows.kept.iter().flat_map(|(keys, values)| [keys, values]) {
                assert_eq!(stored_numbers(x), x.elem_count(), "what was evicted is still there");
                numbers += stored_numbers(x);
            }
            numbers += stored_numbers(&rows.tail.0) + stored_numbers(&rows.tail.1);
            let masks = rows.visible.map_or(0, Tensor::elem_count);
            let orders = rows.order.map_or(0, |order| 8 * order.elem_count());
            // Tokens that all heads keep are one number.
            let appended = if layer.ledger().is_watched() { 0 } else { 40 };
            let on_host: usize = layer.positions().iter().map(|head| 4 * (head.len() - appended)).sum();
            let places = rows.ragged.map_or(0, |_| (3 + 1) * 4 * layer.positions().len());
            assert_eq!(layer.bytes().allocated, 4 * numbers + masks + orders + places + on_host, "{config}");
            let (kept, heads) = (layer.bytes().kept, layer.positions().len());
            // Of the tail, a sixteenth of the rows, and at least sixteen; and what positions take.
            let slack = kept / 8 + 16 * heads * (layer.token_bytes() + 8) + places;
            assert!(layer.bytes().allocated <= kept + slack, "{config}: {:?}", layer.bytes());
        }
    }
    assert!(kept_ratios.iter().filter(|&&ratio| ratio < 0.7).count() > CONFIGS.len() / 2, "{kept_ratios:?}");
}

/// A layer of a large model with a long prompt, of which a tenth is kept: the rest goes back to the system.
#[test]
fn memory_of_what_is_evicted_goes_back() {
    in_own_process("device::memory_of_what_is_evicted_goes_back", evict_and_look_at_memory);
}

fn evict_and_look_at_memory() {
    const TOKENS: usize = 40_000;
    let layout = HeadLayout { num_heads: 8, num_kv_heads: 8, head_dim: 64 };
    let ops = Ops::new(Device::Cpu).unwrap();
    let own = || {
        memory::release_unused();
        memory::process_memory().unwrap().anonymous
    };
    let before = own();
    let rows = CandleRows::new(layout, KvDtype::F32, &ops).unwrap();
    let mut cache = AdaptiveKvCache::new(1, &rows, Retention::Full);
    let layer: &mut CandleLayer = &mut cache.layers_mut::<CandleRows>().unwrap()[0];
    let mut prompt = layer.rows().prompt(TOKENS).unwrap();
    let rows = Tensor::rand(-1f32, 1.0, (8, TOKENS, 64), &Device::Cpu).unwrap();
    prompt.push(&ops, &rows, &rows).unwrap();
    drop(rows);
    let whole = own() - before;
    assert!(whole > 2 * 8 * TOKENS * 64 * 4 * 9 / 10, "{whole} bytes hold the prompt");
    let choose = |kv_head| HeadChoice {
        kv_head,
        level: 0,
        recovered: Vec::new(),
        positions: (0..u32::try_from(TOKENS).unwrap()).step_by(8 + kv_head).collect(),
    };
    let summary = layer.store_prompt(&prompt, Some((0..8).map(choose).collect())).unwrap();
    drop(prompt);
    let left = own().saturating_sub(before);
    let allocated = summary.bytes.allocated;
    assert!(allocated < whole / 5);
    assert!(left < allocated + allocated / 10 + (4 << 20), "{left} bytes for {allocated} allocated");
    drop(cache);
    let left = own().saturating_sub(before);
    assert!(left < 4 << 20, "{left} bytes are left");
}

/// Heads that go on evicting while tokens are generated let go of the same rows as with the kernels, whatever tells which
/// go: classes and places, sums of attention, or the newest token's.
#[test]
fn what_is_evicted_while_decoding_is_what_the_kernels_evict() {
    let fixture = Fixture::read("gqa-tied");
    let kernels = fixture.load(GgmlDType::F32, WeightDtype::F32);
    let ids = text_ids(&kernels);
    for backend in [candle_on_cpu(), ragged_on_cpu()] {
        let candle = fixture.load_for(&backend, GgmlDType::F32, WeightDtype::F32);
        for config in [
            r#"{"decode": "evict", "locality_ratio": 0.2, "frequency_ratio": 0.2, "recovery_threshold": 0.3}"#,
            r#"{"decode": "evict", "method": "streaming_llm", "kept_ratio": 0.3}"#,
            r#"{"decode": "evict", "method": "h2o", "kept_ratio": 0.3}"#,
            r#"{"decode": "evict", "method": "replay", "kept_ratio": 0.3}"#,
            r#"{"decode": "evict", "method": "tova", "kept_ratio": 0.3}"#,
        ] {
            let retention = adaptive(&kernels.tokenizer, config);
            let turns = two_turns(&candle, KvDtype::F32, &retention, &ids, 64);
            let expected = two_turns(&kernels, KvDtype::F32, &retention, &ids, 64);
            assert_same(&turns, &expected, TOLERANCE, config);
            assert!(turns.cache.kept_ratio() < 0.9, "{config}: nothing went");
        }
    }
}

#[test]
fn what_the_path_does_not_do_is_refused() {
    let fixture = Fixture::read("gqa-tied");
    let kernels = fixture.load(GgmlDType::F32, WeightDtype::F32);
    let candle = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
    for dtype in [KvDtype::Q8_0, KvDtype::Q4_0] {
        let error = candle.model.new_cache(dtype, Retention::Full).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(dtype.name()), "{error}");
        assert!(error.hint().unwrap().contains("--kv-dtype f16"), "{error:?}");
    }
    // A cache of the other kind is no cache of this model.
    let mut host = kernels.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
    let mut tensors = candle.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
    for (model, cache) in [(&candle.model, &mut host), (&kernels.model, &mut tensors)] {
        assert!(matches!(model.prefill(&[5, 6], cache, &mut ()), Err(Error::Shape { .. })));
        assert!(matches!(model.decode(5, cache), Err(Error::Shape { .. })));
    }
    // Neither is one without a prompt refused, nor an unknown token taken.
    candle.model.prefill(&[5, 6], &mut tensors, &mut ()).unwrap();
    let kept = tensors.bytes().kept;
    assert!(matches!(candle.model.decode(u32::MAX, &mut tensors), Err(Error::Input { .. })));
    assert_eq!((tensors.seen(), tensors.bytes().kept), (2, kept));
    candle.model.decode(5, &mut tensors).unwrap();
}

/// A float that is too large for f16 is refused by its tensor, as by the kernels.
#[test]
fn weights_that_f16_cannot_hold_are_refused_by_name() {
    let mut fixture = Fixture::read("mha");
    let name = "model.layers.1.mlp.up_proj.weight";
    let weight = &fixture.weights[name];
    let large = (weight.ones_like().unwrap() * 1e6).unwrap();
    fixture.weights.insert(name.to_owned(), large.to_dtype(DType::F32).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fixture.gguf");
    fixture.write_gguf(&path, GgmlDType::F32);
    let refusals = [
        open(&path).unwrap().load(&candle_on_cpu(), WeightDtype::F16, &mut |_, _| {}).unwrap_err(),
        load(&path, WeightDtype::F16).unwrap_err(),
    ];
    for error in refusals {
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
        assert!(error.to_string().contains("`blk.1.ffn_up.weight`"), "{error}");
    }
    open(&path).unwrap().load(&candle_on_cpu(), WeightDtype::Bf16, &mut |_, _| {}).unwrap();
}
