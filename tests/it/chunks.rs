//! Results do not depend on how many prompt rows go through a layer at a time.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::generate::{Conversation, GenerationOptions};
use adaptive_kvcache::model::PrefillOptions;
use candle_core::quantized::GgmlDType;

use crate::support::fixture::Fixture;
use crate::support::{adaptive, data, max_difference, smollm2};

/// Between two orders of the same f32 additions, relative to the largest logit.
const LOGIT_TOLERANCE: f32 = 1e-5;

/// A level's value is a mean or a difference of weights in 0..=1.
const VALUE_TOLERANCE: f64 = 1e-5;

/// Both criteria, with budgets and thresholds at which heads of random weights end at different levels; and methods of
/// every need, but `key_norm` alone: keys of a token that comes twice are equally long in the first layer, up to rounding.
const CONFIGS: [&str; 11] = [
    r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
    r#"{"criterion": "mass", "profile_rows": 40, "frequency_ratio": 0.2, "locality_ratio": 0.5, "recovery_threshold": 0.7}"#,
    r#"{"method": "h2o"}"#,
    r#"{"method": "tova"}"#,
    r#"{"method": "adakv", "kept_ratio": 0.3}"#,
    r#"{"method": "expected_attention", "kept_ratio": 0.6}"#,
    r#"{"method": "criticalkv", "kept_ratio": 0.4, "observation_window": 70}"#,
    r#"{"method": "dropkv", "kept_ratio": 0.4, "observation_window": 70}"#,
    r#"{"method": "compactor", "kept_ratio": 0.4}"#,
    r#"{"method": "duo_attention", "kept_ratio": 0.5, "sink_tokens": 8, "recent_tokens": 30}"#,
];

/// Tokens of the first prompt, decoded after it, and of the second prompt: odd lengths, so that last chunks are shorter.
const FIRST: usize = 301;
const DECODED: u32 = 5;
const SECOND: usize = 93;

fn options(chunk: usize) -> PrefillOptions {
    PrefillOptions { chunk: NonZeroUsize::new(chunk).unwrap() }
}

/// What two turns gave.
struct Turns {
    logits: Vec<Vec<f32>>,
    layers: Vec<LayerSummary>,
    cache: AdaptiveKvCache,
}

fn two_turns(loaded: &Loaded, retention: Retention, ids: &[u32], chunk: usize) -> Turns {
    let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
    let (mut logits, mut layers) = (Vec::new(), Vec::new());
    for prompt in [&ids[..FIRST], &ids[FIRST..FIRST + SECOND]] {
        let prefill = loaded.model.prefill_with(prompt, &mut cache, options(chunk), &mut ()).unwrap();
        logits.push(prefill.logits);
        layers.extend(prefill.layers);
        logits.extend((50..50 + DECODED).map(|id| loaded.model.decode(id, &mut cache).unwrap()));
    }
    Turns { logits, layers, cache }
}

#[test]
fn logits_choices_and_statistics_of_two_turns_are_those_of_the_whole_prompt() {
    let text = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    for name in ["mha", "gqa-tied", "head-dim"] {
        let loaded = Fixture::read(name).load(GgmlDType::F32, WeightDtype::F32);
        let ids = loaded.tokenizer.encode(text.get(..4000).unwrap()).unwrap();
        let retentions = CONFIGS.map(|config| adaptive(&loaded.tokenizer, config));
        for (retention, config) in
            retentions.into_iter().chain([Retention::Full]).zip([&CONFIGS[..], &["full"]].concat())
        {
            let whole = two_turns(&loaded, retention.clone(), &ids, usize::MAX);
            let evicts = whole.cache.bytes().kept < whole.cache.bytes().raw;
            assert_eq!(evicts, config != "full", "{name}, {config}");
            for chunk in [1, 7, 64, 512] {
                let case = format!("{name}, chunks of {chunk}, {config}");
                let turns = two_turns(&loaded, retention.clone(), &ids, chunk);
                for (logits, expected) in turns.logits.iter().zip(&whole.logits) {
                    let largest = expected.iter().fold(0.0, |largest: f32, logit| largest.max(logit.abs()));
                    let difference = max_difference(logits, expected) / largest;
                    assert!(difference < LOGIT_TOLERANCE, "{case}: {difference}");
                }
                for (layer, expected) in turns.layers.iter().zip(&whole.layers) {
                    assert_eq!((layer.layer, layer.bytes), (expected.layer, expected.bytes), "{case}");
                    for (head, expected) in layer.heads.iter().zip(&expected.heads) {
                        assert_eq!((head.level, &head.positions), (expected.level, &expected.positions), "{case}");
                        assert_eq!(head.recovered.len(), expected.recovered.len(), "{case}");
                        for (value, expected) in head.recovered.iter().zip(&expected.recovered) {
                            assert!((value - expected).abs() < VALUE_TOLERANCE, "{case}: {value}, {expected}");
                        }
                    }
                }
                let positions = |cache: &AdaptiveKvCache| -> Vec<Vec<u32>> {
                    cache.ledgers().iter().flat_map(|ledger| ledger.positions().to_vec()).collect()
                };
                assert_eq!(positions(&turns.cache), positions(&whole.cache), "{case}");
            }
        }
    }
}

#[test]
fn a_conversation_is_the_same_in_any_chunks() {
    let loaded = smollm2();
    let talk = |options: PrefillOptions| {
        let retention = adaptive(&loaded.tokenizer, r#"{"criterion": "mass"}"#);
        let mut conversation = Conversation::new(&loaded.model, &loaded.tokenizer, KvDtype::F16, retention, Vec::new())
            .unwrap()
            .with_prefill_options(options);
        let generation = GenerationOptions { max_new_tokens: 8, ..GenerationOptions::default() };
        for question in ["What is the capital of France?", "And of Italy?"] {
            conversation.ask(question, &generation, &mut (), &mut |_| ControlFlow::Continue(())).unwrap();
        }
        conversation.messages().to_vec()
    };
    assert_eq!(talk(options(5)), talk(PrefillOptions::default()));
}
