//! A budget shared out over heads, layers or all of a model, whatever the method (`"budget_over"`).

use std::collections::BTreeSet;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::compress::{AdaptiveConfig, BudgetOver, METHODS, Method, ratio_count};
use candle_core::quantized::GgmlDType;

use crate::support::fixture::Fixture;

/// Layers and KV heads of `gqa-tied`.
const LAYERS: usize = 2;
const KV_HEADS: usize = 2;

/// An odd length, of which half is not whole.
const LEN: u32 = 151;

/// `[layers][kv_heads]` positions that are kept.
fn kept(loaded: &Loaded, config: &AdaptiveConfig) -> Vec<Vec<Vec<u32>>> {
    let mut cache = loaded.model.new_cache(KvDtype::F32, loaded.retention(config)).unwrap();
    let prompt: Vec<u32> = (0..LEN).map(|index| 17 + index * index * 37 % 900).collect();
    let layers = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap().layers;
    assert!(loaded.model.decode(5, &mut cache).unwrap().iter().all(|logit| logit.is_finite()));
    layers.into_iter().map(|layer| layer.heads.into_iter().map(|head| head.positions).collect()).collect()
}

fn config(method: &dyn Method, over: BudgetOver, kept_ratio: f64) -> Option<AdaptiveConfig> {
    let budget = adaptive_kvcache::compress::Budget::KeptRatio(kept_ratio);
    AdaptiveConfig::for_method(method).with_budget(budget).unwrap().with_budget_over(over).ok()
}

#[test]
fn every_method_keeps_what_heads_layers_or_the_model_have_room_for() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32);
    let mut differing = BTreeSet::new();
    for &method in METHODS {
        for ratio in [0.3, 0.0] {
            let each = ratio_count(ratio, LEN as usize).max(1);
            let all = ratio_count(ratio, LEN as usize * LAYERS * KV_HEADS).max(LAYERS * KV_HEADS);
            for over in [BudgetOver::Head, BudgetOver::Layer, BudgetOver::Pool] {
                let Some(config) = config(method, over, ratio) else { continue };
                let kept = kept(&loaded, &config);
                let case = format!("{}, {over:?}, {ratio}", method.name());
                let lens: Vec<Vec<usize>> = kept.iter().map(|layer| layer.iter().map(Vec::len).collect()).collect();
                let layers: Vec<usize> = lens.iter().map(|heads| heads.iter().sum()).collect();
                match over {
                    BudgetOver::Head => assert_eq!(lens, [[each; KV_HEADS]; LAYERS], "{case}"),
                    BudgetOver::Layer => {
                        assert_eq!(layers, [each * KV_HEADS; LAYERS], "{case}");
                        let safe = ratio_count(0.2, each);
                        assert!(lens.iter().flatten().all(|&len| len >= safe), "{case}: {lens:?}");
                    }
                    _ => {
                        assert_eq!(layers.iter().sum::<usize>(), all, "{case}");
                        assert!(lens.iter().flatten().all(|&len| len > 0), "{case}: {lens:?}");
                        if layers[0] != layers[1] {
                            differing.insert(method.name());
                        }
                    }
                }
            }
        }
    }
    // Where scores say so, layers do get different parts.
    assert!(differing.contains("replay") && differing.contains("key_norm"), "{differing:?}");
}

#[test]
fn what_the_authors_chose_can_be_spelt_out() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32);
    for (method, over, same_as) in [
        ("adakv", BudgetOver::Head, "snapkv"),
        ("snapkv", BudgetOver::Layer, "adakv"),
        ("pyramidkv", BudgetOver::Head, "snapkv"),
    ] {
        let by_name = |name: &str| adaptive_kvcache::compress::method_by_name(name).unwrap();
        let shared = kept(&loaded, &config(by_name(method), over, 0.5).unwrap());
        assert_eq!(shared, kept(&loaded, &AdaptiveConfig::for_method(by_name(same_as))), "{method}, {over:?}");
    }
}
