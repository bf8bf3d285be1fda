//! `rkv` against the definition: a dense pass whose masks evolve, with whole attention maps and whole matrices of cosines.

use std::ops::Range;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::WeightDtype;
use adaptive_kvcache::compress::{AdaptiveConfig, ratio_count};
use candle_core::quantized::GgmlDType;

use crate::numbers::{dot, softmax};
use crate::support::adaptive;
use crate::support::dense::Layer;
use crate::support::evolving::{Turn, check};
use crate::support::fixture::Fixture;

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
fn simulate(settings: Settings, turns: &[Turn], numbers: &Layer, visible: &mut [Vec<bool>]) -> Vec<Vec<Vec<usize>>> {
    let len = numbers.input_lengths.len();
    let mut all = Vec::new();
    for (kv_head, visible) in visible.iter_mut().enumerate().take(numbers.keys.len()) {
        let (mut settled, mut held): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        let (mut budget, mut after) = (0, Vec::new());
        for row in 0..len {
            let prompt = &turns.iter().rfind(|turn| turn.prompt.start <= row).unwrap().prompt;
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
        for settings in SETTINGS {
            check(name, &settings.config(), &mut |_, turns, numbers, visible| {
                simulate(settings, turns, numbers, visible)
            });
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
