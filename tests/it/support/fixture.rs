//! The tiny checkpoints of `tests/data/fixtures` (Hugging Face layout): as GGUF files made on the fly, for candle's own
//! LLaMA, and as a dense reference.

use std::collections::HashMap;
use std::path::Path;

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{Loaded, WeightDtype, open};
use adaptive_kvcache::fidelity::argmax;
use adaptive_kvcache::model::Llama;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{D, DType, Device, IndexOp, Tensor};
use serde_json::Value as Json;

use super::{data, ids, json, max_difference, sentencepiece};

/// One fixture: its configuration, weights and expected results.
pub struct Fixture {
    pub config: Json,
    pub weights: HashMap<String, Tensor>,
    pub expected: Json,
}

impl Fixture {
    pub fn read(name: &str) -> Self {
        Self::read_folder(&data("fixtures").join(name))
    }

    /// Reads a folder in Hugging Face's layout; expected results may be missing. Weights are widened to f32.
    pub fn read_folder(folder: &Path) -> Self {
        let expected = folder.join("expected.json");
        let weights = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let widened = weights.into_iter().map(|(name, weight)| (name, weight.to_dtype(DType::F32).unwrap()));
        Self {
            config: json(folder.join("config.json")),
            weights: widened.collect(),
            expected: if expected.is_file() { json(expected) } else { Json::Null },
        }
    }

    pub fn size(&self, key: &str) -> usize {
        usize::try_from(self.config[key].as_u64().unwrap_or_else(|| panic!("{key}"))).unwrap()
    }

    fn rope(&self, key: &str) -> f64 {
        self.config["rope_parameters"][key].as_f64().unwrap_or_else(|| panic!("{key}"))
    }

    fn tied(&self) -> bool {
        self.config["tie_word_embeddings"].as_bool().unwrap()
    }

    fn is_llama3(&self) -> bool {
        self.config["rope_parameters"]["rope_type"] == "llama3"
    }

    /// Divisors of the frequencies, as llama.cpp's converter writes them for Llama 3.1's scaling.
    fn frequency_divisors(&self) -> Vec<f32> {
        let dim = self.size("head_dim");
        let (factor, original) = (self.rope("factor"), self.rope("original_max_position_embeddings"));
        let (low, high) = (self.rope("low_freq_factor"), self.rope("high_freq_factor"));
        (0..dim / 2)
            .map(|i| {
                let wavelength = 2.0 * std::f64::consts::PI * self.rope("rope_theta").powf(2.0 * i as f64 / dim as f64);
                if wavelength < original / high {
                    1.0
                } else if wavelength > original / low {
                    factor as f32
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                }
            })
            .collect()
    }

    /// Writes the fixture as GGUF, as llama.cpp's converter would, with matrices in `dtype` where their rows are whole
    /// blocks.
    pub fn write_gguf(&self, path: &Path, dtype: GgmlDType) {
        let (heads, kv_heads) = (self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let mut tensors: Vec<(String, QTensor)> = Vec::new();
        let mut add = |name: &str, tensor: &Tensor, dtype: GgmlDType| {
            // As converters do with rows that are no whole number of blocks.
            let is_whole = tensor.dims().last().unwrap().is_multiple_of(dtype.block_size());
            let dtype = if is_whole { dtype } else { GgmlDType::F32 };
            tensors.push((name.to_owned(), QTensor::quantize(tensor, dtype).unwrap()));
        };
        add("token_embd.weight", &self.weights["model.embed_tokens.weight"], dtype);
        add("output_norm.weight", &self.weights["model.norm.weight"], GgmlDType::F32);
        if !self.tied() {
            add("output.weight", &self.weights["lm_head.weight"], dtype);
        }
        if self.is_llama3() {
            let divisors = Tensor::new(self.frequency_divisors(), &Device::Cpu).unwrap();
            add("rope_freqs.weight", &divisors, GgmlDType::F32);
        }
        for layer in 0..self.size("num_hidden_layers") {
            for (gguf, hf, interleaved_heads) in [
                ("attn_norm", "input_layernorm", 0),
                ("attn_q", "self_attn.q_proj", heads),
                ("attn_k", "self_attn.k_proj", kv_heads),
                ("attn_v", "self_attn.v_proj", 0),
                ("attn_output", "self_attn.o_proj", 0),
                ("ffn_norm", "post_attention_layernorm", 0),
                ("ffn_gate", "mlp.gate_proj", 0),
                ("ffn_up", "mlp.up_proj", 0),
                ("ffn_down", "mlp.down_proj", 0),
            ] {
                let mut weight = self.weights[&format!("model.layers.{layer}.{hf}.weight")].clone();
                if interleaved_heads > 0 {
                    weight = interleave(&weight, interleaved_heads);
                }
                let dtype = if weight.rank() == 1 { GgmlDType::F32 } else { dtype };
                add(&format!("blk.{layer}.{gguf}.weight"), &weight, dtype);
            }
        }

        let whole = |key: &str| Value::U32(u32::try_from(self.size(key)).unwrap());
        let strings = |texts: &[String]| Value::Array(texts.iter().cloned().map(Value::String).collect());
        let vocab = sentencepiece::vocab(&data("fixtures/tokenizer.model"));
        let metadata = [
            ("general.architecture", Value::String("llama".to_owned())),
            ("llama.block_count", whole("num_hidden_layers")),
            ("llama.context_length", whole("max_position_embeddings")),
            ("llama.embedding_length", whole("hidden_size")),
            ("llama.feed_forward_length", whole("intermediate_size")),
            ("llama.attention.head_count", whole("num_attention_heads")),
            ("llama.attention.head_count_kv", whole("num_key_value_heads")),
            ("llama.attention.key_length", whole("head_dim")),
            ("llama.attention.value_length", whole("head_dim")),
            ("llama.rope.dimension_count", whole("head_dim")),
            ("llama.rope.freq_base", Value::F32(self.rope("rope_theta") as f32)),
            (
                "llama.attention.layer_norm_rms_epsilon",
                Value::F32(self.config["rms_norm_eps"].as_f64().unwrap() as f32),
            ),
            ("tokenizer.ggml.model", Value::String("llama".to_owned())),
            ("tokenizer.ggml.tokens", strings(&vocab.tokens)),
            ("tokenizer.ggml.scores", Value::Array(vocab.scores.iter().copied().map(Value::F32).collect())),
            ("tokenizer.ggml.token_type", Value::Array(vocab.token_types.iter().copied().map(Value::I32).collect())),
            ("tokenizer.ggml.bos_token_id", Value::U32(1)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        ];
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut file = std::fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    /// The fixture through our own loader, matrices in `dtype`.
    pub fn load(&self, dtype: GgmlDType, weights: WeightDtype) -> Loaded {
        self.load_for(&BackendKind::default(), dtype, weights)
    }

    /// As [`load`](Self::load), for the CPU kernels or for candle operations.
    pub fn load_for(&self, backend: &BackendKind, dtype: GgmlDType, weights: WeightDtype) -> Loaded {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fixture.gguf");
        self.write_gguf(&path, dtype);
        open(&path).unwrap().load(backend, weights, &mut |_, _| {}).unwrap()
    }

    /// Logits `[seq_len, vocab_size]` of the slow obvious forward pass over the whole sequence.
    ///
    /// * `decisions`: what rows may no longer see; everything earlier is seen without them
    pub fn dense_logits(&self, ids: &[u32], decisions: &[Decision]) -> Tensor {
        self.dense_logits_over(ids, decisions, ids.len(), GgmlDType::F32)
    }

    /// As [`dense_logits`](Self::dense_logits), where rows from `first_rounded` on see keys and values rounded to a
    /// format.
    pub fn dense_logits_over(
        &self,
        ids: &[u32],
        decisions: &[Decision],
        first_rounded: usize,
        format: GgmlDType,
    ) -> Tensor {
        let (kv_heads, len) = (self.size("num_key_value_heads"), ids.len());
        let mut visible = |layer: usize, _scores: &[Vec<f32>]| -> Vec<Vec<bool>> {
            let sees = |kv_head: usize, row: usize, column: usize| {
                let sees = |decision: &Decision| {
                    let decided = decision.segment.contains(&column) && row >= decision.segment.end;
                    !decided || decision.kept[layer][kv_head].contains(&u32::try_from(column).unwrap())
                };
                column <= row && decisions.iter().all(sees)
            };
            let of_head = |kv_head| (0..len * len).map(|index| sees(kv_head, index / len, index % len)).collect();
            (0..kv_heads).map(of_head).collect()
        };
        self.dense_logits_where(ids, &mut visible, first_rounded, format)
    }

    /// As [`dense_logits_over`](Self::dense_logits_over), where it is told from a layer's scores what rows see.
    ///
    /// * `visible`: called for one layer after the other
    pub fn dense_logits_where(
        &self,
        ids: &[u32],
        visible: &mut Visibility<'_>,
        first_rounded: usize,
        format: GgmlDType,
    ) -> Tensor {
        let (heads, kv_heads) = (self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let (head_dim, len) = (self.size("head_dim"), ids.len());
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        let weight = |name: &str| self.weights[name].clone();
        let norm = |x: &Tensor, name: &str| -> Tensor {
            let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
            let scaled = x.broadcast_div(&(mean + eps).unwrap().sqrt().unwrap()).unwrap();
            scaled.broadcast_mul(&weight(name)).unwrap()
        };
        let linear = |x: &Tensor, name: &str| x.matmul(&weight(name).t().unwrap()).unwrap();
        let (cos, sin) = self.angles(len);
        let rotate = |x: Tensor, heads: usize| {
            let x = x.reshape((1, len, heads, head_dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
            candle_nn::rotary_emb::rope(&x, &cos, &sin).unwrap().squeeze(0).unwrap() // [heads, len, head_dim]
        };

        // `exact` for the first rows, `rounded` for the others.
        let by_row = |exact: Tensor, rounded: Tensor| {
            let rounded = rounded.narrow(0, first_rounded, len - first_rounded).unwrap();
            Tensor::cat(&[exact.narrow(0, 0, first_rounded).unwrap(), rounded], 0).unwrap()
        };
        let round = |x: &Tensor| {
            // Quantisation takes all of a tensor's storage, whatever part of it the tensor is.
            let blocks = QTensor::quantize(&x.force_contiguous().unwrap(), format).unwrap();
            blocks.dequantize(&Device::Cpu).unwrap()
        };
        // Without the mean of the first rows, and rotated.
        let round_keys = |x: &Tensor| {
            if format == GgmlDType::F32 {
                return round(x);
            }
            let mean = x.narrow(0, 0, first_rounded).unwrap().mean_keepdim(0).unwrap();
            let rotation = Tensor::from_vec(hadamard(head_dim), (head_dim, head_dim), &Device::Cpu).unwrap();
            let rotated = x.broadcast_sub(&mean).unwrap().matmul(&rotation).unwrap();
            round(&rotated).matmul(&rotation).unwrap().broadcast_add(&mean).unwrap()
        };

        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        let mut x = weight("model.embed_tokens.weight").index_select(&ids, 0).unwrap();
        for layer in 0..self.size("num_hidden_layers") {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let normed = norm(&x, &name("input_layernorm"));
            let q = rotate(linear(&normed, &name("self_attn.q_proj")), heads);
            let k = rotate(linear(&normed, &name("self_attn.k_proj")), kv_heads);
            let v = linear(&normed, &name("self_attn.v_proj")).reshape((len, kv_heads, head_dim)).unwrap();
            let scores: Vec<Tensor> = (0..heads)
                .map(|head| {
                    let scale = 1.0 / (head_dim as f64).sqrt();
                    let (q, k) = (q.i(head).unwrap(), k.i(head / (heads / kv_heads)).unwrap());
                    let product = |k: Tensor| (q.matmul(&k.t().unwrap()).unwrap() * scale).unwrap();
                    by_row(product(k.clone()), product(round_keys(&k)))
                })
                .collect();
            let numbers: Vec<Vec<f32>> =
                scores.iter().map(|scores| scores.flatten_all().unwrap().to_vec1().unwrap()).collect();
            let visible = visible(layer, &numbers);
            let mut outs = Vec::new();
            for (head, scores) in scores.into_iter().enumerate() {
                let kv_head = head / (heads / kv_heads);
                let v = v.i((.., kv_head)).unwrap().contiguous().unwrap();
                let mask: Vec<f32> =
                    visible[kv_head].iter().map(|&sees| if sees { 0.0 } else { f32::NEG_INFINITY }).collect();
                let scores = (scores + Tensor::from_vec(mask, (len, len), &Device::Cpu).unwrap()).unwrap();
                let weights = candle_nn::ops::softmax(&scores, D::Minus1).unwrap();
                outs.push(by_row(weights.matmul(&v).unwrap(), weights.matmul(&round(&v)).unwrap()));
            }
            let attended = Tensor::cat(&outs, 1).unwrap(); // [len, heads * head_dim]
            x = (x + linear(&attended, &name("self_attn.o_proj"))).unwrap();
            let normed = norm(&x, &name("post_attention_layernorm"));
            let gate = candle_nn::ops::silu(&linear(&normed, &name("mlp.gate_proj"))).unwrap();
            let up = linear(&normed, &name("mlp.up_proj"));
            x = (x + linear(&(gate * up).unwrap(), &name("mlp.down_proj"))).unwrap();
        }
        let output = if self.tied() { "model.embed_tokens.weight" } else { "lm_head.weight" };
        linear(&norm(&x, "model.norm.weight"), output)
    }

    /// Cosines and sines of positions, `[len, head_dim / 2]`.
    pub fn angles(&self, len: usize) -> (Tensor, Tensor) {
        let half = self.size("head_dim") / 2;
        let divisors = if self.is_llama3() { self.frequency_divisors() } else { vec![1.0; half] };
        let theta = self.rope("rope_theta");
        let angle = |index: usize| {
            let (position, i) = (index / half, index % half);
            position as f64 * theta.powf(-(i as f64) / half as f64) / f64::from(divisors[i])
        };
        let table = |f: fn(f64) -> f64| {
            let numbers: Vec<f32> = (0..len * half).map(|index| f(angle(index)) as f32).collect();
            Tensor::from_vec(numbers, (len, half), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
        };
        (table(f64::cos), table(f64::sin))
    }
}

/// The orthonormal Hadamard matrix of a power of two, `[size, size]`: the sign of an element is the parity of the bits that
/// its row and its column share.
pub fn hadamard(size: usize) -> Vec<f32> {
    let sign = |index: usize| if ((index / size) & (index % size)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    (0..size * size).map(|index| sign(index) / (size as f32).sqrt()).collect()
}

/// Given a layer and `[heads]` of its `[seq_len, seq_len]` scores, `[kv_heads]` of `[seq_len, seq_len]`: whether a row
/// sees a column.
pub type Visibility<'a> = dyn FnMut(usize, &[Vec<f32>]) -> Vec<Vec<bool>> + 'a;

/// What a profile kept of a segment of positions; rows behind the segment see nothing else of it.
pub struct Decision {
    pub segment: std::ops::Range<usize>,
    /// `[layer][kv_head]` positions.
    pub kept: Vec<Vec<Vec<u32>>>,
}

/// Rows of a query or key weight from halves to neighbours, head by head.
pub fn interleave(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = weight.dims2().unwrap();
    let split = weight.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
    split.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap()
}

/// Checks a model with the full cache against what transformers made of a prompt: the logits, and the greedy tokens.
#[track_caller]
pub fn check_transformers_case(name: &str, model: &Llama, case: &Json) {
    /// Against numbers that were printed with five digits, by another library.
    const PRINTED_TOLERANCE: f32 = 1e-3;
    let mut cache = model.new_cache(KvDtype::F32, Retention::Full).unwrap();
    let mut logits = model.prefill(&ids(&case["ids"]), &mut cache, &mut ()).unwrap().logits;
    let expected: Vec<f32> =
        case["last_logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    let difference = max_difference(&logits, &expected);
    assert!(difference < PRINTED_TOLERANCE, "{name}: {difference}");
    for &expected in &ids(&case["greedy"]) {
        let id = u32::try_from(argmax(&logits).unwrap()).unwrap();
        assert_eq!(id, expected, "{name}");
        logits = model.decode(id, &mut cache).unwrap();
    }
}
