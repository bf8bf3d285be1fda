//! The candle-operations path on the CPU device against the CPU kernels: logits, choices, conversations, memory, and how
//! many operations a token takes.

use std::num::NonZeroUsize;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::fidelity::argmax;
use adaptive_kvcache::model::{Backend, PrefillOptions};
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, Storage, Tensor};

use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, data, ids, max_difference};

const FIXTURES: [&str; 4] = ["mha", "gqa-tied", "head-dim", "llama3-rope"];

/// Between two orders of the same f32 additions, relative to the largest logit.
const TOLERANCE: f32 = 1e-4;

/// Against numbers that were printed with five digits, by another library.
const PRINTED_TOLERANCE: f32 = 1e-3;

/// A level's value is a mean or a difference of weights in 0..=1.
const VALUE_TOLERANCE: f64 = 1e-4;

/// Every criterion and every method that needs other facts; budgets and thresholds at which heads of random weights end at
/// different levels.
const CONFIGS: [&str; 13] = [
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
];

/// Tokens of the first prompt, decoded after it, and of the second prompt.
const FIRST: usize = 301;
const DECODED: u32 = 20;
const SECOND: usize = 93;

/// What two turns gave.
struct Turns {
    logits: Vec<Vec<f32>>,
    layers: Vec<LayerSummary>,
    cache: AdaptiveKvCache,
}

fn two_turns(loaded: &Loaded, dtype: KvDtype, retention: &Retention, ids: &[u32], chunk: usize) -> Turns {
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
    let on_host = cache.layers().iter().flat_map(|layer| layer.heads()).map(|head| head.positions().to_vec());
    on_host.chain(cache.device_layers().iter().flat_map(|layer| layer.positions().to_vec())).collect()
}

fn relative_difference(got: &[f32], expected: &[f32]) -> f32 {
    max_difference(got, expected) / expected.iter().fold(0.0, |largest: f32, logit| largest.max(logit.abs()))
}

fn text_ids(loaded: &Loaded) -> Vec<u32> {
    let text = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    loaded.tokenizer.encode(text.get(..4000).unwrap()).unwrap()
}

fn assert_same(turns: &Turns, expected: &Turns, tolerance: f32, case: &str) {
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
            let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
            let mut logits = loaded.model.prefill(&ids(&case["ids"]), &mut cache, &mut ()).unwrap().logits;
            let expected: Vec<f32> =
                case["last_logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            let difference = max_difference(&logits, &expected);
            assert!(difference < PRINTED_TOLERANCE, "{name}: {difference}");
            for &expected in &ids(&case["greedy"]) {
                let id = u32::try_from(argmax(&logits).unwrap()).unwrap();
                assert_eq!(id, expected, "{name}");
                logits = loaded.model.decode(id, &mut cache).unwrap();
            }
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
