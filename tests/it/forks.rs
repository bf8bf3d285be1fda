//! One prompt into several caches: each is what it would have been alone.

use adaptive_kvcache::Error;
use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::model::PrefillOptions;
use candle_core::quantized::GgmlDType;

use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, max_difference};

/// Between two orders of the same f32 additions: a full cache's attention without statistics, and one with.
const LOGIT_TOLERANCE: f32 = 1e-5;

/// Methods of every need, each under two budgets, which share what is collected; and searches, which do not.
const CONFIGS: [&str; 13] = [
    r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
    r#"{"method": "replay", "kept_ratio": 0.5}"#,
    r#"{"method": "replay", "kept_ratio": 0.2}"#,
    r#"{"method": "h2o", "kept_ratio": 0.5}"#,
    r#"{"method": "h2o", "kept_ratio": 0.2, "decode": "evict"}"#,
    r#"{"method": "snapkv", "kept_ratio": 0.5}"#,
    r#"{"method": "adakv", "kept_ratio": 0.5}"#,
    r#"{"method": "adakv", "kept_ratio": 0.2}"#,
    r#"{"method": "expected_attention", "kept_ratio": 0.5}"#,
    r#"{"method": "expected_attention", "kept_ratio": 0.2}"#,
    r#"{"method": "streaming_llm", "kept_ratio": 0.3}"#,
    r#"{"method": "tova", "kept_ratio": 0.3}"#,
];

fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<u32>> {
    cache.ledgers().into_iter().flat_map(|ledger| ledger.positions().to_vec()).collect()
}

fn check(loaded: &Loaded, ids: &[u32]) {
    let mut kept: Vec<(KvDtype, Retention)> = vec![(KvDtype::F32, Retention::Full)];
    for (index, config) in CONFIGS.iter().enumerate() {
        let dtype = if index % 3 == 2 { KvDtype::F16 } else { KvDtype::F32 };
        kept.push((dtype, adaptive(&loaded.tokenizer, config)));
    }
    let new = |(dtype, retention): &(KvDtype, Retention)| loaded.model.new_cache(*dtype, retention.clone()).unwrap();
    let mut forks: Vec<AdaptiveKvCache> = kept.iter().map(new).collect();
    let forked = loaded.model.prefill_forks(ids, &mut forks, PrefillOptions::default(), &mut ()).unwrap();
    // Budgets of one method share what is collected, and so do methods that read the same.
    assert!(forked.attentions <= CONFIGS.len() - 2, "{}", forked.attentions);
    for (case, (kept, fork)) in kept.iter().zip(&mut forks).enumerate() {
        let mut alone = new(kept);
        let logits = loaded.model.prefill(ids, &mut alone, &mut ()).unwrap().logits;
        let scale = logits.iter().fold(1f32, |scale, logit| scale.max(logit.abs()));
        assert!(max_difference(&logits, &forked.logits) <= LOGIT_TOLERANCE * scale, "case {case}");
        assert_eq!(positions(&alone), positions(fork), "case {case}");
        assert_eq!((alone.seen(), alone.bytes()), (fork.seen(), fork.bytes()), "case {case}");
        for id in [5, 6, 7] {
            let expected = loaded.model.decode(id, &mut alone).unwrap();
            let got = loaded.model.decode(id, fork).unwrap();
            assert!(max_difference(&expected, &got) <= LOGIT_TOLERANCE * scale, "case {case}, token {id}");
        }
        assert_eq!(positions(&alone), positions(fork), "case {case}, after decoding");
    }
}

#[test]
fn every_fork_keeps_what_it_would_have_kept_alone() {
    for name in ["gqa-tied", "mha", "llama3-rope"] {
        let fixture = Fixture::read(name);
        let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
        let most = loaded.model.config().context_length.min(700) - 4;
        let ids: Vec<u32> = (0..most as u32).map(|index| 10 + index * index % 83).collect();
        check(&loaded, &ids);
        check(&loaded, &ids[..1]);
    }
}

#[test]
fn tensors_fork_as_the_kernels_do() {
    let fixture = Fixture::read("gqa-tied");
    let loaded = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
    let ids: Vec<u32> = (0..90).map(|index| 10 + index * index % 83).collect();
    check(&loaded, &ids);
}

#[test]
fn only_empty_caches_are_forked() {
    let loaded = Fixture::read("gqa-tied").load_for(&BackendKind::default(), GgmlDType::F32, WeightDtype::F32);
    let fork = |caches: &mut [AdaptiveKvCache], ids: &[u32]| {
        loaded.model.prefill_forks(ids, caches, PrefillOptions::default(), &mut ())
    };
    let mut cache = loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    assert!(matches!(fork(&mut [], &[5, 6]), Err(Error::Shape { .. })));
    assert!(matches!(fork(std::slice::from_mut(&mut cache), &[]), Err(Error::Input { .. })));
    fork(std::slice::from_mut(&mut cache), &[5, 6]).unwrap();
    assert!(matches!(fork(std::slice::from_mut(&mut cache), &[5, 6]), Err(Error::Unsupported { .. })));
}
