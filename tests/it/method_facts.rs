//! What methods with a budget read of a prompt, against slow obvious arithmetic in f64.

use std::ops::Range;

use adaptive_kvcache::arch::{Rope, RopeLayout, RopeSettings};
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::blocks::block_attention;
use adaptive_kvcache::attention::last_rows::last_rows;
use adaptive_kvcache::attention::outputs::{absolute_outputs, output_products};
use adaptive_kvcache::attention::prompt_rows::{PromptKv, PromptRows};

use crate::numbers::{dot, seeded, softmax, uniform};

/// Of sums in f32, relative to the largest number.
const TOLERANCE: f64 = 2e-5;

const LAYOUTS: [HeadLayout; 3] = [
    HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 },
    HeadLayout { num_heads: 3, num_kv_heads: 3, head_dim: 16 },
    HeadLayout { num_heads: 6, num_kv_heads: 1, head_dim: 4 },
];

fn assert_near(got: &[f32], expected: &[f64], case: &str) {
    assert_eq!(got.len(), expected.len(), "{case}");
    let largest = expected.iter().fold(1e-9, |largest: f64, number| largest.max(number.abs()));
    for (index, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() < TOLERANCE * largest, "{case}, {index}: {got}, {expected}");
    }
}

/// A prompt behind rows that heads held before, of other numbers for each.
struct Prompt {
    layout: HeadLayout,
    len: usize,
    queries: Vec<f32>,
    /// `[num_kv_heads]` of `[past + len, head_dim]`
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Prompt {
    fn random(layout: HeadLayout, len: usize, past: usize, seed: u64) -> Self {
        let mut rng = seeded(seed);
        let rows = |rng: &mut _| -> Vec<Vec<f32>> {
            let lens = (0..layout.num_kv_heads).map(|head| past * (1 + head) + len);
            lens.map(|len| uniform(rng, len * layout.head_dim, 1.5)).collect()
        };
        let (keys, values) = (rows(&mut rng), rows(&mut rng));
        Self { layout, len, queries: uniform(&mut rng, len * layout.query_width(), 1.5), keys, values }
    }

    fn kv(&self) -> PromptKv {
        let past: Vec<usize> = self.keys.iter().map(|keys| keys.len() / self.layout.head_dim - self.len).collect();
        let rows = |heads: &[Vec<f32>]| PromptRows::whole(self.layout, heads.to_vec(), &past, self.len).unwrap();
        PromptKv { keys: rows(&self.keys), values: rows(&self.values) }
    }

    fn query(&self, row: usize, head: usize) -> &[f32] {
        let start = row * self.layout.query_width() + head * self.layout.head_dim;
        &self.queries[start..start + self.layout.head_dim]
    }

    fn key(&self, kv_head: usize, key: usize) -> &[f32] {
        &self.keys[kv_head][key * self.layout.head_dim..(key + 1) * self.layout.head_dim]
    }

    fn num_keys(&self, kv_head: usize) -> usize {
        self.keys[kv_head].len() / self.layout.head_dim
    }

    fn check_last_rows(&self, rows: usize, num_keys: usize) {
        let (width, head_dim, group) = (self.layout.query_width(), self.layout.head_dim, self.layout.group_size());
        let kv = self.kv();
        for kv_head in 0..self.layout.num_kv_heads {
            let queries = &self.queries[(self.len - rows) * width..];
            let got = last_rows(self.layout, kv_head, queries, &kv, num_keys).unwrap();
            assert_eq!((got.weights.len(), got.outputs.len()), (group, group));
            let all = self.num_keys(kv_head);
            for (index, (weights, outputs)) in got.weights.iter().zip(&got.outputs).enumerate() {
                let (mut expected, mut made) = (Vec::new(), Vec::new());
                for row in self.len - rows..self.len {
                    let seen = all - (self.len - 1 - row);
                    let query = self.query(row, kv_head * group + index);
                    let scores = (0..seen).map(|key| dot(query, self.key(kv_head, key)) / (head_dim as f64).sqrt());
                    let mut weights = softmax(&scores.collect::<Vec<_>>());
                    for number in 0..head_dim {
                        let values = (0..seen).map(|key| f64::from(self.values[kv_head][key * head_dim + number]));
                        made.push(values.zip(&weights).map(|(value, weight)| value * weight).sum());
                    }
                    weights.resize(all, 0.0);
                    expected.extend_from_slice(&weights[all - num_keys..]);
                }
                assert_near(weights, &expected, &format!("weights of {:?}, {rows} rows", self.layout));
                assert_near(outputs, &made, &format!("outputs of {:?}, {rows} rows", self.layout));
            }
        }
    }

    /// The definition, with the last block filled up with queries and keys of zeros.
    fn check_blocks(&self, num_keys: usize, inner: Range<usize>, block: usize) {
        let group = self.layout.group_size();
        let got =
            block_attention(self.layout, &self.queries, &self.kv().keys, num_keys, (inner.clone(), block)).unwrap();
        let recent = num_keys - self.len;
        for (kv_head, got) in got.iter().enumerate() {
            let mut expected = vec![0.0; num_keys];
            let first = self.num_keys(kv_head) - num_keys;
            for start in inner.clone().step_by(block) {
                let columns: Vec<Option<usize>> =
                    (start..start + block).map(|column| (column < inner.end).then_some(column)).collect();
                for head in kv_head * group..(kv_head + 1) * group {
                    for &row in &columns {
                        if row.is_some_and(|row| row < recent) {
                            continue;
                        }
                        let score = |column: &Option<usize>| match (row, *column) {
                            (Some(row), Some(column)) => {
                                dot(self.query(row - recent, head), self.key(kv_head, first + column))
                            }
                            _ => 0.0,
                        };
                        let weights = softmax(&columns.iter().map(score).collect::<Vec<_>>());
                        for (column, weight) in columns.iter().zip(weights) {
                            if let Some(column) = *column {
                                expected[column] += weight / group as f64;
                            }
                        }
                    }
                }
            }
            assert_near(got, &expected, &format!("{:?}, blocks of {block} in {inner:?}", self.layout));
        }
    }
}

#[test]
fn last_rows_are_those_of_attention_whatever_was_kept_before() {
    for (index, layout) in LAYOUTS.into_iter().enumerate() {
        for (len, past, rows) in [(20, 0, 1), (20, 0, 20), (33, 5, 7), (1, 3, 1)] {
            let prompt = Prompt::random(layout, len, past, 40 + index as u64);
            for num_keys in [len, len + past] {
                prompt.check_last_rows(rows, num_keys);
            }
        }
    }
    let prompt = Prompt::random(LAYOUTS[0], 4, 0, 3);
    assert!(last_rows(LAYOUTS[0], 0, &[0.0; 5 * 32], &prompt.kv(), 4).is_err());
    assert!(last_rows(LAYOUTS[0], 0, &[0.0; 32], &prompt.kv(), 5).is_err());
}

#[test]
fn blocks_are_attended_to_both_ways() {
    for (index, layout) in LAYOUTS.into_iter().enumerate() {
        let prompt = Prompt::random(layout, 37, 6, 60 + index as u64);
        for (num_keys, inner, block) in [
            (37, 0..37, 8),
            (37, 0..37, 37),
            (37, 3..35, 8),
            (43, 2..40, 10),
            (37, 5..5, 4),
            (37, 0..37, 100),
            (40, 0..1, 1),
        ] {
            prompt.check_blocks(num_keys, inner, block);
        }
    }
    let prompt = Prompt::random(LAYOUTS[0], 4, 0, 3);
    assert!(block_attention(LAYOUTS[0], &prompt.queries, &prompt.kv().keys, 4, (0..4, 0)).is_err());
    assert!(block_attention(LAYOUTS[0], &prompt.queries, &prompt.kv().keys, 5, (0..5, 2)).is_err());
    assert!(block_attention(LAYOUTS[0], &prompt.queries[1..], &prompt.kv().keys, 4, (0..4, 2)).is_err());
}

#[test]
fn values_behind_the_output_projection_are_those_of_the_definition() {
    for (layout, hidden_size, len) in
        [(LAYOUTS[0], 24, 5), (LAYOUTS[1], 7, 300), (LAYOUTS[2], 20_000, 3), (LAYOUTS[2], 9, 0)]
    {
        let mut rng = seeded(hidden_size as u64);
        let (width, head_dim, group) = (layout.query_width(), layout.head_dim, layout.group_size());
        let projection = uniform(&mut rng, hidden_size * width, 0.5);
        let values: Vec<Vec<f32>> = (0..layout.num_kv_heads).map(|_| uniform(&mut rng, len * head_dim, 1.5)).collect();
        let weights = |rows: Range<usize>, out: &mut Vec<f32>| {
            projection[rows.start * width..rows.end * width].clone_into(out);
        };
        // [num_heads] of [len] of [hidden_size]
        let made: Vec<Vec<Vec<f64>>> = (0..layout.num_heads)
            .map(|head| {
                let of_value = |value: &[f32]| {
                    projection
                        .chunks(width)
                        .map(|row| dot(&row[head * head_dim..(head + 1) * head_dim], value))
                        .collect()
                };
                values[head / group].chunks(head_dim).map(of_value).collect()
            })
            .collect();
        let absolute = absolute_outputs(layout, hidden_size, &weights, &values).unwrap();
        let products = output_products(layout, hidden_size, &weights, &values).unwrap();
        assert_eq!((absolute.len(), products.len()), (layout.num_heads, layout.num_heads * group));
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for head in 0..layout.num_heads {
            let own = &made[head];
            let expected: Vec<f64> = own.iter().map(|made| made.iter().map(|number| number.abs()).sum()).collect();
            assert_near(&absolute[head], &expected, &format!("lengths, {layout:?}"));
            // A product of two may be small beside what it is the sum of.
            let largest = own.iter().map(|made| product(made, made)).fold(0.0, f64::max);
            for other in 0..group {
                let with = &made[head / group * group + other];
                let got = &products[head * group + other];
                assert_eq!(got.len(), len);
                for (index, &got) in got.iter().enumerate() {
                    let expected = product(&own[index], &with[index]);
                    assert!((f64::from(got) - expected).abs() < TOLERANCE * largest, "{layout:?}: {got}, {expected}");
                }
            }
        }
        assert!(absolute_outputs(layout, hidden_size, &weights, &values[1..]).is_err());
        assert!(output_products(layout, hidden_size, &|_, out| out.clear(), &values).is_err());
    }
}

#[test]
fn what_is_rotated_can_be_turned_back() {
    for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
        let plain = RopeSettings::plain(10_000.0, 8, layout);
        let scaled = RopeSettings { attention_factor: 1.25, position_divisor: 4.0, ..plain.clone() };
        for settings in [plain, scaled] {
            let rope = Rope::new(&settings);
            // Heads of twelve numbers, of which eight are rotated.
            let rows = uniform(&mut seeded(5), 30 * 12, 2.0);
            let mut turned = rows.clone();
            rope.rotate(&mut turned, 12, 12, &rope.angles(70, 30));
            assert_ne!(turned, rows);
            rope.unrotate(&mut turned, 12, 70);
            for (got, expected) in turned.iter().zip(&rows) {
                assert!((got - expected).abs() < 1e-5, "{got}, {expected}");
            }
            let mut one = rows[..12].to_vec();
            rope.rotate(&mut one, 12, 12, &rope.angles(3, 1));
            rope.unrotate(&mut one, 12, 3);
            assert!(one.iter().zip(&rows).all(|(got, expected)| (got - expected).abs() < 1e-5));
        }
    }
}
