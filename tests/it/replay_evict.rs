//! `replay` while tokens are generated, against the definition: a dense pass whose masks evolve, with what the prompt's
//! queries see when they are asked again in f64, row by row.

use std::ops::Range;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::WeightDtype;
use candle_core::quantized::GgmlDType;

use crate::numbers::{dot, softmax};
use crate::support::adaptive;
use crate::support::dense::Layer;
use crate::support::evolving::{Turn, check};
use crate::support::fixture::Fixture;

/// Every so many rows of a short prompt one is asked all keys, and the near keys of a row.
const STRIDE: usize = 8;
const NEAR: Range<isize> = -2..8;

/// What a token's attention counts after one more.
fn fade() -> f64 {
    0.5_f64.powf(1.0 / 256.0)
}

/// Sums of the squared weights that the queries of a prompt pay its keys when they are asked again from behind it, `[len]`
/// of the prompt. All of it is one chunk.
///
/// * `settled`: positions that the head held before
/// * `turn`: turns a query by so many positions
fn asked_again(
    numbers: &Layer,
    (head, kv_head): (usize, usize),
    prompt: &Range<usize>,
    settled: &[usize],
    turn: &dyn Fn(&[f32], usize) -> Vec<f32>,
) -> Vec<f64> {
    let (keys, len) = (&numbers.keys[kv_head], prompt.len());
    let scale = 1.0 / (keys[0].len() as f64).sqrt();
    let score = |query: &[f32], position: usize| dot(query, &keys[position]) * scale;
    let mut sums = vec![0.0; len];
    for row in 0..len {
        let query = &numbers.queries[head][prompt.start + row];
        let turned = turn(query, len);
        let is_near = |key: usize| NEAR.contains(&(key.cast_signed() - row.cast_signed()));
        let seen = || settled.iter().copied().chain(prompt.start..=prompt.start + row);
        if row.is_multiple_of(STRIDE) {
            let all = settled.iter().copied().chain(prompt.clone()).map(|position| score(&turned, position));
            let own = (prompt.start..=prompt.start + row).map(|position| score(query, position));
            let weights = softmax(&all.chain(own).collect::<Vec<f64>>());
            let stands_for = STRIDE.min(len - row) as f64;
            for (key, weight) in weights[settled.len()..settled.len() + len].iter().enumerate() {
                sums[key] += if is_near(key) { 0.0 } else { stands_for * weight * weight };
            }
        }
        let rest: f64 = seen().map(|position| score(query, position).exp()).sum();
        let near: Vec<usize> = (0..len).filter(|&key| is_near(key)).collect();
        let exps: Vec<f64> = near.iter().map(|&key| score(&turned, prompt.start + key).exp()).collect();
        let total = rest + exps.iter().sum::<f64>();
        near.iter().zip(exps).for_each(|(&key, exp)| sums[key] += (exp / total) * (exp / total));
    }
    sums
}

/// What each head of a layer holds after each token.
fn simulate(
    sink_tokens: usize,
    turn: &dyn Fn(&[f32], usize) -> Vec<f32>,
    layer: usize,
    turns: &[Turn],
    numbers: &Layer,
    visible: &mut [Vec<bool>],
) -> Vec<Vec<Vec<usize>>> {
    let (kv_heads, len) = (numbers.keys.len(), numbers.input_lengths.len());
    let group = numbers.scores.len() / kv_heads;
    let one_head = |(kv_head, visible): (usize, &mut Vec<bool>)| {
        let heads = || kv_head * group..(kv_head + 1) * group;
        let (mut settled, mut held, mut after) = (Vec::new(), Vec::<usize>::new(), Vec::new());
        let (mut received, mut budget) = (vec![0.0; len], 0);
        for row in 0..len {
            let (index, now) = turns.iter().enumerate().rfind(|(_, turn)| turn.prompt.start <= row).unwrap();
            let prompt = &now.prompt;
            if row == prompt.start {
                settled.append(&mut held);
            }
            held.push(row);
            let sees: Vec<usize> = settled.iter().chain(&held).copied().collect();
            for &column in &sees {
                visible[row * len + column] = true;
            }
            if row + 1 == prompt.end {
                held = turns[index].layers[layer].heads[kv_head].positions.iter().map(|&at| at as usize).collect();
                budget = held.len();
                let outputs = |head: usize, position: usize| numbers.output_lengths[head][position].powi(2);
                let mean = heads().flat_map(|head| prompt.clone().map(move |at| outputs(head, at))).sum::<f64>()
                    / (group * prompt.len()) as f64;
                let tokens = 1.0 / (1.0 - fade());
                for head in heads() {
                    let sums = asked_again(numbers, (head, kv_head), prompt, &settled, turn);
                    for (position, sum) in prompt.clone().zip(sums) {
                        received[position] += sum * outputs(head, position) / mean * tokens / prompt.len() as f64;
                    }
                }
            } else if row >= prompt.end {
                let mut weights = vec![0.0; sees.len()];
                for head in heads() {
                    let scores = sees.iter().map(|column| f64::from(numbers.scores[head][row * len + column]));
                    let own = softmax(&scores.collect::<Vec<f64>>());
                    weights.iter_mut().zip(own).for_each(|(sum, weight)| *sum += weight);
                }
                for (&column, weight) in sees.iter().zip(weights) {
                    received[column] = fade() * received[column] + weight * weight;
                }
                let first_recent = row + 1 - 128.min(budget / 2);
                let worth = |&position: &usize| {
                    if position < sink_tokens || position >= first_recent { f64::INFINITY } else { received[position] }
                };
                while held.len() > budget {
                    let order = |a: &usize, b: &usize| worth(a).total_cmp(&worth(b)).then(b.cmp(a));
                    let goes = *held.iter().min_by(|a, b| order(a, b)).unwrap();
                    held.retain(|&position| position != goes);
                }
            }
            after.push([&settled[..], &held].concat());
        }
        after
    };
    visible.iter_mut().enumerate().map(one_head).collect()
}

#[test]
fn what_is_kept_of_prompts_and_answers_is_what_the_definition_keeps() {
    for name in ["gqa-tied", "mha", "head-dim"] {
        let fixture = Fixture::read(name);
        let (cosines, sines) = fixture.angles(64);
        let (cosines, sines): (Vec<Vec<f32>>, Vec<Vec<f32>>) = (cosines.to_vec2().unwrap(), sines.to_vec2().unwrap());
        let turn = |query: &[f32], positions: usize| {
            let (half, mut turned) = (query.len() / 2, query.to_vec());
            for index in 0..half {
                let (cos, sin) = (cosines[positions][index], sines[positions][index]);
                turned[index] = query[index] * cos - query[half + index] * sin;
                turned[half + index] = query[half + index] * cos + query[index] * sin;
            }
            turned
        };
        for (kept_ratio, sink_tokens, over) in [(0.5, 4, "own"), (0.2, 1, "own"), (0.4, 0, "head")] {
            let config = format!(
                r#"{{"method": "replay", "decode": "evict", "kept_ratio": {kept_ratio}, "sink_tokens": {sink_tokens},
                    "budget_over": "{over}"}}"#
            );
            check(name, &config, &mut |layer, turns, numbers, visible| {
                simulate(sink_tokens, &turn, layer, turns, numbers, visible)
            });
        }
    }
}

/// After every token each head holds as many rows as of the prompt, and hardly more than that is allocated.
#[test]
fn the_budget_is_held_after_every_token() {
    let loaded = Fixture::read("gqa-tied").load(GgmlDType::F32, WeightDtype::Auto);
    let context = loaded.model.config().context_length;
    let prompt: Vec<u32> = (0..100).map(|index| 17 + index * 37 % 900).collect();
    for over in ["own", "head", "layer"] {
        let config =
            format!(r#"{{"method": "replay", "decode": "evict", "kept_ratio": 0.3, "budget_over": "{over}"}}"#);
        let retention = adaptive(&loaded.tokenizer, &config);
        assert_eq!(retention.most_new_rows(500), 1);
        let mut cache = loaded.model.new_cache(KvDtype::F16, retention).unwrap();
        loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        let lens = |cache: &adaptive_kvcache::cache::AdaptiveKvCache| -> Vec<Vec<usize>> {
            cache.ledgers().iter().map(|ledger| ledger.lens()).collect()
        };
        let (before, bytes) = (lens(&cache), cache.bytes());
        let heads: usize = before.iter().map(Vec::len).sum();
        let token = bytes.kept / before.iter().flatten().sum::<usize>();
        for step in prompt.len()..context {
            loaded.model.decode((step as u32 * 37) % 900, &mut cache).unwrap();
            assert_eq!(lens(&cache), before, "{over}, {step}");
            // One row of each head, its position and its note.
            assert!(cache.bytes().allocated <= bytes.allocated + heads * (token + 8), "{over}, {step}");
        }
        // The newest are always among them.
        let newest = u32::try_from(context - 1).unwrap();
        let holds = |head: Vec<u32>| head.len() < 6 || head.contains(&newest);
        assert!(cache.ledgers().iter().flat_map(|ledger| ledger.positions().into_owned()).all(holds), "{over}");
    }
}

/// A token that nothing has gone before is computed as with the full cache.
#[test]
fn where_nothing_has_gone_nothing_changes() {
    let loaded = Fixture::read("mha").load(GgmlDType::F32, WeightDtype::Auto);
    let prompt: Vec<u32> = (0..60).map(|index| 17 + index * 37 % 900).collect();
    let read = |retention| {
        let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap();
        loaded.model.prefill(&prompt, &mut cache, &mut ()).unwrap();
        let logits = [5, 6].map(|id| loaded.model.decode(id, &mut cache).unwrap());
        (logits, cache.mean_rows())
    };
    let everything = r#"{"method": "replay", "decode": "evict", "kept_ratio": 1.0}"#;
    let (evicting, rows) = read(adaptive(&loaded.tokenizer, everything));
    let (full, _) = read(adaptive_kvcache::cache::Retention::Full);
    assert!(evicting[0] == full[0] && evicting[1] != full[1]);
    assert_eq!(rows, 60.0);
}
