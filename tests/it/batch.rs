//! Several sequences at a time: each generates what it would alone, within the limits.

use std::ops::ControlFlow;

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::map::MapAccumulator;
use adaptive_kvcache::cache::{KvDtype, LayerSummary, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::generate::{
    Batch, BatchLimits, BatchPrompt, BatchSummary, FinishReason, FinishedText, Generation, GenerationOptions,
    SamplingOptions,
};
use adaptive_kvcache::model::{PrefillObserver, PrefillOptions};
use candle_core::quantized::GgmlDType;

use crate::support::adaptive;
use crate::support::clock::Looks;
use crate::support::fixture::Fixture;

const CONFIG: &str =
    r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#;

pub fn fixture() -> Loaded {
    Fixture::read("gqa-tied").load(GgmlDType::Q8_0, WeightDtype::Auto)
}

pub fn prompts(loaded: &Loaded) -> Vec<Vec<u32>> {
    let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
    let ids = loaded.tokenizer.encode(text).unwrap();
    (0..7).map(|index| ids[index..ids.len() - 2 * (index % 3)].to_vec()).collect()
}

/// Bytes of one token in a full f16 cache.
pub fn token_bytes(loaded: &Loaded) -> usize {
    let config = loaded.model.config();
    config.num_layers * config.heads.num_kv_heads * (config.heads.head_dim * 2 * 2 + size_of::<u32>())
}

pub fn options(seed: u64) -> GenerationOptions {
    let sampling = SamplingOptions { temperature: 0.8, seed, ..SamplingOptions::default() };
    GenerationOptions { max_new_tokens: 9, sampling, ..GenerationOptions::default() }
}

/// * `prompts`: called `prompt 1` and so on
pub fn batch(
    loaded: &Loaded,
    retention: Retention,
    prompts: Vec<Vec<u32>>,
    limits: BatchLimits,
) -> Result<Batch<'_>, Error> {
    let named = |(index, ids)| BatchPrompt { name: format!("prompt {}", index + 1), ids, options: None };
    let prompts = prompts.into_iter().enumerate().map(named).collect();
    let cache = loaded.model.new_cache(KvDtype::F16, retention)?;
    Batch::new(&loaded.model, &loaded.tokenizer, cache, prompts, &options(5), limits)
}

fn run(loaded: &Loaded, retention: Retention, limits: BatchLimits) -> Result<(BatchSummary, Vec<FinishedText>), Error> {
    let mut texts = Vec::new();
    // How many sequences there are at a time depends on how long things take.
    let mut batch = batch(loaded, retention, prompts(loaded), limits)?.with_clock(Box::new(Looks::of(1)));
    let summary = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text))?;
    texts.sort_by_key(|text| text.index);
    Ok((summary, texts))
}

/// What each prompt's text is if there are no others, and the bytes that are kept of the prompt.
pub fn alone(
    loaded: &Loaded,
    retention: &Retention,
    prompts: &[Vec<u32>],
    prefill: PrefillOptions,
) -> Vec<(Vec<u32>, String, usize)> {
    let text = |(prompt, index): (&Vec<u32>, u64)| {
        let options = GenerationOptions { sampling: options(5).sampling.stream(index), ..options(5) };
        let mut cache = loaded.model.new_cache(KvDtype::F16, retention.clone()).unwrap();
        let logits = loaded.model.prefill_with(prompt, &mut cache, prefill, &mut ()).unwrap().logits;
        let kept = cache.bytes().kept;
        let mut generation = Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, prompt, logits, options);
        let text = generation.by_ref().map(|step| step.unwrap().text).collect();
        (generation.ids().to_vec(), text, kept)
    };
    prompts.iter().zip(0..).map(text).collect()
}

#[test]
fn each_text_is_what_it_would_be_alone() {
    let loaded = fixture();
    for retention in [Retention::Full, adaptive(&loaded.tokenizer, CONFIG)] {
        let expected = alone(&loaded, &retention, &prompts(&loaded), PrefillOptions::default());
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
    // Room for two full sequences of the longest prompt, with what they may generate; the last token is not stored.
    let longest = prompts(&loaded).iter().map(Vec::len).max().unwrap();
    let budget = 2 * (longest + 9 - 1) * token_bytes(&loaded);
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
            matches!(&error, Error::Input { .. }) && error.to_string().starts_with("prompt 1 and the text"),
            "{error}"
        );
    }
    assert!(run(&loaded, Retention::Full, BatchLimits { sequences: 0, kv_bytes: None }).is_err());

    let limits = BatchLimits { sequences: 3, kv_bytes: None };
    let mut batch = batch(&loaded, Retention::Full, prompts(&loaded), limits).unwrap();
    let (mut calls, mut texts) = (0, Vec::new());
    // Asked before each of three prompts, and before each step; those that are under way take some while others are read.
    let go_on = || {
        calls += 1;
        if calls > 3 + 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let summary = batch.run(|_| (), go_on, |text| texts.push(text)).unwrap();
    assert_eq!(summary.finished, 0);
    assert_eq!(texts.len(), 3);
    assert!(texts.iter().all(|text| text.finish_reason == FinishReason::Interrupted));
    texts.sort_by_key(|text| text.index);
    // The first sequence takes part in every step.
    assert_eq!(texts[0].ids.len(), 1 + 4);
    assert_eq!(summary.decoded_tokens, texts.iter().map(|text| text.ids.len() - 1).sum::<usize>());
}

/// What happens while a prompt is read.
#[derive(Clone, Copy)]
enum While {
    Read,
    Interrupted,
    Failed,
}

impl PrefillObserver for While {
    fn progress(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        if matches!(self, Self::Interrupted) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn layer_done(&mut self, _summary: &LayerSummary, _maps: Option<&MapAccumulator>) -> Result<(), Error> {
        if matches!(self, Self::Failed) { Err(Error::input("this one fails")) } else { Ok(()) }
    }
}

#[test]
fn what_ends_a_prompt_loses_no_text_that_is_under_way() {
    let loaded = fixture();
    let limits = BatchLimits { sequences: 3, kv_bytes: None };
    for second in [While::Interrupted, While::Failed] {
        let mut batch = batch(&loaded, Retention::Full, prompts(&loaded), limits).unwrap();
        let mut texts = Vec::new();
        let observe = |index| if index == 1 { second } else { While::Read };
        let result = batch.run(observe, || ControlFlow::Continue(()), |text| texts.push(text));
        assert_eq!(result.is_ok(), matches!(second, While::Interrupted), "{result:?}");
        assert_eq!(texts.len(), 1);
        assert_eq!((texts[0].index, texts[0].finish_reason), (0, FinishReason::Interrupted));
        // The second prompt has gone through a layer before it fails, and the first text takes its step then.
        assert_eq!(texts[0].ids.len(), if matches!(second, While::Failed) { 2 } else { 1 });
    }
}

#[test]
fn a_prompt_that_can_never_be_read_is_refused_before_anything_is_computed() {
    let loaded = fixture();
    let limits = BatchLimits { sequences: 3, kv_bytes: None };
    let context = loaded.model.config().context_length;
    for (bad, part) in [(vec![], "is empty"), (vec![5; context + 1], "more than the model's context")] {
        let mut prompts = prompts(&loaded);
        prompts[3] = bad;
        let error = batch(&loaded, Retention::Full, prompts, limits).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Input { .. }) && message.starts_with("prompt 4 "), "{message}");
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn what_is_put_aside_ends_with_the_context_and_the_last_token() {
    let loaded = fixture();
    let context = loaded.model.config().context_length;
    let ids = prompts(&loaded).swap_remove(0);
    // The last token of a text is not stored.
    let budget = |tokens: usize| BatchLimits { sequences: 1, kv_bytes: Some(tokens * token_bytes(&loaded)) };
    let needed = ids.len() + 9 - 1;
    assert!(batch(&loaded, Retention::Full, vec![ids.clone()], budget(needed)).is_ok());
    assert!(batch(&loaded, Retention::Full, vec![ids], budget(needed - 1)).is_err());
    let nearly_full = vec![5; context - 2];
    assert!(batch(&loaded, Retention::Full, vec![nearly_full.clone()], budget(context)).is_ok());
    assert!(batch(&loaded, Retention::Full, vec![nearly_full], budget(context - 1)).is_err());
}

#[test]
fn an_adaptive_prompt_is_tried_whatever_those_before_it_kept_and_read_once() {
    let loaded = fixture();
    let config = r#"{"criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0}"#;
    let sparing = adaptive(&loaded.tokenizer, config);
    let longest = prompts(&loaded).iter().map(Vec::len).max().unwrap();
    // A prompt of special tokens is kept as a whole; the others hardly.
    let special = vec![loaded.tokenizer.special_ids()[0]; 4];
    let kv_bytes = Some((longest / 2 + 9) * token_bytes(&loaded));
    let limits = BatchLimits { sequences: 8, kv_bytes };
    let mut prompts = prompts(&loaded);
    prompts.insert(0, special.clone());
    prompts.push(special);
    let tokens = prompts.iter().map(Vec::len).sum::<usize>();
    let mut reads = vec![0; prompts.len()];
    let mut texts = Vec::new();
    let mut batch = batch(&loaded, sparing, prompts, limits).unwrap();
    let observe = |index: usize| reads[index] += 1;
    let summary = batch.run(observe, || ControlFlow::Continue(()), |text| texts.push(text)).unwrap();
    assert_eq!((summary.finished, texts.len()), (9, 9));
    assert_eq!(reads, [1; 9]);
    assert_eq!(summary.prompt_tokens, tokens);
}

#[test]
fn a_prompt_may_have_options_of_its_own() {
    let loaded = fixture();
    let ids = prompts(&loaded).swap_remove(0);
    let greedy = GenerationOptions { max_new_tokens: 3, ..GenerationOptions::default() };
    let seeded = GenerationOptions { max_new_tokens: 5, ..options(11) };
    let own = [None, Some(greedy), Some(seeded.clone()), Some(seeded), None];
    let named = own.into_iter().map(|options| BatchPrompt { name: "prompt".to_owned(), ids: ids.clone(), options });
    let limits = BatchLimits { sequences: 2, kv_bytes: None };
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let mut batch =
        Batch::new(model, tokenizer, loaded.full_cache(KvDtype::F16).unwrap(), named.collect(), &options(5), limits)
            .unwrap();
    let mut texts = Vec::new();
    batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text)).unwrap();
    texts.sort_by_key(|text| text.index);
    assert_eq!(texts.iter().map(|text| text.ids.len()).collect::<Vec<_>>(), [9, 3, 5, 5, 9]);
    let seeds: Vec<Option<u64>> = texts.iter().map(|text| text.seed).collect();
    let stream = |index| Some(options(5).sampling.stream(index).seed);
    assert_eq!(seeds, [Some(5), None, Some(11), Some(11), stream(4)]);
    assert_eq!(texts[2].ids, texts[3].ids, "a seed of one's own is taken as it is");

    // Bytes are put aside for what each may generate.
    let needed =
        |tokens: usize| BatchLimits { sequences: 1, kv_bytes: Some((ids.len() + tokens - 1) * token_bytes(&loaded)) };
    for (options, fits) in [(None, false), (Some(GenerationOptions { max_new_tokens: 5, ..options(5) }), true)] {
        let prompt = vec![BatchPrompt { name: "prompt".to_owned(), ids: ids.clone(), options }];
        let cache = loaded.full_cache(KvDtype::F16).unwrap();
        let batch = Batch::new(model, tokenizer, cache, prompt, &self::options(5), needed(5));
        assert_eq!(batch.is_ok(), fits);
    }
}
