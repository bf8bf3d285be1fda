//! A LLaMA model out of a GGUF file: configuration, weights, vocabulary.
//!
//! Names and meanings: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, section "LLM"; tensors as
//! llama.cpp's converter writes them (query and key rows interleaved for the rotation).

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::gguf::{GgufFile, TensorEntry, Value};
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::quant::QuantMatrix;
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::{Block, Embedding, Linear, Llama, LlamaConfig, RopeLayout, RopeSettings};
use crate::tokenizer::{GgufVocab, Tokenizer};

/// In which numbers weights are held and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// The file's own blocks, in the mapped file.
    Auto,
    /// Everything widened to f32 in memory: slow, and the mode in which results are compared to references.
    F32,
}

impl WeightDtype {
    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
        }
    }
}

/// A model with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: Llama,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Bytes of the weights, as stored in the file.
    pub weights_bytes: usize,
}

/// Loads a model and its tokenizer from a GGUF file.
///
/// * `progress`: called with the number of finished layers and of all layers
///
/// # Errors
/// As [`GgufFile::open`], [`config`], [`vocab`] and [`Tokenizer::from_gguf`]; [`Error::BadFile`] for a missing tensor, a
/// tensor of the wrong shape, or one that does not belong to LLaMA.
pub fn load(path: impl AsRef<Path>, dtype: WeightDtype, progress: &mut dyn FnMut(usize, usize)) -> Result<Loaded> {
    let file = GgufFile::open(path)?;
    let config = config(&file)?;
    let tokenizer = Tokenizer::from_gguf(vocab(&file)?)?;
    if tokenizer.vocab_size() != config.vocab_size {
        let reason = format!("{} tokens in the vocabulary, {} embeddings", tokenizer.vocab_size(), config.vocab_size);
        return Err(file.error(reason));
    }
    let model = Weights { file: &file, dtype, used: HashSet::new() }.model(config, progress)?;
    Ok(Loaded { model, tokenizer, weights_bytes: file.tensor_bytes() })
}

/// Reads the model's sizes.
///
/// # Errors
/// [`Error::Unsupported`] for another architecture or a variant that this program does not compute, by name;
/// [`Error::BadFile`] for sizes that are missing or do not fit.
pub fn config(file: &GgufFile) -> Result<LlamaConfig> {
    let architecture = file.string("general.architecture")?.unwrap_or_default();
    let refuse = |what: String| Error::unsupported(format!("{what} (`{}`)", file.path().display()));
    if architecture != "llama" {
        return Err(refuse(format!("architecture `{architecture}`")).with_hint("use a model of the LLaMA architecture"));
    }
    let required = |key: &str| -> Result<usize> {
        match file.whole(key)? {
            Some(value) if (1..=1 << 30).contains(&value) => Ok(value),
            Some(value) => Err(file.error(format!("metadata `{key}` is {value}"))),
            None => Err(file.error(format!("metadata `{key}` is missing"))),
        }
    };
    if file.whole("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err(refuse("a mixture of experts".to_owned()));
    }
    let hidden_size = required("llama.embedding_length")?;
    let num_heads = required("llama.attention.head_count")?;
    let num_kv_heads = file.whole("llama.attention.head_count_kv")?.unwrap_or(num_heads);
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(file.error(format!("{num_heads} query heads cannot share {num_kv_heads} KV heads")));
    }
    let head_dim = file.whole("llama.attention.key_length")?.unwrap_or(hidden_size / num_heads);
    let value_dim = file.whole("llama.attention.value_length")?.unwrap_or(head_dim);
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || value_dim != head_dim {
        return Err(refuse(format!("head dimensions {head_dim} (keys) and {value_dim} (values)")));
    }

    let embedding =
        file.tensors().get("token_embd.weight").ok_or_else(|| file.error("tensor `token_embd.weight` is missing"))?;
    let rope_dim = file.whole("llama.rope.dimension_count")?.unwrap_or(head_dim);
    if rope_dim % 2 != 0 || rope_dim > head_dim {
        return Err(
            file.error(format!("metadata `llama.rope.dimension_count` is {rope_dim}, the head dimension {head_dim}"))
        );
    }
    let scaling = file.string("llama.rope.scaling.type")?.unwrap_or_else(|| "none".to_owned());
    let position_divisor = match scaling.as_str() {
        "none" => file.float("llama.rope.scale_linear")?.unwrap_or(1.0),
        "linear" => match file.float("llama.rope.scaling.factor")? {
            Some(factor) => factor,
            None => file.float("llama.rope.scale_linear")?.unwrap_or(1.0),
        },
        other => {
            return Err(refuse(format!("rope scaling `{other}`")).with_hint("linear and llama3 scaling are computed"));
        }
    };
    let theta = file.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    if position_divisor <= 0.0 || theta <= 0.0 {
        return Err(file.error(format!("rope base {theta} or scaling factor {position_divisor} is not positive")));
    }
    let frequency_divisors = match file.tensors().get("rope_freqs.weight") {
        Some(entry) => {
            let divisors = quant_matrix(file, "rope_freqs.weight", entry, 1, rope_dim / 2)?;
            let mut out = vec![0.0; rope_dim / 2];
            divisors.dequantize_rows(0..1, &mut out);
            out
        }
        None => Vec::new(),
    };
    Ok(LlamaConfig {
        hidden_size,
        intermediate_size: required("llama.feed_forward_length")?,
        num_layers: required("llama.block_count")?,
        heads: HeadLayout { num_heads, num_kv_heads, head_dim },
        vocab_size: embedding.shape[0],
        rms_norm_eps: file
            .float("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| file.error("metadata `llama.attention.layer_norm_rms_epsilon` is missing"))?,
        context_length: required("llama.context_length")?,
        rope: RopeSettings {
            theta,
            dim: rope_dim,
            layout: RopeLayout::Interleaved,
            position_divisor,
            frequency_divisors,
        },
    })
}

/// Reads the vocabulary and the chat template.
///
/// # Errors
/// [`Error::BadFile`] if a key is missing or has the wrong type.
pub fn vocab(file: &GgufFile) -> Result<GgufVocab> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |value: &Value| if let Value::String(text) = value { Some(text.clone()) } else { None };
    #[expect(clippy::cast_possible_truncation)]
    let float = |value: &Value| if let Value::Float(number) = value { Some(*number as f32) } else { None };
    let kind = |value: &Value| match value {
        Value::Signed(number) => i32::try_from(*number).ok(),
        Value::Unsigned(number) => i32::try_from(*number).ok(),
        _ => None,
    };
    let id = |name: &str| -> Result<Option<u32>> {
        file.whole(&key(name))?
            .map(|id| u32::try_from(id).map_err(|_| file.error(format!("metadata `{}` is {id}", key(name)))))
            .transpose()
    };
    Ok(GgufVocab {
        path: file.path().to_owned(),
        model: file.string(&key("model"))?.ok_or_else(|| file.error("metadata `tokenizer.ggml.model` is missing"))?,
        pre: file.string(&key("pre"))?,
        tokens: file.array(&key("tokens"), "a list of strings", text)?,
        scores: file.array(&key("scores"), "a list of floats", float)?,
        token_types: file.array(&key("token_type"), "a list of integers", kind)?,
        merges: file.array(&key("merges"), "a list of strings", text)?,
        bos_id: id("bos_token_id")?,
        eos_id: id("eos_token_id")?,
        eot_id: id("eot_token_id")?,
        unk_id: id("unknown_token_id")?,
        add_bos: file.boolean(&key("add_bos_token"))?,
        add_eos: file.boolean(&key("add_eos_token"))?,
        add_space_prefix: file.boolean(&key("add_space_prefix"))?,
        chat_template: file.string("tokenizer.chat_template")?,
    })
}

/// Takes tensors out of a file, by name and expected shape, and remembers which.
struct Weights<'a> {
    file: &'a GgufFile,
    dtype: WeightDtype,
    used: HashSet<String>,
}

impl Weights<'_> {
    fn model(mut self, config: LlamaConfig, progress: &mut dyn FnMut(usize, usize)) -> Result<Llama> {
        let LlamaConfig { hidden_size, vocab_size, num_layers, .. } = config;
        let embed_tokens = match self.matrix("token_embd.weight", vocab_size, hidden_size)? {
            MatrixWeights::Dense(table) => Embedding::dense(table),
            MatrixWeights::Quantised(table) => Embedding::quantised(table),
        };
        let lm_head = if self.file.tensors().contains_key("output.weight") {
            self.linear("output", vocab_size, hidden_size)?
        } else {
            embed_tokens.tied_output()
        };
        let norm = self.vector("output_norm.weight", hidden_size)?;
        let mut layers = Vec::new();
        for layer in 0..num_layers {
            layers.push(self.block(&config, layer)?);
            progress(layer + 1, num_layers);
        }
        self.used.insert("rope_freqs.weight".to_owned()); // part of the configuration
        if let Some(unknown) = self.file.tensors().keys().filter(|name| !self.used.contains(*name)).min() {
            let reason = format!("tensor `{unknown}` is not part of a LLaMA model of {num_layers} layers");
            return Err(self.file.error(reason).with_hint("its effect would be lost; use a plain LLaMA checkpoint"));
        }
        Llama::new(config, embed_tokens, layers, norm, lm_head)
    }

    fn block(&mut self, config: &LlamaConfig, layer: usize) -> Result<Block> {
        let LlamaConfig { hidden_size, intermediate_size, heads, .. } = *config;
        let (queries, kv) = (heads.query_width(), heads.kv_width());
        let name = |part: &str| format!("blk.{layer}.{part}");
        Ok(Block {
            input_layernorm: self.vector(&name("attn_norm.weight"), hidden_size)?,
            q_proj: self.linear(&name("attn_q"), queries, hidden_size)?,
            k_proj: self.linear(&name("attn_k"), kv, hidden_size)?,
            v_proj: self.linear(&name("attn_v"), kv, hidden_size)?,
            o_proj: self.linear(&name("attn_output"), hidden_size, queries)?,
            post_attention_layernorm: self.vector(&name("ffn_norm.weight"), hidden_size)?,
            gate_proj: self.linear(&name("ffn_gate"), intermediate_size, hidden_size)?,
            up_proj: self.linear(&name("ffn_up"), intermediate_size, hidden_size)?,
            down_proj: self.linear(&name("ffn_down"), hidden_size, intermediate_size)?,
        })
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize) -> Result<Linear> {
        let bias_name = format!("{name}.bias");
        let bias =
            if self.file.tensors().contains_key(&bias_name) { Some(self.vector(&bias_name, rows)?) } else { None };
        let linear = match self.matrix(&format!("{name}.weight"), rows, cols)? {
            MatrixWeights::Dense(weight) => Linear::dense(weight),
            MatrixWeights::Quantised(weight) => Linear::quantised(weight),
        };
        Ok(linear.with_bias(bias))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<MatrixWeights> {
        let matrix = self.take(name, &[rows, cols])?;
        Ok(match self.dtype {
            WeightDtype::Auto => MatrixWeights::Quantised(Arc::new(matrix)),
            WeightDtype::F32 => MatrixWeights::Dense(widen(&matrix)?),
        })
    }

    /// A norm's weight or a bias, f32.
    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Ok(widen(&self.take(name, &[len])?)?.squeeze(0)?)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<QuantMatrix> {
        let entry =
            self.file.tensors().get(name).ok_or_else(|| self.file.error(format!("tensor `{name}` is missing")))?;
        if entry.shape != shape {
            return Err(self.file.error(format!("tensor `{name}`: expected shape {shape:?}, got {:?}", entry.shape)));
        }
        self.used.insert(name.to_owned());
        let rows = if shape.len() == 1 { 1 } else { shape[0] };
        quant_matrix(self.file, name, entry, rows, shape[shape.len() - 1])
    }
}

enum MatrixWeights {
    Dense(Tensor),
    Quantised(Arc<QuantMatrix>),
}

fn quant_matrix(file: &GgufFile, name: &str, entry: &TensorEntry, rows: usize, cols: usize) -> Result<QuantMatrix> {
    QuantMatrix::new(file.shared_bytes(), entry.range.clone(), entry.dtype, rows, cols)
        .map_err(|error| file.error(format!("tensor `{name}`: {error}")))
}

fn widen(matrix: &QuantMatrix) -> Result<Tensor> {
    let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize_rows(0..matrix.rows(), &mut numbers);
    Ok(Tensor::from_vec(numbers, (matrix.rows(), matrix.cols()), &Device::Cpu)?)
}
