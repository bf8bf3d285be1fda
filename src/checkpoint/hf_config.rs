//! Hugging Face's `config.json` and `generation_config.json`: which model they describe.
//!
//! Meaning and defaults of the keys: `configuration_llama.py`, `configuration_mistral.py`, `configuration_qwen2.py`,
//! `configuration_qwen3.py` and `modeling_rope_utils.py` of <https://github.com/huggingface/transformers> (version 5.23; older
//! spellings of the rotary settings are read as well). A key that would change what is computed, and is not computed here, is
//! refused by name. Not for: weights (see [`super::weights`]) and tokenizers.

mod ids;
mod rope;

use std::path::Path;

use serde_json::Value;

use super::files::read_json;
use super::weights::{Assembly, Bias, Naming, OutputLayer};
use crate::attention::HeadLayout;
use crate::error::Result;
use crate::json::{Object, cut, shown};
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::{Architecture, LlamaConfig, SlidingWindow};
use crate::tokenizer::ModelIds;

/// What a quantised checkpoint should be replaced by.
const QUANTISED_HINT: &str = "use the original checkpoint, or a quantised one in GGUF format";

/// How the names of classes begin that compute something else, whatever `model_type` says beside them.
const OTHERS: [&str; 44] = [
    "apertus",
    "arcee",
    "arctic",
    "baichuan",
    "bitnet",
    "bloom",
    "chatglm",
    "codegen",
    "cohere",
    "dbrx",
    "deepseek",
    "diffllama",
    "ernie",
    "exaone",
    "falcon",
    "gemma",
    "glm",
    "gpt",
    "granite",
    "grok",
    "helium",
    "hunyuan",
    "internlm",
    "jamba",
    "kimi",
    "llama4",
    "mamba",
    "minicpm",
    "minimax",
    "ministral",
    "mistral3",
    "mixtral",
    "mllama",
    "mpt",
    "nemotron",
    "olmo",
    "opt",
    "phi",
    "qwen",
    "recurrentgemma",
    "rwkv",
    "smollm3",
    "stablelm",
    "starcoder",
];

/// transformers' `max_position_embeddings` where there is none.
const LLAMA_CONTEXT: usize = 2048;
const MISTRAL_CONTEXT: usize = 131_072;
const QWEN_CONTEXT: usize = 32_768;

/// Sliding window of a model that has one, and whose configuration has none written down.
const WINDOW: usize = 4096;

/// The first layer with a window of a Qwen model whose configuration has none written down.
const QWEN_WINDOW_LAYER: u64 = 28;

/// What a model folder in this layout says of its model.
#[derive(Debug, Clone)]
pub struct HfConfig {
    /// Sizes and constants.
    pub config: LlamaConfig,
    /// How its tensors make the model.
    pub assembly: Assembly,
    /// Tokens that begin and end a text.
    pub ids: ModelIds,
    /// What was found wrong and is gone on without, for [`Checkpoint::notes`](super::Checkpoint::notes).
    pub notes: Vec<String>,
}

/// Reads a folder's `config.json` and, if it is there, `generation_config.json`.
///
/// # Errors
/// [`Error::Io`] if `config.json` cannot be read; [`Error::BadFile`] for a key that is missing, has the wrong type or
/// contradicts another; [`Error::Unsupported`], by name, for another architecture or a setting that is not computed.
///
/// [`Error::Io`]: crate::Error::Io
/// [`Error::BadFile`]: crate::Error::BadFile
/// [`Error::Unsupported`]: crate::Error::Unsupported
pub fn read(folder: &Path) -> Result<HfConfig> {
    let path = folder.join("config.json");
    let json = read_json(&path)?;
    let mut config = Object::new(&json, &path)?.hf_config()?;
    let path = folder.join("generation_config.json");
    if path.is_file() {
        let json = read_json(&path)?;
        let generation = Object::new(&json, &path)?;
        let HfConfig { config: LlamaConfig { vocab_size, .. }, ids, notes, .. } = &mut config;
        ids.eos_ids.extend(generation.token_ids("eos_token_id", *vocab_size, notes)?);
        if ids.bos_id.is_none() {
            ids.bos_id = generation.token_ids("bos_token_id", *vocab_size, notes)?.first().copied();
        }
    }
    config.ids.eos_ids.sort_unstable();
    config.ids.eos_ids.dedup();
    Ok(config)
}

impl Object<'_> {
    fn hf_config(&self) -> Result<HfConfig> {
        let architecture = self.architecture()?;
        self.refuse_what_is_not_computed()?;
        let hidden_size = self.required_size("hidden_size")?;
        let vocab_size = self.required_size("vocab_size")?;
        let heads = self.heads(architecture, hidden_size)?;
        // Fine-tunes for longer texts may give the longer length apart.
        let longest = self.size("max_sequence_length")?;
        let default = match architecture {
            Architecture::Llama => LLAMA_CONTEXT,
            Architecture::Mistral => MISTRAL_CONTEXT,
            Architecture::Qwen2 | Architecture::Qwen3 => QWEN_CONTEXT,
        };
        let trained = self.size("max_position_embeddings")?.or(longest).unwrap_or(default);
        let num_layers = self.required_size("num_hidden_layers")?;
        let (rope, lengthened) = self.rope(heads.head_dim, trained)?;
        let max_context = trained.max(lengthened).max(longest.unwrap_or(0));
        let sliding_window = match architecture {
            Architecture::Llama => None,
            Architecture::Mistral => {
                self.window_size()?.map(|size| SlidingWindow { size, layers: vec![true; num_layers] })
            }
            Architecture::Qwen2 | Architecture::Qwen3 => self.qwen_window(num_layers)?,
        };
        let bias = |is_there: bool| if is_there { Bias::Always } else { Bias::Never };
        // Keys that an architecture does not have change nothing.
        let says = |key: &str| -> Result<bool> { Ok(self.flag(key)?.unwrap_or(false)) };
        let attention_bias = match architecture {
            Architecture::Llama | Architecture::Qwen3 => says("attention_bias")?,
            Architecture::Mistral => false,
            Architecture::Qwen2 => true,
        };
        let mlp_bias = architecture == Architecture::Llama && says("mlp_bias")?;
        let is_tied = self.flag("tie_word_embeddings")?.unwrap_or(false);
        let mut notes = Vec::new();
        let ids = ModelIds {
            bos_id: self.token_ids("bos_token_id", vocab_size, &mut notes)?.first().copied(),
            eos_ids: self.token_ids("eos_token_id", vocab_size, &mut notes)?,
            num_embeddings: Some(vocab_size),
        };
        Ok(HfConfig {
            config: LlamaConfig {
                architecture,
                hidden_size,
                intermediate_size: self.required_size("intermediate_size")?,
                num_layers,
                heads,
                vocab_size,
                rms_norm_eps: self.positive("rms_norm_eps")?.unwrap_or(1e-6),
                context_length: max_context,
                sliding_window,
                rope,
            },
            assembly: Assembly {
                naming: Naming::HuggingFace,
                attention_bias: bias(attention_bias),
                attention_output_bias: bias(attention_bias && architecture != Architecture::Qwen2),
                mlp_bias: bias(mlp_bias),
                output: if is_tied { OutputLayer::Tied } else { OutputLayer::Own },
            },
            ids,
            notes,
        })
    }

    fn architecture(&self) -> Result<Architecture> {
        const HINT: &str = "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM";
        let model_type = self.text("model_type")?;
        let names = self.typed("architectures", "a list of strings", |value| {
            value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        })?;
        let of_type = |name: &str| Architecture::ALL.into_iter().find(|architecture| architecture.name() == name);
        let refuse = |name: &str| Err(self.unsupported(&format!("architecture `{name}`")).with_hint(HINT));
        let by_type = match model_type {
            None => None,
            Some(name) => match of_type(name) {
                Some(architecture) => Some(architecture),
                None => return refuse(name),
            },
        };
        let by_name = match names.as_deref() {
            None | Some([]) => None,
            Some([first, more @ ..]) => match of_class(first) {
                Some(architecture) if more.is_empty() || by_type.is_some() => Some(architecture),
                // transformers goes by `model_type`, and so may whoever derived a class of their own.
                None if by_type.is_some() && may_be_derived(first) => None,
                _ if more.is_empty() => return refuse(first),
                _ => return refuse(&format!("{first}, ...")),
            },
        };
        match (by_name, by_type) {
            (Some(a), Some(b)) if a != b => {
                Err(self.error("keys `architectures` and `model_type` name different models").with_hint(HINT))
            }
            (Some(architecture), _) | (None, Some(architecture)) => Ok(architecture),
            (None, None) => Err(self.error("keys `architectures` and `model_type` are missing").with_hint(HINT)),
        }
    }

    fn refuse_what_is_not_computed(&self) -> Result<()> {
        if let Some(quantization) = self.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or_else(|| {
                let has = |key: &str| quantization.get(key).is_some();
                match () {
                    () if has("load_in_4bit") || has("load_in_8bit") => "bitsandbytes",
                    () if self.get("quantization").is_some() => "mlx",
                    () => "of unknown method",
                }
            });
            let what = format!("quantisation `{}` (key `quantization_config`)", cut(method));
            return Err(self.unsupported(&what).with_hint(QUANTISED_HINT));
        }
        if self.get("quantization").is_some() {
            let what = "MLX's quantisation (key `quantization`)";
            return Err(self.unsupported(what).with_hint(QUANTISED_HINT));
        }
        for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
            if self.get(key).and_then(Value::as_u64).is_some_and(|experts| experts > 1) {
                return Err(self.unsupported(&format!("a mixture of experts (key `{key}`)")));
            }
        }
        if let Some(name) = self.text("hidden_act")?.filter(|name| !matches!(*name, "silu" | "swish")) {
            return Err(self.unsupported(&format!("activation `{name}` (key `hidden_act`)")));
        }
        Ok(())
    }

    /// How far back a window reaches; absent is not the same as null here.
    fn window_size(&self) -> Result<Option<usize>> {
        if self.map.contains_key("sliding_window") { self.size("sliding_window") } else { Ok(Some(WINDOW)) }
    }

    /// The sliding window of a Qwen model, if it has one in any of its layers: those that `layer_types` says, or all from
    /// `max_window_layers` on.
    fn qwen_window(&self, num_layers: usize) -> Result<Option<SlidingWindow>> {
        if !self.flag("use_sliding_window")?.unwrap_or(false) {
            return Ok(None);
        }
        let layers: Vec<bool> = if let Some(types) = self.list("layer_types")? {
            let of_type = |value: &Value| match value.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(self.unsupported(&format!("a layer of type {} (key `layer_types`)", shown(value)))),
            };
            let layers = types.iter().map(of_type).collect::<Result<Vec<_>>>()?;
            if layers.len() != num_layers {
                let reason = format!("key `layer_types` is of {} layers, expected {num_layers}", layers.len());
                return Err(self.error(reason));
            }
            layers
        } else {
            let first = self.typed("max_window_layers", "a whole number", Value::as_u64)?.unwrap_or(QWEN_WINDOW_LAYER);
            (0..num_layers).map(|layer| layer as u64 >= first).collect()
        };
        let size = self.window_size()?;
        Ok(size.filter(|_| layers.contains(&true)).map(|size| SlidingWindow { size, layers }))
    }

    fn heads(&self, architecture: Architecture, hidden_size: usize) -> Result<HeadLayout> {
        let num_heads = self.required_size("num_attention_heads")?;
        // Absent is not the same as null here: defaults are those of each one's first model.
        let default = match architecture {
            Architecture::Mistral if !self.map.contains_key("num_key_value_heads") => 8,
            Architecture::Qwen2 | Architecture::Qwen3 if !self.map.contains_key("num_key_value_heads") => 32,
            _ => num_heads,
        };
        let num_kv_heads = self.size("num_key_value_heads")?.unwrap_or(default);
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(self.error(format!("{num_heads} query heads cannot share {num_kv_heads} KV heads")));
        }
        let head_dim = match self.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if architecture == Architecture::Qwen3 && !self.map.contains_key("head_dim") => 128,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                return Err(self.error(format!(
                    "`hidden_size` {hidden_size} is not a multiple of `num_attention_heads` {num_heads}, and there is no \
                     `head_dim`"
                )));
            }
        };
        if head_dim > MAX_HEAD_DIM {
            return Err(self.unsupported(&format!("head dimension {head_dim}, above {MAX_HEAD_DIM},")));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.error(format!("head dimension {head_dim} is odd, and cannot be rotated")));
        }
        Ok(HeadLayout { num_heads, num_kv_heads, head_dim })
    }
}

/// The model that a class of transformers computes. Early conversions spell `LLaMA` as Meta does.
fn of_class(name: &str) -> Option<Architecture> {
    match name.to_ascii_lowercase().as_str() {
        "llamaforcausallm" => Some(Architecture::Llama),
        "mistralforcausallm" => Some(Architecture::Mistral),
        "qwen2forcausallm" => Some(Architecture::Qwen2),
        "qwen3forcausallm" => Some(Architecture::Qwen3),
        _ => None,
    }
}

/// Whether a class may be one that somebody derived: it makes texts, and is none of transformers' that compute other models.
fn may_be_derived(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let makes_texts = name.contains("causallm") || name.contains("lmheadmodel");
    makes_texts && !OTHERS.iter().any(|other| name.starts_with(other))
}
