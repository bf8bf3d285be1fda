//! What a backend has to do, as one table: every operation, at many shapes and formats, with what plain arithmetic in f64
//! makes of it. An [`Observer`] goes over it: a test compares the numbers, `cargo bench` times the operations.

use std::fmt;
use std::sync::Arc;

use adaptive_kvcache::arch::{HeadLayout, LlamaConfig, Rope, RopeLayout, RopeSettings};
use adaptive_kvcache::backend::{Backend, Block, Candle, Embedding, Kernels, PromptRequest, Shown, Wanted, Weights};
use adaptive_kvcache::cache::{AdaptiveKvCache, CacheLayer, HeadStep, KvDtype, Retention, Rows};
use adaptive_kvcache::compress::HeadChoice;
use adaptive_kvcache::kernels::quant::WeightMatrix;
use adaptive_kvcache::ops::{DecodeWith, Ops};
use adaptive_kvcache::tokens::TokenClass;
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use rand::rngs::StdRng;

use crate::numbers::{seeded, softmax, uniform, widen};

pub const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 96;
pub const VOCAB: usize = 48;

/// Of f32 sums in another order, relative to the largest number.
pub const EXACT: f64 = 2e-5;

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

pub fn matrix(numbers: &[f32], cols: usize) -> Arc<WeightMatrix> {
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

/// One backend at one shape: a prompt of `len` rows in two chunks, of which heads keep different rows; a token on top;
/// rows that go; another token.
fn lines<B: Backend>(backend: &B, plain: &Plain, first: Line, rng: &mut StdRng, observer: &mut impl Observer) {
    let Line { heads, len, dtype, .. } = first;
    let HeadLayout { num_kv_heads, head_dim, .. } = heads;
    let line = |operation| Line { operation, ..first };
    let weights = plain.weights(backend);
    weights.expect_sizes(&plain.config).unwrap();
    let rope = Rope::new(&plain.config.rope);
    let total = len + 2;
    let hidden: Vec<Vec<f32>> = (0..total).map(|_| uniform(rng, HIDDEN, 1.0)).collect();
    let angles = rope.angles(0, total);
    let of_row = |row: usize| &angles[row * head_dim / 2..(row + 1) * head_dim / 2];
    let projected: Vec<[Vec<f64>; 4]> = (0..total).map(|row| plain.project(&hidden[row], of_row(row))).collect();
    let part = |kind: usize, row: usize, head: usize| &projected[row][kind][head * head_dim..(head + 1) * head_dim];

    let mut cache = AdaptiveKvCache::new(1, &backend.empty_rows(dtype).unwrap(), Retention::Full);
    let layer = &mut cache.layers_mut::<B::Rows>().unwrap()[0];
    let rotations = backend.rotations(angles[..len * head_dim / 2].to_vec()).unwrap();
    let asks = PromptRequest { prompt_len: len, stats: None, again: false };
    let empty = layer.rows().clone();
    let mut prompt = backend.prompt(&empty, asks).unwrap();
    let block = &weights.blocks[0];
    let wanted = Wanted { replay: true, unrotated: true };
    let (mut queries, mut unrotated, mut attended, mut finished) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut chunks: Vec<(usize, B::Projected)> = Vec::new();
    // The last chunk comes last, and is what is timed.
    for (start, rows) in [(0, &hidden[..len / 2]), (len / 2, &hidden[len / 2..len])] {
        if rows.is_empty() {
            continue;
        }
        let is_last = start + rows.len() == len;
        let named = |last, other| line(if is_last { last } else { other });
        let stream = backend.hidden(rows.concat()).unwrap();
        assert!(backend.bad_rows(&stream).unwrap().is_empty());
        let chunk = observer.run(
            named("project", "project, first chunk"),
            || (),
            |()| backend.project(block, &stream, &rotations, start, true).unwrap(),
        );
        backend
            .show(&chunk, &stream, wanted, &mut |shown| {
                assert_eq!(shown.hidden, rows.concat());
                queries.extend_from_slice(shown.queries);
                unrotated.extend_from_slice(shown.unrotated_queries);
                Ok(())
            })
            .unwrap();
        // A prompt with all chunks before this one.
        let before = || {
            let mut prompt = backend.prompt(&empty, asks).unwrap();
            for (start, chunk) in &chunks {
                backend.attend(&mut prompt, chunk, *start, None, None).unwrap();
            }
            prompt
        };
        let attend = |mut prompt: B::Prompt| {
            let out = backend.attend(&mut prompt, &chunk, start, None, None).unwrap();
            (prompt, out)
        };
        let (with_chunk, out) = observer.run(named("attend", "attend, first chunk"), before, attend);
        prompt = with_chunk;
        attended.extend(backend.attended(&out).unwrap());
        let again = || attend(before()).1;
        let finish = |out| backend.finish(block, &stream, out).unwrap();
        let after = observer.run(named("finish", "finish, first chunk"), again, finish);
        let show = &mut |shown: Shown<'_>| {
            finished.extend_from_slice(shown.hidden);
            Ok(())
        };
        backend.show(&chunk, &after, wanted, show).unwrap();
        if is_last {
            let last = finished[(len - 1) * HIDDEN..].to_vec();
            let logits = observer.run(line("logits"), || (), |()| backend.logits(&weights, &after).unwrap());
            let expected = || product(&plain.head, &plain.normed(&widen(&last), 2));
            observer.compare(line("logits"), &logits, expected, EXACT);
        }
        chunks.push((start, chunk));
    }
    let all = |kind: usize| projected[..len].iter().flat_map(|row| row[kind].clone()).collect();
    observer.compare(line("project, unrotated queries"), &unrotated, || all(0), EXACT);
    observer.compare(line("project, queries"), &queries, || all(1), EXACT);
    let kv = backend.prompt_kv(&prompt).unwrap();
    for (what, kind, rows) in [("project, keys", 2, &kv.keys), ("project, values", 3, &kv.values)] {
        for head in 0..num_kv_heads {
            let expected = || (0..len).flat_map(|row| part(kind, row, head).to_vec()).collect();
            observer.compare(line(what), &rows.rows(head, 0..len), expected, EXACT);
        }
    }
    let over = |row: usize, rows: &[usize], head: usize| {
        let kv_head = head / heads.group_size();
        let of = |kind| rows.iter().map(|&row| part(kind, row, kv_head)).collect::<Vec<_>>();
        plain.attend(part(1, row, head), &of(2), &of(3))
    };
    let causal = || {
        (0..len)
            .flat_map(|row| (0..heads.num_heads).map(move |head| (row, head)))
            .flat_map(|(row, head)| over(row, &(0..=row).collect::<Vec<_>>(), head).1)
            .collect()
    };
    observer.compare(line("attend"), &attended, causal, EXACT);
    let width = heads.query_width();
    let expected = || {
        (0..len).flat_map(|row| plain.finish(&hidden[row], &widen(&attended[row * width..(row + 1) * width]))).collect()
    };
    observer.compare(line("finish"), &finished, expected, EXACT);

    // Heads keep different rows: the first all of them, the last none but one.
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
    for (row, stream) in hidden.iter().enumerate().skip(len) {
        let stream = backend.hidden(stream.clone()).unwrap();
        let rotations = backend.rotations(of_row(row).to_vec()).unwrap();
        let chunk = backend.project(block, &stream, &rotations, 0, false).unwrap();
        *layer = observer.run(
            line("append"),
            || layer.clone(),
            |mut layer| {
                backend.append(&mut layer, &chunk, row, TokenClass::default()).unwrap();
                layer
            },
        );
        let held: Vec<Vec<usize>> =
            layer.positions().iter().map(|head| head.iter().map(|&position| position as usize).collect()).collect();
        let out = observer.run(
            line("attend to kept rows"),
            || (),
            |()| backend.attended(&backend.attend_rows(layer.rows(), &chunk).unwrap()).unwrap(),
        );
        let of_heads = |heads_of: std::ops::Range<usize>| -> Vec<_> {
            heads_of.map(|head| over(row, &held[head / heads.group_size()], head)).collect()
        };
        let expected = || of_heads(0..heads.num_heads).into_iter().flat_map(|(_, out)| out).collect();
        observer.compare(line("attend to kept rows"), &out, expected, tolerance(dtype));
        for (kv_head, rows) in held.iter().enumerate() {
            let group = heads.group_size();
            let expected = || {
                let group = of_heads(kv_head * group..(kv_head + 1) * group);
                (0..rows.len()).map(|at| group.iter().map(|(weights, _)| weights[at]).sum()).collect()
            };
            let weights = observer.run(
                line("weights of kept rows"),
                || (),
                |()| backend.row_weights(layer.rows(), &chunk, kv_head).unwrap(),
            );
            observer.compare(line("weights of kept rows"), &weights, expected, tolerance(dtype));
        }
        lose_rows(layer);
    }
    assert!(layer.bytes().kept <= layer.bytes().allocated);
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
        let plain = Plain::new(heads, rope, &mut rng);
        for &dtype in dtypes {
            let first = Line { backend, heads, len, dtype, operation: "" };
            lines(&make(&plain.config), &plain, first, &mut rng, observer);
        }
    }
}

/// The lines of the CPU kernels.
pub fn kernels(observer: &mut impl Observer) {
    table("kernels", Kernels::new, &KvDtype::ALL, observer);
}

/// The lines of candle operations on the CPU, in both ways of decoding.
pub fn candle(observer: &mut impl Observer) {
    let ops = Ops::new(Device::Cpu).unwrap();
    table("candle", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16], observer);
    let ops = ops.with_decode(DecodeWith::Ragged);
    table("candle, ragged", |config| Candle::new(ops.clone(), config), &[KvDtype::F32, KvDtype::F16], observer);
}
