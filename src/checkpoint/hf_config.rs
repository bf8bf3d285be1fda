//! Hugging Face's `config.json` and `generation_config.json`: which LLaMA they describe.
//!
//! Meaning and defaults of the keys: `configuration_llama.py`, `configuration_mistral.py` and `modeling_rope_utils.py`
//! of <https://github.com/huggingface/transformers> (version 5.23; older spellings of the rotary settings are read as
//! well). A key that would change what is computed, and is not computed here, is refused by name. Not for: weights (see
//! [`super::weights`]) and tokenizers.

use std::path::Path;

use serde_json::{Map, Value};

use super::files::read_json;
use super::weights::{Assembly, Bias, Naming, OutputLayer};
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::rope_scaling::{Llama3Scaling, YarnScaling};
use crate::model::{DynamicNtk, LlamaConfig, RopeLayout, RopeSettings};
use crate::tokenizer::ModelIds;

/// The largest size that is believed.
const MAX_SIZE: usize = 1 << 30;

/// transformers' `max_position_embeddings` where there is none.
const LLAMA_CONTEXT: usize = 2048;
const MISTRAL_CONTEXT: usize = 131_072;

/// Sliding window of a Mistral model whose configuration has none written down.
const MISTRAL_WINDOW: usize = 4096;

/// What a model folder in this layout says of its model.
#[derive(Debug, Clone)]
pub struct HfConfig {
    /// Sizes and constants.
    pub config: LlamaConfig,
    /// How its tensors make the model.
    pub assembly: Assembly,
    /// Tokens that begin and end a text.
    pub ids: ModelIds,
}

/// Which of the supported models it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
}

/// Reads a folder's `config.json` and, if it is there, `generation_config.json`.
///
/// # Errors
/// [`Error::Io`] if `config.json` cannot be read; [`Error::BadFile`] for a key that is missing, has the wrong type or
/// contradicts another; [`Error::Unsupported`], by name, for another architecture or a setting that is not computed.
pub fn read(folder: &Path) -> Result<HfConfig> {
    let path = folder.join("config.json");
    let json = Json::read(&path)?;
    let mut config = json.hf_config()?;
    let generation = folder.join("generation_config.json");
    if generation.is_file() {
        let generation = Json::read(&generation)?;
        config.ids.eos_ids.extend(generation.token_ids("eos_token_id", config.config.vocab_size)?);
        if config.ids.bos_id.is_none() {
            config.ids.bos_id = generation.token_id("bos_token_id", config.config.vocab_size)?;
        }
    }
    config.ids.eos_ids.sort_unstable();
    config.ids.eos_ids.dedup();
    Ok(config)
}

/// An object of a JSON file, which errors can name. A key whose value is null counts as absent.
struct Json<'a> {
    path: &'a Path,
    /// What a key's name begins with in messages: the path of the object in the file.
    prefix: &'static str,
    map: Map<String, Value>,
}

impl<'a> Json<'a> {
    fn read(path: &'a Path) -> Result<Self> {
        match read_json(path)? {
            Value::Object(map) => Ok(Self { path, prefix: "", map }),
            _ => Err(Error::bad_file(path, "it is not a JSON object")),
        }
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(format!("{what} (`{}`)", self.path.display()))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// What is wrong with a key's value.
    fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.map.get(key).map_or("nothing".to_owned(), |value| format!("`{}`", shortened(value)));
        self.error(format!("key `{}{key}`: expected {expected}, got {got}", self.prefix))
    }

    fn typed<T>(&self, key: &str, expected: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, expected))
    }

    /// A size of at least 1.
    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 1 to 2^30", |value| {
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=MAX_SIZE).contains(size))
        })
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a whole number from 1 to 2^30"))
    }

    /// A number above 0.
    fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| value.as_f64().filter(|&x| x.is_finite() && x > 0.0))
    }

    fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.wrong(key, "a number above 0"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A token id, or the first of a list of them.
    fn token_id(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        Ok(self.token_ids(key, vocab_size)?.first().copied())
    }

    /// A token id, or a list of them; empty if absent.
    fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(items) => items.iter().map(id).collect(),
            single => Some(vec![id(single)?]),
        })?;
        let ids: Vec<u32> = ids.unwrap_or_default();
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(_) => Err(self.wrong(key, &format!("ids below the vocabulary's size, {vocab_size}"))),
            None => Ok(ids),
        }
    }

    fn hf_config(&self) -> Result<HfConfig> {
        let family = self.family()?;
        self.refuse_what_is_not_computed()?;
        let hidden_size = self.required_size("hidden_size")?;
        let vocab_size = self.required_size("vocab_size")?;
        let heads = self.heads(family, hidden_size)?;
        // Fine-tunes for longer texts may give the longer length apart.
        let longest = self.size("max_sequence_length")?;
        let default = if family == Family::Mistral { MISTRAL_CONTEXT } else { LLAMA_CONTEXT };
        let mut max_context = self.size("max_position_embeddings")?.or(longest).unwrap_or(default);
        let rope = self.rope(heads.head_dim, max_context)?;
        max_context = max_context.max(longest.unwrap_or(0));
        if let Some(dynamic) = rope.dynamic {
            // Beyond `max_position_embeddings` is where this scaling is at work.
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let longest = (max_context as f64 * dynamic.factor) as usize;
            max_context = longest.clamp(max_context, MAX_SIZE);
        }
        let sliding_window = match family {
            Family::Llama => None,
            // Absent is not the same as null here.
            Family::Mistral if !self.map.contains_key("sliding_window") => Some(MISTRAL_WINDOW),
            Family::Mistral => self.size("sliding_window")?,
        };
        let sliding_window = sliding_window.filter(|&window| window < max_context);
        // A Mistral model has no biases, whatever its configuration says.
        let bias = |key: &str| -> Result<Bias> {
            let is_there = family == Family::Llama && self.flag(key)?.unwrap_or(false);
            Ok(if is_there { Bias::Always } else { Bias::Never })
        };
        let is_tied = self.flag("tie_word_embeddings")?.unwrap_or(false);
        Ok(HfConfig {
            config: LlamaConfig {
                hidden_size,
                intermediate_size: self.required_size("intermediate_size")?,
                num_layers: self.required_size("num_hidden_layers")?,
                heads,
                vocab_size,
                rms_norm_eps: self.positive("rms_norm_eps")?.unwrap_or(1e-6),
                context_length: sliding_window.unwrap_or(max_context),
                sliding_window,
                rope,
            },
            assembly: Assembly {
                naming: Naming::HuggingFace,
                attention_bias: bias("attention_bias")?,
                mlp_bias: bias("mlp_bias")?,
                output: if is_tied { OutputLayer::Tied } else { OutputLayer::Own },
            },
            ids: ModelIds {
                bos_id: self.token_id("bos_token_id", vocab_size)?,
                eos_ids: self.token_ids("eos_token_id", vocab_size)?,
                num_embeddings: Some(vocab_size),
            },
        })
    }

    fn family(&self) -> Result<Family> {
        const HINT: &str = "supported are LlamaForCausalLM and MistralForCausalLM";
        let model_type = self.text("model_type")?;
        let names = self.typed("architectures", "a list of strings", |value| {
            value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        })?;
        let of_architecture = |name: &str| match name {
            "LlamaForCausalLM" => Some(Family::Llama),
            "MistralForCausalLM" => Some(Family::Mistral),
            _ => None,
        };
        let of_type = |name: &str| match name {
            "llama" => Some(Family::Llama),
            "mistral" => Some(Family::Mistral),
            _ => None,
        };
        let refuse = |name: &str| Err(self.unsupported(&format!("architecture `{name}`")).with_hint(HINT));
        let by_name = match names.as_deref() {
            None | Some([]) => None,
            Some([only]) => match of_architecture(only) {
                Some(family) => Some(family),
                None => return refuse(only),
            },
            Some([first, ..]) => return refuse(&format!("{first}, ...")),
        };
        let by_type = match model_type.as_deref() {
            None => None,
            Some(name) => match of_type(name) {
                Some(family) => Some(family),
                None => return refuse(name),
            },
        };
        match (by_name, by_type) {
            (Some(a), Some(b)) if a != b => {
                Err(self.error("keys `architectures` and `model_type` name different models").with_hint(HINT))
            }
            (Some(family), _) | (None, Some(family)) => Ok(family),
            (None, None) => Err(self.error("keys `architectures` and `model_type` are missing").with_hint(HINT)),
        }
    }

    fn refuse_what_is_not_computed(&self) -> Result<()> {
        if let Some(quantization) = self.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("of unknown method");
            let what = format!("quantisation `{}` (key `quantization_config`)", shortened(&method.into()));
            return Err(self
                .unsupported(&what)
                .with_hint("use the original checkpoint, or a quantised one in GGUF format"));
        }
        if let Some(name) = self.text("hidden_act")?.filter(|name| !matches!(name.as_str(), "silu" | "swish")) {
            return Err(self.unsupported(&format!("activation `{name}` (key `hidden_act`)")));
        }
        Ok(())
    }

    fn heads(&self, family: Family, hidden_size: usize) -> Result<HeadLayout> {
        let num_heads = self.required_size("num_attention_heads")?;
        // Absent is not the same as null here: Mistral's default is that of its first model.
        let default =
            if family == Family::Mistral && !self.map.contains_key("num_key_value_heads") { 8 } else { num_heads };
        let num_kv_heads = self.size("num_key_value_heads")?.unwrap_or(default);
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(self.error(format!("{num_heads} query heads cannot share {num_kv_heads} KV heads")));
        }
        let head_dim = match self.size("head_dim")? {
            Some(head_dim) => head_dim,
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

    /// The rotary settings, from `rope_parameters`, or `rope_scaling` and `rope_theta`, or all of them.
    fn rope(&self, head_dim: usize, max_context: usize) -> Result<RopeSettings> {
        let params = self.rope_parameters()?;
        let theta = params.positive("rope_theta")?.unwrap_or(10_000.0);
        if params.positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(self.unsupported("rotation of a part of each head (key `partial_rotary_factor`)"));
        }
        let kind = match (params.text("rope_type")?, params.text("type")?) {
            (Some(new), Some(old)) if new != old => {
                return Err(
                    self.error(format!("keys `rope_type` (`{new}`) and `type` (`{old}`) contradict each other"))
                );
            }
            (Some(kind), _) | (None, Some(kind)) => kind,
            (None, None) if params.get("factor").is_some() => {
                return Err(self.error("rope scaling has a `factor`, and no `rope_type`"));
            }
            (None, None) => "default".to_owned(),
        };
        let original_context = || -> Result<usize> {
            let original = params.size("original_max_position_embeddings")?;
            Ok(original.unwrap_or(max_context))
        };
        let mut rope = RopeSettings::plain(theta, head_dim, RopeLayout::Halves);
        match kind.as_str() {
            "default" => {}
            "linear" => {
                rope.scaling = "linear";
                rope.position_divisor = params.required_positive("factor")?;
            }
            "dynamic" => {
                let factor = params.required_positive("factor")?;
                if factor < 1.0 {
                    return Err(params.wrong("factor", "a number of at least 1"));
                }
                if head_dim == 2 {
                    return Err(self.unsupported("rope scaling `dynamic` of heads of dimension 2"));
                }
                rope.scaling = "dynamic";
                rope.dynamic = Some(DynamicNtk { factor, original_context: max_context });
            }
            "llama3" => {
                let scaling = Llama3Scaling {
                    factor: params.required_positive("factor")?,
                    low_freq_factor: params.required_positive("low_freq_factor")?,
                    high_freq_factor: params.required_positive("high_freq_factor")?,
                    original_context: original_context()?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    return Err(params.wrong("high_freq_factor", "a number above `low_freq_factor`"));
                }
                rope.scaling = "llama3";
                rope.frequency_divisors = scaling.divisors(theta, head_dim);
            }
            "yarn" => params.yarn(&mut rope, original_context()?, max_context)?,
            other => {
                return Err(self
                    .unsupported(&format!("rope scaling `{other}`"))
                    .with_hint("default, linear, dynamic, llama3 and yarn are computed"));
            }
        }
        Ok(rope)
    }

    /// `YaRN`'s settings; `self` is the object that holds them.
    fn yarn(&self, rope: &mut RopeSettings, original_context: usize, max_context: usize) -> Result<()> {
        if rope.theta <= 1.0 {
            return Err(self.wrong("rope_theta", "a number above 1"));
        }
        let factor = match self.positive("factor")? {
            Some(factor) => factor,
            // transformers takes this quotient for a factor of null, and refuses one that is absent.
            #[expect(clippy::cast_precision_loss)]
            None if self.map.contains_key("factor") => max_context as f64 / original_context as f64,
            None => return Err(self.wrong("factor", "a number above 0")),
        };
        let non_negative = |key: &str| {
            self.typed(key, "a number of at least 0", |value| value.as_f64().filter(|&x| x.is_finite() && x >= 0.0))
        };
        // 0 counts as absent.
        let given = |key: &str| -> Result<Option<f64>> { Ok(non_negative(key)?.filter(|&value| value != 0.0)) };
        let mut scaling = YarnScaling::new(factor, original_context);
        scaling.beta_fast = given("beta_fast")?.unwrap_or(scaling.beta_fast);
        scaling.beta_slow = given("beta_slow")?.unwrap_or(scaling.beta_slow);
        scaling.truncate = self.flag("truncate")?.unwrap_or(true);
        rope.scaling = "yarn";
        rope.frequency_divisors = scaling.divisors(rope.theta, rope.dim);
        rope.attention_factor = match (non_negative("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
            (Some(factor), ..) => factor,
            (None, Some(mscale), Some(all)) => {
                YarnScaling::attention_factor(factor, mscale) / YarnScaling::attention_factor(factor, all)
            }
            (None, ..) => YarnScaling::attention_factor(factor, 1.0),
        };
        Ok(())
    }

    /// All rotary settings as one object; one that is given twice must have one value.
    fn rope_parameters(&self) -> Result<Json<'a>> {
        let mut params = Json { path: self.path, prefix: "rope_parameters.", map: Map::new() };
        let mut add = |key: &str, value: &Value| match params.map.insert(key.to_owned(), value.clone()) {
            Some(other) if !equal(&other, value) => Err(self.error(format!(
                "key `{key}` is given twice, as `{}` and as `{}`",
                shortened(&other),
                shortened(value)
            ))),
            _ => Ok(()),
        };
        for group in ["rope_parameters", "rope_scaling"] {
            let object = self.typed(group, "an object", |value| value.as_object().cloned())?;
            for (key, value) in object.unwrap_or_default() {
                if value.is_object() {
                    return Err(self.unsupported(&format!("rope settings of their own for `{key}` (key `{group}`)")));
                }
                add(&key, &value)?;
            }
        }
        for key in ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"] {
            if let Some(value) = self.get(key) {
                add(key, value)?;
            }
        }
        Ok(params)
    }
}

/// Whether two values are the same, `1` and `1.0` included.
fn equal(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|a| b.as_f64() == Some(a))
}

/// A value as text for a message.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= LONGEST { text } else { text.chars().take(LONGEST).chain("...".chars()).collect() }
}
