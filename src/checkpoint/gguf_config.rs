//! What a GGUF file's metadata say of a model of LLaMA's architecture, or of one of its relatives: its configuration and its
//! vocabulary.
//!
//! Names and meanings: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, section "LLM"; tensors as
//! llama.cpp's converter writes them (LLaMA's query and key rows interleaved for the rotation). Not for: the container
//! ([`super::gguf`]) and the weights ([`super::weights`]).

mod vocab;

use super::gguf::{GgufFile, Value};
use super::tensors::Tensors;
use super::weights::stored_matrix;
use crate::arch::rope_scaling::YarnScaling;
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::{Architecture, LlamaConfig, RopeLayout, RopeSettings, SlidingWindow};

pub use self::vocab::{TOKENS, vocab};

/// Those that GGUF files name (`general.architecture`); their other keys begin with the name.
const ARCHITECTURES: [Architecture; 3] = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];

fn key_of(architecture: Architecture, name: &str) -> String {
    format!("{architecture}.{name}")
}

/// Largest size that is believed.
const MAX_SIZE: usize = 1 << 30;

/// Keys of settings that other architectures have, each with the numbers that change nothing. A file of this architecture
/// that has another number was made for something that is not computed here.
const FOREIGN: [(&str, &[f64]); 12] = [
    ("logit_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.scale", &[0.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attention.temperature_length", &[0.0]),
    ("rope.scaling.alpha", &[0.0]),
    ("nextn_predict_layers", &[0.0]),
];

/// Reads the model's sizes.
///
/// * `file`: the model's first or only file
/// * `tensors`: those of all its files
///
/// # Errors
/// [`Error::Unsupported`] for another architecture or a variant that this program does not compute, by name;
/// [`Error::BadFile`] for sizes that are missing or do not fit.
pub fn config(file: &GgufFile, tensors: &Tensors) -> Result<LlamaConfig> {
    let architecture = architecture(file)?;
    let key = |name: &str| key_of(architecture, name);
    if tensors.iter().next().is_none() {
        let reason = "it holds a header and no tensors, as files with a vocabulary alone do";
        return Err(file.error(reason).with_hint("give the model that it belongs to"));
    }
    let required = |key: &str, value: Option<usize>| -> Result<usize> {
        match value {
            Some(value) if (1..=MAX_SIZE).contains(&value) => Ok(value),
            Some(value) => Err(file.error(format!("metadata `{key}` is {value}, expected 1 to 2^30"))),
            None => Err(file.error(format!("metadata `{key}` is missing"))),
        }
    };
    let size = |key: &str| required(key, file.whole(key)?);
    let num_layers = size(&key("block_count"))?;
    let of_layers = |key: &str| file.whole_of_layers(key, num_layers);
    let hidden_size = size(&key("embedding_length"))?;
    let heads = heads(
        file,
        architecture,
        hidden_size,
        of_layers(&key("attention.head_count"))?,
        of_layers(&key("attention.head_count_kv"))?,
    )?;
    let eps = &key("attention.layer_norm_rms_epsilon");
    let rms_norm_eps = match file.float(eps)? {
        Some(value) if (0.0..1.0).contains(&value) => value,
        Some(value) => return Err(file.error(format!("metadata `{eps}` is {value}, expected a number from 0 to 1"))),
        None => return Err(file.error(format!("metadata `{eps}` is missing"))),
    };
    let embedding =
        tensors.get("token_embd.weight").ok_or_else(|| file.error("tensor `token_embd.weight` is missing"))?;
    let trained = size(&key("context_length"))?;
    let (rope, context_length) = rope(file, architecture, tensors, heads.head_dim, trained)?;
    let mlp = &key("feed_forward_length");
    Ok(LlamaConfig {
        architecture,
        hidden_size,
        intermediate_size: required(mlp, of_layers(mlp)?)?,
        num_layers,
        heads,
        vocab_size: embedding.shape[0],
        rms_norm_eps,
        context_length,
        sliding_window: sliding_window(file, architecture, num_layers)?,
        rope,
    })
}

/// Which one it is; refuses others, and settings of theirs, by name.
fn architecture(file: &GgufFile) -> Result<Architecture> {
    let refuse = |what: String| Error::unsupported(format!("{what} (`{}`)", file.path().display()));
    let name = file.string("general.architecture")?.unwrap_or_default();
    let Some(architecture) = ARCHITECTURES.into_iter().find(|architecture| architecture.name() == name) else {
        let known = ARCHITECTURES.map(Architecture::name).join(", ");
        return Err(refuse(format!("architecture `{name}`")).with_hint(format!("supported are {known}")));
    };
    for name in ["expert_count", "expert_used_count"] {
        if file.whole(&key_of(architecture, name))?.unwrap_or(0) > 0 {
            return Err(refuse("a mixture of experts".to_owned()).with_hint("use a dense model"));
        }
    }
    for (name, neutral) in FOREIGN {
        let key = key_of(architecture, name);
        if let Some(value) = file.float(&key)?.filter(|value| !neutral.contains(value)) {
            return Err(refuse(format!("the setting `{key}` = {value}"))
                .with_hint("it belongs to another architecture: convert the model anew"));
        }
    }
    let key = key_of(architecture, "attention.causal");
    if file.boolean(&key)? == Some(false) {
        return Err(refuse(format!("attention to later tokens (`{key}` is false)")));
    }
    Ok(architecture)
}

/// Checks how many heads there are, and of which size.
fn heads(
    file: &GgufFile,
    architecture: Architecture,
    hidden_size: usize,
    count: Option<usize>,
    count_kv: Option<usize>,
) -> Result<HeadLayout> {
    let [count_key, count_kv_key, key_length, value_length] =
        ["head_count", "head_count_kv", "key_length", "value_length"]
            .map(|name| key_of(architecture, &format!("attention.{name}")));
    let num_heads = match count {
        Some(count) if (1..=MAX_SIZE).contains(&count) => count,
        Some(count) => return Err(file.error(format!("metadata `{count_key}` is {count}"))),
        None => return Err(file.error(format!("metadata `{count_key}` is missing"))),
    };
    let num_kv_heads = count_kv.unwrap_or(num_heads);
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(
            file.error(format!("{num_heads} query heads cannot share {num_kv_heads} KV heads (`{count_kv_key}`)"))
        );
    }
    let head_dim = match file.whole(&key_length)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(file.error(format!(
                "`{}` {hidden_size} is not a multiple of `{count_key}` {num_heads}, and there is no `{key_length}`",
                key_of(architecture, "embedding_length")
            )));
        }
    };
    let value_dim = file.whole(&value_length)?.unwrap_or(head_dim);
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) || value_dim != head_dim {
        let what = format!(
            "head dimensions {head_dim} (`{key_length}`) and {value_dim} (`{value_length}`) in `{}`",
            file.path().display()
        );
        let hint = format!("they must be equal, even and at most {MAX_HEAD_DIM}");
        return Err(Error::unsupported(what).with_hint(hint));
    }
    Ok(HeadLayout { num_heads, num_kv_heads, head_dim })
}

/// The sliding window, of all layers unless a list says which. llama.cpp's converter writes none for these architectures, and
/// llama.cpp overlooks one that another program has written: it attends to everything then, as the model was not trained to.
fn sliding_window(file: &GgufFile, architecture: Architecture, num_layers: usize) -> Result<Option<SlidingWindow>> {
    let key = key_of(architecture, "attention.sliding_window");
    let Some(size) = file.whole(&key)?.filter(|&size| size > 0) else { return Ok(None) };
    if size > MAX_SIZE {
        return Err(file.error(format!("metadata `{key}` is {size}, expected at most 2^30")));
    }
    let key = key_of(architecture, "attention.sliding_window_pattern");
    if !file.metadata().contains_key(&key) {
        return Ok(Some(SlidingWindow { size, layers: vec![true; num_layers] }));
    }
    let layers = file.array(&key, "true or false for each layer", |value| match value {
        Value::Bool(is_windowed) => Some(*is_windowed),
        _ => None,
    })?;
    if layers.len() != num_layers {
        let reason = format!("metadata `{key}` is of {} layers, expected {num_layers}", layers.len());
        return Err(file.error(reason));
    }
    Ok(layers.contains(&true).then_some(SlidingWindow { size, layers }))
}

/// Reads how positions are rotated, as llama.cpp does: a factor without a type is linear, one of 0 is none, and the type
/// `none` ignores it.
///
/// * `trained`: `context_length`
///
/// Also gives the longest sequence: scaling makes it longer than `trained`, unless that is the longer one already.
fn rope(
    file: &GgufFile,
    architecture: Architecture,
    tensors: &Tensors,
    head_dim: usize,
    trained: usize,
) -> Result<(RopeSettings, usize)> {
    let named = |name: &str| key_of(architecture, &format!("rope.{name}"));
    let key = &named("dimension_count");
    let dim = file.whole(key)?.unwrap_or(head_dim);
    if dim != head_dim {
        // So does llama.cpp.
        return Err(file.error(format!("metadata `{key}` is {dim}, expected {head_dim}, the head dimension")));
    }
    let positive = |key: &str, default: f64| -> Result<f64> {
        match file.float(key)? {
            Some(value) if value <= 0.0 => {
                Err(file.error(format!("metadata `{key}` is {value}, expected more than 0")))
            }
            value => Ok(value.unwrap_or(default)),
        }
    };
    let theta = positive(&named("freq_base"), 10_000.0)?;
    let [key, old] = ["scaling.factor", "scale_linear"].map(named);
    let key = if file.metadata().contains_key(&key) { key } else { old };
    let factor = match file.float(&key)? {
        None | Some(0.0) => 1.0,
        Some(_) => positive(&key, 1.0)?,
    };
    // Converters turn the rows of LLaMA's queries and keys, and leave others' as they are.
    let is_turned = architecture == Architecture::Llama;
    let layout = if is_turned { RopeLayout::Interleaved } else { RopeLayout::Halves };
    let mut rope = RopeSettings::plain(theta, dim, layout);
    rope.attention_factor = positive(&named("scaling.attn_factor"), 1.0)?;
    let scaling = file.string(&named("scaling.type"))?.unwrap_or_else(|| "linear".to_owned());
    let mut context = trained;
    match scaling.as_str() {
        "none" => {}
        "linear" => {
            rope.position_divisor = factor;
            context = trained.max(times(trained, factor));
        }
        "yarn" => {
            // 0 counts as absent in llama.cpp.
            let original = file.whole(&named("scaling.original_context_length"))?.filter(|&original| original > 0);
            yarn(file, architecture, &mut rope, factor, original.unwrap_or(trained))?;
            context = trained.max(original.map_or(0, |original| times(original, factor)));
        }
        other => {
            return Err(Error::unsupported(format!("rope scaling `{other}` (`{}`)", file.path().display()))
                .with_hint("linear, llama3 and yarn scaling are computed"));
        }
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
        if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
            let reason = format!("tensor `rope_freqs.weight` holds {divisor}, expected numbers above 0");
            return Err(Error::bad_file(&tensor.path, reason));
        }
        if !rope.frequency_divisors.is_empty() {
            return Err(Error::unsupported(format!(
                "rope scaling `yarn` with divisors of its own (`{}`)",
                file.path().display()
            )));
        }
        rope.scaling = "llama3";
        rope.frequency_divisors = divisors;
    }
    Ok((rope, context))
}

/// A length times a scaling factor, of what is believed.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) fn times(tokens: usize, factor: f64) -> usize {
    ((tokens as f64 * factor) as usize).min(MAX_SIZE)
}

/// `YaRN` as llama.cpp computes it: the same as transformers without `mscale`, times a factor of the file's own, which is
/// in `rope` already.
fn yarn(
    file: &GgufFile,
    architecture: Architecture,
    rope: &mut RopeSettings,
    factor: f64,
    original_context: usize,
) -> Result<()> {
    let key = |name: &str| key_of(architecture, &format!("rope.scaling.{name}"));
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
    if rope.theta <= 1.0 {
        return Err(file.error(format!(
            "metadata `{}` is {}, too small for yarn",
            key_of(architecture, "rope.freq_base"),
            rope.theta
        )));
    }
    let mut scaling = YarnScaling::new(factor, original_context);
    scaling.beta_fast = positive("yarn_beta_fast", scaling.beta_fast)?;
    scaling.beta_slow = positive("yarn_beta_slow", scaling.beta_slow)?;
    rope.scaling = "yarn";
    rope.frequency_divisors = scaling.divisors(rope.theta, rope.dim);
    rope.attention_factor *= YarnScaling::attention_factor(factor, 1.0);
    Ok(())
}
