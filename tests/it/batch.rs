//! Several sequences at a time: each generates what it would alone, within the limits.

use std::ops::ControlFlow;

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::generate::{
    Batch, BatchLimits, BatchSummary, FinishReason, FinishedText, Generation, GenerationOptions, SamplingOptions,
};
use candle_core::quantized::GgmlDType;

use crate::support::adaptive;
use crate::support::fixture::Fixture;

const CONFIG: &str =
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#;

fn fixture() -> Loaded {
    Fixture::read("gqa-tied").load(GgmlDType::Q8_0, WeightDtype::Auto)
}

fn prompts(loaded: &Loaded) -> Vec<Vec<u32>> {
    let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
    let ids = loaded.tokenizer.encode(text).unwrap();
    (0..7).map(|index| ids[index..ids.len() - 2 * (index % 3)].to_vec()).collect()
}

/// Bytes of one token in a full f16 cache.
fn token_bytes(loaded: &Loaded) -> usize {
    let config = loaded.model.config();
    config.num_layers * config.heads.num_kv_heads * config.heads.head_dim * 2 * 2
}

fn options(seed: u64) -> GenerationOptions {
    let sampling = SamplingOptions { temperature: 0.8, seed, ..SamplingOptions::default() };
    GenerationOptions { max_new_tokens: 9, sampling, ..GenerationOptions::default() }
}

fn run(loaded: &Loaded, retention: Retention, limits: BatchLimits) -> Result<(BatchSummary, Vec<FinishedText>), Error> {
    let mut texts = Vec::new();
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let mut batch = Batch::new(model, tokenizer, KvDtype::F16, retention, prompts(loaded), options(5), limits)?;
    let summary = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text))?;
    texts.sort_by_key(|text| text.index);
    Ok((summary, texts))
}

#[test]
fn each_text_is_what_it_would_be_alone() {
    let loaded = fixture();
    for retention in [Retention::Full, adaptive(&loaded.tokenizer, CONFIG)] {
        let expected: Vec<(Vec<u32>, String, usize)> = prompts(&loaded)
            .iter()
            .map(|prompt| {
                let mut cache = loaded.model.new_cache(KvDtype::F16, retention.clone()).unwrap();
                let logits = loaded.model.prefill(prompt, &mut cache, &mut ()).unwrap().logits;
                let kept = cache.bytes().kept;
                let mut generation =
                    Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, prompt, logits, options(5));
                let text = generation.by_ref().map(|step| step.unwrap().text).collect();
                (generation.ids().to_vec(), text, kept)
            })
            .collect();
        for sequences in [1, 2, 3, 16] {
            let (summary, texts) = run(&loaded, retention.clone(), BatchLimits { sequences, kv_bytes: None }).unwrap();
            let got: Vec<(Vec<u32>, String, usize)> =
                texts.into_iter().map(|text| (text.ids, text.text, text.kv.kept)).collect();
            assert_eq!(got, expected, "{sequences} at a time");
            assert_eq!((summary.finished, summary.most_sequences), (7, sequences.min(7)));
            assert_eq!(summary.prompt_tokens, prompts(&loaded).iter().map(Vec::len).sum::<usize>());
            assert_eq!(summary.decoded_tokens, expected.iter().map(|(ids, ..)| ids.len() - 1).sum::<usize>());
        }
    }
}

#[test]
fn a_budget_limits_what_is_under_way_and_an_adaptive_cache_fits_more() {
    let loaded = fixture();
    // Room for two and a half full sequences with what they may generate.
    let longest = prompts(&loaded).iter().map(Vec::len).max().unwrap();
    let budget = (longest + 9) * token_bytes(&loaded) * 5 / 2;
    let limits = BatchLimits { sequences: 7, kv_bytes: Some(budget) };
    let (unlimited, texts) = run(&loaded, Retention::Full, BatchLimits { sequences: 7, kv_bytes: None }).unwrap();
    let (full, full_texts) = run(&loaded, Retention::Full, limits).unwrap();
    assert_eq!(full_texts, texts);
    assert_eq!(full.most_sequences, 2);
    assert!(full.most_kv_bytes <= budget && unlimited.most_kv_bytes > budget);

    let config = r#"{"criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0}"#;
    let (adaptive_run, _) = run(&loaded, adaptive(&loaded.tokenizer, config), limits).unwrap();
    assert!(adaptive_run.most_sequences > 2 && adaptive_run.most_kv_bytes <= budget, "{adaptive_run:?}");
    assert_eq!(adaptive_run.finished, 7);
}

#[test]
fn what_can_never_fit_is_refused_and_an_interrupted_batch_gives_what_it_has() {
    let loaded = fixture();
    for retention in [Retention::Full, adaptive(&loaded.tokenizer, CONFIG)] {
        let limits = BatchLimits { sequences: 2, kv_bytes: Some(9 * token_bytes(&loaded)) };
        let error = run(&loaded, retention, limits).unwrap_err();
        assert!(
            matches!(&error, Error::Input { .. }) && error.to_string().starts_with("prompt 1 and the 9"),
            "{error}"
        );
    }
    assert!(run(&loaded, Retention::Full, BatchLimits { sequences: 0, kv_bytes: None }).is_err());

    let limits = BatchLimits { sequences: 3, kv_bytes: None };
    let mut batch = Batch::new(
        &loaded.model,
        &loaded.tokenizer,
        KvDtype::F16,
        Retention::Full,
        prompts(&loaded),
        options(5),
        limits,
    )
    .unwrap();
    let (mut steps, mut texts) = (0, Vec::new());
    let go_on = || {
        steps += 1;
        if steps > 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let summary = batch.run(|_| (), go_on, |text| texts.push(text)).unwrap();
    assert_eq!(summary.finished, 0);
    assert_eq!(texts.len(), 3);
    assert!(texts.iter().all(|text| text.finish_reason == FinishReason::Interrupted && text.ids.len() == 5));
}
