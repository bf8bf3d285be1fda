//! Layers with a sliding window: far beyond it, against transformers and against a dense pass whose rows see what is in
//! their window; with both backends, in turns, in batches, with compression, in quantised caches.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::prefill::{QueryBlock, prefill};
use adaptive_kvcache::attention::prompt_rows::{PromptKv, PromptRows};
use adaptive_kvcache::attention::window::PromptWindow;
use adaptive_kvcache::backend::{BackendKind, HeadCache};
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{self, WeightDtype};
use adaptive_kvcache::compress::METHODS;
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::model::{Llama, PrefillOptions};
use adaptive_kvcache::tokens::TokenClassifier;
use candle_core::IndexOp;
use candle_core::quantized::GgmlDType;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::support::fixture::Fixture;
use crate::support::{candle_on_cpu, data, ids, json, max_difference, ragged_on_cpu};

/// Against logits of up to 30 that another library computed in f32 and that were printed with five digits.
const TOLERANCE: f32 = 1e-4;

/// Against the dense pass: orders of f32 additions, relative to the largest logit.
const DENSE_TOLERANCE: f32 = 1e-5;

/// The window of `mistral-window` in all layers, and of `qwen2-window` in the second.
const WINDOW: usize = 16;

fn folder(name: &str) -> PathBuf {
    data("checkpoints").join(name)
}

fn load(path: impl AsRef<std::path::Path>, backend: &BackendKind) -> Llama {
    checkpoint::open(path).unwrap().model(backend, WeightDtype::F32, &mut |_, _| {}).unwrap()
}

/// The CPU kernels, and candle operations both ways.
fn backends() -> Vec<BackendKind> {
    vec![BackendKind::Kernels(Compute::Exact), candle_on_cpu(), ragged_on_cpu()]
}

/// Ids without much of a pattern.
fn some_ids(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| u32::try_from((7 * i * i + 5 * i + 11 * seed) % 61 + 3).unwrap()).collect()
}

fn adaptive(config: &str) -> Retention {
    let config = adaptive_kvcache::compress::AdaptiveConfig::parse(config, None).unwrap();
    let classifier = TokenClassifier::new([1, 2], [5, 9, 23, 40]);
    Retention::Adaptive { config: config.into(), classifier, words: None }
}

/// What is done to a cache: a prompt, or tokens that are decoded one by one.
#[derive(Debug, Clone, Copy)]
enum Part {
    Prompt(usize),
    Decode(usize),
}
use Part::{Decode, Prompt};

/// Tokens that were decided about, and what is kept of them, `[layer][kv_head]`.
type Decided = (Range<usize>, Vec<Vec<Vec<u32>>>);

/// What the parts of a text gave.
struct Run {
    /// Where in the text each of `logits` is.
    rows: Vec<usize>,
    logits: Vec<Vec<f32>>,
    decisions: Vec<Decided>,
    cache: AdaptiveKvCache,
}

/// Takes a text in part by part, and checks after each token that no head holds what has left its window.
fn run(model: &Llama, text: &[u32], parts: &[Part], mut cache: AdaptiveKvCache, chunk: usize, plain: bool) -> Run {
    let (mut rows, mut logits, mut decisions) = (Vec::new(), Vec::new(), Vec::new());
    let options = PrefillOptions { chunk: NonZeroUsize::new(chunk).unwrap() };
    for &part in parts {
        let seen = cache.seen();
        match part {
            Prompt(len) => {
                let prefill = model.prefill_with(&text[seen..seen + len], &mut cache, options, &mut ()).unwrap();
                logits.push(prefill.logits);
                rows.push(cache.seen() - 1);
                let decided = cache.seen() - prefill.layers[0].prompt_len..cache.seen();
                let of_layer = |layer: &adaptive_kvcache::cache::LayerSummary| {
                    layer.heads.iter().map(|head| head.positions.clone()).collect()
                };
                decisions.push((decided, prefill.layers.iter().map(of_layer).collect()));
                expect_within_windows(model, &cache);
            }
            Decode(count) => {
                for &id in &text[seen..seen + count] {
                    let step = if plain { model.decode_plain(id, &mut cache) } else { model.decode(id, &mut cache) };
                    logits.push(step.unwrap());
                    rows.push(cache.seen() - 1);
                    expect_within_windows(model, &cache);
                }
            }
        }
    }
    Run { rows, logits, decisions, cache }
}

#[track_caller]
fn expect_within_windows(model: &Llama, cache: &AdaptiveKvCache) {
    for (layer, ledger) in cache.ledgers().into_iter().enumerate() {
        let Some(window) = model.config().window(layer) else { continue };
        for positions in ledger.positions().iter() {
            let first = (cache.seen() + 1).saturating_sub(window);
            assert!(positions.iter().all(|&at| (first..cache.seen()).contains(&(at as usize))), "{positions:?}");
        }
    }
}

/// The logits of a dense pass over the whole text in which rows see what is in their window, and of what was decided
/// before them what was kept.
fn dense(fixture: &Fixture, model: &Llama, text: &[u32], run: &Run) -> Vec<Vec<f32>> {
    let first_rounded = text.len();
    dense_rounded(fixture, model, text, run, first_rounded, GgmlDType::F32)
}

fn dense_rounded(
    fixture: &Fixture,
    model: &Llama,
    text: &[u32],
    run: &Run,
    first_rounded: usize,
    format: GgmlDType,
) -> Vec<Vec<f32>> {
    let (kv_heads, len) = (model.config().heads.num_kv_heads, text.len());
    let mut visible = |layer: usize, _: &[Vec<f32>]| -> Vec<Vec<bool>> {
        let window = model.config().window(layer).unwrap_or(usize::MAX);
        let sees = |kv_head: usize, row: usize, column: usize| {
            let kept = |(decided, kept): &Decided| {
                row < decided.end
                    || !decided.contains(&column)
                    || kept[layer][kv_head].contains(&u32::try_from(column).unwrap())
            };
            column <= row && row - column < window && run.decisions.iter().all(kept)
        };
        (0..kv_heads)
            .map(|kv_head| (0..len * len).map(|index| sees(kv_head, index / len, index % len)).collect())
            .collect()
    };
    let logits = fixture.dense_logits_where(text, &mut visible, first_rounded, format);
    run.rows.iter().map(|&row| logits.i(row).unwrap().to_vec1().unwrap()).collect()
}

#[track_caller]
fn expect_close(case: &str, got: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        let largest = expected.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let difference = max_difference(got, expected) / largest;
        assert!(difference < tolerance, "{case}, step {step}: {difference}");
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn far_beyond_the_window_logits_are_those_of_transformers() {
    for name in ["mistral-window", "qwen2-window"] {
        let expected = json(folder(name).join("expected.json"));
        for backend in backends() {
            let model = load(folder(name), &backend);
            for case in expected["cases"].as_array().unwrap() {
                let decoded = case["decoded"].as_array().unwrap();
                let mut text = ids(&case["ids"]);
                let parts = [Prompt(text.len()), Decode(decoded.len())];
                text.extend(decoded.iter().map(|step| u32::try_from(step["id"].as_u64().unwrap()).unwrap()));
                let mut rows = vec![numbers(&case["last_logits"])];
                rows.extend(decoded.iter().map(|step| numbers(&step["logits"])));
                for (chunk, plain) in [(512, false), (7, true), (64, false)] {
                    let cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
                    let run = run(&model, &text, &parts, cache, chunk, plain);
                    for (step, (got, expected)) in run.logits.iter().zip(&rows).enumerate() {
                        let difference = max_difference(got, expected);
                        let case = format!("{name}, {}, {} tokens", model.backend(), text.len());
                        assert!(difference < TOLERANCE, "{case}, step {step}: {difference}");
                    }
                }
            }
        }
    }
}

/// Else agreement with transformers would say nothing of the window.
#[test]
fn the_window_shows_in_the_logits() {
    let expected = json(folder("mistral-window").join("expected.json"));
    let wide = with_config("mistral-window", |config| config["sliding_window"] = Value::Null);
    let model = load(wide.path(), &BackendKind::default());
    for case in expected["cases"].as_array().unwrap() {
        let text = ids(&case["ids"]);
        let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
        let logits = model.prefill(&text, &mut cache, &mut ()).unwrap().logits;
        let difference = max_difference(&logits, &numbers(&case["last_logits"]));
        assert_eq!(difference > 100.0 * TOLERANCE, text.len() > WINDOW, "{} tokens: {difference}", text.len());
    }
}

fn with_config(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut config = json(folder(name).join("config.json"));
    change(&mut config);
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(folder(name).join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    copy
}

/// Prompts within the window, at its border and beyond it, after rows that have gone one by one, and were put in other
/// places.
const TURNS: [&[Part]; 4] = [
    &[Prompt(40), Decode(9), Prompt(7), Decode(20), Prompt(50), Decode(3)],
    &[Prompt(10), Decode(12), Prompt(1), Decode(1), Prompt(15), Prompt(16), Decode(5)],
    &[Prompt(3), Decode(40), Prompt(14), Decode(2), Prompt(17), Decode(2)],
    &[Prompt(90), Prompt(2), Decode(17), Prompt(31), Decode(4)],
];

fn len(parts: &[Part]) -> usize {
    parts
        .iter()
        .map(|part| match part {
            Prompt(len) | Decode(len) => len,
        })
        .sum()
}

#[test]
fn further_turns_see_their_window_whatever_its_size() {
    for size in [1, 2, 5, WINDOW, 40, 64, 100] {
        let copy = with_config("mistral-window", |config| config["sliding_window"] = size.into());
        let fixture = Fixture::read_folder(copy.path());
        for (turns, parts) in TURNS.into_iter().enumerate() {
            let text = some_ids(len(parts), turns);
            for backend in backends() {
                let model = load(copy.path(), &backend);
                for (chunk, plain) in [(512, false), (6, true)] {
                    let cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
                    let run = run(&model, &text, parts, cache, chunk, plain);
                    let case = format!("window of {size}, turns {turns}, {}, chunks of {chunk}", model.backend());
                    expect_close(&case, &run.logits, &dense(&fixture, &model, &text, &run), DENSE_TOLERANCE);
                    let held = (size - 1).min(text.len());
                    assert!(run.cache.ledgers().iter().all(|ledger| ledger.lens() == [held; 2]), "{case}");
                }
            }
        }
    }
}

/// Every method, and the search by both criteria: what is kept is what its own decision says and the window has not
/// passed.
#[test]
fn what_is_compressed_is_what_the_window_holds() {
    let copy = with_config("mistral-window", |config| config["sliding_window"] = 40.into());
    let fixture = Fixture::read_folder(copy.path());
    let in_one_pass = METHODS.iter().filter(|method| method.needs().repetition.is_none());
    let mut configs: Vec<String> =
        in_one_pass.map(|method| format!(r#"{{"method": "{}", "kept_ratio": 0.4}}"#, method.name())).collect();
    configs.extend([
        r#"{"frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#.to_owned(),
        r#"{"criterion": "mass", "frequency_ratio": 0.2, "locality_ratio": 0.2, "recovery_threshold": 0.5}"#.to_owned(),
        r#"{"criterion": "mass", "profile_rows": 9, "frequency_ratio": 0.2, "recovery_threshold": 0.5}"#.to_owned(),
    ]);
    for config in &configs {
        for (turns, parts) in TURNS.into_iter().enumerate() {
            let text = some_ids(len(parts), turns);
            let mut decided = Vec::new();
            for backend in backends() {
                let model = load(copy.path(), &backend);
                for chunk in [512, 13] {
                    let cache = model.new_cache(KvDtype::F32, adaptive(config)).unwrap();
                    let run = run(&model, &text, parts, cache, chunk, false);
                    let case = format!("{config}, turns {turns}, {}, chunks of {chunk}", model.backend());
                    expect_close(&case, &run.logits, &dense(&fixture, &model, &text, &run), DENSE_TOLERANCE);
                    decided.push((case, run.decisions));
                }
            }
            let (_, first) = &decided[0];
            for (case, other) in &decided[1..] {
                // `key_norm` has equal scores for the same token, up to rounding.
                assert!(other == first || config.contains("key_norm"), "{case}: {other:?} and {first:?}");
            }
            let (range, kept) = &first[0];
            let in_window = range.len().min(39);
            let rows: usize = kept.iter().flatten().map(Vec::len).sum();
            assert!(rows > 0 && rows <= 4 * in_window, "{config}: {rows} of {in_window}");
            if config.contains("kept_ratio") && !config.contains("pyramid") {
                let expected = (16 * in_window + 5) / 10;
                assert!(rows.abs_diff(expected) <= 4, "{config}: {rows}, expected {expected}");
            }
        }
    }
}

/// Of layers that differ, each decides about what it holds.
#[test]
fn layers_without_a_window_keep_what_is_far() {
    let mut model = None;
    for config in [None, Some(r#"{"method": "snapkv"}"#), Some(r#"{"method": "replay"}"#), Some("{}")] {
        for backend in backends() {
            let of_backend = load(folder("qwen2-window"), &backend);
            let text = some_ids(170, 3);
            let parts = [Prompt(100), Decode(20), Prompt(30), Decode(20)];
            let retention = config.map_or(Retention::Full, adaptive);
            let cache = of_backend.new_cache(KvDtype::F32, retention).unwrap();
            let run = run(&of_backend, &text, &parts, cache, 64, false);
            let ledgers = run.cache.ledgers();
            assert!(ledgers[1].lens().iter().all(|&rows| rows < WINDOW));
            assert!(ledgers[0].lens().iter().all(|&rows| rows >= 40), "{config:?}: {:?}", ledgers[0].lens());
            if config.is_none() {
                assert_eq!((ledgers[0].lens(), ledgers[1].lens()), (vec![170; 2], vec![WINDOW - 1; 2]));
            }
            let (logits, name) = (run.logits, of_backend.backend());
            let expected = model.get_or_insert_with(|| (config, logits.clone()));
            if expected.0 == config {
                expect_close(&format!("{config:?}, {name}"), &logits, &expected.1, DENSE_TOLERANCE);
            } else {
                model = Some((config, logits));
            }
        }
    }
}

/// What has left the window is free memory, in every format.
#[test]
fn memory_is_that_of_the_window() {
    let mixed = load(folder("mistral-window"), &BackendKind::default()).new_cache(KvDtype::Mixed, Retention::Full);
    assert!(matches!(mixed, Err(Error::Unsupported { .. })));
    for dtype in KvDtype::ALL.into_iter().filter(|&dtype| dtype != KvDtype::Mixed) {
        let model = load(folder("mistral-window"), &BackendKind::default());
        let text = some_ids(250, 1);
        let cache = model.new_cache(dtype, Retention::Full).unwrap();
        let run = run(&model, &text, &[Prompt(200), Decode(50)], cache, 64, false);
        let (bytes, token) = (run.cache.bytes(), dtype.token_bytes(32));
        assert_eq!(bytes.kept, 2 * 2 * (WINDOW - 1) * token);
        assert_eq!(bytes.raw, 2 * 2 * 250 * token);
        // A row more during a step, and what a buffer that is full grows by.
        assert!(bytes.allocated < 2 * 2 * 3 * (WINDOW + 1) * (token + 4), "{dtype:?}: {bytes:?}");
        assert!(run.cache.kept_ratio() < 0.07);
    }
}

/// Rows of a quantised cache go and move without a change to others.
#[test]
fn quantised_caches_hold_the_same_window() {
    /// Blocks are rounded alike; products are summed in other orders, and queries rounded to 8 bits in `q8_0`'s.
    const QUANTISED_TOLERANCE: f32 = 0.02;
    let fixture = Fixture::read_folder(&folder("mistral-window"));
    for (dtype, format) in [(KvDtype::Q8_0, GgmlDType::Q8_0), (KvDtype::Q4_0, GgmlDType::Q4_0)] {
        let model = load(folder("mistral-window"), &BackendKind::default());
        let text = some_ids(80, 5);
        let cache = model.new_cache(dtype, Retention::Full).unwrap();
        let run = run(&model, &text, &[Prompt(40), Decode(40)], cache, 512, false);
        let expected = dense_rounded(&fixture, &model, &text, &run, 40, format);
        expect_close(dtype.name(), &run.logits, &expected, QUANTISED_TOLERANCE);
    }
}

/// Prompts in whole numbers of 16 bits begin in the middle of what is rounded.
#[test]
fn rounded_products_see_the_same_window() {
    /// What 16 bits cost sums of numbers up to 1.
    const ROUNDED_TOLERANCE: f32 = 3e-3;
    let layout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
    let (len, chunk) = (300, 150);
    let mut rng = StdRng::seed_from_u64(5);
    let mut numbers =
        |heads: usize| (0..len * heads * 32).map(|_| rng.random_range(-1.0_f32..1.0)).collect::<Vec<f32>>();
    let (queries, keys, values) = (numbers(4), numbers(2), numbers(2));
    let nothing = HeadCache::new(32, KvDtype::F32).unwrap();
    let attended = |size: Option<usize>, is_rounded: bool| {
        let window = size.map(|size| PromptWindow::new(size, 0, &[vec![], vec![]]));
        let (own_keys, own_values) =
            PromptRows::after_within(layout, len, &[nothing.rows(); 2], window.as_ref()).unwrap();
        let mut kv = PromptKv { keys: own_keys, values: own_values };
        let mut out = Vec::new();
        for first_row in (0..len).step_by(chunk) {
            let rows = |all: &[f32], width: usize| all[first_row * width..(first_row + chunk) * width].to_vec();
            kv.keys.push(&rows(&keys, 64)).unwrap();
            kv.values.push(&rows(&values, 64)).unwrap();
            if is_rounded {
                kv.round();
            }
            let queries = rows(&queries, 128);
            let block = QueryBlock { queries: &queries, first_row };
            out.extend(prefill(layout, block, &kv.keys, &kv.values, None, None).unwrap());
        }
        out
    };
    for size in [30, 64, 100, 129] {
        let exact = attended(Some(size), false);
        let difference = max_difference(&attended(Some(size), true), &exact);
        assert!(difference < ROUNDED_TOLERANCE, "window of {size}: {difference}");
        assert!(max_difference(&attended(None, false), &exact) > 10.0 * ROUNDED_TOLERANCE, "window of {size}");
    }
}

#[test]
fn sequences_of_a_batch_are_at_different_places_of_their_windows() {
    let model = load(folder("mistral-window"), &BackendKind::default());
    let prompts = [5, 15, 16, 17, 60];
    let new = |index: usize| {
        let mut cache = model.new_cache(KvDtype::F16, Retention::Full).unwrap();
        model.prefill(&some_ids(prompts[index], index), &mut cache, &mut ()).unwrap();
        cache
    };
    let mut together: Vec<_> = (0..prompts.len()).map(new).collect();
    let mut alone = together.clone();
    let mut logits = Vec::new();
    for step in 0..30 {
        let ids: Vec<u32> = (0..5).map(|index| (step * 5 + index) % 60 + 2).collect();
        let mut caches: Vec<_> = together.iter_mut().collect();
        model.decode_batch(&ids, &mut caches, &mut logits).unwrap();
        for ((cache, &id), logits) in alone.iter_mut().zip(&ids).zip(logits.chunks_exact(64)) {
            assert_eq!(model.decode(id, cache).unwrap(), logits, "step {step}");
        }
    }
    for cache in &together {
        assert!(cache.ledgers().iter().all(|ledger| ledger.lens() == [WINDOW - 1; 2]));
    }
}

/// Several tokens at a time, and taking some of them back, as long as no row has gone.
#[test]
fn runs_end_where_rows_leave_the_window() {
    let model = load(folder("mistral-window"), &BackendKind::default());
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    model.prefill(&some_ids(10, 0), &mut cache, &mut ()).unwrap();
    let mut other = cache.clone();
    let mut logits = Vec::new();
    assert_eq!(model.longest_run(cache.seen()), 5);
    let error = model.decode_run(&some_ids(6, 1), &mut cache, &mut logits).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    model.decode_run(&some_ids(5, 1), &mut cache, &mut logits).unwrap();
    model.take_back(2, &mut cache).unwrap();
    for &id in &some_ids(3, 1) {
        model.decode(id, &mut other).unwrap();
    }
    for &id in &some_ids(9, 7) {
        assert_eq!(model.decode(id, &mut cache).unwrap(), model.decode(id, &mut other).unwrap());
    }
    assert_eq!(model.longest_run(cache.seen()), 0);
    assert!(model.take_back(1, &mut cache).is_err(), "what left the window is gone");
}

#[test]
fn what_has_no_sense_with_a_window_is_refused() {
    for backend in backends() {
        let model = load(folder("mistral-window"), &backend);
        for config in [r#"{"decode": "evict"}"#, r#"{"method": "h2o", "decode": "evict"}"#] {
            let error = model.new_cache(KvDtype::F32, adaptive(config)).unwrap_err();
            assert!(error.to_string().contains("sliding window"), "{error}");
            assert!(error.hint().is_some_and(|hint| hint.contains("append")), "{error}");
        }
        // A cache whose rows would stay.
        let wide = with_config("mistral-window", |config| config["sliding_window"] = Value::Null);
        let mut cache = load(wide.path(), &backend).new_cache(KvDtype::F32, Retention::Full).unwrap();
        let error = model.prefill(&[1, 2], &mut cache, &mut ()).unwrap_err();
        assert!(error.to_string().contains("windows"), "{error}");
    }
}

/// A second pass would have to see what the window has passed.
#[test]
fn methods_with_a_second_pass_are_refused() {
    let model = load(folder("mistral-window"), &BackendKind::default());
    for method in METHODS.iter().filter(|method| method.needs().repetition.is_some()) {
        let config = format!(r#"{{"method": "{}", "instruction": false}}"#, method.name());
        let mut cache = model.new_cache(KvDtype::F32, adaptive(&config)).unwrap();
        let error = model.prefill(&some_ids(9, 0), &mut cache, &mut ()).unwrap_err().to_string();
        assert!(error.contains(method.name()) && error.contains("sliding window"), "{error}");
    }
}
