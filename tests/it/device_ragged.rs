//! Decoding in one launch for each layer, as on CUDA, by the launch's forward on the CPU: whole models against the kernels
//! and against grouped operations, how many operations a token takes, and what goes to the device when.

use adaptive_kvcache::attention::{HeadLayout, device};
use adaptive_kvcache::backend::{BackendKind, CandleRows};
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Ledger, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, open};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::ops::{DecodeWith, Ops};
use adaptive_kvcache::tokens::TokenClass;
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};

use crate::device::{
    CONFIGS, DECODED, HALF_CACHE_TOLERANCE, OUTSIDE, TOLERANCE, assert_same, relative_difference, text_ids, two_turns,
};
use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, max_difference, ragged_on_cpu, smollm2_path};

/// A fixture in f32 that decodes by the kernels, by grouped operations, and in one launch for each layer.
fn load_three(fixture: &Fixture) -> [Loaded; 3] {
    [BackendKind::default(), candle_on_cpu(), ragged_on_cpu()]
        .map(|backend| fixture.load_for(&backend, GgmlDType::F32, WeightDtype::F32))
}

/// Between two orders of f32 additions of numbers below 1.
const SUM_TOLERANCE: f32 = 1e-5;

#[test]
fn two_turns_are_those_of_the_kernels_and_of_grouped_operations() {
    let mut compared = 0;
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let [kernels, grouped, ragged] = load_three(&fixture);
        let ids = text_ids(&kernels);
        let retentions = CONFIGS.map(|config| adaptive(&kernels.tokenizer, config));
        for (retention, config) in retentions.into_iter().zip(CONFIGS).chain([(Retention::Full, "full")]) {
            let case = format!("{name}, {config}");
            let turns = two_turns(&ragged, KvDtype::F32, &retention, &ids, 64);
            assert_same(&turns, &two_turns(&kernels, KvDtype::F32, &retention, &ids, 64), TOLERANCE, &case);
            assert_same(&turns, &two_turns(&grouped, KvDtype::F32, &retention, &ids, 64), TOLERANCE, &case);
            for layer in turns.cache.layers::<CandleRows>().unwrap() {
                let rows = layer.rows().for_attention().unwrap();
                // Each token after the second prompt was one launch.
                assert_eq!(rows.ragged.unwrap().launches(), u64::from(DECODED), "{case}");
                let kept: usize = layer.positions().iter().map(|head| head.len() - DECODED as usize).sum();
                let stored = rows.kept.map_or(0, |(keys, _)| keys.dim(0).unwrap());
                assert_eq!(stored, kept, "{case}: rows that no head keeps");
                assert!(rows.visible.is_none() && rows.order.is_none(), "{case}");
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 3 * (CONFIGS.len() + 1));
}

#[test]
fn half_precision_caches_are_near_the_kernels_and_grouped_operations() {
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let [kernels, grouped, ragged] = load_three(&fixture);
        let ids = text_ids(&kernels);
        // Methods whose choices do not hang on the last digits of a second turn's weights.
        let adaptive = adaptive(&kernels.tokenizer, r#"{"method": "streaming_llm", "kept_ratio": 0.3}"#);
        for (case, retention) in [("full", Retention::Full), ("streaming_llm", adaptive)] {
            let turns = two_turns(&ragged, KvDtype::F16, &retention, &ids, 64);
            for other in [&kernels, &grouped] {
                let expected = two_turns(other, KvDtype::F16, &retention, &ids, 64);
                assert_same(&turns, &expected, HALF_CACHE_TOLERANCE, &format!("{name}, {case}"));
            }
        }
    }
}

/// The real model: heads of 64 numbers, three query heads each, and prompts that fill several ranges of rows.
#[test]
fn the_real_model_decodes_as_with_grouped_operations() {
    let load = |backend| open(smollm2_path()).unwrap().load(&backend, WeightDtype::F32, &mut |_, _| {}).unwrap();
    let (grouped, ragged) = (load(candle_on_cpu()), load(ragged_on_cpu()));
    let ids = text_ids(&grouped);
    let retention = adaptive(&grouped.tokenizer, CONFIGS[3]);
    let mut caches = [&grouped, &ragged].map(|loaded| {
        let mut cache = loaded.model.new_cache(KvDtype::F32, retention.clone()).unwrap();
        loaded.model.prefill(&ids[..200], &mut cache, &mut ()).unwrap();
        cache
    });
    assert!(caches[1].kept_ratio() < 0.95, "{} kept", caches[1].kept_ratio());
    let [grouped_cache, ragged_cache] = &mut caches;
    for &id in &ids[200..206] {
        let expected = grouped.model.decode(id, grouped_cache).unwrap();
        let got = ragged.model.decode(id, ragged_cache).unwrap();
        let difference = relative_difference(&got, &expected);
        assert!(difference < TOLERANCE, "{difference}");
    }
}

/// Operations of a token within each layer, with a cache in f32.
const PER_LAYER: u64 = 18;

/// More with a cache in f16: the new key and the new value are rounded, and nothing is widened.
const PER_HALF_LAYER: [(KvDtype, u64); 2] = [(KvDtype::F32, 0), (KvDtype::F16, 2)];

/// A layer's first token after a prompt: its heads' places and counters, and the two tensors of a tail.
const FIRST_TOKEN: u64 = 4;

/// When a tail is full: two tensors, and what is copied to them.
const GROWTH: u64 = 4;

#[test]
fn operations_of_a_token_are_the_same_whatever_heads_keep() {
    let mut most_lens = 0;
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let loaded = fixture.load_for(&ragged_on_cpu(), GgmlDType::F32, WeightDtype::F32);
        let (model, ids) = (&loaded.model, text_ids(&loaded));
        let layers = model.config().num_layers as u64;
        let retentions = CONFIGS.map(|config| adaptive(&loaded.tokenizer, config));
        let mut plain = None;
        for (retention, config) in retentions.into_iter().zip(CONFIGS).chain([(Retention::Full, "full")]) {
            for (prompt_len, (dtype, more)) in [30, 300].into_iter().flat_map(|len| PER_HALF_LAYER.map(|x| (len, x))) {
                let mut cache = model.new_cache(dtype, retention.clone()).unwrap();
                model.prefill(&ids[..prompt_len], &mut cache, &mut ()).unwrap();
                let count = |cache: &mut AdaptiveKvCache| {
                    let before = model.ops().unwrap().launches();
                    model.decode(7, cache).unwrap();
                    model.ops().unwrap().launches() - before
                };
                let case = format!("{name}, {config}, {dtype:?}, {prompt_len} tokens");
                let usual = count(&mut cache) - layers * FIRST_TOKEN;
                // The first case's count is the bound of all.
                let plain = *plain.get_or_insert(usual);
                assert!(plain <= OUTSIDE + layers * PER_LAYER, "{case}: {plain}");
                assert_eq!(usual, plain + layers * more, "{case}");
                let ragged = |cache: &AdaptiveKvCache| -> Vec<usize> {
                    let layers = cache.layers::<CandleRows>().unwrap().iter();
                    let rows = layers.map(|layer| layer.rows().for_attention().unwrap().ragged.unwrap());
                    rows.map(|rows| std::ptr::from_ref(rows) as usize).collect()
                };
                let at_first = ragged(&cache);
                let mut grown = 0;
                for _ in 0..40 {
                    let count = count(&mut cache);
                    // Layers of one cache may differ in when their tails are full.
                    assert!(count >= usual && (count - usual).is_multiple_of(GROWTH), "{case}: {count}, not {usual}");
                    grown += (count - usual) / GROWTH;
                }
                assert!((layers..=4 * layers).contains(&grown), "{case}: tails grew {grown} times");
                assert_eq!(ragged(&cache), at_first, "{case}: heads' places went to the device again");
                assert!(cache.layers::<CandleRows>().unwrap().iter().all(|layer| layer.rows().num_groups() == 1));
                let lens = |ledger: &&Ledger| {
                    let mut lens = ledger.lens();
                    lens.sort_unstable();
                    lens.dedup();
                    lens.len()
                };
                most_lens = most_lens.max(cache.ledgers().iter().map(lens).max().unwrap());
            }
        }
    }
    assert!(most_lens > 1, "no layer had heads of different lengths");
}

/// Heads that the kernels are not made for are attended to in groups.
#[test]
fn heads_beyond_the_kernels_sizes_are_grouped() {
    let layout = |num_heads, num_kv_heads, head_dim| HeadLayout { num_heads, num_kv_heads, head_dim };
    for (layout, decode_with) in [
        (layout(32, 2, 16), DecodeWith::Ragged),
        (layout(34, 2, 16), DecodeWith::Groups),
        (layout(2, 2, 256), DecodeWith::Ragged),
        (layout(2, 2, 264), DecodeWith::Groups),
    ] {
        let rows = |seed: f32, heads: usize, len: usize| {
            let numbers: Vec<f32> = (0..heads * len * layout.head_dim).map(|i| (i as f32 * seed).sin()).collect();
            Tensor::from_vec(numbers, (heads, len, layout.head_dim), &Device::Cpu).unwrap()
        };
        let run = |decode_with: DecodeWith| {
            let ops = Ops::new(Device::Cpu).unwrap().with_decode(decode_with);
            let empty = CandleRows::new(layout, KvDtype::F32, &ops).unwrap();
            let mut cache = AdaptiveKvCache::new(1, &empty, Retention::Full);
            let layer = &mut cache.layers_mut::<CandleRows>().unwrap()[0];
            let mut prompt = layer.rows().prompt(50).unwrap();
            prompt.push(&ops, &rows(0.3, 2, 50), &rows(0.7, 2, 50)).unwrap();
            let choose = |kv_head: usize| HeadChoice {
                kv_head,
                level: 0,
                recovered: Vec::new(),
                positions: (0..50).step_by(3 - kv_head).collect(),
            };
            layer.store_prompt(&prompt, Some((0..2).map(choose).collect())).unwrap();
            layer.append(&rows(0.9, 2, 1), &rows(1.1, 2, 1), 50, TokenClass::default()).unwrap();
            let queries = rows(1.3, layout.num_heads, 1).squeeze(1).unwrap();
            let used = layer.rows().decode_with();
            let rows = layer.rows().for_attention().unwrap();
            assert_eq!(rows.ragged.is_some(), used == DecodeWith::Ragged);
            let out = device::decode(&ops, layout, &queries, &rows).unwrap();
            (used, out.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let (used, out) = run(DecodeWith::Ragged);
        assert_eq!(used, decode_with, "{layout:?}");
        let difference = max_difference(&out, &run(DecodeWith::Groups).1);
        assert!(difference < SUM_TOLERANCE, "{layout:?}: {difference}");
    }
}

/// Between the GPU's order of f32 additions and the CPU's, relative to the largest logit.
#[cfg(feature = "cuda")]
const GPU_TOLERANCE: f32 = 1e-4;

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn two_turns_on_a_gpu_are_those_of_the_kernels() {
    let gpu = BackendKind::Candle(Ops::new(Device::new_cuda(0).unwrap()).unwrap());
    for name in ["mha", "gqa-tied", "head-dim"] {
        let fixture = Fixture::read(name);
        let kernels = fixture.load(GgmlDType::F32, WeightDtype::F32);
        let on_gpu = fixture.load_for(&gpu, GgmlDType::F32, WeightDtype::F32);
        let ids = text_ids(&kernels);
        let streaming = adaptive(&kernels.tokenizer, r#"{"method": "streaming_llm", "kept_ratio": 0.3}"#);
        for (case, retention) in [("full", Retention::Full), ("streaming_llm", streaming)] {
            for (dtype, tolerance) in [(KvDtype::F32, GPU_TOLERANCE), (KvDtype::F16, HALF_CACHE_TOLERANCE)] {
                let turns = two_turns(&on_gpu, dtype, &retention, &ids, 64);
                let expected = two_turns(&kernels, dtype, &retention, &ids, 64);
                assert_same(&turns, &expected, tolerance, &format!("{name}, {case}, {dtype:?}"));
                let layers = turns.cache.layers::<CandleRows>().unwrap();
                assert!(layers.iter().all(|layer| layer.rows().decode_with() == DecodeWith::Ragged), "{name}");
            }
        }
    }
}
