//! `rkv` against the definition: a dense pass whose masks evolve, with whole attention maps and whole matrices of cosines.

use std::ops::Range;

use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype};
use adaptive_kvcache::checkpoint::WeightDtype;
use adaptive_kvcache::compress::{AdaptiveConfig, ratio_count};
use adaptive_kvcache::model::Llama;
use candle_core::IndexOp;
use candle_core::quantized::GgmlDType;

use crate::numbers::{dot, softmax};
use crate::support::dense::{Layer, forward};
use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, max_difference};

/// Between two orders of the same f32 additions.
const TOLERANCE: f32 = 1e-4;

#[derive(Clone, Copy)]
struct Settings {
    ratio: f64,
    window: usize,
    kernel: usize,
    importance: f64,
    every: usize,
}

impl Settings {
    fn config(&self) -> String {
        let Self { ratio, window, kernel, importance, every } = self;
        format!(
            r#"{{"method": "rkv", "decode": "evict", "kept_ratio": {ratio}, "observation_window": {window},
                "pool_kernel": {kernel}, "importance": {importance}, "evict_every": {every}}}"#
        )
    }
}

/// What stays of some rows of a KV head, ascending.
///
/// * `rows`: positions, ascending; those from `first_recent` on stay
/// * `asking`: rows whose attention counts
fn still_kept(
    settings: Settings,
    numbers: &Layer,
    kv_head: usize,
    (rows, first_recent): (&[usize], usize),
    asking: Range<usize>,
    budget: usize,
) -> Vec<usize> {
    let (group, len) = (numbers.scores.len() / numbers.keys.len(), numbers.input_lengths.len());
    let before: Vec<usize> = rows.iter().copied().filter(|&row| row < first_recent).collect();
    let mut importance = vec![0.0; before.len()];
    for asking_row in asking.clone() {
        let score = |column: usize| {
            let heads = kv_head * group..(kv_head + 1) * group;
            let scores = heads.map(|head| f64::from(numbers.scores[head][asking_row * len + column]));
            scores.fold(f64::NEG_INFINITY, f64::max)
        };
        let scores: Vec<f64> = before.iter().map(|&column| score(column)).collect();
        for (sum, weight) in importance.iter_mut().zip(softmax(&scores)) {
            *sum += weight / asking.len() as f64;
        }
    }
    let half = settings.kernel / 2;
    let pooled = (0..before.len()).map(|at| {
        (at.saturating_sub(half)..(at + half + 1).min(before.len())).map(|near| importance[near]).fold(0.0, f64::max)
    });
    let key = |row: usize| &numbers.keys[kv_head][row][..];
    let cosine = |a: usize, b: usize| {
        if a == b { 0.0 } else { dot(key(a), key(b)) / (dot(key(a), key(a)) * dot(key(b), key(b))).sqrt() }
    };
    let mut means = vec![0.0; rows.len()];
    for &row in rows {
        let mut cosines: Vec<f64> = rows.iter().map(|&other| cosine(row, other)).collect();
        if let Some(last) = cosines.iter().rposition(|&cosine| cosine > 0.5) {
            cosines[last] = 0.0;
        }
        means.iter_mut().zip(cosines).for_each(|(mean, cosine)| *mean += cosine / rows.len() as f64);
    }
    let share = settings.importance;
    let scores: Vec<f64> =
        pooled.zip(softmax(&means)).map(|(own, alike)| share * own - (1.0 - share) * alike).collect();
    let mut order: Vec<usize> = (0..before.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let recent = &rows[before.len()..];
    let mut kept: Vec<usize> = recent.iter().rev().take(budget).copied().collect();
    kept.extend(order.into_iter().take(budget - kept.len()).map(|at| before[at]));
    kept.sort_unstable();
    kept
}

/// What each head of a layer holds after each token, `[kv_heads]` of `[len]`.
fn simulate(
    settings: Settings,
    prompts: &[Range<usize>],
    numbers: &Layer,
    visible: &mut [Vec<bool>],
) -> Vec<Vec<Vec<usize>>> {
    let len = numbers.input_lengths.len();
    let mut all = Vec::new();
    for (kv_head, visible) in visible.iter_mut().enumerate().take(numbers.keys.len()) {
        let (mut settled, mut held): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        let (mut budget, mut after) = (0, Vec::new());
        for row in 0..len {
            let prompt = prompts.iter().rfind(|prompt| prompt.start <= row).unwrap();
            if row == prompt.start {
                settled.append(&mut held);
            }
            held.push(row);
            for &column in settled.iter().chain(&held) {
                visible[row * len + column] = true;
            }
            let first_recent = (row + 1).saturating_sub(settings.window);
            if row + 1 == prompt.end {
                budget = ratio_count(settings.ratio, prompt.len()).max(1);
                let asking = first_recent.max(prompt.start)..row + 1;
                held = still_kept(settings, numbers, kv_head, (&held, first_recent), asking, budget);
            } else if row >= prompt.end && held.len() >= budget + settings.every {
                let asking = first_recent.max(prompt.end)..row + 1;
                held = still_kept(settings, numbers, kv_head, (&held, first_recent), asking, budget);
            }
            after.push([&settled[..], &held].concat());
        }
        all.push(after);
    }
    all
}

/// `[layers]` of `[kv_heads]` of positions, ascending.
fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<Vec<usize>>> {
    let sorted = |head: &Vec<u32>| {
        let mut head: Vec<usize> = head.iter().map(|&position| position as usize).collect();
        head.sort_unstable();
        head
    };
    cache.ledgers().iter().map(|ledger| ledger.positions().iter().map(sorted).collect()).collect()
}

type Decode = fn(&Llama, u32, &mut AdaptiveKvCache) -> adaptive_kvcache::Result<Vec<f32>>;

fn check(fixture: &Fixture, model: &Llama, new_cache: AdaptiveKvCache, settings: Settings, decode: Decode, what: &str) {
    let mut cache = new_cache;
    let (mut all, mut prompts, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    for (len, decoded) in [(50_u32, 40_u32), (9, 25)] {
        let prompt: Vec<u32> = (0..len).map(|index| 17 + (index * 37 + len * 7) % 900).collect();
        let start = all.len();
        all.extend(&prompt);
        let prefill = model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        prompts.push(start..all.len());
        outputs.push((all.len() - 1, positions(&cache), prefill.logits));
        for step in 0..decoded {
            let id = (step * 53 + len) % 900;
            all.push(id);
            let logits = decode(model, id, &mut cache).unwrap();
            outputs.push((all.len() - 1, positions(&cache), logits));
        }
    }
    let (kv_heads, len) = (fixture.size("num_key_value_heads"), all.len());
    let mut held = Vec::new();
    let mut visible = |_: usize, numbers: &Layer| {
        let mut visible = vec![vec![false; len * len]; kv_heads];
        held.push(simulate(settings, &prompts, numbers, &mut visible));
        visible
    };
    let (_, expected) = forward(fixture, &all, &mut visible);
    let mut evictions = 0;
    for (row, now, logits) in outputs {
        for (layer, heads) in now.iter().enumerate() {
            for (kv_head, positions) in heads.iter().enumerate() {
                let head = &held[layer][kv_head];
                assert_eq!(positions, &head[row], "{what}, row {row}, layer {layer}, KV head {kv_head}");
                evictions += usize::from(head[row].len() < head[row - 1].len());
            }
        }
        let expected: Vec<f32> = expected.i(row).unwrap().to_vec1().unwrap();
        let difference = max_difference(&logits, &expected);
        assert!(difference < TOLERANCE, "{what}, row {row}: {difference}");
    }
    assert!(evictions > 0, "{what}");
}

const SETTINGS: [Settings; 4] = [
    Settings { ratio: 0.4, window: 4, kernel: 3, importance: 0.1, every: 7 },
    Settings { ratio: 0.3, window: 8, kernel: 7, importance: 0.6, every: 11 },
    // Fewer tokens than are observed; a budget of fewer.
    Settings { ratio: 0.2, window: 6, kernel: 1, importance: 0.3, every: 2 },
    Settings { ratio: 0.5, window: 3, kernel: 5, importance: 0.0, every: 1 },
];

#[test]
fn what_is_kept_of_prompts_and_answers_is_what_the_definition_keeps() {
    for name in ["gqa-tied", "mha", "head-dim"] {
        let fixture = Fixture::read(name);
        let kernels = fixture.load(GgmlDType::F32, WeightDtype::Auto);
        let candle = fixture.load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::F32);
        for settings in SETTINGS {
            let ways: [(&str, _, Decode); 3] = [
                ("team", &kernels, Llama::decode),
                ("plain", &kernels, Llama::decode_plain),
                ("candle", &candle, Llama::decode),
            ];
            for (way, loaded, decode) in ways {
                let retention = adaptive(&loaded.tokenizer, &settings.config());
                let cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
                check(
                    &fixture,
                    &loaded.model,
                    cache,
                    settings,
                    decode,
                    &format!("{name}, {way}, {}", settings.config()),
                );
            }
        }
    }
}

/// Between two evictions the cache grows by `evict_every` rows, and goes back to what it kept of the prompt.
#[test]
fn memory_swings_between_the_budget_and_some_tokens_more() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let retention = adaptive(&loaded.tokenizer, r#"{"method": "rkv", "decode": "evict", "kept_ratio": 0.5}"#);
    assert_eq!([0, 9, 500].map(|tokens| retention.most_new_rows(tokens)), [0, 9, 128]);
    let mut cache = loaded.model.new_cache(KvDtype::F16, retention).unwrap();
    let prompt: Vec<u32> = (0..100).map(|index| 17 + index * 37 % 900).collect();
    loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
    let (kept, allocated) = (cache.bytes().kept, cache.bytes().allocated);
    let token = kept / 50;
    for step in 1..=400_usize {
        loaded.model.decode((step as u32 * 37) % 900, &mut cache).unwrap();
        assert_eq!(cache.bytes().kept, kept + step % 128 * token, "after {step}");
        if step % 128 == 0 {
            // Slack for the next rows, and the queries that are noted.
            assert!(cache.bytes().allocated < allocated * 5, "{} for {allocated}", cache.bytes().allocated);
        }
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    for (settings, reason) in [
        (r#""importance": 1.5"#, "in 0..=1"),
        (r#""evict_every": 0"#, "at least 1"),
        (r#""pool_kernel": 4"#, "odd"),
        (r#""observation_window": 0"#, "at least 1"),
    ] {
        let error = AdaptiveConfig::parse(&format!(r#"{{"method": "rkv", {settings}}}"#), None).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    let error = AdaptiveConfig::parse(r#"{"method": "kvzip", "instruction": "no"}"#, None).unwrap_err();
    assert!(error.to_string().contains("expected true or false, got `\"no\"`"), "{error}");
}
