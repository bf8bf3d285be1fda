//! Guesses from the text: they change what is generated in nothing, and leave no trace in the cache.

use std::ops::ControlFlow;

use adaptive_kvcache::Error;
use adaptive_kvcache::backend::KernelRows;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::generate::{
    Batch, BatchLimits, BatchPrompt, BatchSummary, Conversation, Draft, DraftCounts, FinishReason, FinishedText,
    Generation, GenerationOptions, SamplingOptions,
};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;

use crate::support::fixture::Fixture;
use crate::support::scripted::{CONTROL, NORMAL, Scripted};
use crate::support::{adaptive, candle_on_cpu, data, smollm2};

/// What only a configuration with eviction while tokens are generated says.
const EVICTING: &str = r#"{"method": "streaming_llm", "kept_ratio": 0.5, "decode": "evict"}"#;

/// Caches whose heads keep everything, what each needs, and shares of a budget.
fn retentions(loaded: &Loaded) -> Vec<Retention> {
    let configs = [
        r#"{"criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
        r#"{"method": "replay", "kept_ratio": 0.5}"#,
        r#"{"method": "adakv", "kept_ratio": 0.3}"#,
        r#"{"method": "pyramidkv", "kept_ratio": 0.4}"#,
    ];
    let adaptive = configs.iter().map(|config| adaptive(&loaded.tokenizer, config));
    std::iter::once(Retention::Full).chain(adaptive).collect()
}

struct Random(u32);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) as usize % bound
    }
}

/// Both caches hold the same, number by number, and know the same of it.
#[track_caller]
fn expect_equal(a: &AdaptiveKvCache, b: &AdaptiveKvCache, case: &str) {
    assert_eq!((a.seen(), a.bytes().kept), (b.seen(), b.bytes().kept), "{case}");
    assert!(a.is_consistent() && b.is_consistent(), "{case}");
    assert_eq!(a.segment_classes(&[]), b.segment_classes(&[]), "{case}");
    let layers = a.layers::<KernelRows>().unwrap().iter().zip(b.layers::<KernelRows>().unwrap());
    for (a, b) in layers {
        assert_eq!((a.positions(), a.ledger().seen()), (b.positions(), b.ledger().seen()), "{case}");
        assert!(a.rows().heads() == b.rows().heads(), "{case}: rows differ");
    }
}

/// Gives one cache its tokens one at a time, and the other in runs, with wrong guesses behind that are taken back.
fn compare_runs(loaded: &Loaded, prompt: &[u32], dtype: KvDtype, retention: &Retention, tokens: usize, case: &str) {
    let model = &loaded.model;
    let vocab_size = model.config().vocab_size;
    let mut random = Random(u32::try_from(prompt.len()).unwrap());
    let mut id = || u32::try_from(3 + random.below(vocab_size - 3)).unwrap();
    let mut single = model.new_cache(dtype, retention.clone()).unwrap();
    model.prefill(prompt, &mut single, &mut ()).unwrap();
    let mut runs = single.clone();
    let ids: Vec<u32> = (0..tokens).map(|_| id()).collect();
    let mut logits = Vec::new();
    let (mut done, mut count) = (0, 1);
    while done < ids.len() {
        count = (count * 3 + 2) % 10; // 5, 7, 3, 1, 5 ..
        let right = &ids[done..ids.len().min(done + count)];
        let wrong = done % 4;
        let run: Vec<u32> = right.iter().copied().chain((0..wrong).map(|_| id())).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + done % 3).build().unwrap();
        pool.install(|| model.decode_run(&run, &mut runs, &mut logits)).unwrap();
        assert_eq!(runs.seen(), single.seen() + run.len());
        for (index, &id) in right.iter().enumerate() {
            let own = model.decode(id, &mut single).unwrap();
            let row = &logits[index * vocab_size..(index + 1) * vocab_size];
            assert!(own == row, "{case}: token {} of a run of {}, after {}", index, run.len(), single.seen());
        }
        model.take_back(wrong, &mut runs).unwrap();
        expect_equal(&single, &runs, case);
        done += right.len();
    }
    // What was decoded is decided about with the next prompt: the books are the same, too.
    let next = &prompt[..prompt.len().min(9)];
    let expected = model.prefill(next, &mut single, &mut ()).unwrap().logits;
    assert!(model.prefill(next, &mut runs, &mut ()).unwrap().logits == expected, "{case}: the next prompt");
    expect_equal(&single, &runs, case);
}

#[test]
fn a_run_is_its_tokens_one_after_the_other_bit_by_bit() {
    for (name, weights, dtypes) in [
        ("mha", GgmlDType::F32, &[KvDtype::F32, KvDtype::F16][..]),
        ("gqa-tied", GgmlDType::Q8_0, &[KvDtype::F16]),
        ("gqa-tied", GgmlDType::Q4_1, &[KvDtype::F32]),
        ("gqa-tied", GgmlDType::Q4_0, &[KvDtype::F16]),
        ("gqa-tied", GgmlDType::Q5_0, &[KvDtype::F16]),
        ("gqa-tied", GgmlDType::BF16, &[KvDtype::F16]),
        ("head-dim", GgmlDType::F16, &[KvDtype::F16, KvDtype::Q8_0, KvDtype::Q4_0, KvDtype::Q8_0Q4_0, KvDtype::Mixed]),
        ("llama3-rope", GgmlDType::F32, &[KvDtype::F16]),
    ] {
        let loaded = Fixture::read(name).load(weights, WeightDtype::Auto);
        let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
        let prompt = loaded.tokenizer.encode(text).unwrap();
        for &dtype in dtypes.iter().filter(|dtype| dtype.check(loaded.model.config().heads.head_dim).is_ok()) {
            for (index, retention) in retentions(&loaded).iter().enumerate() {
                compare_runs(&loaded, &prompt, dtype, retention, 24, &format!("{name} {weights:?} {dtype:?} {index}"));
            }
        }
    }
}

/// Heads of several ranges of rows, which runs go on from the middle of, and end.
#[test]
fn runs_cross_from_one_range_of_rows_to_the_next() {
    let loaded = Fixture::read("llama3-rope").load(GgmlDType::F16, WeightDtype::Auto);
    let prompt: Vec<u32> = (0..1017u32).map(|index| 5 + index * index % 300).collect();
    for (index, retention) in retentions(&loaded).iter().take(2).enumerate() {
        compare_runs(&loaded, &prompt, KvDtype::F16, retention, 24, &format!("{index}"));
    }
    compare_runs(&loaded, &prompt[..509], KvDtype::F32, &Retention::Full, 12, "509");
}

/// Heads of 64 numbers in groups of three, 2.3 ranges each, on the number formats of all caches.
#[test]
fn runs_of_a_real_model_are_bit_by_bit_the_same() {
    let loaded = smollm2();
    let novel = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    let prompt = loaded.tokenizer.encode(&novel[..2200]).unwrap();
    for dtype in KvDtype::ALL {
        let retentions = retentions(loaded);
        compare_runs(loaded, &prompt, dtype, &retentions[0], 8, &format!("full {dtype:?}"));
        compare_runs(loaded, &prompt, dtype, &retentions[1], 5, &format!("fastgen {dtype:?}"));
    }
}

#[test]
fn a_run_that_is_refused_leaves_the_cache_as_it_was() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::Q8_0, WeightDtype::Auto);
    let model = &loaded.model;
    let prompt: Vec<u32> = (5..25).collect();
    let cache = |retention: Retention| {
        let mut cache = model.new_cache(KvDtype::F16, retention).unwrap();
        model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        cache
    };
    let mut logits = Vec::new();
    let mut full = cache(Retention::Full);
    let before = full.clone();
    let unknown = u32::try_from(model.config().vocab_size).unwrap();
    for ids in [&[][..], &[5, 6, unknown], &vec![5; model.config().context_length]] {
        assert!(matches!(model.decode_run(ids, &mut full, &mut logits), Err(Error::Input { .. })), "{ids:?}");
        expect_equal(&full, &before, "refused");
    }
    // A prompt is no guess.
    assert!(matches!(model.take_back(1, &mut full), Err(Error::Unsupported { .. })));
    model.decode_run(&[5, 6, 7], &mut full, &mut logits).unwrap();
    assert!(matches!(model.take_back(4, &mut full), Err(Error::Unsupported { .. })));
    model.take_back(3, &mut full).unwrap();
    expect_equal(&full, &before, "taken back");

    let mut evicting = cache(adaptive(&loaded.tokenizer, EVICTING));
    let before = evicting.clone();
    assert!(matches!(model.decode_run(&[5, 6], &mut evicting, &mut logits), Err(Error::Unsupported { .. })));
    expect_equal(&evicting, &before, "evicting");

    let candle = Fixture::read("gqa-tied").load_for(&candle_on_cpu(), GgmlDType::Q8_0, WeightDtype::Auto);
    let mut cache = candle.model.new_cache(KvDtype::F16, Retention::Full).unwrap();
    candle.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
    let refused = candle.model.decode_run(&[5, 6], &mut cache, &mut logits).unwrap_err();
    assert!(refused.to_string().contains("`candle`"), "{refused}");
    assert!(!candle.model.decodes_runs() && cache.seen() == prompt.len());
}

/// What a text came to, and the cache behind it.
struct Generated {
    ids: Vec<u32>,
    texts: Vec<String>,
    finish_reason: FinishReason,
    counts: DraftCounts,
    cache: AdaptiveKvCache,
}

/// * `steps`: after which the text is broken off
fn generate(
    loaded: &Loaded,
    prompt: &[u32],
    retention: &Retention,
    options: &GenerationOptions,
    draft: Draft,
    steps: usize,
) -> Generated {
    let mut cache = loaded.model.new_cache(KvDtype::F16, retention.clone()).unwrap();
    let logits = loaded.model.prefill(prompt, &mut cache, &mut ()).unwrap().logits;
    let options = GenerationOptions { draft, ..options.clone() };
    let mut generation = Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, prompt, logits, options);
    let mut texts: Vec<String> = generation.by_ref().take(steps).map(|step| step.unwrap().text).collect();
    texts.push(generation.held_back());
    let (ids, finish_reason, counts) = (generation.ids().to_vec(), generation.finish_reason(), generation.drafts());
    drop(generation);
    Generated { ids, texts, finish_reason, counts, cache }
}

/// Generates with guesses and without; what became of the guesses.
#[track_caller]
fn expect_same(
    loaded: &Loaded,
    prompt: &[u32],
    retention: &Retention,
    options: &GenerationOptions,
    steps: usize,
) -> (DraftCounts, FinishReason) {
    let [with, without] =
        [Draft::Auto, Draft::Off].map(|draft| generate(loaded, prompt, retention, options, draft, steps));
    let case = format!("{options:?}, {steps} steps");
    assert_eq!((&with.ids, &with.texts), (&without.ids, &without.texts), "{case}");
    assert_eq!(with.finish_reason, without.finish_reason, "{case}");
    expect_equal(&with.cache, &without.cache, &case);
    assert_eq!(without.counts, DraftCounts::default());
    assert!(with.counts.accepted <= with.counts.drafted);
    (with.counts, with.finish_reason)
}

/// A model whose text goes round: a b c d e a b c ..
fn round() -> Scripted {
    let letters = ["a", "b", "c", "d", "e", "x"].map(|letter| (letter, NORMAL));
    let mut model = Scripted::new(&[&[("</s>", CONTROL)], &letters[..]].concat());
    model.says(&["a", "b", "c", "d", "e", "a"]).meta("llama.context_length", Value::U32(256));
    model
}

#[test]
fn a_text_that_goes_round_is_the_same_wherever_it_ends() {
    let loaded = round().load();
    let prompt = loaded.tokenizer.encode("abcdeabcde").unwrap();
    let options = |max_new_tokens| GenerationOptions { max_new_tokens, ..GenerationOptions::default() };
    let full = &Retention::Full;
    for count in 0..40 {
        expect_same(&loaded, &prompt, full, &options(count), usize::MAX);
        let (_, reason) = expect_same(&loaded, &prompt, full, &options(200), count);
        assert_eq!(reason, FinishReason::Interrupted);
    }
    let (counts, reason) = expect_same(&loaded, &prompt, full, &options(200), usize::MAX);
    assert_eq!(reason, FinishReason::Length);
    assert!(counts.accepted > 120 && counts.accepted * 10 > counts.drafted * 9, "{counts:?}");
    let (_, reason) = expect_same(&loaded, &prompt, full, &options(1000), usize::MAX);
    assert_eq!(reason, FinishReason::Context);
    for stop in ["ea", "deabcdeab", "c", "x"] {
        for after in [1, 7, 23] {
            // Not before it has gone round some times.
            let text = "abcde".repeat(after);
            let stop = if after == 1 { stop.to_owned() } else { format!("{text}{stop}") };
            expect_same(&loaded, &prompt, full, &GenerationOptions { stop: vec![stop], ..options(200) }, usize::MAX);
        }
    }
}

/// Wrong guesses: the model leaves the round at random, by one stream of random numbers.
#[test]
fn drawn_texts_are_the_same_by_the_same_random_numbers() {
    let mut model = round();
    // Each time, most go on and some do not; some of these end the text.
    model.leads("c", "x", 3.8).leads("e", "</s>", 3.4).says(&["x", "c"]);
    let loaded = model.load();
    let prompt = loaded.tokenizer.encode("abcdeabcde").unwrap();
    let (mut counts, mut ended) = (DraftCounts::default(), 0);
    for seed in 0..40 {
        let base = SamplingOptions { temperature: 1.0, seed, ..SamplingOptions::default() };
        for sampling in [
            SamplingOptions { top_k: 3, ..base },
            SamplingOptions { top_p: 0.95, repeat_penalty: 1.05, repeat_last_n: 9, ..base },
            SamplingOptions { min_p: 0.2, ..base },
        ] {
            let options = GenerationOptions { max_new_tokens: 60, sampling, ..GenerationOptions::default() };
            let (made, reason) = expect_same(&loaded, &prompt, &Retention::Full, &options, usize::MAX);
            expect_same(&loaded, &prompt, &Retention::Full, &options, 20);
            counts += made;
            ended += usize::from(reason == FinishReason::Eos);
        }
    }
    assert!(counts.accepted > 500 && counts.drafted > counts.accepted + 100, "{counts:?}");
    assert!(ended > 5, "{ended}");
}

#[test]
fn a_real_model_repeats_its_prompt_sooner_and_says_the_same() {
    let loaded = smollm2();
    let novel = std::fs::read_to_string(data("text/eighty_days_ch1-5.txt")).unwrap();
    let part = &novel[..600];
    let prompt = loaded.tokenizer.encode(&format!("{part}\n\n{part}\n\n{}", &part[..200])).unwrap();
    let options = GenerationOptions { max_new_tokens: 40, ignore_eos: true, ..GenerationOptions::default() };
    for retention in &retentions(loaded)[..3] {
        let (counts, _) = expect_same(loaded, &prompt, retention, &options, usize::MAX);
        assert!(counts.accepted >= 8, "{counts:?}");
    }
    let sampling = SamplingOptions { temperature: 0.8, seed: 3, ..SamplingOptions::default() };
    expect_same(loaded, &prompt, &Retention::Full, &GenerationOptions { sampling, ..options }, usize::MAX);
}

#[test]
fn where_nothing_can_be_guessed_it_is_said_why() {
    let kernels = round().load();
    let evicting = adaptive(&kernels.tokenizer, EVICTING);
    assert_eq!(Draft::Auto.obstacle(&kernels.model, &Retention::Full), None);
    assert_eq!(Draft::Off.obstacle(&kernels.model, &Retention::Full), Some("off"));
    assert!(Draft::Auto.obstacle(&kernels.model, &evicting).unwrap().contains("evicting"));
    let prompt = kernels.tokenizer.encode("abcdeabcdeabcdeabcde").unwrap();
    let options = GenerationOptions { max_new_tokens: 40, ..GenerationOptions::default() };
    assert_eq!(expect_same(&kernels, &prompt, &evicting, &options, usize::MAX).0, DraftCounts::default());

    let candle = Fixture::read("mha").load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::Auto);
    assert!(Draft::Auto.obstacle(&candle.model, &Retention::Full).unwrap().contains("backend"));
    let mut cache = candle.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let prompt = [5, 6, 7, 5, 6, 7, 5, 6, 7];
    let logits = candle.model.prefill(&prompt, &mut cache, &mut ()).unwrap().logits;
    let mut generation = Generation::new(&candle.model, &candle.tokenizer, &mut cache, &prompt, logits, options);
    assert!(generation.by_ref().all(|step| step.is_ok()));
    assert_eq!(generation.drafts(), DraftCounts::default());
}

/// Answers, some of them broken off, draw the same random numbers, and the cache goes on from the same tokens.
#[test]
fn a_conversation_is_the_same() {
    let mut model = round();
    model.leads("c", "x", 3.8).leads("e", "</s>", 3.4).says(&["x", "c"]);
    let loaded = model.load();
    let talk = |draft: Draft, seed: u64| {
        let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
        let config = r#"{"criterion": "mass", "recovery_threshold": 0.6}"#;
        let mut conversation =
            Conversation::new(model, tokenizer, KvDtype::F16, adaptive(tokenizer, config), Vec::new()).unwrap();
        let sampling = SamplingOptions { temperature: 1.0, top_k: 3, seed, ..SamplingOptions::default() };
        let mut counts = DraftCounts::default();
        for (question, most, stop) in [("abcde", 30, usize::MAX), ("ab", 30, 9), ("cde", 20, 13), ("a", 20, usize::MAX)]
        {
            let options = GenerationOptions { max_new_tokens: most, sampling, draft, ..GenerationOptions::default() };
            let mut shown = 0;
            let mut show = |_: &str| {
                shown += 1;
                if shown == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            counts += conversation.ask(question, &options, &mut (), &mut show).unwrap().drafts;
        }
        (conversation.messages().to_vec(), conversation.cache().clone(), counts)
    };
    let mut all = DraftCounts::default();
    for seed in 0..12 {
        let (with, without) = (talk(Draft::Auto, seed), talk(Draft::Off, seed));
        assert_eq!(with.0, without.0);
        expect_equal(&with.1, &without.1, "conversation");
        all += with.2;
    }
    assert!(all.accepted > 50, "{all:?}");
}

/// Sequences guess while they are alone, and go on with others in the middle of a run.
#[test]
fn a_batch_guesses_while_a_sequence_is_alone() {
    let mut model = round();
    model.leads("c", "x", 3.8).says(&["x", "c"]);
    let loaded = model.load();
    let run = |draft: Draft, sequences: usize| -> (BatchSummary, Vec<FinishedText>) {
        let prompt = |index: usize| BatchPrompt {
            name: format!("prompt {}", index + 1),
            ids: loaded.tokenizer.encode(&"abcde".repeat(4 + 5 * index)).unwrap(),
            options: None,
        };
        let sampling = SamplingOptions { temperature: 0.5, seed: 3, ..SamplingOptions::default() };
        let options = GenerationOptions { max_new_tokens: 60, sampling, draft, ..GenerationOptions::default() };
        let limits = BatchLimits { sequences, kv_bytes: None };
        let prompts = (0..3).map(prompt).collect();
        let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
        let mut batch = Batch::new(
            model,
            tokenizer,
            model.new_cache(KvDtype::F16, Retention::Full).unwrap(),
            prompts,
            &options,
            limits,
        )
        .unwrap();
        let mut texts = Vec::new();
        let summary = batch.run(|_| (), || ControlFlow::Continue(()), |text| texts.push(text)).unwrap();
        texts.sort_by_key(|text| text.index);
        (summary, texts)
    };
    let (summary, expected) = run(Draft::Off, 1);
    assert_eq!(summary.drafts, DraftCounts::default());
    for sequences in 1..=3 {
        let (summary, texts) = run(Draft::Auto, sequences);
        assert_eq!(texts, expected, "{sequences} at a time");
        assert_eq!(summary.decoded_tokens, 3 * 59);
        // The last of three is alone with two at a time, too.
        assert!(summary.drafts.accepted > 0 || sequences == 3, "{sequences}: {:?}", summary.drafts);
    }
}
