//! What a backend has to do, as one table: every operation, at many shapes and formats, against plain arithmetic in f64.
//! The largest error of each line is printed (`--nocapture`). A further backend is done when its lines pass.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any type

use std::sync::Arc;

use adaptive_kvcache::arch::{HeadLayout, LlamaConfig, Rope, RopeLayout, RopeSettings};
use adaptive_kvcache::backend::{Backend, Block, Candle, Embedding, Kernels, PromptRequest, Wanted, Weights};
use adaptive_kvcache::cache::{AdaptiveKvCache, CacheLayer, HeadStep, KvDtype, Retention, Rows};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::kernels::quant::WeightMatrix;
use adaptive_kvcache::ops::{DecodeWith, Ops};
use adaptive_kvcache::tokens::TokenClass;
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use rand::rngs::StdRng;

use crate::numbers::{dot, seeded, softmax, uniform, widen};

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 96;
const VOCAB: usize = 48;

/// Of f32 sums in another order, relative to the largest number.
const EXACT: f64 = 2e-5;

/// What a cache's format may change, relative to the largest number.
fn tolerance(dtype: KvDtype) -> f64 {
    match dtype {
        KvDtype::F32 => EXACT,
        KvDtype::F16 => 2e-3,
        KvDtype::Q8_0 => 2e-2,
        KvDtype::Q4_0 => 0.25,
    }
}

/// A model's sizes, and its weights as plain numbers.
struct Plain {
    config: LlamaConfig,
    /// Queries, keys, values, output, gate, up, down: `[out, in]`.
    linears: [Vec<f32>; 7],
    query_bias: Vec<f32>,
    norms: [Vec<f32>; 3],
    table: Vec<f32>,
    head: Vec<f32>,
}

fn matrix(numbers: &[f32], cols: usize) -> Arc<WeightMatrix> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    // Room to align: the kernels read numbers in place.
    let mut buffer = vec![0u8; bytes.len() + 64];
    let start = buffer.as_ptr().align_offset(64);
    buffer[start..start + bytes.len()].copy_from_slice(&bytes);
    let range = start..start + bytes.len();
    Arc::new(WeightMatrix::new(Arc::new(buffer), range, GgmlDType::F32, numbers.len() / cols, cols).unwrap())
}

fn product(weights: &[f32], x: &[f64]) -> Vec<f64> {
    weights.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

impl Plain {
    fn new(heads: HeadLayout, rope: RopeLayout, rng: &mut StdRng) -> Self {
        let config = LlamaConfig {
            hidden_size: HIDDEN,
            intermediate_size: INTERMEDIATE,
            num_layers: 1,
            heads,
            vocab_size: VOCAB,
            rms_norm_eps: 1e-5,
            context_length: 4096,
            sliding_window: None,
            rope: RopeSettings::plain(10_000.0, heads.head_dim, rope),
        };
        let (queries, kv) = (heads.query_width(), heads.kv_width());
        let sizes = [
            queries * HIDDEN,
            kv * HIDDEN,
            kv * HIDDEN,
            HIDDEN * queries,
            INTERMEDIATE * HIDDEN,
            INTERMEDIATE * HIDDEN,
            HIDDEN * INTERMEDIATE,
        ];
        Self {
            linears: sizes.map(|len| uniform(rng, len, 0.3)),
            query_bias: uniform(rng, queries, 0.5),
            norms: [(); 3].map(|()| uniform(rng, HIDDEN, 1.0)),
            table: uniform(rng, VOCAB * HIDDEN, 1.0),
            head: uniform(rng, VOCAB * HIDDEN, 0.3),
            config,
        }
    }

    fn weights<B: Backend>(&self, backend: &B) -> Weights<B> {
        let linear = |index: usize, cols: usize, bias: Option<Vec<f32>>| {
            backend.linear(matrix(&self.linears[index], cols), bias).unwrap()
        };
        let norm = |index: usize| backend.vector(self.norms[index].clone()).unwrap();
        let block = Block {
            input_layernorm: norm(0),
            q_proj: linear(0, HIDDEN, Some(self.query_bias.clone())),
            k_proj: linear(1, HIDDEN, None),
            v_proj: linear(2, HIDDEN, None),
            o_proj: linear(3, self.config.heads.query_width(), None),
            post_attention_layernorm: norm(1),
            gate_proj: linear(4, HIDDEN, None),
            up_proj: linear(5, HIDDEN, None),
            down_proj: linear(6, INTERMEDIATE, None),
        };
        Weights {
            embed_tokens: Embedding::new(matrix(&self.table, HIDDEN)),
            blocks: vec![block],
            norm: norm(2),
            lm_head: backend.linear(matrix(&self.head, HIDDEN), None).unwrap(),
        }
    }

    fn normed(&self, x: &[f64], norm: usize) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = (mean + self.config.rms_norm_eps).sqrt().recip();
        x.iter().zip(&self.norms[norm]).map(|(x, &weight)| x * scale * f64::from(weight)).collect()
    }

    /// Queries before and after rotation, keys, values of one row.
    fn project(&self, x: &[f32], angles: &[(f32, f32)]) -> [Vec<f64>; 4] {
        let normed = self.normed(&widen(x), 0);
        let mut queries = product(&self.linears[0], &normed);
        queries.iter_mut().zip(&self.query_bias).for_each(|(query, &bias)| *query += f64::from(bias));
        let keys = product(&self.linears[1], &normed);
        let rotated = |heads: &[f64]| -> Vec<f64> {
            heads.chunks_exact(self.config.heads.head_dim).flat_map(|head| self.rotated(head, angles)).collect()
        };
        [queries.clone(), rotated(&queries), rotated(&keys), product(&self.linears[2], &normed)]
    }

    fn rotated(&self, head: &[f64], angles: &[(f32, f32)]) -> Vec<f64> {
        let mut out = head.to_vec();
        let half = head.len() / 2;
        for (index, &(cos, sin)) in angles.iter().enumerate() {
            let (a, b) = match self.config.rope.layout {
                RopeLayout::Interleaved => (2 * index, 2 * index + 1),
                RopeLayout::Halves => (index, half + index),
            };
            let (cos, sin) = (f64::from(cos), f64::from(sin));
            (out[a], out[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
        }
        out
    }

    fn finish(&self, x: &[f32], attended: &[f64]) -> Vec<f64> {
        let residual: Vec<f64> =
            product(&self.linears[3], attended).iter().zip(x).map(|(a, &b)| a + f64::from(b)).collect();
        let normed = self.normed(&residual, 1);
        let gate = product(&self.linears[4], &normed).into_iter().map(|gate| gate / (1.0 + (-gate).exp()));
        let activated: Vec<f64> = gate.zip(product(&self.linears[5], &normed)).map(|(gate, up)| gate * up).collect();
        product(&self.linears[6], &activated).iter().zip(residual).map(|(a, b)| a + b).collect()
    }

    /// Weights and output of one query head over some rows.
    fn attend(&self, query: &[f64], keys: &[&[f64]], values: &[&[f64]]) -> (Vec<f64>, Vec<f64>) {
        let scale = f64::from(self.config.heads.scale());
        let score = |key: &&[f64]| scale * key.iter().zip(query).map(|(k, q)| k * q).sum::<f64>();
        let weights = softmax(&keys.iter().map(score).collect::<Vec<_>>());
        let mut out = vec![0.0; query.len()];
        for (weight, value) in weights.iter().zip(values) {
            out.iter_mut().zip(*value).for_each(|(out, value)| *out += weight * value);
        }
        (weights, out)
    }
}

/// Compares numbers, relative to the largest; prints and checks the error.
#[track_caller]
fn check(line: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{line}");
    let largest = expected.iter().fold(1e-9, |largest: f64, x| largest.max(x.abs()));
    let error = got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max) / largest;
    println!("{line:60} {error:9.1e}");
    assert!(error <= tolerance, "{line}: {error:e}, at most {tolerance:e}");
}

/// A prompt and a few tokens on top, as the plain path projects them.
struct Expected<'a> {
    plain: &'a Plain,
    /// Begins every line.
    name: String,
    dtype: KvDtype,
    /// Rows of the prompt.
    len: usize,
    /// `[len + more]` of `[HIDDEN]`.
    hidden: Vec<Vec<f32>>,
    /// `[len + more, head_dim / 2]`.
    angles: Vec<(f32, f32)>,
    /// Of each row, unrotated queries, queries, keys and values.
    projected: Vec<[Vec<f64>; 4]>,
}

impl<'a> Expected<'a> {
    fn new(plain: &'a Plain, name: &str, (len, more): (usize, usize), dtype: KvDtype, rng: &mut StdRng) -> Self {
        let half = plain.config.heads.head_dim / 2;
        let hidden: Vec<Vec<f32>> = (0..len + more).map(|_| uniform(rng, HIDDEN, 1.0)).collect();
        let angles = Rope::new(&plain.config.rope).angles(0, len + more);
        let rows = hidden.iter().zip(angles.chunks_exact(half));
        let projected = rows.map(|(row, angles)| plain.project(row, angles)).collect();
        Self { plain, name: name.to_owned(), dtype, len, hidden, angles, projected }
    }

    fn line(&self, operation: &str) -> String {
        let HeadLayout { num_heads, num_kv_heads, head_dim } = self.plain.config.heads;
        let Self { name, len, .. } = self;
        format!("{name} {operation}, {num_heads}/{num_kv_heads} x {head_dim}, {len} rows, {}", self.dtype.name())
    }

    fn part(&self, kind: usize, row: usize, head: usize) -> &[f64] {
        let head_dim = self.plain.config.heads.head_dim;
        &self.projected[row][kind][head * head_dim..(head + 1) * head_dim]
    }

    /// Weights and output of a query head over some rows.
    fn over(&self, row: usize, rows: &[usize], head: usize) -> (Vec<f64>, Vec<f64>) {
        let kv_head = head / self.plain.config.heads.group_size();
        let of = |kind| rows.iter().map(|&row| self.part(kind, row, kv_head)).collect::<Vec<_>>();
        self.plain.attend(self.part(1, row, head), &of(2), &of(3))
    }
}

/// One backend at one shape: a prompt of `len` rows in two chunks, of which heads keep different rows; a token on top;
/// rows that go; another token.
fn lines<B: Backend>(backend: &B, plain: &Plain, name: &str, len: usize, dtype: KvDtype, rng: &mut StdRng) {
    let weights = plain.weights(backend);
    weights.expect_sizes(&plain.config).unwrap();
    let expected = Expected::new(plain, name, (len, 2), dtype, rng);
    let mut cache = AdaptiveKvCache::new(1, &backend.empty_rows(dtype).unwrap(), Retention::Full);
    let layer = &mut cache.layers_mut::<B::Rows>().unwrap()[0];
    let prompt = prompt_lines(backend, &weights, layer, &expected);
    // Heads keep different rows: the first all of them, the last none but one.
    let num_kv_heads = plain.config.heads.num_kv_heads;
    let kept = |head: usize| -> Vec<usize> {
        if head + 1 == num_kv_heads && head > 0 { vec![len - 1] } else { (0..len).step_by(head + 1).collect() }
    };
    let choices = (0..num_kv_heads).map(|kv_head| HeadChoice {
        kv_head,
        level: 0,
        recovered: Vec::new(),
        positions: kept(kv_head).into_iter().map(|row| row as u32).collect(),
    });
    layer.store_prompt(B::stored_prompt(&prompt), Some(choices.collect())).unwrap();
    drop(prompt);
    for row in len..expected.hidden.len() {
        token_lines(backend, &weights, layer, &expected, row);
        lose_rows(layer);
    }
    assert!(layer.bytes().kept <= layer.bytes().allocated);
}

/// What a prompt goes through, operation by operation.
fn prompt_lines<B: Backend>(
    backend: &B,
    weights: &Weights<B>,
    layer: &CacheLayer<B::Rows>,
    expected: &Expected<'_>,
) -> B::Prompt {
    let Expected { plain, len, hidden, angles, projected, .. } = expected;
    let (len, heads) = (*len, plain.config.heads);
    let rotations = backend.rotations(angles[..len * heads.head_dim / 2].to_vec()).unwrap();
    let asks = PromptRequest { prompt_len: len, stats: None, again: false };
    let mut prompt = backend.prompt(layer.rows(), asks).unwrap();
    let block = &weights.blocks[0];
    let wanted = Wanted { replay: true, unrotated: true };
    let (mut queries, mut unrotated, mut attended, mut finished) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (first, rows) in [(0, &hidden[..len / 2]), (len / 2, &hidden[len / 2..len])] {
        if rows.is_empty() {
            continue;
        }
        let stream = backend.hidden(rows.concat()).unwrap();
        assert!(backend.bad_rows(&stream).unwrap().is_empty());
        let chunk = backend.project(block, &stream, &rotations, first, true).unwrap();
        backend
            .show(&chunk, &stream, wanted, &mut |shown| {
                assert_eq!(shown.hidden, rows.concat());
                queries.extend_from_slice(shown.queries);
                unrotated.extend_from_slice(shown.unrotated_queries);
                Ok(())
            })
            .unwrap();
        let out = backend.attend(&mut prompt, &chunk, first, None, None).unwrap();
        attended.extend(backend.attended(&out).unwrap());
        let after = backend.finish(block, &stream, out).unwrap();
        let show = &mut |shown: adaptive_kvcache::backend::Shown<'_>| {
            finished.extend_from_slice(shown.hidden);
            Ok(())
        };
        backend.show(&chunk, &after, wanted, show).unwrap();
        if first + rows.len() == len {
            let last = &finished[(len - 1) * HIDDEN..];
            let logits = product(&plain.head, &plain.normed(&widen(last), 2));
            check(&expected.line("logits"), &backend.logits(weights, &after).unwrap(), &logits, EXACT);
        }
    }
    let all = |kind: usize| -> Vec<f64> { projected[..len].iter().flat_map(|row| row[kind].clone()).collect() };
    check(&expected.line("project, unrotated queries"), &unrotated, &all(0), EXACT);
    check(&expected.line("project, queries"), &queries, &all(1), EXACT);
    let kv = backend.prompt_kv(&prompt).unwrap();
    for (what, kind, rows) in [("keys", 2, &kv.keys), ("values", 3, &kv.values)] {
        for head in 0..heads.num_kv_heads {
            let wanted: Vec<f64> = (0..len).flat_map(|row| expected.part(kind, row, head).to_vec()).collect();
            check(&expected.line(&format!("project, {what}")), &rows.rows(head, 0..len), &wanted, EXACT);
        }
    }
    let causal: Vec<f64> = (0..len)
        .flat_map(|row| (0..heads.num_heads).map(move |head| (row, head)))
        .flat_map(|(row, head)| expected.over(row, &(0..=row).collect::<Vec<_>>(), head).1)
        .collect();
    check(&expected.line("attend"), &attended, &causal, EXACT);
    let width = heads.query_width();
    let after: Vec<f64> = (0..len)
        .flat_map(|row| plain.finish(&hidden[row], &widen(&attended[row * width..(row + 1) * width])))
        .collect();
    check(&expected.line("finish"), &finished, &after, EXACT);
    prompt
}

/// What one more token goes through, over the rows that heads have kept.
fn token_lines<B: Backend>(
    backend: &B,
    weights: &Weights<B>,
    layer: &mut CacheLayer<B::Rows>,
    expected: &Expected<'_>,
    row: usize,
) {
    let heads = expected.plain.config.heads;
    let (half, group_size, tolerance) = (heads.head_dim / 2, heads.group_size(), tolerance(expected.dtype));
    let stream = backend.hidden(expected.hidden[row].clone()).unwrap();
    let rotations = backend.rotations(expected.angles[row * half..(row + 1) * half].to_vec()).unwrap();
    let chunk = backend.project(&weights.blocks[0], &stream, &rotations, 0, false).unwrap();
    backend.append(layer, &chunk, row, TokenClass::default()).unwrap();
    let held: Vec<Vec<usize>> =
        layer.positions().iter().map(|head| head.iter().map(|&position| position as usize).collect()).collect();
    let out = backend.attended(&backend.attend_rows(layer.rows(), &chunk).unwrap()).unwrap();
    let of_heads: Vec<_> =
        (0..heads.num_heads).map(|head| expected.over(row, &held[head / group_size], head)).collect();
    let outputs: Vec<f64> = of_heads.iter().flat_map(|(_, out)| out.clone()).collect();
    check(&expected.line("attend to kept rows"), &out, &outputs, tolerance);
    for (kv_head, group) in of_heads.chunks_exact(group_size).enumerate() {
        let sums: Vec<f64> =
            (0..held[kv_head].len()).map(|at| group.iter().map(|(weights, _)| weights[at]).sum()).collect();
        let weights = backend.row_weights(layer.rows(), &chunk, kv_head).unwrap();
        check(&expected.line("weights of kept rows"), &weights, &sums, tolerance);
    }
}

/// Lets the first row of every head go that holds more than one.
fn lose_rows<R: Rows>(layer: &mut CacheLayer<R>) {
    let before = layer.positions().to_vec();
    let choices = before.iter().enumerate().map(|(kv_head, held)| HeadChoice {
        kv_head,
        level: 0,
        recovered: Vec::new(),
        positions: held[usize::from(held.len() > 1)..].to_vec(),
    });
    layer.keep_of_prompt(0, choices.collect()).unwrap();
    assert!(layer.evict(&mut vec![HeadStep::default(); before.len()]).is_ok());
    for (after, before) in layer.positions().iter().zip(before) {
        assert_eq!(*after, before[usize::from(before.len() > 1)..]);
    }
}

/// Head sizes, groups of query heads, rows of the prompt.
fn shapes() -> Vec<(HeadLayout, usize)> {
    let layout = |group: usize, num_kv_heads: usize, head_dim| HeadLayout {
        num_heads: group * num_kv_heads,
        num_kv_heads,
        head_dim,
    };
    let mut shapes = Vec::new();
    for head_dim in [32, 64, 96, 128, 256] {
        for group in [1, 3, 16] {
            shapes.extend([1, 7].map(|len| (layout(group, 2, head_dim), len)));
        }
    }
    shapes.push((layout(2, 3, 64), 512));
    shapes
}

fn table<B: Backend>(name: &str, make: impl Fn(&LlamaConfig) -> B, dtypes: &[KvDtype]) {
    for (index, (heads, len)) in shapes().into_iter().enumerate() {
        let mut rng = seeded(index as u64);
        let rope = if index % 2 == 0 { RopeLayout::Halves } else { RopeLayout::Interleaved };
        let plain = Plain::new(heads, rope, &mut rng);
        for &dtype in dtypes {
            lines(&make(&plain.config), &plain, name, len, dtype, &mut rng);
        }
    }
}

#[test]
fn the_kernels_keep_the_contract() {
    table("kernels", Kernels::new, &KvDtype::ALL);
}

#[test]
fn candle_operations_keep_the_contract() {
    let ops = Ops::new(Device::Cpu).unwrap();
    table("candle", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16]);
    let ops = ops.with_decode(DecodeWith::Ragged);
    table("candle, ragged", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16]);
}

/// The table can fail: numbers that are off by more than the tolerance are found.
#[test]
#[should_panic(expected = "at most")]
fn the_table_finds_a_wrong_number() {
    check("a wrong number", &[1.0, 2.001], &[1.0, 2.0], EXACT);
}

/// Embeddings are looked up in memory, whatever computes.
#[test]
fn tokens_have_their_rows() {
    let mut rng = seeded(1);
    let numbers = uniform(&mut rng, VOCAB * HIDDEN, 1.0);
    let table = Embedding::new(matrix(&numbers, HIDDEN));
    let mut out = Vec::new();
    table.look_up(&[3, 0, 47], &mut out).unwrap();
    assert_eq!(out, [&numbers[3 * HIDDEN..4 * HIDDEN], &numbers[..HIDDEN], &numbers[47 * HIDDEN..]].concat());
    assert!(table.look_up(&[48], &mut out).is_err());
    assert!(dot(&out, &out) > 0.0);
}
