//! The assembly of a model from named tensors: written once, for every format.
//!
//! A tensor is asked for by its role; a [`Naming`] says what the format calls it. Whatever the format, a tensor that is
//! missing, has another shape or another kind of numbers is an error that names it and its file, and so is one that no
//! role asks for: its effect would be lost. Not for: reading files (see [`super::tensors`] for what readers hand over).

use std::collections::HashSet;
use std::sync::Arc;

use super::convert;
use super::tensors::{StoredDtype, StoredTensor, Tensors};
use crate::backend::{Backend, BackendKind, Block, Candle, Embedding, Kernels, Weights};
use crate::error::{Error, Result};
use crate::kernels::quant::{WeightFormat, WeightMatrix};
use crate::mapped;
use crate::model::{Llama, LlamaConfig};

/// What a file that cannot be used should be replaced by.
const DTYPE_HINT: &str = "use a checkpoint in F32, F16 or BF16, or a quantised one in GGUF format";

/// Parts of names that only tensors have which are quantised in a way that is not read, or belong to an adapter.
const FOREIGN_TENSORS: [(&str, &str); 11] = [
    (".qweight", "quantised as by AWQ or GPTQ"),
    (".qzeros", "quantised as by AWQ or GPTQ"),
    (".absmax", "quantised as by bitsandbytes"),
    (".quant_state", "quantised as by bitsandbytes"),
    (".SCB", "quantised as by bitsandbytes"),
    (".weight_scale", "quantised to FP8 or as by compressed-tensors"),
    (".weight_scale_inv", "quantised to FP8"),
    (".weight_packed", "quantised as by compressed-tensors"),
    (".scales", "quantised as by MLX"),
    (".lora_A", "of an adapter (LoRA)"),
    (".lora_B", "of an adapter (LoRA)"),
];

/// In which numbers weight matrices are held and multiplied. Norms and biases are f32 always.
///
/// In the quantised ones, the matrices of all layers are rounded to blocks in memory, tensor after tensor. The output layer
/// is as `llama-quantize` makes it: `Q6_K` (`Q8_0` with [`Q8_0`](Self::Q8_0), or if its columns are no multiple of 256). The
/// table of token vectors stays as it is stored, in its mapped file: of it only some rows are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// The file's own floats or quantised blocks, in the mapped file. For candle operations, quantised blocks as they are
    /// where candle has the format, and all else in the floats that suit the device (see [`float_dtype`](crate::device::float_dtype)).
    Auto,
    /// Everything widened to f32 in memory: slow, and the mode in which results are compared to references.
    F32,
    /// Every matrix rounded to f16 in memory, unless it is stored so.
    F16,
    /// Every matrix rounded to bf16 in memory, unless it is stored so.
    Bf16,
    /// Matrices of floats in blocks of 32, 34 bytes each.
    Q8_0,
    /// Matrices of floats in blocks of 32, 18 bytes each.
    Q4_0,
    /// Matrices of floats in blocks of 256, 144 bytes each; in `Q5_0` those whose columns are no multiple of 256.
    Q4K,
}

impl WeightDtype {
    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
        }
    }

    /// Whether matrices are quantised.
    #[must_use]
    pub fn is_blocks(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4K)
    }

    /// In what a matrix is held; `None` if that is left to its file and the backend.
    ///
    /// * `cols`: its columns
    /// * `is_output`: whether it is the output layer
    #[must_use]
    pub fn of_matrix(self, cols: usize, is_output: bool) -> Option<WeightFormat> {
        let has_large_blocks = cols.is_multiple_of(WeightFormat::Q4K.block_size());
        Some(match self {
            Self::Auto => return None,
            Self::F32 => WeightFormat::F32,
            Self::F16 => WeightFormat::F16,
            Self::Bf16 => WeightFormat::BF16,
            Self::Q8_0 => WeightFormat::Q8_0,
            Self::Q4_0 | Self::Q4K if is_output && has_large_blocks => WeightFormat::Q6K,
            Self::Q4_0 | Self::Q4K if is_output => WeightFormat::Q8_0,
            Self::Q4_0 => WeightFormat::Q4_0,
            Self::Q4K if has_large_blocks => WeightFormat::Q4K,
            Self::Q4K => WeightFormat::Q5_0,
        })
    }

    /// What a user should know of matrices that are not held in what is asked for, if a model has such.
    pub(super) fn note(self, config: &LlamaConfig) -> Option<String> {
        let widths = [config.hidden_size, config.heads.query_width(), config.intermediate_size];
        let mut small: Vec<usize> =
            widths.into_iter().filter(|&cols| self.of_matrix(cols, false) == Some(WeightFormat::Q5_0)).collect();
        small.sort_unstable();
        small.dedup();
        let columns = small.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
        (!small.is_empty()).then(|| {
            format!(
                "matrices of {columns} columns, no multiple of 256, are quantised to q5_0 instead of {}",
                self.name()
            )
        })
    }
}

/// What a tensor is in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The table of token vectors, `[vocab_size, hidden_size]`.
    EmbedTokens,
    /// The last norm, `[hidden_size]`.
    Norm,
    /// The output layer, `[vocab_size, hidden_size]`.
    LmHead,
    /// A part of the block of this index.
    Block(usize, Part),
}

/// A part of a block; shapes are [`Block`]'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    InputNorm,
    Query,
    Key,
    Value,
    /// Of each query head.
    QueryNorm,
    /// Of each key.
    KeyNorm,
    Output,
    PostAttentionNorm,
    Gate,
    Up,
    Down,
}

/// How a format names tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// llama.cpp's, as `blk.0.attn_q.weight`.
    Gguf,
    /// transformers', as `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
    /// Meta's own, as `layers.0.attention.wq.weight`.
    Meta,
}

impl Naming {
    /// The name of a role's tensor without `.weight` or `.bias`.
    #[must_use]
    pub fn name(self, role: Role) -> String {
        let of_three = |[gguf, hugging_face, meta]: [&'static str; 3]| match self {
            Self::Gguf => gguf,
            Self::HuggingFace => hugging_face,
            Self::Meta => meta,
        };
        match role {
            Role::EmbedTokens => of_three(["token_embd", "model.embed_tokens", "tok_embeddings"]).to_owned(),
            Role::Norm => of_three(["output_norm", "model.norm", "norm"]).to_owned(),
            Role::LmHead => of_three(["output", "lm_head", "output"]).to_owned(),
            Role::Block(layer, part) => {
                let prefix = of_three(["blk", "model.layers", "layers"]);
                let part = of_three(match part {
                    Part::InputNorm => ["attn_norm", "input_layernorm", "attention_norm"],
                    Part::Query => ["attn_q", "self_attn.q_proj", "attention.wq"],
                    Part::Key => ["attn_k", "self_attn.k_proj", "attention.wk"],
                    Part::Value => ["attn_v", "self_attn.v_proj", "attention.wv"],
                    // Meta has none.
                    Part::QueryNorm => ["attn_q_norm", "self_attn.q_norm", "attention.q_norm"],
                    Part::KeyNorm => ["attn_k_norm", "self_attn.k_norm", "attention.k_norm"],
                    Part::Output => ["attn_output", "self_attn.o_proj", "attention.wo"],
                    Part::PostAttentionNorm => ["ffn_norm", "post_attention_layernorm", "ffn_norm"],
                    Part::Gate => ["ffn_gate", "mlp.gate_proj", "feed_forward.w1"],
                    Part::Up => ["ffn_up", "mlp.up_proj", "feed_forward.w3"],
                    Part::Down => ["ffn_down", "mlp.down_proj", "feed_forward.w2"],
                });
                format!("{prefix}.{layer}.{part}")
            }
        }
    }

    /// Whether a tensor that no role asks for holds nothing but what the configuration says as well: tables of rotary
    /// frequencies and causal masks, which older programs stored.
    pub(super) fn is_harmless(self, name: &str) -> bool {
        const SUFFIXES: [&str; 10] = [
            ".rotary_emb.inv_freq",
            ".rotary_emb.original_inv_freq",
            ".rotary_emb.cos_cached",
            ".rotary_emb.sin_cached",
            ".attention.masked_bias",
            ".attn.masked_bias",
            ".self_attn.masked_bias",
            ".self_attn.bias",
            ".position_ids",
            ".causal_mask",
        ];
        match self {
            Self::Gguf => name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd.weight"),
            Self::HuggingFace => SUFFIXES.iter().any(|suffix| name.ends_with(suffix)),
            Self::Meta => name == "rope.freqs" || name.ends_with(".attention.inner_attention.rope.freqs"),
        }
    }
}

/// Whether layers have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// A bias that is there is used.
    IfPresent,
    /// The configuration says that there is one: a missing one is an error.
    Always,
    /// The configuration says that there is none: one that is there is an error.
    Never,
}

/// Where the output layer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputLayer {
    /// Its own tensor, which must be there.
    Own,
    /// The embedding; a tensor that is there all the same is its equal, and ignored.
    Tied,
    /// Its own tensor, or the embedding if there is none.
    OwnIfPresent,
}

/// How a format's tensors make a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assembly {
    /// Names of the tensors.
    pub naming: Naming,
    /// Biases of the query, key and value layers.
    pub attention_bias: Bias,
    /// The bias of what attention puts out.
    pub attention_output_bias: Bias,
    /// Biases of the gate, up and down layers.
    pub mlp_bias: Bias,
    /// The output layer.
    pub output: OutputLayer,
}

/// Makes a model of tensors. For candle operations, they go to the device one by one: the host never holds a copy of
/// more than one of them. Rows of the embedding are looked up in its file, and only they go to the device.
///
/// * `backend`: what is to compute the model
/// * `progress`: called with the number of finished layers and of all layers
///
/// # Errors
/// [`Error::BadFile`] for a tensor that is missing, has the wrong shape or belongs to no part of the model;
/// [`Error::Unsupported`] for numbers that are not computed with; [`Error::Tensor`] if a device refuses.
pub fn assemble(
    backend: &BackendKind,
    tensors: &Tensors,
    assembly: Assembly,
    config: LlamaConfig,
    dtype: WeightDtype,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Llama> {
    match backend {
        &BackendKind::Kernels(compute) => {
            assemble_with(Kernels::new(&config, compute), tensors, assembly, config, dtype, progress)
        }
        BackendKind::Candle(ops) => {
            assemble_with(Candle::new(ops.clone(), &config), tensors, assembly, config, dtype, progress)
        }
    }
}

fn assemble_with<B: Backend>(
    backend: B,
    tensors: &Tensors,
    assembly: Assembly,
    config: LlamaConfig,
    dtype: WeightDtype,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Llama> {
    let taker = Taker { tensors, assembly, dtype, backend: &backend, used: HashSet::new() };
    let weights = taker.weights(&config, progress)?;
    Llama::new(config, backend, weights)
}

/// Takes tensors by role and expected shape, and remembers which.
struct Taker<'a, B> {
    tensors: &'a Tensors,
    assembly: Assembly,
    dtype: WeightDtype,
    backend: &'a B,
    used: HashSet<String>,
}

impl<B: Backend> Taker<'_, B> {
    fn weights(mut self, config: &LlamaConfig, progress: &mut dyn FnMut(usize, usize)) -> Result<Weights<B>> {
        let LlamaConfig { hidden_size, vocab_size, num_layers, .. } = *config;
        self.refuse_foreign_quantisation()?;
        let table_name = self.weight_name(Role::EmbedTokens);
        let table = if self.dtype.is_blocks() {
            self.take(&table_name, &[vocab_size, hidden_size])?
        } else {
            self.matrix(&table_name, vocab_size, hidden_size, false)?
        };
        let table = Arc::new(table);
        let embed_tokens = Embedding::new(Arc::clone(&table));
        let output_name = self.weight_name(Role::LmHead);
        let has_own = match self.assembly.output {
            OutputLayer::Own => true,
            OutputLayer::Tied => false,
            OutputLayer::OwnIfPresent => self.tensors.get(&output_name).is_some(),
        };
        let lm_head = if has_own {
            // A bias of the output layer is no part of any LLaMA format but GGUF's, which allows them all.
            let bias = if self.assembly.naming == Naming::Gguf { Bias::IfPresent } else { Bias::Never };
            self.linear(Role::LmHead, vocab_size, hidden_size, bias)?
        } else {
            self.used.insert(output_name);
            let output = if self.dtype.is_blocks() {
                Arc::new(self.in_dtype(&table_name, WeightMatrix::clone(&table), true)?)
            } else {
                table
            };
            self.backend.linear(output, None)?
        };
        let norm = self.vector(&self.weight_name(Role::Norm), hidden_size)?;
        let mut blocks = Vec::new();
        for layer in 0..num_layers {
            blocks.push(self.block(config, layer)?);
            progress(layer + 1, num_layers);
        }
        let is_unused = |name: &str| !self.used.contains(name) && !self.assembly.naming.is_harmless(name);
        if let Some((name, tensor)) = self.tensors.iter().find(|(name, _)| is_unused(name)) {
            let reason = format!("tensor `{name}` is not part of a model of this architecture and {num_layers} layers");
            return Err(
                Error::bad_file(&tensor.path, reason).with_hint("its effect would be lost; use a plain checkpoint")
            );
        }
        Ok(Weights { embed_tokens, blocks, norm, lm_head })
    }

    fn block(&mut self, config: &LlamaConfig, layer: usize) -> Result<Block<B>> {
        let LlamaConfig { hidden_size, intermediate_size, heads, .. } = *config;
        let Assembly { attention_bias, attention_output_bias, mlp_bias, .. } = self.assembly;
        let (queries, kv) = (heads.query_width(), heads.kv_width());
        let role = |part| Role::Block(layer, part);
        let mut head_norm = |part| {
            let name = self.weight_name(role(part));
            config.architecture.has_head_norms().then(|| self.vector(&name, heads.head_dim)).transpose()
        };
        let (q_norm, k_norm) = (head_norm(Part::QueryNorm)?, head_norm(Part::KeyNorm)?);
        Ok(Block {
            q_norm,
            k_norm,
            input_layernorm: self.vector(&self.weight_name(role(Part::InputNorm)), hidden_size)?,
            q_proj: self.linear(role(Part::Query), queries, hidden_size, attention_bias)?,
            k_proj: self.linear(role(Part::Key), kv, hidden_size, attention_bias)?,
            v_proj: self.linear(role(Part::Value), kv, hidden_size, attention_bias)?,
            o_proj: self.linear(role(Part::Output), hidden_size, queries, attention_output_bias)?,
            post_attention_layernorm: self.vector(&self.weight_name(role(Part::PostAttentionNorm)), hidden_size)?,
            gate_proj: self.linear(role(Part::Gate), intermediate_size, hidden_size, mlp_bias)?,
            up_proj: self.linear(role(Part::Up), intermediate_size, hidden_size, mlp_bias)?,
            down_proj: self.linear(role(Part::Down), hidden_size, intermediate_size, mlp_bias)?,
        })
    }

    /// Says what the matter is with a checkpoint that is quantised in a way that is not read, or an adapter, before it is
    /// about a missing tensor.
    fn refuse_foreign_quantisation(&self) -> Result<()> {
        let foreign = self.tensors.iter().find_map(|(name, tensor)| {
            let known =
                FOREIGN_TENSORS.iter().find(|(part, _)| name.ends_with(part) || name.contains(&format!("{part}.")));
            known.map(|(_, what)| (name, tensor, what))
        });
        foreign.map_or(Ok(()), |(name, tensor, what)| {
            let what = format!("tensor `{name}` of `{}`, {what},", tensor.path.display());
            Err(Error::unsupported(what).with_hint(DTYPE_HINT))
        })
    }

    fn weight_name(&self, role: Role) -> String {
        format!("{}.weight", self.assembly.naming.name(role))
    }

    fn linear(&mut self, role: Role, rows: usize, cols: usize, bias: Bias) -> Result<B::Linear> {
        let bias_name = format!("{}.bias", self.assembly.naming.name(role));
        let stored = self.tensors.get(&bias_name);
        let bias = match (bias, stored) {
            (Bias::Never, Some(tensor)) => {
                let reason = format!("tensor `{bias_name}` is there, but the configuration says that there is no bias");
                return Err(Error::bad_file(&tensor.path, reason).with_hint("its effect would be lost"));
            }
            (Bias::Never | Bias::IfPresent, None) => None,
            (Bias::Always, _) | (Bias::IfPresent, Some(_)) => Some(self.numbers(&bias_name, rows)?),
        };
        let name = self.weight_name(role);
        let matrix = self.matrix(&name, rows, cols, role == Role::LmHead)?;
        self.backend.linear(Arc::new(matrix), bias)
    }

    /// Says that a matrix's numbers don't fit the numbers they are to be in.
    fn too_large(&self, name: &str, dtype: &str) -> Error {
        let path = self.tensors.get(name).map_or(self.tensors.path(), |tensor| &tensor.path);
        let reason = format!("tensor `{name}` has numbers that are too large for {dtype} or not finite");
        Error::bad_file(path, reason).with_hint("use --dtype auto, bf16 or f32")
    }

    /// A weight matrix in the numbers that are asked for.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize, is_output: bool) -> Result<WeightMatrix> {
        let matrix = self.take(name, &[rows, cols])?;
        self.in_dtype(name, matrix, is_output)
    }

    fn in_dtype(&self, name: &str, matrix: WeightMatrix, is_output: bool) -> Result<WeightMatrix> {
        let dtype = match self.dtype.of_matrix(matrix.cols(), is_output) {
            Some(dtype) => dtype,
            None => self.backend.dtype(matrix.dtype())?,
        };
        self.rounded(name, matrix, dtype)
    }

    /// A norm's weight.
    fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector> {
        let numbers = self.numbers(name, len)?;
        self.backend.vector(numbers)
    }

    /// A norm's weight or a bias.
    fn numbers(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let stored = self.take(name, &[len])?;
        let mut numbers = vec![0.0; len];
        stored.dequantize_rows(0..1, &mut numbers);
        Ok(numbers)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<WeightMatrix> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.tensors.missing(name))?;
        if tensor.shape != shape {
            let reason = format!("tensor `{name}`: expected shape {shape:?}, got {:?}", tensor.shape);
            return Err(Error::bad_file(&tensor.path, reason));
        }
        self.used.insert(name.to_owned());
        let rows = if shape.len() == 1 { 1 } else { shape[0] };
        stored_matrix(name, tensor, rows, shape[shape.len() - 1])
    }

    /// A matrix in other numbers. What was mapped of it is given back.
    fn rounded(&self, name: &str, matrix: WeightMatrix, dtype: WeightFormat) -> Result<WeightMatrix> {
        let stored = matrix.dtype();
        if stored == dtype {
            return Ok(matrix);
        }
        let path = self.tensors.get(name).map_or(self.tensors.path(), |tensor| &tensor.path).display();
        let wanted = if self.dtype.is_blocks() { self.dtype.name().to_owned() } else { dtype.to_string() };
        if self.dtype.is_blocks() && !stored.is_float() {
            let from = stored.name().to_lowercase();
            let what =
                format!("quantising tensor `{name}` of `{path}` to {wanted} from {from}, which is quantised already,");
            return Err(Error::unsupported(what).with_hint("use --dtype auto, or a checkpoint in f16, bf16 or f32"));
        }
        let (cols, block) = (matrix.cols(), dtype.block_size());
        if !cols.is_multiple_of(block) {
            let columns = format!("whose {cols} columns are no multiple of {block}");
            let what = format!("quantising tensor `{name}` of `{path}`, {columns}, to {wanted}");
            return Err(Error::unsupported(what).with_hint("use --dtype auto, f16 or bf16"));
        }
        let converted = convert::converted(&matrix, dtype)?.ok_or_else(|| self.too_large(name, &wanted))?;
        mapped::release(matrix.data());
        Ok(converted)
    }
}

/// A tensor's bytes as a matrix, in place if they are aligned.
///
/// # Errors
/// [`Error::Unsupported`] for numbers that are not computed with; [`Error::BadFile`] if the bytes do not fit.
pub(super) fn stored_matrix(name: &str, tensor: &StoredTensor, rows: usize, cols: usize) -> Result<WeightMatrix> {
    let dtype = match &tensor.dtype {
        StoredDtype::Usable(dtype) => *dtype,
        StoredDtype::Other(dtype) => {
            let what = format!("tensor `{name}` of `{}` in {dtype}", tensor.path.display());
            return Err(Error::unsupported(what).with_hint(DTYPE_HINT));
        }
    };
    let (owner, range) = tensor.aligned(WeightMatrix::alignment(dtype))?;
    WeightMatrix::new(owner, range, dtype, rows, cols)
        .map_err(|error| Error::bad_file(&tensor.path, format!("tensor `{name}`: {error}")))
}
