//! `"refit"`: values of kept keys are fitted to what the prompt's queries read of all; nothing else changes.

use adaptive_kvcache::backend::KernelRows;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use candle_core::quantized::GgmlDType;

use crate::support::adaptive;
use crate::support::fixture::Fixture;

fn fixture() -> Loaded {
    Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto)
}

/// A cache that read a text, and the logits of the next token.
fn read(loaded: &Loaded, dtype: KvDtype, retention: Retention) -> (AdaptiveKvCache, Vec<f32>) {
    let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day, at a table of their own.";
    let mut cache = loaded.model.new_cache(dtype, retention).unwrap();
    for ids in loaded.tokenizer.encode(text).unwrap().chunks(40) {
        loaded.model.prefill(ids, &mut cache, &mut ()).unwrap();
    }
    let logits = loaded.model.decode(7, &mut cache).unwrap();
    (cache, logits)
}

/// Positions, keys and values of all heads.
fn rows(cache: &AdaptiveKvCache) -> Vec<(Vec<u32>, Vec<f32>, Vec<f32>)> {
    let layers = cache.layers::<KernelRows>().unwrap();
    let heads = layers.iter().flat_map(|layer| layer.positions().iter().zip(layer.rows().heads()));
    let wide = |(positions, head): (&Vec<u32>, &adaptive_kvcache::backend::HeadCache)| {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        head.rows().widen_to(&mut keys, &mut values);
        (positions.clone(), keys, values)
    };
    heads.map(wide).collect()
}

/// With one budget for all layers and one for each head, in all numbers, over two prompts.
#[test]
fn positions_and_keys_stay_and_values_change() {
    let loaded = fixture();
    for method in [r#""method": "replay", "kept_ratio": 0.4"#, r#""method": "snapkv", "kept_ratio": 0.4"#] {
        for dtype in KvDtype::ALL {
            if dtype.check(loaded.model.config().heads.head_dim).is_err() {
                continue;
            }
            let with = |refit: bool| {
                read(&loaded, dtype, adaptive(&loaded.tokenizer, &format!(r#"{{{method}, "refit": {refit}}}"#)))
            };
            let ((plain, before), (fitted, after)) = (with(false), with(true));
            assert_eq!(plain.bytes(), fitted.bytes(), "{method} {dtype:?}");
            let mut changed = 0;
            for ((positions, keys, values), fitted) in rows(&plain).into_iter().zip(rows(&fitted)) {
                // The second prompt's choice is made with the first one's fitted values.
                assert_eq!(positions.len(), fitted.0.len(), "{method} {dtype:?}");
                if positions == fitted.0 && keys == fitted.1 {
                    changed += usize::from(values != fitted.2);
                }
            }
            assert!(changed > 0, "{method} {dtype:?}");
            assert!(after.iter().all(|logit| logit.is_finite()) && before != after, "{method} {dtype:?}");
        }
    }
}

#[test]
fn where_nothing_goes_nothing_changes() {
    let loaded = fixture();
    let keeps = |refit: bool| {
        let config = format!(r#"{{"method": "replay", "kept_ratio": 1.0, "refit": {refit}}}"#);
        read(&loaded, KvDtype::F16, adaptive(&loaded.tokenizer, &config))
    };
    let ((plain, before), (fitted, after)) = (keeps(false), keeps(true));
    assert!(rows(&plain) == rows(&fitted) && before == after);
}
