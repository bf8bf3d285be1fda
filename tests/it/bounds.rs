//! What sequences do at their bounds: a budget in bytes that holds whatever is read and written, and the end of the context.

use adaptive_kvcache::Error;
use adaptive_kvcache::backend::{BackendKind, HeadCache, KernelRows};
use adaptive_kvcache::cache::{AdaptiveKvCache, Bounds, KvDtype, NOTE_BYTES, Overflow, Retention};
use adaptive_kvcache::checkpoint::{self, Loaded, WeightDtype};
use adaptive_kvcache::compress::{METHODS, Method};
use adaptive_kvcache::generate::{FinishReason, Generation, GenerationOptions};
use adaptive_kvcache::model::PrefillOptions;
use candle_core::quantized::GgmlDType;
use tempfile::TempDir;

use crate::support::fixture::Fixture;
use crate::support::{adaptive, candle_on_cpu, data, max_difference};

const LAYERS: usize = 2;
const HEADS: usize = 4;
const HEAD_DIM: usize = 32;
const CONTEXT: usize = 512;

fn model() -> Loaded {
    Fixture::read("head-dim").load(GgmlDType::F32, WeightDtype::Auto)
}

/// Ids without much of a pattern.
fn some_ids(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| u32::try_from((7 * i * i + 5 * i + 11 * seed) % 961 + 3).unwrap()).collect()
}

fn config(method: &dyn Method, bytes: usize) -> String {
    format!(r#"{{"method": "{}", "kv_budget": "{bytes}B"}}"#, method.name())
}

fn new_cache(loaded: &Loaded, dtype: KvDtype, config: &str, bounds: Bounds) -> AdaptiveKvCache {
    loaded.model.new_cache(dtype, adaptive(&loaded.tokenizer, config)).unwrap().with_bounds(bounds)
}

/// Bytes of so many rows of each head.
fn rows(count: usize, dtype: KvDtype) -> usize {
    let center = HEAD_DIM * 4 * (usize::from(dtype.has_key_blocks()) + usize::from(dtype == KvDtype::Mixed));
    LAYERS * HEADS * (count * (dtype.token_bytes(HEAD_DIM) + NOTE_BYTES) + center)
}

fn decode(loaded: &Loaded, cache: &mut AdaptiveKvCache, id: u32) -> Vec<f32> {
    loaded.model.make_room(cache, 1, PrefillOptions::default(), &mut ()).unwrap();
    loaded.model.decode(id, cache).unwrap()
}

fn positions(cache: &AdaptiveKvCache) -> Vec<Vec<u32>> {
    cache.ledgers().iter().flat_map(|ledger| ledger.positions().to_vec()).collect()
}

#[test]
fn a_budget_in_bytes_is_never_exceeded_and_well_used() {
    let loaded = model();
    let bounds = Bounds { ahead: 16, protected: 10, ..Bounds::default() };
    for &method in METHODS {
        for dtype in [KvDtype::F16, KvDtype::Q8_0, KvDtype::Mixed] {
            let budget = rows(60, dtype);
            let case = format!("{}, {dtype:?}", method.name());
            let mut cache = new_cache(&loaded, dtype, &config(method, budget), bounds);
            let expect = |cache: &AdaptiveKvCache, when: &str| {
                let allocated = cache.bytes().allocated;
                assert!(allocated <= budget, "{case}, {when}: {allocated} of {budget}");
                assert!(cache.is_consistent(), "{case}, {when}");
            };
            let mut most = 0;
            for (turn, (read, written)) in [(20, 3), (100, 70), (7, 40), (150, 5), (1, 30)].into_iter().enumerate() {
                loaded.model.prefill(&some_ids(read, turn), &mut cache, &mut ()).unwrap();
                expect(&cache, "read");
                for id in some_ids(written, turn + 9) {
                    let logits = decode(&loaded, &mut cache, id);
                    assert!(logits.iter().all(|logit| logit.is_finite()), "{case}");
                    expect(&cache, "written");
                    let rows: usize = cache.ledgers().iter().map(|ledger| ledger.num_rows()).sum();
                    most = most.max(cache.bytes().kept + rows * NOTE_BYTES);
                }
                let (seen, kept) = (cache.seen(), positions(&cache));
                // Sinks, and the newest tokens.
                let newest =
                    (seen - 10..seen).chain(0..4).all(|at| kept.iter().all(|head| head.contains(&(at as u32))));
                assert!(newest || seen < 30, "{case}, turn {turn}: {kept:?}");
            }
            assert_eq!(cache.seen(), 426, "{case}");
            assert!(most * 10 >= budget * 9, "{case}: {most} of {budget} were used at most");
        }
    }
}

/// A prompt that fills the budget leaves no room; then the lowest of what it left go.
#[test]
fn the_first_token_has_room_whatever_the_prompt_filled() {
    let loaded = model();
    for &method in METHODS {
        let budget = rows(60, KvDtype::F16);
        let mut cache = new_cache(&loaded, KvDtype::F16, &config(method, budget), Bounds::default());
        loaded.model.prefill(&some_ids(150, 1), &mut cache, &mut ()).unwrap();
        assert_eq!(loaded.model.room(&cache), 0, "{}", method.name());
        let before = candidates(&cache);
        decode(&loaded, &mut cache, 7);
        assert!((1..60).contains(&loaded.model.room(&cache)) && cache.bounds().ahead == 0);
        for (before, after) in before.iter().zip(candidates(&cache)) {
            assert!(after[..after.len() - 1].iter().all(|row| before.contains(row)), "{}", method.name());
            assert_eq!(after.last().unwrap().0, 150);
        }
        for id in some_ids(100, 2) {
            decode(&loaded, &mut cache, id);
            assert!(cache.bytes().allocated <= budget, "{}", method.name());
        }
    }
}

#[test]
fn a_budget_that_is_not_reached_changes_nothing() {
    let loaded = model();
    for dtype in [KvDtype::F16, KvDtype::Q4_0] {
        let mut full = loaded.full_cache(dtype).unwrap();
        let bounds = Bounds { ahead: 16, ..Bounds::default() };
        let mut bounded = new_cache(&loaded, dtype, r#"{"method": "replay", "kv_budget": "64MB"}"#, bounds);
        for turn in 0..3 {
            let ids = some_ids(50, turn);
            let logits =
                [&mut full, &mut bounded].map(|cache| loaded.model.prefill(&ids, cache, &mut ()).unwrap().logits);
            assert_eq!(logits[0], logits[1]);
            for id in some_ids(20, turn + 5) {
                assert_eq!(decode(&loaded, &mut full, id), decode(&loaded, &mut bounded, id), "{dtype:?}");
            }
        }
        assert_eq!(bounded.bytes().kept, full.bytes().kept);
    }
}

/// Of what is neither safe nor new, the rows that stay have scores at least as high as those that went: of each head, where
/// each has as many rows as any other; of all heads, where they compete.
#[test]
fn the_best_of_old_and_new_stay() {
    let loaded = model();
    for (over, is_pooled) in [("own", false), ("pool", true)] {
        let budget = rows(40, KvDtype::F16);
        let config = format!(r#"{{"method": "keydiff", "kv_budget": "{budget}B", "budget_over": "{over}"}}"#);
        let bounds = Bounds { protected: 6, ..Bounds::default() };
        let mut cache = new_cache(&loaded, KvDtype::F16, &config, bounds);
        loaded.model.prefill(&some_ids(90, 1), &mut cache, &mut ()).unwrap();
        let before = candidates(&cache);
        let lens: Vec<usize> = before.iter().map(Vec::len).collect();
        assert!(if is_pooled { lens.iter().any(|&len| len != 40) } else { lens == [40; 8] }, "{lens:?}");
        assert_eq!(lens.iter().sum::<usize>(), 8 * 40);
        loaded.model.prefill(&some_ids(60, 2), &mut cache, &mut ()).unwrap();
        let after = candidates(&cache);
        assert_eq!(after.iter().map(Vec::len).sum::<usize>(), 8 * 40);
        assert!(after.iter().flatten().any(|&(at, _)| at >= 90) && after.iter().flatten().any(|&(at, _)| at < 90));
        let mut worst_kept = [f32::INFINITY; 8];
        let mut best_gone = [f32::NEG_INFINITY; 8];
        for (head, (before, after)) in before.iter().zip(&after).enumerate() {
            for &(at, score) in before {
                let is_kept = after.iter().any(|&(kept, _)| kept == at);
                if !is_kept {
                    assert!(at >= 4, "a sink went");
                    best_gone[head] = best_gone[head].max(score);
                }
            }
            for &(_, score) in after.iter().filter(|&&(at, _)| (4..144).contains(&at)) {
                worst_kept[head] = worst_kept[head].min(score);
            }
        }
        let fold = |all: &[f32], fold: fn(f32, f32) -> f32| all.iter().copied().reduce(fold).unwrap();
        if is_pooled {
            assert!(fold(&best_gone, f32::max) <= fold(&worst_kept, f32::min), "{best_gone:?}, {worst_kept:?}");
        } else {
            assert!(best_gone.iter().zip(worst_kept).all(|(gone, kept)| *gone <= kept));
        }
    }
}

/// `[heads]` what is held, with its scores.
fn candidates(cache: &AdaptiveKvCache) -> Vec<Vec<(u32, f32)>> {
    cache.ledgers().iter().flat_map(|ledger| ledger.candidates(usize::MAX)).collect()
}

/// What old rows are worth to newer queries counts: rows that the second prompt repeats stay, though they scored low.
#[test]
fn replay_judges_what_it_holds_by_newer_queries() {
    let loaded = model();
    let budget = rows(40, KvDtype::F32);
    let config = format!(r#"{{"method": "replay", "kv_budget": "{budget}B"}}"#);
    let first = some_ids(80, 1);
    let scores_after = |second: &[u32]| {
        let mut cache = new_cache(&loaded, KvDtype::F32, &config, Bounds { protected: 6, ..Bounds::default() });
        loaded.model.prefill(&first, &mut cache, &mut ()).unwrap();
        let before = candidates(&cache);
        loaded.model.prefill(second, &mut cache, &mut ()).unwrap();
        (before, candidates(&cache))
    };
    let (before, after) = scores_after(&first[20..60]);
    let rose = before.iter().zip(&after).flat_map(|(before, after)| {
        after.iter().filter(|&&(at, score)| before.iter().any(|&(old, then)| old == at && score > then * 1.02))
    });
    assert!(rose.count() > 3);
    // Never less than then.
    for (before, after) in before.iter().zip(&after) {
        for &(at, score) in after.iter().filter(|&&(at, _)| at < 80) {
            assert!(before.iter().any(|&(old, then)| old == at && score >= then), "{at}");
        }
    }
}

#[test]
fn a_cache_goes_on_from_a_file_as_it_would_have() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    let path = folder.path().join("a.kv");
    for &method in METHODS {
        let budget = rows(50, KvDtype::Q8_0);
        let bounds = Bounds { ahead: 8, ..Bounds::default() };
        let mut cache = new_cache(&loaded, KvDtype::Q8_0, &config(method, budget), bounds);
        for turn in 0..2 {
            loaded.model.prefill(&some_ids(70, turn), &mut cache, &mut ()).unwrap();
            for id in some_ids(12, turn + 4) {
                decode(&loaded, &mut cache, id);
            }
        }
        loaded.save_cache(&cache, &path).unwrap();
        let mut other = loaded.saved_cache(&path).unwrap().with_bounds(bounds);
        assert_eq!(candidates(&cache), candidates(&other), "{}", method.name());
        let both = |ids: &[u32], caches: [&mut AdaptiveKvCache; 2]| {
            caches.map(|cache| loaded.model.prefill(ids, cache, &mut ()).unwrap().logits)
        };
        let logits = both(&some_ids(30, 7), [&mut cache, &mut other]);
        assert_eq!(logits[0], logits[1], "{}", method.name());
        for id in some_ids(30, 8) {
            assert_eq!(decode(&loaded, &mut cache, id), decode(&loaded, &mut other, id), "{}", method.name());
        }
        assert_eq!(positions(&cache), positions(&other), "{}", method.name());
    }
}

/// Keys of the first layer depend on nothing but their token and its position: moved, they are those of the tokens that stay,
/// had these been all of the text.
#[test]
fn rows_that_move_together_are_those_of_a_shorter_text() {
    let loaded = model();
    let bounds = Bounds { overflow: Overflow::Shift, protected: 100, ..Bounds::default() };
    for (retention, has_scores) in [
        (Retention::Full, false),
        (adaptive(&loaded.tokenizer, r#"{"method": "streaming_llm", "kept_ratio": 0.5}"#), false),
    ] {
        let mut cache = loaded.model.new_cache(KvDtype::F32, retention).unwrap().with_bounds(bounds);
        let ids = some_ids(500, 3);
        loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap();
        let mut all = ids.clone();
        for id in some_ids(12, 4) {
            decode(&loaded, &mut cache, id);
            all.push(id);
        }
        assert_eq!((cache.seen(), cache.shifted()), (CONTEXT, 0));
        let held = positions(&cache)[0].clone();
        decode(&loaded, &mut cache, 77);
        all.push(77);
        let kept = if held.len() > CONTEXT / 2 {
            // The first four, and the newest.
            [&held[..4], &held[held.len() - (CONTEXT / 2 - 4)..]].concat()
        } else {
            held
        };
        assert_eq!(cache.seen(), kept.len() + 1);
        assert_eq!(cache.ids(), all);
        assert_eq!(cache.shifted(), CONTEXT - kept.len());
        let mut stayed: Vec<u32> = kept.iter().map(|&at| all[at as usize]).collect();
        stayed.push(77);
        let mut short = loaded.full_cache(KvDtype::F32).unwrap();
        loaded.model.prefill(&stayed, &mut short, &mut ()).unwrap();
        let keys = |cache: &AdaptiveKvCache| {
            let layers = cache.layers::<KernelRows>().unwrap();
            layers[0].rows().heads().iter().flat_map(HeadCache::keys).collect::<Vec<f32>>()
        };
        let (moved, fresh) = (keys(&cache), keys(&short));
        let difference = moved.iter().zip(&fresh).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved.len() == fresh.len() && difference < 1e-4, "{difference}, {has_scores}");
        for head in positions(&cache) {
            assert!(head.iter().copied().eq(0..=u32::try_from(kept.len()).unwrap()), "{head:?}");
        }
        // Its tokens are not at their own positions: there are no first ones to go back to.
        assert!(matches!(cache.clone().keep_first(100), Err(Error::Unsupported { .. })));
        assert!(cache.is_consistent());
        // And further prompts go on from there.
        let logits = loaded.model.prefill(&some_ids(100, 9), &mut cache, &mut ()).unwrap().logits;
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }
}

/// Heads of different lengths end at the same position, and what no prompt has decided about is decided about later.
#[test]
fn a_text_goes_on_beyond_the_context_within_its_budget() {
    let (loaded, folder) = (model(), TempDir::new().unwrap());
    for (method, dtype) in [("replay", KvDtype::F16), ("replay", KvDtype::Mixed), ("streaming_llm", KvDtype::Q8_0)] {
        let budget = rows(60, dtype);
        let bounds = Bounds { ahead: 16, protected: 10, overflow: Overflow::Shift, ..Bounds::default() };
        let config = format!(r#"{{"method": "{method}", "kv_budget": "{budget}B"}}"#);
        let mut cache = new_cache(&loaded, dtype, &config, bounds);
        loaded.model.prefill(&some_ids(200, 1), &mut cache, &mut ()).unwrap();
        for (step, id) in some_ids(1500, 2).into_iter().enumerate() {
            let logits = decode(&loaded, &mut cache, id);
            assert!(logits.iter().all(|logit| logit.is_finite()), "{method}, {dtype:?}");
            assert!(cache.bytes().allocated <= budget, "{method}, {dtype:?}, {step}");
            assert!(cache.seen() <= CONTEXT && cache.is_consistent(), "{method}, {dtype:?}, {step}");
        }
        assert_eq!(cache.ids().len(), 1700);
        // However few rows a head holds, the first tokens are where they were, and the newest beside those of all others.
        let seen = u32::try_from(cache.seen()).unwrap();
        let lens: Vec<usize> = positions(&cache).iter().map(Vec::len).collect();
        assert!(method == "streaming_llm" || lens.iter().any(|&len| len != lens[0]), "{lens:?}");
        for head in positions(&cache) {
            assert!((0..4).chain(seen - 10..seen).all(|position| head.contains(&position)), "{method}: {head:?}");
        }
        assert_eq!(cache.seen() + cache.shifted(), 1700);
        assert!(cache.bytes().raw > 1600 * LAYERS * HEADS * cache.token_bytes(), "{:?}", cache.bytes());
        let path = folder.path().join("a.kv");
        loaded.save_cache(&cache, &path).unwrap();
        let mut other = loaded.saved_cache(&path).unwrap().with_bounds(bounds);
        assert_eq!((other.seen(), other.shifted(), other.ids()), (cache.seen(), cache.shifted(), cache.ids()));
        for id in some_ids(100, 3) {
            assert_eq!(decode(&loaded, &mut cache, id), decode(&loaded, &mut other, id), "{method}, {dtype:?}");
        }
    }
}

/// Where all layers look back over a window, moving together is moving along: nothing changes.
#[test]
fn rows_of_a_window_move_along() {
    let folder = data("checkpoints").join("mistral-window");
    let load = |context: usize| {
        let mut checkpoint = checkpoint::open(&folder).unwrap();
        checkpoint.set_context(context).unwrap();
        checkpoint.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap()
    };
    let (short, long) = (load(60), load(256));
    let bounds = Bounds { overflow: Overflow::Shift, ..Bounds::default() };
    let mut moved = short.new_cache(KvDtype::F32, Retention::Full).unwrap().with_bounds(bounds);
    let mut stayed = long.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let ids: Vec<u32> = some_ids(200, 1).into_iter().map(|id| id % 61).collect();
    short.prefill(&ids[..50], &mut moved, &mut ()).unwrap();
    long.prefill(&ids[..50], &mut stayed, &mut ()).unwrap();
    for &id in &ids[50..] {
        short.make_room(&mut moved, 1, PrefillOptions::default(), &mut ()).unwrap();
        let logits = [short.decode(id, &mut moved).unwrap(), long.decode(id, &mut stayed).unwrap()];
        let difference = max_difference(&logits[0], &logits[1]);
        assert!(difference < 1e-3, "{difference} after {} tokens", moved.ids().len());
        assert!(moved.seen() <= 60);
    }
    assert!(moved.shifted() > 100);
}

/// Tensors hold what they are told to, but do not move.
#[test]
fn candle_operations_hold_a_budget_and_move_nothing() {
    let kernels = model();
    let loaded = Fixture::read("head-dim").load_for(&candle_on_cpu(), GgmlDType::F32, WeightDtype::Auto);
    let config = format!(r#"{{"method": "keydiff", "kv_budget": "{}B"}}"#, rows(50, KvDtype::F32));
    let bounds = Bounds { ahead: 8, protected: 10, ..Bounds::default() };
    let [mut cache, mut other] = [&loaded, &kernels].map(|loaded| new_cache(loaded, KvDtype::F32, &config, bounds));
    for turn in 0..3 {
        for (loaded, cache) in [(&loaded, &mut cache), (&kernels, &mut other)] {
            loaded.model.prefill(&some_ids(40, turn), cache, &mut ()).unwrap();
            for id in some_ids(40, turn + 5) {
                decode(loaded, cache, id);
            }
        }
        assert_eq!(positions(&cache), positions(&other), "turn {turn}");
    }
    let mut cache = cache.emptied().with_bounds(Bounds { overflow: Overflow::Shift, ..bounds });
    loaded.model.prefill(&some_ids(512, 1), &mut cache, &mut ()).unwrap();
    let refused = loaded.model.make_room(&mut cache, 1, PrefillOptions::default(), &mut ()).unwrap_err();
    assert!(refused.to_string().contains("moving keys to other positions"), "{refused}");
}

#[test]
fn generation_stops_at_the_context_or_goes_on() {
    let loaded = model();
    for (overflow, reason, count) in
        [(Overflow::Stop, FinishReason::Context, 13), (Overflow::Shift, FinishReason::Length, 300)]
    {
        let mut cache = loaded.full_cache(KvDtype::F16).unwrap().with_bounds(Bounds { overflow, ..Bounds::default() });
        let ids = some_ids(500, 3);
        let logits = loaded.model.prefill(&ids, &mut cache, &mut ()).unwrap().logits;
        let options = GenerationOptions { max_new_tokens: 300, ignore_eos: true, ..GenerationOptions::default() };
        let mut generation = Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, &ids, logits, options);
        generation.by_ref().for_each(|step| drop(step.unwrap()));
        assert_eq!((generation.finish_reason(), generation.ids().len()), (reason, count));
        drop(generation);
        assert_eq!(cache.ids().len(), 500 + count - 1);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let loaded = model();
    let message = |error: Error| format!("{error} | {}", error.hint().unwrap_or("-"));
    // A budget without room for a token more.
    let mut cache = new_cache(&loaded, KvDtype::F16, r#"{"method": "replay", "kv_budget": "1B"}"#, Bounds::default());
    loaded.model.prefill(&some_ids(20, 1), &mut cache, &mut ()).unwrap();
    let full = loaded.model.make_room(&mut cache, 1, PrefillOptions::default(), &mut ()).unwrap_err();
    assert!(message(full).contains("the budget of 1 byte has no room for another token | give a larger --kv-budget"));
    // Heads that hold what the first prompt left them.
    let config = r#"{"method": "replay", "kv_budget": "20KB", "decode": "evict"}"#;
    let mut cache = new_cache(&loaded, KvDtype::F16, config, Bounds::default());
    loaded.model.prefill(&some_ids(120, 1), &mut cache, &mut ()).unwrap();
    for id in some_ids(100, 2) {
        decode(&loaded, &mut cache, id);
        assert!(cache.bytes().allocated <= 20 << 10, "{:?}", cache.bytes());
    }
    let refused = loaded.model.prefill(&some_ids(20, 1), &mut cache, &mut ()).unwrap_err();
    assert!(message(refused).contains("where heads go on evicting is not supported"), "evict");
    // Rotations that depend on the length.
    let dynamic = checkpoint::open(data("checkpoints").join("dynamic")).unwrap();
    let model = dynamic.model(&BackendKind::default(), WeightDtype::F32, &mut |_, _| {}).unwrap();
    let bounds = Bounds { overflow: Overflow::Shift, ..Bounds::default() };
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap().with_bounds(bounds);
    let context = model.config().context_length;
    model.prefill(&vec![5; context], &mut cache, &mut ()).unwrap();
    let refused = model.make_room(&mut cache, 1, PrefillOptions::default(), &mut ()).unwrap_err();
    assert!(message(refused).contains("rotated by the length of the sequence"), "dynamic");
}
