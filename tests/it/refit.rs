//! `"refit"`: values of kept keys are fitted to what the prompt's queries read of all; nothing else changes.

use adaptive_kvcache::backend::{HeadCache, KernelRows};
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use candle_core::quantized::GgmlDType;

use crate::support::adaptive;
use crate::support::fixture::Fixture;

const TEXT: &str =
    "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day, at a table of their own.";

/// In each of the ways in which positions are chosen: over all layers, within a head, in a second pass, by the search.
const METHODS: [&str; 4] = [
    r#""method": "replay", "kept_ratio": 0.4"#,
    r#""method": "snapkv", "kept_ratio": 0.4, "observation_window": 8"#,
    r#""method": "kvzip", "kept_ratio": 0.4"#,
    r#""criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6"#,
];

/// A cache that read a text, in prompts of at most so many tokens.
fn read(loaded: &Loaded, dtype: KvDtype, config: &str, prompt_tokens: usize) -> AdaptiveKvCache {
    let retention: Retention = adaptive(&loaded.tokenizer, config);
    let mut cache = loaded.model.new_cache(dtype, retention).unwrap();
    for ids in loaded.tokenizer.encode(TEXT).unwrap().chunks(prompt_tokens) {
        loaded.model.prefill(ids, &mut cache, &mut ()).unwrap();
    }
    cache
}

/// Keys and values of all heads.
fn rows(cache: &AdaptiveKvCache) -> Vec<(Vec<f32>, Vec<f32>)> {
    let heads = cache.layers::<KernelRows>().unwrap().iter().flat_map(|layer| layer.rows().heads());
    let wide = |head: &HeadCache| {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        head.rows().widen_to(&mut keys, &mut values);
        (keys, values)
    };
    heads.map(wide).collect()
}

fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<Vec<u32>>> {
    cache.layers::<KernelRows>().unwrap().iter().map(|layer| layer.positions().into_owned()).collect()
}

#[test]
fn positions_keys_and_bytes_stay_and_values_change() {
    // Heads of 8 numbers that share keys, and of 32, which there are blocks for.
    for name in ["gqa-tied", "head-dim"] {
        let loaded = Fixture::read(name).load(GgmlDType::F32, WeightDtype::Auto);
        let head_dim = loaded.model.config().heads.head_dim;
        for dtype in KvDtype::ALL.into_iter().filter(|dtype| dtype.check(head_dim).is_ok()) {
            for method in METHODS {
                let read = |refit: bool| read(&loaded, dtype, &format!(r#"{{{method}, "refit": {refit}}}"#), 1000);
                let (plain, fitted) = (read(false), read(true));
                let place = format!("{name}, {method}, {dtype:?}");
                assert_eq!(positions(&plain), positions(&fitted), "{place}");
                assert_eq!(plain.bytes(), fitted.bytes(), "{place}");
                let mut changed = 0;
                for ((keys, values), fitted) in rows(&plain).into_iter().zip(rows(&fitted)) {
                    assert!(keys == fitted.0 && fitted.1.iter().all(|value| value.is_finite()), "{place}");
                    changed += usize::from(values != fitted.1);
                }
                assert!(changed > 0, "{place}");
            }
        }
    }
}

#[test]
fn later_prompts_are_fitted_with_what_earlier_ones_left() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    for method in METHODS {
        let mut cache = read(&loaded, KvDtype::F16, &format!(r#"{{{method}, "refit": true}}"#), 30);
        assert!(rows(&cache).iter().flat_map(|(_, values)| values).all(|value| value.is_finite()), "{method}");
        assert!(loaded.model.decode(7, &mut cache).unwrap().iter().all(|logit| logit.is_finite()), "{method}");
    }
}

#[test]
fn where_nothing_goes_nothing_changes() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let keeps = |refit: bool| {
        read(&loaded, KvDtype::F16, &format!(r#"{{"method": "replay", "kept_ratio": 1.0, "refit": {refit}}}"#), 30)
    };
    assert!(rows(&keeps(false)) == rows(&keeps(true)));
}
