//! Methods with a budget in a whole model: against kvpress, and what a budget of a share or of bytes comes to.
//!
//! `tests/data/kvpress.json` was made by `scripts/compare_kvpress.sh`, which also compares the real model.

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, NOTE_BYTES};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::compress::{AdaptiveConfig, Allocation, Budget, METHODS, Method, ratio_count};
use candle_core::quantized::GgmlDType;

use crate::support::fixture::Fixture;
use crate::support::{adaptive, data, ids, json};

/// Layers times KV heads of `gqa-tied`.
const HEADS: usize = 4;

fn gqa_tied() -> Loaded {
    Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32)
}

/// Whether one budget is for all layers, and so rounded once.
fn is_pooled(method: &dyn Method) -> bool {
    method.allocation() == Allocation::Pooled
}

/// Processes a prompt; what the layers kept.
fn prefill(loaded: &Loaded, prompt: &[u32], cache: &mut AdaptiveKvCache) -> Vec<LayerSummary> {
    loaded.model.prefill(prompt, cache, &mut ()).unwrap().layers
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|index| 17 + index * 37 % 900).collect()
}

#[test]
fn kept_positions_are_those_of_kvpress() {
    let golden = json(data("kvpress.json"));
    let loaded = gqa_tied();
    let prompt = ids(&golden["prompt_tokens"]);
    let methods = golden["methods"].as_object().unwrap();
    assert_eq!(methods.len(), 14);
    for (method, layers) in methods {
        // Some are a method with settings of their own.
        let mut config =
            golden["settings"].get(method).cloned().unwrap_or_else(|| serde_json::json!({ "method": method }));
        config["kept_ratio"] = golden["kept_ratio"].clone();
        let config = config.to_string();
        let mut cache = loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, &config)).unwrap();
        let got = prefill(&loaded, &prompt, &mut cache);
        assert_eq!(got.len(), layers.as_array().unwrap().len());
        for (layer, expected) in got.iter().zip(layers.as_array().unwrap()) {
            let expected: Vec<Vec<u32>> = expected.as_array().unwrap().iter().map(ids).collect();
            let kept: Vec<Vec<u32>> = layer.heads.iter().map(|head| head.positions.clone()).collect();
            assert_eq!(kept, expected, "{method}, layer {}", layer.layer);
        }
    }
}

#[test]
fn every_method_keeps_its_share_of_every_prompt_and_the_search_is_not_asked() {
    let loaded = gqa_tied();
    for &method in METHODS {
        for (ratio, len, kept) in [(0.5, 101, 50), (0.3, 10, 3), (0.0, 70, 1), (1.0, 30, 30), (0.5, 1, 1)] {
            let config = AdaptiveConfig::for_method(method).with_budget(Budget::KeptRatio(ratio)).unwrap();
            let mut cache = loaded.model.new_cache(KvDtype::F16, loaded.retention(&config)).unwrap();
            let layers = prefill(&loaded, &prompt(len), &mut cache);
            let heads: Vec<_> = layers.iter().flat_map(|layer| &layer.heads).collect();
            let name = method.name();
            assert!(heads.iter().all(|head| head.level == Some(0) && head.recovered.is_empty()), "{name}");
            let total: usize = heads.iter().map(|head| head.positions.len()).sum();
            // One budget for all layers is rounded down once, others for every head.
            let rounded_once = ratio_count(ratio, len as usize * HEADS).max(HEADS);
            let expected = if is_pooled(method) { rounded_once } else { HEADS * kept };
            assert_eq!(total, expected, "{name}, {ratio} of {len}");
            assert_eq!(cache.bytes().kept, total * 2 * 2 * 8, "{name}");
            assert!(heads.iter().all(|head| !head.positions.is_empty()), "{name}");
            if method.allocation() == Allocation::Uniform {
                assert!(heads.iter().all(|head| head.positions.len() == kept), "{name}, {ratio} of {len}");
            }
            // Decoding goes on from there.
            assert!(loaded.model.decode(5, &mut cache).unwrap().iter().all(|logit| logit.is_finite()));
        }
    }
}

#[test]
fn bytes_are_those_of_the_cache_after_the_prompt() {
    let loaded = gqa_tied();
    for &method in METHODS {
        for (dtype, row_bytes) in [(KvDtype::F16, 16), (KvDtype::F32, 32)] {
            let token_bytes = 2 * row_bytes * HEADS;
            // Positions and scores take room, too.
            let taken = token_bytes + HEADS * NOTE_BYTES;
            for (budget, kept) in [(80 * taken + taken - 1, 80), (1, 1), (1 << 30, 150)] {
                let config = AdaptiveConfig::for_method(method).with_budget(Budget::Bytes(budget)).unwrap();
                let mut cache = loaded.model.new_cache(dtype, loaded.retention(&config)).unwrap();
                prefill(&loaded, &prompt(150), &mut cache);
                let row = 2 * row_bytes;
                let rounded_once = (budget / (row + NOTE_BYTES)).clamp(HEADS, 150 * HEADS) * row;
                let expected = if is_pooled(method) { rounded_once } else { kept * token_bytes };
                assert_eq!(cache.bytes().kept, expected, "{}, {budget} bytes", method.name());
            }
        }
    }
}

/// A second prompt: the budget is of the prompt and of what was decoded before it; what was kept earlier stays.
#[test]
fn a_budget_is_of_what_is_decided_about() {
    let loaded = gqa_tied();
    for &method in METHODS {
        let config = AdaptiveConfig::for_method(method);
        let mut cache = loaded.model.new_cache(KvDtype::F32, loaded.retention(&config)).unwrap();
        prefill(&loaded, &prompt(80), &mut cache);
        let first: Vec<Vec<u32>> = positions(&cache);
        for id in 40..46 {
            loaded.model.decode(id, &mut cache).unwrap();
        }
        let layers = prefill(&loaded, &prompt(34), &mut cache);
        let name = method.name();
        let kept: usize = layers.iter().flat_map(|layer| &layer.heads).map(|head| head.positions.len()).sum();
        assert_eq!(kept, HEADS * 20, "{name}");
        for ((first, now), head) in
            first.iter().zip(positions(&cache)).zip(layers.iter().flat_map(|layer| &layer.heads))
        {
            assert_eq!(now, [first.as_slice(), &head.positions].concat(), "{name}");
            assert!(head.positions.iter().all(|position| (80..120).contains(position)), "{name}");
        }
    }
}

fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<u32>> {
    cache.ledgers().iter().flat_map(|ledger| ledger.positions().to_vec()).collect()
}

#[test]
fn every_method_has_a_configuration_file_that_is_its_default() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for &method in METHODS {
        // What was found to be best is called that.
        let name = if method.name() == "replay" { "best" } else { method.name() };
        let file = folder.join(format!("{name}.json"));
        assert_eq!(AdaptiveConfig::from_file(&file).unwrap(), AdaptiveConfig::for_method(method), "{}", file.display());
    }
}
