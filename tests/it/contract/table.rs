//! What a backend has to do, as one table: every operation, at many shapes and formats, with what plain arithmetic in f64
//! makes of it. An [`Observer`] goes over it: a test compares the numbers, `cargo bench` times the operations.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use adaptive_kvcache::arch::{Architecture, HeadLayout, LlamaConfig, Rope, RopeLayout, RopeSettings};
use adaptive_kvcache::backend::{Backend, Block, Candle, Embedding, Kernels, PromptRequest, Shown, Wanted, Weights};
use adaptive_kvcache::cache::{AdaptiveKvCache, CacheLayer, HeadStep, KvDtype, Retention, Rows};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::kernels::quant::{Compute, WeightFormat, WeightMatrix};
use adaptive_kvcache::ops::{DecodeWith, Ops};
use adaptive_kvcache::tokens::TokenClass;
use candle_core::Device;
use rand::rngs::StdRng;

use crate::numbers::{seeded, softmax, uniform, widen};

pub const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 96;
pub const VOCAB: usize = 48;

/// Of f32 sums in another order, relative to the largest number.
pub const EXACT: f64 = 2e-5;

/// What a cache's format may change, relative to the largest number.
fn tolerance(dtype: KvDtype) -> f64 {
    match dtype.values() {
        KvDtype::F32 => EXACT,
        KvDtype::F16 => 2e-3,
        KvDtype::Q8_0 => 2e-2,
        _ => 0.25,
    }
}

/// A model's sizes, and its weights as plain numbers.
struct Plain {
    config: LlamaConfig,
    /// Queries, keys, values, output, gate, up, down: `[out, in]`.
    linears: [Vec<f32>; 7],
    query_bias: Vec<f32>,
    norms: [Vec<f32>; 3],
    /// Of queries and keys, `[head_dim]`, if they have any.
    head_norms: Option<[Vec<f32>; 2]>,
    table: Vec<f32>,
    head: Vec<f32>,
}

pub fn matrix(numbers: &[f32], cols: usize) -> Arc<WeightMatrix> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    // Room to align: the kernels read numbers in place.
    let mut buffer = vec![0u8; bytes.len() + 64];
    let start = buffer.as_ptr().align_offset(64);
    buffer[start..start + bytes.len()].copy_from_slice(&bytes);
    let range = start..start + bytes.len();
    Arc::new(WeightMatrix::new(Arc::new(buffer), range, WeightFormat::F32, numbers.len() / cols, cols).unwrap())
}

fn product(weights: &[f32], x: &[f64]) -> Vec<f64> {
    weights.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

impl Plain {
    fn new(heads: HeadLayout, architecture: Architecture, rope: RopeLayout, rng: &mut StdRng) -> Self {
        let config = LlamaConfig {
            architecture,
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
            head_norms: architecture.has_head_norms().then(|| [(); 2].map(|()| uniform(rng, heads.head_dim, 1.0))),
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
        let head_norm =
            |index: usize| self.head_norms.as_ref().map(|norms| backend.vector(norms[index].clone()).unwrap());
        let block = Block {
            input_layernorm: norm(0),
            q_norm: head_norm(0),
            k_norm: head_norm(1),
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
        self.normed_by(x, &self.norms[norm])
    }

    fn normed_by(&self, x: &[f64], norm: &[f32]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = (mean + self.config.rms_norm_eps).sqrt().recip();
        x.iter().zip(norm).map(|(x, &weight)| x * scale * f64::from(weight)).collect()
    }

    /// Queries before and after rotation, keys, values of one row.
    fn project(&self, x: &[f32], angles: &[(f32, f32)]) -> [Vec<f64>; 4] {
        let normed = self.normed(&widen(x), 0);
        let mut queries = product(&self.linears[0], &normed);
        queries.iter_mut().zip(&self.query_bias).for_each(|(query, &bias)| *query += f64::from(bias));
        let mut keys = product(&self.linears[1], &normed);
        let head_dim = self.config.heads.head_dim;
        for (heads, norm) in [&mut queries, &mut keys].into_iter().zip(self.head_norms.iter().flatten()) {
            *heads = heads.chunks_exact(head_dim).flat_map(|head| self.normed_by(head, norm)).collect();
        }
        let rotated = |heads: &[f64]| -> Vec<f64> {
            heads.chunks_exact(head_dim).flat_map(|head| self.rotated(head, angles)).collect()
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

/// A line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    backend: &'static str,
    heads: HeadLayout,
    /// Rows of the prompt.
    len: usize,
    dtype: KvDtype,
    operation: &'static str,
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, heads: HeadLayout { num_heads, num_kv_heads, head_dim }, len, dtype, operation } = self;
        let dtype = dtype.name();
        write!(formatter, "{backend} {operation}, {num_heads} on {num_kv_heads} x {head_dim}, {len} rows, {dtype}")
    }
}

/// Who goes over the table.
pub trait Observer {
    /// Runs an operation, once or more often, each time on an input that is made for it; any result counts, all are alike.
    fn run<I, O>(&mut self, line: Line, input: impl FnMut() -> I, operation: impl FnMut(I) -> O) -> O;

    /// Sees what has come of an operation, and what was expected, to how much of the largest number.
    fn compare(&mut self, line: Line, got: &[f32], expected: impl FnOnce() -> Vec<f64>, tolerance: f64);
}

/// A backend at one shape, and what it gets.
struct Case<'a, B: Backend> {
    backend: &'a B,
    plain: &'a Plain,
    weights: Weights<B>,
    /// What all lines have in common.
    first: Line,
    /// `[len + 2]` of `[HIDDEN]`: rows of the prompt, and two tokens on top.
    hidden: Vec<Vec<f32>>,
    /// `[len + 2, head_dim / 2]`
    angles: Vec<(f32, f32)>,
    /// `[len + 2]` of unrotated queries, queries, keys and values, as plain arithmetic has them.
    projected: Vec<[Vec<f64>; 4]>,
}

/// What a backend makes of a prompt, row after row.
#[derive(Default)]
struct Made {
    queries: Vec<f32>,
    unrotated: Vec<f32>,
    attended: Vec<f32>,
    finished: Vec<f32>,
}

impl<'a, B: Backend> Case<'a, B> {
    fn new(backend: &'a B, plain: &'a Plain, first: Line, rng: &mut StdRng) -> Self {
        let weights = plain.weights(backend);
        weights.expect_sizes(&plain.config).unwrap();
        let total = first.len + 2;
        let hidden: Vec<Vec<f32>> = (0..total).map(|_| uniform(rng, HIDDEN, 1.0)).collect();
        let angles = Rope::new(&plain.config.rope).angles(0, total);
        let rows = hidden.iter().zip(angles.chunks_exact(first.heads.head_dim / 2));
        let projected = rows.map(|(row, angles)| plain.project(row, angles)).collect();
        Self { backend, plain, weights, first, hidden, angles, projected }
    }

    fn line(&self, operation: &'static str) -> Line {
        Line { operation, ..self.first }
    }

    fn rotations(&self, rows: Range<usize>) -> B::Rotations {
        let half = self.first.heads.head_dim / 2;
        self.backend.rotations(self.angles[rows.start * half..rows.end * half].to_vec()).unwrap()
    }

    fn part(&self, kind: usize, row: usize, head: usize) -> &[f64] {
        let head_dim = self.first.heads.head_dim;
        &self.projected[row][kind][head * head_dim..(head + 1) * head_dim]
    }

    /// Weights and output of a query head over some rows.
    fn over(&self, row: usize, rows: &[usize], head: usize) -> (Vec<f64>, Vec<f64>) {
        let kv_head = head / self.first.heads.group_size();
        let of = |kind| rows.iter().map(|&row| self.part(kind, row, kv_head)).collect::<Vec<_>>();
        self.plain.attend(self.part(1, row, head), &of(2), &of(3))
    }

    /// All lines: a prompt in two chunks, of which heads keep different rows; a token on top; rows that go; another token.
    fn lines(&self, observer: &mut impl Observer) {
        let Line { len, dtype, .. } = self.first;
        let mut cache = AdaptiveKvCache::new(1, &self.backend.empty_rows(dtype).unwrap(), Retention::Full);
        let layer = &mut cache.layers_mut::<B::Rows>().unwrap()[0];
        let (prompt, made) = self.prompt(&layer.rows().clone(), observer);
        self.compare_prompt(&prompt, &made, observer);
        store::<B>(layer, &prompt, len);
        drop(prompt);
        for row in len..self.hidden.len() {
            self.token(layer, row, observer);
            lose_rows(layer);
        }
        assert!(layer.bytes().kept <= layer.bytes().allocated);
    }

    /// What a prompt goes through. The last chunk comes last, and is what is timed.
    fn prompt(&self, empty: &B::Rows, observer: &mut impl Observer) -> (B::Prompt, Made) {
        let (backend, len, block) = (self.backend, self.first.len, &self.weights.blocks[0]);
        let asks = PromptRequest { prompt_len: len, stats: None, again: false, window: None };
        let rotations = self.rotations(0..len);
        let mut prompt = backend.prompt(empty, asks).unwrap();
        let mut made = Made::default();
        let mut chunks: Vec<(usize, B::Projected)> = Vec::new();
        for (start, end) in [(0, len / 2), (len / 2, len)] {
            if start == end {
                continue;
            }
            let rows = self.hidden[start..end].concat();
            let named = |last, other| self.line(if end == len { last } else { other });
            let stream = backend.hidden(rows.clone()).unwrap();
            assert!(backend.bad_rows(&stream).unwrap().is_empty());
            let project = |()| backend.project(block, &stream, &rotations, start, true).unwrap();
            let chunk = observer.run(named("project", "project, first chunk"), || (), project);
            // A prompt with all chunks before this one.
            let before = || {
                let mut prompt = backend.prompt(empty, asks).unwrap();
                for (start, chunk) in &chunks {
                    backend.attend(&mut prompt, chunk, *start, None, None).unwrap();
                }
                prompt
            };
            let attend = |mut prompt: B::Prompt| {
                let out = backend.attend(&mut prompt, &chunk, start, None, None).unwrap();
                (prompt, out)
            };
            let out;
            (prompt, out) = observer.run(named("attend", "attend, first chunk"), before, attend);
            made.attended.extend(backend.attended(&out).unwrap());
            let again = || attend(before()).1;
            let finish = |out| backend.finish(block, &stream, out).unwrap();
            let after = observer.run(named("finish", "finish, first chunk"), again, finish);
            assert_eq!(made.add(backend, &chunk, [&stream, &after]), rows);
            if end == len {
                let line = self.line("logits");
                let logits = observer.run(line, || (), |()| backend.logits(&self.weights, &after).unwrap());
                let last = widen(&made.finished[(len - 1) * HIDDEN..]);
                let expected = || product(&self.plain.head, &self.plain.normed(&last, 2));
                observer.compare(line, &logits, expected, EXACT);
                let (stream, out) = backend.last_row(&stream, attend(before()).1).unwrap();
                let alone = backend.finish(block, &stream, out).unwrap();
                observer.compare(line, &backend.logits(&self.weights, &alone).unwrap(), expected, EXACT);
            }
            chunks.push((start, chunk));
        }
        (prompt, made)
    }

    fn compare_prompt(&self, prompt: &B::Prompt, made: &Made, observer: &mut impl Observer) {
        let Line { heads, len, .. } = self.first;
        let all = |kind: usize| self.projected[..len].iter().flat_map(|row| row[kind].clone()).collect();
        observer.compare(self.line("project, unrotated queries"), &made.unrotated, || all(0), EXACT);
        observer.compare(self.line("project, queries"), &made.queries, || all(1), EXACT);
        let kv = self.backend.prompt_kv(prompt).unwrap();
        for (what, kind, rows) in [("project, keys", 2, &kv.keys), ("project, values", 3, &kv.values)] {
            for head in 0..heads.num_kv_heads {
                let expected = || (0..len).flat_map(|row| self.part(kind, row, head).to_vec()).collect();
                observer.compare(self.line(what), &rows.rows(head, 0..len), expected, EXACT);
            }
        }
        let causal = || {
            (0..len)
                .flat_map(|row| (0..heads.num_heads).map(move |head| (row, head)))
                .flat_map(|(row, head)| self.over(row, &(0..=row).collect::<Vec<_>>(), head).1)
                .collect()
        };
        observer.compare(self.line("attend"), &made.attended, causal, EXACT);
        let rows = || self.hidden.iter().zip(made.attended.chunks_exact(heads.query_width()));
        let expected = || rows().flat_map(|(row, attended)| self.plain.finish(row, &widen(attended))).collect();
        observer.compare(self.line("finish"), &made.finished, expected, EXACT);
    }

    /// What one more token goes through, over the rows that heads have kept.
    fn token(&self, layer: &mut CacheLayer<B::Rows>, row: usize, observer: &mut impl Observer) {
        let (backend, heads, tolerance) = (self.backend, self.first.heads, tolerance(self.first.dtype));
        let stream = backend.hidden(self.hidden[row].clone()).unwrap();
        let rotations = self.rotations(row..row + 1);
        let chunk = backend.project(&self.weights.blocks[0], &stream, &rotations, 0, false).unwrap();
        let append = |mut layer: CacheLayer<B::Rows>| {
            backend.append(&mut layer, &chunk, row, TokenClass::default()).unwrap();
            layer
        };
        *layer = observer.run(self.line("append"), || layer.clone(), append);
        let held: Vec<Vec<usize>> =
            layer.positions().iter().map(|head| head.iter().map(|&position| position as usize).collect()).collect();
        let line = self.line("attend to kept rows");
        let attend = |()| backend.attended(&backend.attend_rows(layer.rows(), &chunk).unwrap()).unwrap();
        let out = observer.run(line, || (), attend);
        let of_heads = |heads_of: Range<usize>| -> Vec<_> {
            heads_of.map(|head| self.over(row, &held[head / heads.group_size()], head)).collect()
        };
        let expected = || of_heads(0..heads.num_heads).into_iter().flat_map(|(_, out)| out).collect();
        observer.compare(line, &out, expected, tolerance);
        for (kv_head, rows) in held.iter().enumerate() {
            let group = heads.group_size();
            let expected = || {
                let group = of_heads(kv_head * group..(kv_head + 1) * group);
                (0..rows.len()).map(|at| group.iter().map(|(weights, _)| weights[at]).sum()).collect()
            };
            let line = self.line("weights of kept rows");
            let weights = observer.run(line, || (), |()| backend.row_weights(layer.rows(), &chunk, kv_head).unwrap());
            observer.compare(line, &weights, expected, tolerance);
        }
    }
}

impl Made {
    /// Takes in what became of a chunk; its rows, as they came.
    ///
    /// * `hidden`: before the layer, and after it
    fn add<B: Backend>(&mut self, backend: &B, chunk: &B::Projected, [before, after]: [&B::Hidden; 2]) -> Vec<f32> {
        let wanted = Wanted { replay: true, queries: true, unrotated: true };
        let mut rows = Vec::new();
        let take_queries = &mut |shown: Shown<'_>| {
            rows.extend_from_slice(shown.hidden);
            self.queries.extend_from_slice(shown.queries);
            self.unrotated.extend_from_slice(shown.unrotated_queries);
            Ok(())
        };
        backend.show(chunk, before, wanted, take_queries).unwrap();
        let take_finished = &mut |shown: Shown<'_>| {
            self.finished.extend_from_slice(shown.hidden);
            Ok(())
        };
        backend.show(chunk, after, wanted, take_finished).unwrap();
        rows
    }
}

/// Stores a prompt of which heads keep different rows: the first all of them, the last none but one.
fn store<B: Backend>(layer: &mut CacheLayer<B::Rows>, prompt: &B::Prompt, len: usize) {
    let num_kv_heads = layer.positions().len();
    let kept = |head: usize| -> Vec<usize> {
        if head + 1 == num_kv_heads && head > 0 { vec![len - 1] } else { (0..len).step_by(head + 1).collect() }
    };
    let choices = (0..num_kv_heads).map(|kv_head| HeadChoice {
        kv_head,
        level: 0,
        recovered: Vec::new(),
        positions: kept(kv_head).into_iter().map(|row| row as u32).collect(),
    });
    layer.store_prompt(B::stored_prompt(prompt), Some(choices.collect())).unwrap();
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

fn table<B: Backend>(
    backend: &'static str,
    make: impl Fn(&LlamaConfig) -> B,
    dtypes: &[KvDtype],
    observer: &mut impl Observer,
) {
    for (index, (heads, len)) in shapes().into_iter().enumerate() {
        let mut rng = seeded(index as u64);
        let rope = if index % 2 == 0 { RopeLayout::Halves } else { RopeLayout::Interleaved };
        let architecture = if index % 3 == 1 { Architecture::Qwen3 } else { Architecture::Llama };
        let plain = Plain::new(heads, architecture, rope, &mut rng);
        for &dtype in dtypes {
            let first = Line { backend, heads, len, dtype, operation: "" };
            Case::new(&make(&plain.config), &plain, first, &mut rng).lines(observer);
        }
    }
}

/// The lines of the CPU kernels.
pub fn kernels(observer: &mut impl Observer) {
    table("kernels", |config| Kernels::new(config, Compute::Fast), &KvDtype::ALL, observer);
}

/// The lines of candle operations on the CPU, in both ways of decoding.
pub fn candle(observer: &mut impl Observer) {
    let ops = Ops::new(Device::Cpu).unwrap();
    table("candle", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16], observer);
    let ops = ops.with_decode(DecodeWith::Ragged);
    table("candle, ragged", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16], observer);
}
