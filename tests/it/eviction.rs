//! Eviction while tokens are generated (`"decode": "evict"`): against a dense pass whose masks evolve, step by step; and
//! what it takes.

use std::ops::Range;

use adaptive_kvcache::backend::KernelRows;
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, LayerSummary, Ledger, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype};
use adaptive_kvcache::compress::AdaptiveConfig;
use adaptive_kvcache::model::Llama;
use adaptive_kvcache::tokens::TokenClass;
use candle_core::IndexOp;
use candle_core::quantized::GgmlDType;

use crate::support::fixture::Fixture;
use crate::support::{adaptive, max_difference};

/// Between two orders of the same f32 additions.
const TOLERANCE: f32 = 1e-4;

/// Levels of all kinds: with one of these thresholds each, heads of the fixtures end up at several.
const CONFIGS: [&str; 10] = [
    r#"{"decode": "evict", "frequency_ratio": 0.3, "locality_ratio": 0.2, "recovery_threshold": 0.2}"#,
    r#"{"decode": "evict", "criterion": "mass", "frequency_ratio": 0.3, "locality_ratio": 0.3, "recovery_threshold": 0.6}"#,
    r#"{"decode": "evict", "criterion": "mass", "policies": ["special", "full"], "recovery_threshold": 0.0, "sink_tokens": 2}"#,
    r#"{"decode": "evict", "criterion": "mass", "policies": ["punctuation", "locality", "frequency", "full"],
        "frequency_ratio": 0.2, "locality_ratio": 0.2, "recovery_threshold": 0.4}"#,
    r#"{"decode": "evict", "method": "streaming_llm", "kept_ratio": 0.4, "sink_tokens": 2}"#,
    r#"{"decode": "evict", "method": "h2o", "kept_ratio": 0.35}"#,
    r#"{"decode": "evict", "method": "h2o", "kept_ratio": 0.05}"#,
    r#"{"decode": "evict", "method": "h2o", "budget_over": "pool"}"#,
    r#"{"decode": "evict", "method": "tova"}"#,
    r#"{"decode": "evict", "method": "tova", "kept_ratio": 0.2}"#,
];

/// A prompt and what its profile chose; tokens up to the next turn's prompt were decoded.
struct Turn {
    prompt: Range<usize>,
    layers: Vec<LayerSummary>,
}

/// A row that a head holds of its last segment.
#[derive(Clone, Copy)]
struct Row {
    position: usize,
    /// Since the segment's prompt began.
    received: f32,
    /// From the newest token, over all heads of the layer.
    newest: f32,
}

/// What a head keeps of its rows after a decoding step, by the definitions.
///
/// * `first`: of the segment
/// * `seen`: tokens so far
fn still_kept(
    config: &AdaptiveConfig,
    (level, budget): (usize, usize),
    (first, seen): (usize, usize),
    classes: &[TokenClass],
    mut rows: Vec<Row>,
) -> Vec<usize> {
    let count = |ratio: f64| usize::try_from((ratio * (seen - first) as f64 + 1e-9).floor() as i64).unwrap();
    let Some(method) = config.budgeted() else {
        let search = config.fastgen().unwrap();
        rows.sort_by(|a, b| b.received.total_cmp(&a.received).then(a.position.cmp(&b.position)));
        let names = config.level_names(level);
        let kept = |(rank, row): (usize, &Row)| {
            let class = classes[row.position];
            names.iter().any(|&name| match name {
                "special" => class.special || row.position < search.sink_tokens,
                "punctuation" => class.punctuation,
                "frequency" => rank < count(search.frequency_ratio),
                "locality" => row.position + count(search.locality_ratio) >= seen,
                "full" => true,
                _ => panic!("{name}"),
            })
        };
        return rows.iter().enumerate().filter(|&(rank, row)| kept((rank, row))).map(|(_, row)| row.position).collect();
    };
    let first_recent = seen - budget.div_ceil(2).min(seen);
    let settings = method.method.settings().unwrap();
    let is_sink = |row: &Row| (row.position as u64) < settings["sink_tokens"].as_u64().unwrap();
    let worth = |row: &Row| match method.method.name() {
        "streaming_llm" if is_sink(row) => f32::INFINITY,
        "streaming_llm" => row.position as f32,
        "h2o" if row.position >= first_recent => f32::INFINITY,
        "h2o" => row.received,
        "tova" if row.position + 1 == seen => f32::INFINITY,
        "tova" => row.newest,
        name => panic!("{name}"),
    };
    rows.sort_by(|a, b| worth(b).total_cmp(&worth(a)).then(a.position.cmp(&b.position)));
    rows.truncate(budget);
    rows.into_iter().map(|row| row.position).collect()
}

/// What each head of a layer holds after each token, `[kv_heads]` of `[seq_len]`, ascending: settled rows first.
fn simulate(
    config: &AdaptiveConfig,
    classes: &[TokenClass],
    turns: &[Turn],
    layer: usize,
    scores: &[Vec<f32>],
    visible: &mut [Vec<bool>],
) -> Vec<Vec<Vec<usize>>> {
    let (kv_heads, len) = (visible.len(), classes.len());
    let group_size = scores.len() / kv_heads;
    // `[heads]` of the weights with which a row sees the columns that its head's mask shows.
    let weights = |head: usize, row: usize, visible: &[bool]| -> Vec<f32> {
        let seen = |column: &usize| visible[row * len + column];
        let score = |column: usize| scores[head][row * len + column];
        let max = (0..=row).filter(seen).map(score).fold(f32::NEG_INFINITY, f32::max);
        let mut weights = vec![0.0; len];
        (0..=row).filter(seen).for_each(|column| weights[column] = (score(column) - max).exp());
        let sum: f32 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    };
    let mut held: Vec<Vec<Vec<usize>>> = vec![Vec::with_capacity(len); kv_heads];
    for (index, turn) in turns.iter().enumerate() {
        let end = turns.get(index + 1).map_or(len, |next| next.prompt.start);
        let settled: Vec<Vec<usize>> = held.iter().map(|held| held.last().cloned().unwrap_or_default()).collect();
        let mut received = vec![vec![0.0_f32; len]; kv_heads];
        let mut kept: Vec<Vec<usize>> = vec![Vec::new(); kv_heads];
        for row in turn.prompt.start..end {
            let mut newest = vec![0.0_f32; len];
            let in_prompt = turn.prompt.contains(&row);
            for kv_head in 0..kv_heads {
                kept[kv_head].push(row);
                for &column in settled[kv_head].iter().chain(&kept[kv_head]) {
                    visible[kv_head][row * len + column] = true;
                }
                for head in kv_head * group_size..(kv_head + 1) * group_size {
                    for (column, weight) in weights(head, row, &visible[kv_head]).into_iter().enumerate() {
                        received[kv_head][column] += weight;
                        newest[column] += weight;
                    }
                }
            }
            for kv_head in 0..kv_heads {
                let choice = &turn.layers[layer].heads[kv_head];
                if row + 1 == turn.prompt.end {
                    kept[kv_head] = choice.positions.iter().map(|&position| position as usize).collect();
                } else if !in_prompt {
                    let row_of = |&position: &usize| Row {
                        position,
                        received: received[kv_head][position],
                        newest: newest[position],
                    };
                    let rows = kept[kv_head].iter().map(row_of).collect();
                    let rule = (choice.level.unwrap(), choice.positions.len());
                    kept[kv_head] = still_kept(config, rule, (turn.prompt.start, row + 1), classes, rows);
                    kept[kv_head].sort_unstable();
                }
                held[kv_head].push([&settled[kv_head][..], &kept[kv_head]].concat());
            }
        }
    }
    held
}

fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<Vec<usize>>> {
    let of_layer = |ledger: &&Ledger| {
        let sorted = |positions: &[u32]| {
            let mut positions: Vec<usize> = positions.iter().map(|&position| position as usize).collect();
            positions.sort_unstable();
            positions
        };
        ledger.positions().iter().map(|head| sorted(head)).collect()
    };
    cache.ledgers().iter().map(of_layer).collect()
}

/// Prompts and decoded tokens through the model; then through the dense pass. Kept positions are compared after each
/// token, logits after each token that has some.
fn check(fixture: &Fixture, loaded: &Loaded, config: &str, prompts: &[Vec<u32>], decoded: usize, plain: bool) {
    let parsed = AdaptiveConfig::parse(config, None).unwrap();
    let classifier = loaded.tokenizer.classifier(&parsed);
    let retention = adaptive(&loaded.tokenizer, config);
    let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
    let (mut all, mut turns): (Vec<u32>, Vec<Turn>) = (Vec::new(), Vec::new());
    // Rows, what is held after them, and their logits.
    let mut outputs = Vec::new();
    for prompt in prompts {
        let start = all.len();
        all.extend(prompt);
        let prefill = loaded.model.prefill(prompt, &mut cache, &mut ()).unwrap();
        turns.push(Turn { prompt: start..all.len(), layers: prefill.layers });
        outputs.push((all.len() - 1, positions(&cache), prefill.logits));
        for step in 0..decoded {
            // Some of them are punctuation, or special.
            let id = if step % 11 == 5 { prompts[0][prompts[0].len() - 1] } else { (step as u32 * 37) % 900 };
            all.push(id);
            let decode = if plain { Llama::decode_plain } else { Llama::decode };
            let logits = decode(&loaded.model, id, &mut cache).unwrap();
            outputs.push((all.len() - 1, positions(&cache), logits));
        }
    }
    let classes = classifier.classify_all(&all);
    let (kv_heads, len) = (fixture.size("num_key_value_heads"), all.len());
    let mut held = Vec::new();
    let mut visible = |layer: usize, scores: &[Vec<f32>]| {
        let mut visible = vec![vec![false; len * len]; kv_heads];
        held.push(simulate(&parsed, &classes, &turns, layer, scores, &mut visible));
        visible
    };
    let expected = fixture.dense_logits_where(&all, &mut visible, len, GgmlDType::F32);
    for (row, held_now, logits) in outputs {
        for (layer, heads) in held_now.iter().enumerate() {
            for (kv_head, positions) in heads.iter().enumerate() {
                let expected = &held[layer][kv_head][row];
                assert_eq!(positions, expected, "row {row}, layer {layer}, KV head {kv_head}, {config}");
            }
        }
        let expected: Vec<f32> = expected.i(row).unwrap().to_vec1().unwrap();
        let difference = max_difference(&logits, &expected);
        assert!(difference < TOLERANCE, "row {row}, {config}: {difference}");
    }
    let evicted = |row: usize, head: &[Vec<usize>]| head[row].len() < head[row - 1].len() + 1;
    let last = turns.last().unwrap().prompt.end;
    let steps_that_evict = (last..len).filter(|&row| held.iter().flatten().any(|head| evicted(row, head))).count();
    assert!(steps_that_evict > decoded / 2, "hardly anything is evicted under {config}");
}

#[test]
fn evicting_while_decoding_equals_dense_attention_with_evolving_masks() {
    const STEPS: usize = 64;
    let text = "The Reform Club was founded in 1836, and its members: gentlemen; dined there every day.";
    for name in ["mha", "gqa-tied", "head-dim", "llama3-rope"] {
        let fixture = Fixture::read(name);
        // Stored weights decode in steps of a team, and through tensors.
        let loaded = fixture.load(GgmlDType::F32, WeightDtype::Auto);
        let prompt = loaded.tokenizer.encode(text).unwrap();
        for config in CONFIGS {
            for plain in [false, true] {
                check(&fixture, &loaded, config, std::slice::from_ref(&prompt), STEPS, plain);
            }
        }
    }
}

/// What is held when a further prompt comes stays; from then on only the prompt, and what comes after it, is evicted.
#[test]
fn evicting_over_several_turns_equals_dense_attention_with_evolving_masks() {
    let texts = ["The Reform Club was founded in 1836, and its members dined there.", "When?", "And why; who knows!"];
    for name in ["mha", "gqa-tied"] {
        let fixture = Fixture::read(name);
        let loaded = fixture.load(GgmlDType::F32, WeightDtype::F32);
        let prompts: Vec<Vec<u32>> = texts.iter().map(|text| loaded.tokenizer.encode(text).unwrap()).collect();
        for config in CONFIGS {
            check(&fixture, &loaded, config, &prompts, 12, false);
        }
    }
}

/// Several sequences at a time, over any number of threads and in every format: what each does alone.
#[test]
fn steps_of_a_batch_evict_what_single_ones_evict() {
    let fixture = Fixture::read("head-dim");
    let loaded = fixture.load(GgmlDType::F32, WeightDtype::Auto);
    let model = &loaded.model;
    let prompt = loaded.tokenizer.encode("The Reform Club was founded in 1836, and its members: gentlemen.").unwrap();
    for dtype in KvDtype::ALL.into_iter().filter(|&dtype| dtype != KvDtype::Mixed) {
        let caches = CONFIGS.iter().enumerate().map(|(index, config)| {
            let retention = if index == 1 { Retention::Full } else { adaptive(&loaded.tokenizer, config) };
            let mut cache = model.new_cache(dtype, retention).unwrap();
            model.prefill(&prompt[..prompt.len() - index], &mut cache, &mut ()).unwrap();
            cache
        });
        let mut together: Vec<AdaptiveKvCache> = caches.collect();
        let mut single = together.clone();
        let mut logits = Vec::new();
        for step in 0..40 {
            let ids: Vec<u32> = (0..together.len() as u32).map(|index| (17 + step * 37 + index * 101) % 900).collect();
            let mut caches: Vec<&mut AdaptiveKvCache> = together.iter_mut().collect();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + step as usize % 3).build().unwrap();
            pool.install(|| model.decode_batch(&ids, &mut caches, &mut logits)).unwrap();
            for (index, logits) in logits.chunks_exact(logits.len() / ids.len()).enumerate() {
                let own = model.decode(ids[index], &mut single[index]).unwrap();
                assert!(own == logits, "{dtype:?}, step {step}: a batch changes a sequence's result");
                assert_eq!(positions(&together[index]), positions(&single[index]));
            }
        }
    }
}

/// Until the context is full, a method's cache never grows beyond what it kept of the prompt, and one row while it steps.
#[test]
fn a_budget_is_held_until_the_context_is_full() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let context = loaded.model.config().context_length;
    let prompt: Vec<u32> = (0..40).map(|index| 17 + index * 37 % 900).collect();
    for config in CONFIGS.iter().filter(|config| config.contains("method")) {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let mut cache = loaded.model.new_cache(dtype, adaptive(&loaded.tokenizer, config)).unwrap();
            loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
            let (kept, heads) = (cache.bytes().kept, cache.num_layers() * cache.ledgers()[0].positions().len());
            let token = cache.layers::<KernelRows>().unwrap()[0].token_bytes();
            // Positions and notes are 8 bytes a row.
            let most = kept + heads * token + (kept / token + heads) * 8;
            for step in prompt.len()..context {
                loaded.model.decode((step as u32 * 37) % 900, &mut cache).unwrap();
                let bytes = cache.bytes();
                assert_eq!(bytes.kept, kept, "{config}");
                assert!(bytes.allocated <= most, "{config}: {} of {most} bytes", bytes.allocated);
            }
            assert_eq!(cache.seen(), context);
        }
    }
}

/// What a batch puts aside for the tokens of a text.
#[test]
fn generated_tokens_add_one_row_at_most_where_a_budget_is_held() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let rows = |config: &str| adaptive(&loaded.tokenizer, config).most_new_rows(9);
    assert_eq!(rows(r#"{"decode": "evict", "method": "h2o"}"#), 1);
    assert_eq!(rows(r#"{"decode": "append", "method": "h2o"}"#), 9);
    // All of them may be kept.
    assert_eq!(rows(r#"{"decode": "evict"}"#), 9);
    assert_eq!(adaptive(&loaded.tokenizer, r#"{"decode": "evict", "method": "h2o"}"#).most_new_rows(0), 0);
    assert_eq!(Retention::Full.most_new_rows(9), 9);
}

/// What a level keeps of a long text is a share of it, and what is allocated follows.
#[test]
fn what_a_search_evicts_is_given_back() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let context = loaded.model.config().context_length;
    let config = r#"{"decode": "evict", "criterion": "mass", "policies": ["special", "frequency", "locality", "full"],
                     "frequency_ratio": 0.1, "locality_ratio": 0.1, "recovery_threshold": 0.0}"#;
    let mut cache = loaded.model.new_cache(KvDtype::F16, adaptive(&loaded.tokenizer, config)).unwrap();
    loaded.model.prefill(&[20; 100], &mut cache, &mut ()).unwrap();
    for step in 100..context {
        loaded.model.decode(20 + (step as u32 * 37) % 900, &mut cache).unwrap();
    }
    // Every head is recovered by its special tokens, of which there is the first.
    assert!(cache.ledgers().iter().flat_map(|ledger| ledger.positions().into_owned()).all(|head| *head == [0]));
    assert_eq!(cache.bytes().kept, 4 * cache.layers::<KernelRows>().unwrap()[0].token_bytes());
}
