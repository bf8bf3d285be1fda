//! What a GGUF file's metadata say of a LLaMA model: its configuration and its vocabulary.
//!
//! Names and meanings: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, section "LLM"; tensors as
//! llama.cpp's converter writes them (query and key rows interleaved for the rotation). Not for: the container
//! ([`super::gguf`]) and the weights ([`super::weights`]).

use super::gguf::{GgufFile, Value};
use super::tensors::Tensors;
use super::weights::stored_matrix;
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::rope_scaling::YarnScaling;
use crate::model::{LlamaConfig, RopeLayout, RopeSettings};
use crate::tokenizer::GgufVocab;

/// Reads the model's sizes.
///
/// * `file`: the model's first or only file
/// * `tensors`: those of all its files
///
/// # Errors
/// [`Error::Unsupported`] for another architecture or a variant that this program does not compute, by name;
/// [`Error::BadFile`] for sizes that are missing or do not fit.
pub fn config(file: &GgufFile, tensors: &Tensors) -> Result<LlamaConfig> {
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
        tensors.get("token_embd.weight").ok_or_else(|| file.error("tensor `token_embd.weight` is missing"))?;
    let context_length = required("llama.context_length")?;
    let rope = rope(file, tensors, head_dim, context_length)?;
    Ok(LlamaConfig {
        hidden_size,
        intermediate_size: required("llama.feed_forward_length")?,
        num_layers: required("llama.block_count")?,
        heads: HeadLayout { num_heads, num_kv_heads, head_dim },
        vocab_size: embedding.shape[0],
        rms_norm_eps: file
            .float("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| file.error("metadata `llama.attention.layer_norm_rms_epsilon` is missing"))?,
        context_length,
        sliding_window: None,
        rope,
    })
}

/// Reads how positions are rotated.
fn rope(file: &GgufFile, tensors: &Tensors, head_dim: usize, context_length: usize) -> Result<RopeSettings> {
    let dim = file.whole("llama.rope.dimension_count")?.unwrap_or(head_dim);
    if dim % 2 != 0 || dim > head_dim {
        return Err(
            file.error(format!("metadata `llama.rope.dimension_count` is {dim}, the head dimension {head_dim}"))
        );
    }
    let theta = file.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let factor = match file.float("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => file.float("llama.rope.scale_linear")?,
    };
    if theta <= 0.0 || factor.is_some_and(|factor| factor <= 0.0) {
        let factor = factor.unwrap_or(1.0);
        return Err(file.error(format!("rope base {theta} or scaling factor {factor} is not positive")));
    }
    let mut rope = RopeSettings::plain(theta, dim, RopeLayout::Interleaved);
    let scaling = file.string("llama.rope.scaling.type")?.unwrap_or_else(|| "none".to_owned());
    match scaling.as_str() {
        "none" => rope.position_divisor = file.float("llama.rope.scale_linear")?.unwrap_or(1.0),
        "linear" => rope.position_divisor = factor.unwrap_or(1.0),
        "yarn" => yarn(file, &mut rope, factor, context_length)?,
        other => {
            return Err(Error::unsupported(format!("rope scaling `{other}` (`{}`)", file.path().display()))
                .with_hint("linear, llama3 and yarn scaling are computed"));
        }
    }
    if rope.position_divisor <= 0.0 {
        return Err(file.error(format!("rope scaling factor {} is not positive", rope.position_divisor)));
    }
    if rope.position_divisor != 1.0 {
        rope.scaling = "linear";
    }
    if let Some(tensor) = tensors.get("rope_freqs.weight") {
        if tensor.shape != [dim / 2] {
            let reason = format!("tensor `rope_freqs.weight`: expected shape {:?}, got {:?}", [dim / 2], tensor.shape);
            return Err(Error::bad_file(&tensor.path, reason));
        }
        let mut divisors = vec![0.0; dim / 2];
        stored_matrix("rope_freqs.weight", tensor, 1, dim / 2)?.dequantize_rows(0..1, &mut divisors);
        if rope.frequency_divisors.is_empty() {
            rope.scaling = "llama3";
            rope.frequency_divisors = divisors;
        } else {
            return Err(Error::unsupported(format!(
                "rope scaling `yarn` with divisors of its own (`{}`)",
                file.path().display()
            )));
        }
    }
    Ok(rope)
}

/// `YaRN` as llama.cpp computes it: the same as transformers without `mscale`, times a factor of the file's own.
fn yarn(file: &GgufFile, rope: &mut RopeSettings, factor: Option<f64>, context_length: usize) -> Result<()> {
    let key = |name: &str| format!("llama.rope.scaling.{name}");
    // Experiments of single models; their sense changed between versions of llama.cpp.
    for (name, neutral) in [("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)] {
        if let Some(value) = file.float(&key(name))?.filter(|&value| value != neutral) {
            let what = format!("rope scaling `yarn` with `{}` = {value} (`{}`)", key(name), file.path().display());
            return Err(Error::unsupported(what));
        }
    }
    let positive = |name: &str, default: f64| -> Result<f64> {
        match file.float(&key(name))? {
            Some(value) if value <= 0.0 => Err(file.error(format!("metadata `{}` is {value}", key(name)))),
            value => Ok(value.unwrap_or(default)),
        }
    };
    let factor = factor.ok_or_else(|| file.error(format!("metadata `{}` is missing", key("factor"))))?;
    let original_context = match file.whole(&key("original_context_length"))? {
        Some(0) => return Err(file.error(format!("metadata `{}` is 0", key("original_context_length")))),
        original => original.unwrap_or(context_length),
    };
    if rope.theta <= 1.0 {
        return Err(file.error(format!("metadata `llama.rope.freq_base` is {}, too small for yarn", rope.theta)));
    }
    let mut scaling = YarnScaling::new(factor, original_context);
    scaling.beta_fast = positive("yarn_beta_fast", scaling.beta_fast)?;
    scaling.beta_slow = positive("yarn_beta_slow", scaling.beta_slow)?;
    rope.scaling = "yarn";
    rope.frequency_divisors = scaling.divisors(rope.theta, rope.dim);
    rope.attention_factor = positive("attn_factor", 1.0)? * YarnScaling::attention_factor(factor, 1.0);
    Ok(())
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
    // Only chat templates ask for these, so what is not an id is none.
    let other_ids = [
        ("pad_token", "padding_token_id"),
        ("sep_token", "seperator_token_id"),
        ("cls_token", "cls_token_id"),
        ("mask_token", "mask_token_id"),
    ];
    let other_ids = other_ids.into_iter().filter_map(|(name, key)| Some((name, id(key).ok()??))).collect();
    let mut names: Vec<_> =
        file.metadata().keys().filter_map(|key| key.strip_prefix("tokenizer.chat_template.")).collect();
    names.sort_unstable();
    let mut named_templates = Vec::new();
    for name in names {
        if let Some(source) = file.string(&format!("tokenizer.chat_template.{name}"))? {
            named_templates.push((name.to_owned(), source));
        }
    }
    let other_ends = ["eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"];
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
        other_end_ids: other_ends.into_iter().filter_map(|name| id(name).transpose()).collect::<Result<_>>()?,
        unk_id: id("unknown_token_id")?,
        add_bos: file.boolean(&key("add_bos_token"))?,
        add_eos: file.boolean(&key("add_eos_token"))?,
        add_space_prefix: file.boolean(&key("add_space_prefix"))?,
        other_ids,
        chat_template: file.string("tokenizer.chat_template")?,
        named_templates,
        notes: Vec::new(),
    })
}
