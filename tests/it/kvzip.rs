//! `kvzip` and `kvzip_plus` against the definition: a dense pass over the prompt and its repetition, whole attention maps,
//! and the largest weight of each column; and what the second pass leaves behind.

use std::ops::ControlFlow;

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::prompt_rows::PromptRows;
use adaptive_kvcache::attention::repeat::{Repeated, largest_weights};
use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::compress::{AdaptiveConfig, ratio_count};
use adaptive_kvcache::model::{PrefillObserver, PrefillOptions};
use adaptive_kvcache::tokens::{RepeatWords, TokenClassifier};
use candle_core::IndexOp;
use candle_core::quantized::GgmlDType;

use crate::numbers::softmax;
use crate::support::dense::{Layer, forward};
use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, data, ids, json, smollm2};

/// Between scores of two f32 forward passes, relative.
const TOLERANCE: f64 = 1e-3;

/// What the definition says: scores of the last `segment_len` of `read` tokens, `[layers][kv_heads][segment_len]`.
///
/// * `sees`: whether a row of a layer's KV head sees an earlier position
fn expected_scores(
    fixture: &Fixture,
    read: &[u32],
    segment_len: usize,
    settings: &Settings<'_>,
    sees: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> Vec<Vec<Vec<f64>>> {
    let (heads, kv_heads) = (fixture.size("num_attention_heads"), fixture.size("num_key_value_heads"));
    let first = read.len() - segment_len;
    let mut all = vec![vec![vec![0.0_f64; segment_len]; kv_heads]; fixture.size("num_hidden_layers")];
    for start in (0..segment_len).step_by(settings.chunk) {
        let originals = first + start..first + (start + settings.chunk).min(segment_len);
        let mut asked = Vec::new();
        if let Some(words) = settings.words {
            if start == 0 {
                asked.extend(&words.from_start);
            } else {
                asked.extend(&words.from_words);
                asked.extend(&read[originals.start - 8..originals.start]);
            }
            asked.extend(&words.turn);
        }
        let ids = [read, &asked, &read[originals.clone()]].concat();
        let len = ids.len();
        let mut visible = |layer: usize, _: &Layer| -> Vec<Vec<bool>> {
            let sees = |kv_head, row, column| column <= row && sees(layer, kv_head, row, column);
            (0..kv_heads).map(|head| (0..len * len).map(|at| sees(head, at / len, at % len)).collect()).collect()
        };
        for (layer, numbers) in forward(fixture, &ids, &mut visible).0.into_iter().enumerate() {
            for head in 0..heads {
                let scores = &mut all[layer][head / (heads / kv_heads)];
                for row in read.len()..ids.len() {
                    let sinks = 0..settings.sinks.min(originals.start);
                    let columns: Vec<usize> = sinks.chain(originals.clone()).chain(read.len()..=row).collect();
                    let seen: Vec<f64> =
                        columns.iter().map(|&column| f64::from(numbers.scores[head][row * len + column])).collect();
                    for (column, mut weight) in columns.into_iter().zip(softmax(&seen)) {
                        if settings.plus {
                            weight *= numbers.output_lengths[head][column] / numbers.input_lengths[row];
                        }
                        if originals.contains(&column) {
                            let score = &mut scores[column - first];
                            *score = score.max(weight);
                        }
                    }
                }
            }
        }
    }
    for head in all.iter_mut().flatten() {
        let sinks = settings.sinks.saturating_sub(first).min(segment_len);
        head[..sinks].fill(f64::INFINITY);
    }
    all
}

#[derive(Clone, Copy)]
struct Settings<'a> {
    plus: bool,
    sinks: usize,
    chunk: usize,
    words: Option<&'a RepeatWords>,
}

impl Settings<'_> {
    fn config(&self, kept_ratio: f64) -> String {
        let Self { plus, sinks, chunk, words } = self;
        format!(
            r#"{{"method": "{}", "kept_ratio": {kept_ratio}, "sink_tokens": {sinks}, "repeat_chunk": {chunk}, "instruction": {}}}"#,
            if *plus { "kvzip_plus" } else { "kvzip" },
            words.is_some(),
        )
    }
}

/// Positions of the last segment, `[layers][kv_heads]`.
fn held(cache: &AdaptiveKvCache, first: usize) -> Vec<Vec<Vec<usize>>> {
    let of_head = |head: &Vec<u32>| head.iter().map(|&at| at as usize).filter(|&at| at >= first).collect();
    cache.ledgers().iter().map(|ledger| ledger.positions().iter().map(of_head).collect()).collect()
}

/// Checks that the best of all scores are kept, as many as there should be.
#[track_caller]
fn check_best(held: &[Vec<Vec<usize>>], first: usize, expected: &[Vec<Vec<f64>>], count: usize, what: &str) {
    let (mut kept, mut lost) = (Vec::new(), Vec::new());
    for (held, scores) in held.iter().flatten().zip(expected.iter().flatten()) {
        for (index, &score) in scores.iter().enumerate() {
            if held.contains(&(first + index)) { kept.push(score) } else { lost.push(score) }
        }
    }
    assert_eq!(kept.len(), count, "{what}");
    let (worst, best) = (kept.iter().copied().fold(f64::INFINITY, f64::min), lost.iter().copied().fold(0.0, f64::max));
    assert!(worst >= best * (1.0 - TOLERANCE), "{what}: {worst} is kept, {best} is not");
}

fn backends() -> [(&'static str, BackendKind); 2] {
    [("kernels", BackendKind::default()), ("candle", candle_on_cpu())]
}

const TEXT: &str = "Phileas Fogg was a member of the Reform Club, and that was all; he dined there every day, at the same \
    hour, in the same room, at the same table, and went home at midnight, only to go to bed.";

#[test]
fn what_is_kept_received_the_largest_weights_of_a_repetition() {
    for name in ["gqa-tied", "mha", "head-dim"] {
        let fixture = Fixture::read(name);
        for (backend, kind) in backends() {
            let loaded = fixture.load_for(&kind, GgmlDType::F32, WeightDtype::F32);
            let prompt = loaded.tokenizer.encode(TEXT).unwrap();
            let words = loaded.tokenizer.repeat_words().unwrap();
            for (plus, sinks, chunk, words) in [
                (false, 4, 2048, Some(&words)),
                (true, 4, 2048, Some(&words)),
                (false, 4, 30, Some(&words)),
                (true, 3, 30, Some(&words)),
                (true, 0, 25, None),
                (false, 9, 7, None),
            ] {
                let settings = Settings { plus, sinks, chunk, words };
                if name != "gqa-tied" && chunk != 30 {
                    continue; // one model goes through all settings
                }
                let expected = expected_scores(&fixture, &prompt, prompt.len(), &settings, &|_, _, _, _| true);
                let total = prompt.len() * expected.len() * expected[0].len();
                for ratio in [0.15, 0.3, 0.5, 0.8] {
                    let retention = adaptive(&loaded.tokenizer, &settings.config(ratio));
                    let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
                    // Chunks of rows that do not divide the chunks of the repetition.
                    let options = PrefillOptions { chunk: 19.try_into().unwrap() };
                    let prefill = loaded.model.prefill_with(&prompt, &mut cache, options, &mut ()).unwrap();
                    let count = ratio_count(ratio, total);
                    let what = format!("{name}, {backend}, {}", settings.config(ratio));
                    let held = held(&cache, 0);
                    check_best(&held, 0, &expected, count, &what);
                    let told = prefill.layers.iter().map(|layer| {
                        layer.heads.iter().map(|head| head.positions.iter().map(|&at| at as usize).collect()).collect()
                    });
                    assert_eq!(told.collect::<Vec<Vec<Vec<usize>>>>(), held, "{what}");
                    // Nothing of the full cache or of the repetition is left.
                    let row = 2 * 4 * fixture.size("head_dim");
                    let bytes = cache.bytes();
                    assert_eq!((cache.seen(), bytes.kept), (prompt.len(), count * row), "{what}");
                    assert!(bytes.allocated <= bytes.kept * 3 / 2 + 1024, "{what}: {bytes:?}");
                    assert!(cache.is_consistent());
                }
            }
        }
    }
}

/// A further prompt: what was decoded since the first is repeated with it, on top of what the first has left.
#[test]
fn a_further_prompt_is_repeated_on_top_of_what_earlier_ones_left() {
    let fixture = Fixture::read("gqa-tied");
    for (backend, kind) in backends() {
        let loaded = fixture.load_for(&kind, GgmlDType::F32, WeightDtype::F32);
        let words = loaded.tokenizer.repeat_words().unwrap();
        let encode = |text: &str| loaded.tokenizer.encode(text).unwrap();
        let (first, second) = (encode(TEXT), encode("And when did he go home; was it at midnight, or before?"));
        for plus in [false, true] {
            let settings = Settings { plus, sinks: 4, chunk: 20, words: Some(&words) };
            let retention = adaptive(&loaded.tokenizer, &settings.config(0.4));
            let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
            loaded.model.prefill(&first, &mut cache, &mut ()).unwrap();
            let kept = held(&cache, 0);
            let said = [33, 44, 55, 66, 77, 88];
            for id in said {
                loaded.model.decode(id, &mut cache).unwrap();
            }
            let mut at_once = cache.clone();
            loaded.model.prefill(&second, &mut cache, &mut ()).unwrap();
            let read = [&first[..], &said, &second].concat();
            let segment = said.len() + second.len();
            let sees = |layer: usize, kv_head: usize, row: usize, column: usize| {
                row < first.len() || column >= first.len() || kept[layer][kv_head].contains(&column)
            };
            let expected = expected_scores(&fixture, &read, segment, &settings, &sees);
            let count = ratio_count(0.4, segment * 4);
            check_best(&held(&cache, first.len()), first.len(), &expected, count, &format!("{backend}, {plus}"));
            let before = |cache| -> Vec<Vec<Vec<usize>>> {
                let settled = |head: Vec<usize>| head.into_iter().filter(|&at| at < first.len()).collect();
                held(cache, 0).into_iter().map(|layer| layer.into_iter().map(settled).collect()).collect()
            };
            assert_eq!(before(&cache), kept, "{backend}");
            // A clone that goes on is repeated alike.
            loaded.model.prefill(&second, &mut at_once, &mut ()).unwrap();
            assert_eq!(held(&at_once, 0), held(&cache, 0));
        }
    }
}

/// A cache that was compressed by a second pass goes on as one that was compressed in another way.
#[test]
fn logits_and_what_follows_are_those_of_the_kept_rows() {
    let fixture = Fixture::read("gqa-tied");
    let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
    let prompt = loaded.tokenizer.encode(TEXT).unwrap();
    let full_cache = || loaded.model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let full = loaded.model.prefill(&prompt, &mut full_cache(), &mut ()).unwrap();
    let mut cache =
        loaded.model.new_cache(KvDtype::F32, adaptive(&loaded.tokenizer, r#"{"method": "kvzip"}"#)).unwrap();
    let prefill = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
    assert_eq!(prefill.logits, full.logits, "the next token's logits come from the whole prompt");
    let kept: Vec<Vec<Vec<u32>>> = cache.ledgers().iter().map(|ledger| ledger.positions().to_vec()).collect();
    let decision = crate::support::fixture::Decision { segment: 0..prompt.len(), kept };
    let mut all = prompt.clone();
    for id in [7, 300, 21] {
        all.push(id);
        let logits = loaded.model.decode(id, &mut cache).unwrap();
        let dense = fixture.dense_logits(&all, std::slice::from_ref(&decision));
        let expected: Vec<f32> = dense.i(all.len() - 1).unwrap().to_vec1().unwrap();
        assert!(crate::support::max_difference(&logits, &expected) < 1e-4);
    }
}

#[test]
fn without_words_it_says_so_and_the_cache_stays_usable() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32);
    let prompt = loaded.tokenizer.encode(TEXT).unwrap();
    let retention = |config: &str, words: Option<Result<RepeatWords, String>>| Retention::Adaptive {
        config: AdaptiveConfig::parse(config, None).unwrap().into(),
        classifier: TokenClassifier::default(),
        words: words.map(Into::into),
    };
    for (words, reason) in [
        (None, "the cache was made without a tokenizer"),
        (Some(Err("its template is no template".to_owned())), "its template is no template"),
    ] {
        let mut cache = loaded.model.new_cache(KvDtype::F16, retention(r#"{"method": "kvzip"}"#, words)).unwrap();
        let error = loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap_err();
        assert!(matches!(error, Error::Input { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("`kvzip`") && message.ends_with(reason), "{message}");
        assert!(error.hint().unwrap().contains("`instruction`"), "{:?}", error.hint());
        assert!(cache.seen() == 0 && cache.is_consistent());
    }
    let config = r#"{"method": "kvzip", "instruction": false}"#;
    let mut cache = loaded.model.new_cache(KvDtype::F16, retention(config, None)).unwrap();
    loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
    assert_eq!(cache.bytes().kept, cache.bytes().raw / 2);
}

/// Stops after so many calls, and notes what it was told.
struct Stops {
    after: usize,
    told: Vec<(usize, usize)>,
}

impl PrefillObserver for Stops {
    fn progress(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.told.push((done, total));
        if self.told.len() > self.after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn both_passes_are_told_of_and_can_be_stopped() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32);
    let prompt = loaded.tokenizer.encode(TEXT).unwrap();
    let config = r#"{"method": "kvzip_plus", "instruction": false, "repeat_chunk": 50}"#;
    let new_cache = || loaded.model.new_cache(KvDtype::F16, adaptive(&loaded.tokenizer, config)).unwrap();
    let mut all = Stops { after: usize::MAX, told: Vec::new() };
    loaded.model.prefill(&prompt, &mut new_cache(), &mut all).unwrap();
    let total = prompt.len() * 2 * 2; // passes and layers
    assert!(all.told.iter().all(|told| told.1 == total) && all.told.is_sorted_by(|a, b| a.0 < b.0));
    assert_eq!(all.told.last(), Some(&(total, total)));
    for after in 0..all.told.len() {
        let mut stops = Stops { after, told: Vec::new() };
        let stopped = loaded.model.prefill(&prompt, &mut new_cache(), &mut stops);
        assert!(matches!(stopped, Err(Error::Interrupted)), "{after}");
        assert_eq!(stops.told.len(), after + 1);
    }
}

/// Words as transformers makes them of the same text, and the turn of the model's own template.
#[test]
fn words_are_those_of_the_chat_template() {
    let Loaded { tokenizer, .. } = smollm2();
    let words = tokenizer.repeat_words().unwrap();
    let text = |ids: &[u32]| tokenizer.decode(ids, false);
    assert_eq!(text(&words.from_start), "\n\nRepeat the previous context exactly.");
    let from_words = "\n\nRepeat the part of the previous context exactly, starting with";
    assert_eq!(text(&words.from_words), from_words);
    assert_eq!(words.turn, tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n").unwrap(), "{}", text(&words.turn));
    // A built-in format.
    let llama2 = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::F32).tokenizer;
    let words = llama2.repeat_words().unwrap();
    assert_eq!(llama2.decode(&words.turn, false), "[/INST]");
}

/// `tests/data/kvpress_kvzip.json` was made by `scripts/compare_kvpress.sh`, which also compares the real model.
#[test]
fn kept_positions_are_those_of_kvpress() {
    let golden = json(data("kvpress_kvzip.json"));
    let prompt = ids(&golden["prompt_tokens"]);
    for (_, kind) in backends() {
        let loaded = Fixture::read("gqa-tied").load_for(&kind, GgmlDType::F32, WeightDtype::F32);
        let words = RepeatWords {
            from_start: ids(&golden["words"]["from_start"]),
            from_words: ids(&golden["words"]["from_words"]),
            turn: ids(&golden["words"]["turn"]),
        };
        let methods = golden["methods"].as_object().unwrap();
        assert_eq!(methods.len(), 2);
        for (method, layers) in methods {
            let config = format!(
                r#"{{"method": "{method}", "kept_ratio": {}, "repeat_chunk": {}}}"#,
                golden["kept_ratio"], golden["repeat_chunk"]
            );
            let retention = Retention::Adaptive {
                config: AdaptiveConfig::parse(&config, None).unwrap().into(),
                classifier: TokenClassifier::default(),
                words: Some(Ok(words.clone()).into()),
            };
            let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
            loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
            for (ledger, expected) in cache.ledgers().iter().zip(layers.as_array().unwrap()) {
                let expected: Vec<Vec<u32>> = expected.as_array().unwrap().iter().map(ids).collect();
                assert_eq!(ledger.positions(), expected, "{method}, layer {}", ledger.layer());
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let layout = HeadLayout { num_heads: 2, num_kv_heads: 1, head_dim: 4 };
    let mut keys = PromptRows::with_capacity(layout, 3);
    keys.push(&[0.5; 12]).unwrap();
    let repeated = Repeated {
        layout,
        queries: &[1.0; 24],
        keys: &keys,
        factors: &[1.0; 3],
        sinks: &[0],
        originals: std::slice::from_ref(&(0..0)),
    };
    assert_eq!(
        largest_weights(repeated).unwrap(),
        [Vec::<f32>::new(), Vec::new()],
        "nothing was there before the repetition"
    );
    for bad in [
        Repeated { queries: &[1.0; 23], ..repeated },
        Repeated { factors: &[1.0; 2], ..repeated },
        Repeated { sinks: &[], ..repeated },
        Repeated { sinks: &[1], ..repeated },
        Repeated { originals: &[], ..repeated },
        Repeated { originals: std::slice::from_ref(&(0..1)), ..repeated },
    ] {
        assert!(matches!(largest_weights(bad), Err(Error::Shape { .. })));
    }
    let no_numbers = Repeated { queries: &[f32::NAN; 24], ..repeated };
    assert!(matches!(largest_weights(no_numbers), Err(Error::NotANumber { .. })));
}
