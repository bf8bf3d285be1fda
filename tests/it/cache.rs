//! The ragged cache: what is stored where, and what it takes.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any type

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::prompt_rows::{PromptKv, PromptRows};
use adaptive_kvcache::backend::{CandleRows, HeadCache, KernelLayer, KernelRows};
use adaptive_kvcache::cache::{AdaptiveKvCache, KvDtype, Retention};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::tokens::TokenClass;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;
use proptest::prelude::*;

use crate::numbers::{seeded, uniform};

/// Bytes of a stored position.
const POSITION_BYTES: usize = 4;

/// SPEC, "Memory": slack after prefill stays under this share of the kept bytes.
const MAX_SLACK_RATIO: f64 = 0.05;

const MB: f64 = 1024.0 * 1024.0;

const LLAMA_2_7B: HeadLayout = HeadLayout { num_heads: 32, num_kv_heads: 32, head_dim: 128 };
const SMALL: HeadLayout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 4 };

fn cache(layout: HeadLayout, dtype: KvDtype) -> AdaptiveKvCache {
    AdaptiveKvCache::new(1, &KernelRows::new(layout, dtype).unwrap(), Retention::Full)
}

/// A number that says which head and position it belongs to, and that f16 holds exactly.
fn number(kv_head: usize, position: usize) -> f32 {
    (kv_head * 64 + position) as f32
}

fn token(layout: HeadLayout, position: usize, sign: f32) -> Vec<f32> {
    (0..layout.num_kv_heads).flat_map(|head| vec![sign * number(head, position); layout.head_dim]).collect()
}

/// Keys are their positions, values the same negated.
fn prompt(layout: HeadLayout, len: usize) -> PromptKv {
    let rows = |sign| {
        let mut rows = PromptRows::with_capacity(layout, len);
        (0..len).for_each(|position| rows.push(&token(layout, position, sign)).unwrap());
        rows
    };
    PromptKv { keys: rows(1.0), values: rows(-1.0) }
}

fn choices(positions: &[&[u32]]) -> Vec<HeadChoice> {
    let choice = |(kv_head, positions): (usize, &&[u32])| HeadChoice {
        kv_head,
        level: kv_head,
        recovered: vec![0.5; kv_head + 1],
        positions: positions.to_vec(),
    };
    positions.iter().enumerate().map(choice).collect()
}

/// First number of each kept key and value.
fn first_numbers(head: &HeadCache, head_dim: usize) -> Vec<(f32, f32)> {
    let (keys, values) = rows(head);
    keys.into_iter().zip(values).step_by(head_dim).collect()
}

/// All keys and all values, `[kept, head_dim]` each.
fn rows(head: &HeadCache) -> (Vec<f32>, Vec<f32>) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    head.rows().widen_to(&mut keys, &mut values);
    (keys, values)
}

/// Asserts that every head holds the rows of its positions.
#[track_caller]
fn assert_holds(layer: &KernelLayer, layout: HeadLayout, positions: &[Vec<u32>]) {
    assert_eq!(layer.positions(), positions);
    assert_eq!(layer.rows().for_attention().len(), positions.len());
    for (kv_head, (head, positions)) in layer.rows().heads().iter().zip(positions).enumerate() {
        assert_eq!((head.len(), head.is_empty()), (positions.len(), positions.is_empty()));
        let expected: Vec<_> = positions
            .iter()
            .map(|&position| number(kv_head, position as usize))
            .map(|number| (number, -number))
            .collect();
        assert_eq!(first_numbers(head, layout.head_dim), expected, "KV head {kv_head}");
    }
}

#[test]
fn the_memory_of_the_originals_published_run() {
    let prompt = prompt(LLAMA_2_7B, 18);
    // Layer 30 of SPEC's table: 18.924 % of 576 rows, that is 109, are not kept.
    let kept: Vec<Vec<u32>> = (0..32).map(|head| (0..if head < 13 { 14 } else { 15 }).collect()).collect();
    assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), 576 - 109);
    let kept: Vec<&[u32]> = kept.iter().map(Vec::as_slice).collect();

    let mut cache = cache(LLAMA_2_7B, KvDtype::F16);
    assert_eq!(cache.bytes().saved_ratio(), 0.0, "nothing is saved of nothing");
    let summary = cache.layers_mut::<KernelRows>().unwrap()[0].store_prompt(&prompt, Some(choices(&kept))).unwrap();
    let bytes = summary.bytes;
    assert_eq!((bytes.raw, bytes.kept), (32 * 18 * 128 * 2 * 2, (576 - 109) * 128 * 2 * 2));
    assert_eq!(format!("{:.3} MB -> {:.3}MB", bytes.raw as f64 / MB, bytes.kept as f64 / MB), "0.281 MB -> 0.228MB");
    assert_eq!(format!("{:.3}", 100.0 * bytes.saved_ratio()), "18.924");
    assert_eq!(cache.bytes(), bytes, "one layer is all");
}

#[test]
fn storing_a_prompt_allocates_exactly_what_is_kept() {
    let layout = HeadLayout { num_heads: 3, num_kv_heads: 3, head_dim: 128 };
    for dtype in KvDtype::ALL {
        for len in [1_usize, 18, 1000] {
            let prompt = prompt(layout, len);
            let everything: Vec<u32> = (0..len as u32).collect();
            let odd: Vec<u32> = everything.iter().copied().filter(|position| position % 2 == 1).collect();
            let mut cache = cache(layout, dtype);
            let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
            let kept = choices(&[&everything, &odd, &[len as u32 - 1]]);
            let bytes = layer.store_prompt(&prompt, Some(kept)).unwrap().bytes;
            let rows = len + len / 2 + 1;
            assert_eq!(bytes.kept, rows * dtype.token_bytes(128));
            assert_eq!(bytes.raw, 3 * len * dtype.token_bytes(128));
            let centers = num_centers(dtype) * 3 * 128 * 4;
            assert_eq!(bytes.allocated, bytes.kept + rows * POSITION_BYTES + centers, "{dtype:?}, {len} tokens");
            assert!((bytes.allocated - centers - bytes.kept) as f64 <= MAX_SLACK_RATIO * bytes.kept as f64);
            assert_eq!(layer.bytes(), bytes);
        }
    }
}

#[test]
fn every_head_keeps_the_rows_of_its_positions_and_new_ones() {
    for dtype in [KvDtype::F16, KvDtype::F32] {
        let prompt = prompt(SMALL, 10);
        let mut cache = cache(SMALL, dtype);
        let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
        let summary = layer.store_prompt(&prompt, Some(choices(&[&[0, 3, 9], &[]]))).unwrap();
        assert_eq!((summary.layer, summary.prompt_len), (0, 10));
        assert_eq!(summary.heads[0].positions, [0, 3, 9]);
        assert_eq!((summary.heads[1].kv_head, summary.heads[1].level), (1, Some(1)));
        assert_eq!(summary.heads[1].recovered, [0.5, 0.5]);
        assert_holds(layer, SMALL, &[vec![0, 3, 9], vec![]]);
        for position in 10..50 {
            layer
                .append(&token(SMALL, position, 1.0), &token(SMALL, position, -1.0), position, TokenClass::default())
                .unwrap();
            let new: Vec<u32> = (10..=position as u32).collect();
            assert_holds(layer, SMALL, &[[&[0, 3, 9], &new[..]].concat(), new]);
            let row_bytes = dtype.token_bytes(SMALL.head_dim);
            let seen = position + 1;
            assert_eq!(
                (layer.bytes().raw, layer.bytes().kept),
                (seen * 2 * row_bytes, (2 * (seen - 10) + 3) * row_bytes)
            );
        }
    }
}

#[test]
fn without_choices_everything_is_kept() {
    let prompt = prompt(SMALL, 5);
    let mut cache = cache(SMALL, KvDtype::F32);
    let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
    let summary = layer.store_prompt(&prompt, None).unwrap();
    assert!(summary.heads.iter().all(|head| head.level.is_none() && head.recovered.is_empty()));
    assert_holds(layer, SMALL, &[(0..5).collect(), (0..5).collect()]);
    assert_eq!((summary.bytes.raw, summary.bytes.saved_ratio()), (summary.bytes.kept, 0.0));
}

/// The buffer may grow by a sixteenth, and by 16 rows at least.
#[test]
fn slack_of_a_growing_head_is_bounded_and_growth_is_rare() {
    for dtype in KvDtype::ALL {
        for head_dim in [1, 80, 128].into_iter().filter(|&head_dim| dtype.check(head_dim).is_ok()) {
            let row_bytes = dtype.newest().token_bytes(head_dim);
            let mut head = HeadCache::new(head_dim, dtype).unwrap();
            assert_eq!(head.allocated_bytes(), 0);
            let row = vec![1.0; head_dim];
            let mut growths = 0;
            for position in 0..4000_usize {
                let before = head.allocated_bytes();
                head.push(&row, &row).unwrap();
                growths += usize::from(head.allocated_bytes() != before);
                let len = head.len();
                assert_eq!(len, position + 1);
                assert!(head.allocated_bytes() >= len * row_bytes);
                assert!(head.allocated_bytes() <= (len + (len / 16).max(16)) * row_bytes, "{len} rows");
            }
            // 16 times to 256 rows, then ln(4000 / 256) / ln(17 / 16) = 45 times.
            assert!(growths <= 16 + 46, "grew {growths} times");
        }
    }
}

#[test]
fn a_fork_does_not_see_what_the_other_appends() {
    let prompt = prompt(SMALL, 3);
    let mut cache = cache(SMALL, KvDtype::F16);
    cache.layers_mut::<KernelRows>().unwrap()[0].store_prompt(&prompt, None).unwrap();
    cache.settle(&[0; 3]);
    let mut fork = cache.clone();
    fork.layers_mut::<KernelRows>().unwrap()[0]
        .append(&token(SMALL, 3, 1.0), &token(SMALL, 3, -1.0), 3, TokenClass::default())
        .unwrap();
    fork.advance(1);
    assert_holds(&cache.layers::<KernelRows>().unwrap()[0], SMALL, &[vec![0, 1, 2], vec![0, 1, 2]]);
    assert_holds(&fork.layers::<KernelRows>().unwrap()[0], SMALL, &[vec![0, 1, 2, 3], vec![0, 1, 2, 3]]);
    assert_eq!((cache.seen(), fork.seen()), (3, 4));
}

#[test]
fn rows_of_another_size_are_refused() {
    let mut head = HeadCache::new(2, KvDtype::F32).unwrap();
    head.push(&[1.0, 2.0], &[3.0, 4.0]).unwrap();
    assert!(matches!(head.push(&[0.0; 3], &[0.0; 2]), Err(Error::Shape { .. })), "a key too long");
    assert!(matches!(head.push(&[0.0; 2], &[0.0; 1]), Err(Error::Shape { .. })), "a value too short");
    assert_eq!(rows(&head), (vec![1.0, 2.0], vec![3.0, 4.0]), "what is refused leaves no trace");
}

/// Rows of another backend's are an error wherever a cache is looked into.
#[test]
fn a_cache_of_another_backend_is_refused() {
    let mut cache = cache(SMALL, KvDtype::F32);
    for error in [
        cache.layers::<CandleRows>().unwrap_err(),
        cache.layers_mut::<CandleRows>().unwrap_err(),
        cache.expect_shape::<CandleRows>(1, SMALL).unwrap_err(),
    ] {
        assert!(matches!(&error, Error::Shape { .. }) && error.to_string().contains("CandleRows"), "{error}");
    }
    cache.expect_shape::<KernelRows>(1, SMALL).unwrap();
}

#[test]
fn a_prompt_that_does_not_fit_is_refused() {
    let whole = prompt(SMALL, 5);
    let short = PromptKv { keys: whole.keys.clone(), values: prompt(SMALL, 4).values };
    for (what, prompt, kept) in [
        ("a head too few", &whole, choices(&[&[0]])),
        ("a head too many", &whole, choices(&[&[0], &[0], &[0]])),
        ("heads in another order", &whole, choices(&[&[0], &[0]]).into_iter().rev().collect()),
        ("a position beyond the prompt", &whole, choices(&[&[0], &[5]])),
        ("positions that descend", &whole, choices(&[&[0], &[2, 1]])),
        ("a position twice", &whole, choices(&[&[0], &[2, 2]])),
        ("fewer values than keys", &short, choices(&[&[0], &[0]])),
    ] {
        let mut cache = cache(SMALL, KvDtype::F32);
        let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
        assert!(matches!(layer.store_prompt(prompt, Some(kept)), Err(Error::Shape { .. })), "{what}");
        assert_holds(layer, SMALL, &[vec![], vec![]]);
    }
    let mut cache = cache(SMALL, KvDtype::F32);
    let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
    layer.store_prompt(&whole, None).unwrap();
    let without_past = layer.store_prompt(&whole, None);
    assert!(matches!(without_past, Err(Error::Shape { .. })), "rows that do not begin with what is held");
    let mut prompt = layer.rows().prompt(1).unwrap();
    prompt.keys.push(&token(SMALL, 5, 1.0)).unwrap();
    prompt.values.push(&token(SMALL, 5, -1.0)).unwrap();
    let settled = layer.store_prompt(&prompt, Some(choices(&[&[4], &[5]])));
    assert!(matches!(settled, Err(Error::Shape { .. })), "a position that was decided about before");
}

/// What an earlier prompt kept stays; what was appended since is kept or evicted with the new prompt; positions go on.
#[test]
fn a_further_prompt_decides_about_what_came_since_the_one_before() {
    for dtype in [KvDtype::F32, KvDtype::F16] {
        let prompt = prompt(SMALL, 5);
        let mut cache = cache(SMALL, dtype);
        let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
        layer.store_prompt(&prompt, Some(choices(&[&[0, 3], &[2]]))).unwrap();
        for position in 5..8 {
            layer
                .append(&token(SMALL, position, 1.0), &token(SMALL, position, -1.0), position, TokenClass::default())
                .unwrap();
        }
        let mut prompt = layer.rows().prompt(4).unwrap();
        for position in 8..12 {
            prompt.keys.push(&token(SMALL, position, 1.0)).unwrap();
            prompt.values.push(&token(SMALL, position, -1.0)).unwrap();
        }
        let summary = layer.store_prompt(&prompt, Some(choices(&[&[6, 8, 11], &[]]))).unwrap();
        assert_eq!(summary.prompt_len, 7, "three appended and four new tokens");
        assert_holds(layer, SMALL, &[vec![0, 3, 6, 8, 11], vec![2]]);
        let bytes = layer.bytes();
        assert_eq!(bytes.raw / 12, bytes.kept / 3, "2 x 12 positions seen, 6 kept");
        let positions = 6 * size_of::<u32>();
        assert_eq!(bytes.allocated, bytes.kept + positions, "no slack after a prompt");
        layer.append(&token(SMALL, 12, 1.0), &token(SMALL, 12, -1.0), 12, TokenClass::default()).unwrap();
        assert_holds(layer, SMALL, &[vec![0, 3, 6, 8, 11, 12], vec![2, 12]]);
    }
}

/// SPEC, "Decoding": the next token's position is the number of tokens seen, never the number kept.
#[test]
fn a_new_tokens_position_is_the_number_of_tokens_seen() {
    let prompt = prompt(SMALL, 5);
    let mut cache = cache(SMALL, KvDtype::F32);
    let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
    layer.store_prompt(&prompt, Some(choices(&[&[0], &[1, 2]]))).unwrap();
    for position in [0, 1, 2, 3, 4, 6, 1000] {
        let result = layer.append(&[0.0; 8], &[0.0; 8], position, TokenClass::default());
        assert!(matches!(result, Err(Error::Shape { .. })), "position {position} after 5 tokens");
    }
    assert!(
        matches!(layer.append(&[0.0; 4], &[0.0; 8], 5, TokenClass::default()), Err(Error::Shape { .. })),
        "keys of one head"
    );
    assert!(
        matches!(layer.append(&[0.0; 8], &[0.0; 12], 5, TokenClass::default()), Err(Error::Shape { .. })),
        "values of three heads"
    );
    assert_holds(layer, SMALL, &[vec![0], vec![1, 2]]);
    layer.append(&token(SMALL, 5, 1.0), &token(SMALL, 5, -1.0), 5, TokenClass::default()).unwrap();
    assert_holds(layer, SMALL, &[vec![0, 5], vec![1, 2, 5]]);
}

/// A value in ggml's blocks: candle's own quantisation.
///
/// * `dtype`: one of [`KvDtype::UNIFORM`]
fn rounded(dtype: KvDtype, row: &[f32]) -> Vec<f32> {
    let format = match dtype {
        KvDtype::F32 => return row.to_vec(),
        KvDtype::F16 => return row.iter().map(|&number| f16::from_f32(number).to_f32()).collect(),
        KvDtype::Q8_0 => GgmlDType::Q8_0,
        _ => GgmlDType::Q4_0,
    };
    let row = Tensor::new(row, &Device::Cpu).unwrap();
    QTensor::quantize(&row, format).unwrap().dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
}

/// A key: in blocks, without the center and rotated in pieces of the largest power of two.
fn rounded_key(dtype: KvDtype, key: &[f32], center: &[f32]) -> Vec<f32> {
    if !matches!(dtype, KvDtype::Q8_0 | KvDtype::Q4_0) {
        return rounded(dtype, key);
    }
    let size: usize = 1 << key.len().trailing_zeros();
    // Neighbours first, as sums are rounded in this order.
    let rotated = |row: &[f32]| -> Vec<f32> {
        let mut row = row.to_vec();
        for half in (0..size.ilog2()).map(|power| 1 << power) {
            for index in (0..row.len()).filter(|index| index & half == 0) {
                (row[index], row[index + half]) = (row[index] + row[index + half], row[index] - row[index + half]);
            }
        }
        row.into_iter().map(|number| number * (1.0 / (size as f32).sqrt())).collect()
    };
    let moved: Vec<f32> = key.iter().zip(center).map(|(number, center)| number - center).collect();
    rotated(&rounded(dtype, &rotated(&moved))).iter().zip(center).map(|(number, center)| number + center).collect()
}

/// How many vectors say what a head's keys have in common.
fn num_centers(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::Mixed => 2,
        _ => usize::from(matches!(dtype.keys(), KvDtype::Q8_0 | KvDtype::Q4_0)),
    }
}

/// What may happen to a head.
#[derive(Debug, Clone)]
enum Step {
    /// So many tokens more.
    Push(usize),
    /// From this percentage of the rows on, only every so many-th stays.
    Evict {
        from_percent: usize,
        every: usize,
        offset: usize,
    },
    /// So many times, the row at this percentage of the rows goes, and the last one takes its place.
    SwapRemove {
        at_percent: usize,
        count: usize,
    },
    Shrink,
    Reserve(usize),
    /// A prompt comes, of which so many tokens are left.
    Settle(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..50_usize).prop_map(Step::Push),
        (0..100_usize, 1..5_usize, 0..5_usize).prop_map(|(from_percent, every, offset)| Step::Evict {
            from_percent,
            every,
            offset
        }),
        (0..100_usize, 0..40_usize).prop_map(|(at_percent, count)| Step::SwapRemove { at_percent, count }),
        Just(Step::Shrink),
        (0..40_usize).prop_map(Step::Reserve),
        (0..40_usize).prop_map(Step::Settle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Tiles, pairs of rows and what is left over of both hold, after whatever happened, the rows that a plain list of
    /// rows holds; nothing is rounded twice.
    #[test]
    fn a_head_holds_what_a_list_of_rows_holds(
        dtype in prop::sample::select(&KvDtype::ALL[..]),
        blocks in 1..4_usize,
        steps in prop::collection::vec(any_step(), 1..12),
        seed in 0..1000_u64,
    ) {
        let head_dim = 32 * blocks;
        let mut head = HeadCache::new(head_dim, dtype).unwrap();
        let mut expected: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
        let mut settled = 0;
        let mut rng = seeded(seed);
        let center = if seed.is_multiple_of(2) { vec![0.0; head_dim] } else { uniform(&mut rng, head_dim, 30.0) };
        if !seed.is_multiple_of(2) {
            head.center_keys(&center);
        }
        for step in steps {
            match step {
                Step::Push(count) => {
                    for _ in 0..count {
                        let (key, value) = (uniform(&mut rng, head_dim, 3.0), uniform(&mut rng, head_dim, 0.1));
                        head.push(&key, &value).unwrap();
                        let values = dtype.newest().values();
                        expected.push((rounded_key(dtype.keys(), &key, &center), rounded(values, &value)));
                    }
                }
                Step::Evict { from_percent, every, offset } => {
                    let first = expected.len() * from_percent / 100;
                    let stays = |row: &usize| *row < first || (row + offset).is_multiple_of(every);
                    let kept: Vec<usize> = (0..expected.len()).filter(stays).collect();
                    head.keep_rows(&kept);
                    settled = kept.partition_point(|&row| row < settled);
                    expected = kept.iter().map(|&row| expected[row].clone()).collect();
                }
                Step::SwapRemove { at_percent, count } => {
                    // No row comes into the place of one in other numbers.
                    let others = if dtype == KvDtype::Mixed { settled } else { 0 };
                    for _ in 0..count.min(expected.len() - others) {
                        let row = others + (expected.len() - others) * at_percent / 100;
                        head.swap_remove(row);
                        expected.swap_remove(row);
                        settled = settled.min(expected.len());
                    }
                }
                Step::Shrink => head.shrink_to_fit(),
                Step::Reserve(rows) => head.reserve_exact(rows),
                Step::Settle(count) => {
                    head.settle(count);
                    if dtype == KvDtype::Mixed {
                        expected[settled..].iter_mut().for_each(|(_, value)| *value = rounded(KvDtype::Q4_0, value));
                    }
                    for _ in 0..count {
                        let (key, value) = (uniform(&mut rng, head_dim, 3.0), uniform(&mut rng, head_dim, 0.1));
                        head.push_settled(&key, &value).unwrap();
                        expected.push((rounded_key(dtype.keys(), &key, &center), rounded(dtype.values(), &value)));
                    }
                    settled = expected.len();
                }
            }
            let newest = expected.len() - settled;
            prop_assert_eq!(head.num_settled(), if dtype == KvDtype::Mixed { settled } else { 0 });
            let bytes = settled * dtype.token_bytes(head_dim) + newest * dtype.newest().token_bytes(head_dim);
            prop_assert_eq!(head.held_bytes(), bytes);
            let (keys, values) = rows(&head);
            prop_assert_eq!(head.len(), expected.len());
            prop_assert!(keys == expected.iter().flat_map(|(key, _)| key.clone()).collect::<Vec<_>>());
            prop_assert!(values == expected.iter().flat_map(|(_, value)| value.clone()).collect::<Vec<_>>());
        }
        head.shrink_to_fit();
        let centers = if seed.is_multiple_of(2) { 0 } else { num_centers(dtype) * 4 * head_dim };
        prop_assert_eq!(head.allocated_bytes(), head.held_bytes() + centers);
    }
}

/// What all keys of a prompt have in common is not rounded with each, and one large number leaves the others their bits.
#[test]
fn four_bits_are_for_what_keys_differ_by() {
    let layout = HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim: 64 };
    let mut rng = seeded(3);
    let common: Vec<f32> = uniform(&mut rng, 64, 40.0);
    let mut prompt =
        PromptKv { keys: PromptRows::with_capacity(layout, 50), values: PromptRows::with_capacity(layout, 50) };
    let mut keys: Vec<Vec<f32>> = Vec::new();
    for _ in 0..60 {
        let own = uniform(&mut rng, 64, 1.0);
        keys.push(common.iter().zip(&own).map(|(common, own)| common + own).collect());
    }
    prompt.keys.push(&keys[..50].concat()).unwrap();
    prompt.values.push(&vec![0.5; 50 * 64]).unwrap();
    let mut cache = cache(layout, KvDtype::Q4_0);
    let layer = &mut cache.layers_mut::<KernelRows>().unwrap()[0];
    layer.store_prompt(&prompt, Some(choices(&[&(0..50).collect::<Vec<u32>>()]))).unwrap();
    for (position, key) in keys.iter().enumerate().skip(50) {
        layer.append(key, &[0.5; 64], position, TokenClass::default()).unwrap();
    }
    // Of 64 numbers in -1..1 few sums are above 2.5, and a step is an eighth of the largest.
    let error = |stored: &[f32]| {
        let difference = keys.iter().flatten().zip(stored).map(|(key, stored)| (key - stored).powi(2)).sum::<f32>();
        (difference / (60.0 * 64.0)).sqrt()
    };
    assert!(error(&layer.rows().heads()[0].keys()) < 0.12);
    let mut uncentered = HeadCache::new(64, KvDtype::Q4_0).unwrap();
    for key in &keys {
        uncentered.push(key, &[0.5; 64]).unwrap();
    }
    assert!(error(&uncentered.keys()) > 0.5, "keys that have little in common");
}

/// Blocks are whole: llama.cpp refuses other heads as well.
#[test]
fn quantised_caches_need_heads_of_whole_blocks() {
    assert_eq!(KvDtype::ALL.map(|dtype| dtype.token_bytes(64)), [512, 256, 196, 164, 136, 104, 72, 104]);
    for (dtype, head_dim, fits) in [
        (KvDtype::F16, 80, true),
        (KvDtype::Q8_0, 80, false),
        (KvDtype::Q4_0, 16, false),
        (KvDtype::Q8_0, 96, true),
        (KvDtype::Q4_0, 32, true),
    ] {
        let layout = HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim };
        let made = KernelRows::new(layout, dtype);
        assert_eq!(made.is_ok(), fits, "{dtype:?} of {head_dim}");
        if let Err(error) = made {
            assert!(matches!(error, Error::Unsupported { .. }));
            assert!(error.to_string().contains(dtype.name()) && error.to_string().contains(&head_dim.to_string()));
            assert!(error.hint().is_some_and(|hint| hint.contains("f16")));
        }
    }
    assert!(matches!(HeadCache::new(0, KvDtype::F16), Err(Error::Shape { .. })));
}
