//! Rotary settings of Hugging Face's `config.json`: `rope_parameters`, or the older `rope_scaling` and `rope_theta`.
//!
//! Meaning and defaults: `modeling_rope_utils.py` of transformers. How long sequences may become: as vLLM derives it.

use serde_json::{Map, Value};

use super::super::gguf_config::times;
use crate::arch::rope_scaling::{Llama3Scaling, YarnScaling};
use crate::error::Result;
use crate::json::{Object, shown};
use crate::model::{DynamicNtk, RopeLayout, RopeSettings};

impl Object<'_> {
    /// The rotary settings, from `rope_parameters`, or `rope_scaling` and `rope_theta`, or all of them; and the length that
    /// they stretch positions to, or `max_context` if they don't.
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) for values that make no sense; [`Error::Unsupported`](crate::Error::Unsupported)
    /// for a scaling that is not computed.
    pub fn rope(&self, head_dim: usize, max_context: usize) -> Result<(RopeSettings, usize)> {
        let map = self.rope_parameters()?;
        let params = Object { path: self.path, prefix: "rope_parameters.", map: &map };
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
            (None, None) => "default",
        };
        let original_context = || -> Result<usize> {
            let original = params.size("original_max_position_embeddings")?;
            Ok(original.unwrap_or(max_context))
        };
        let mut rope = RopeSettings::plain(theta, head_dim, RopeLayout::Halves);
        let mut stretched = max_context;
        match kind {
            "default" => {}
            "linear" => {
                rope.scaling = "linear";
                rope.position_divisor = params.required_positive("factor")?;
                stretched = times(max_context, rope.position_divisor);
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
                stretched = times(max_context, factor);
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
            "yarn" => {
                let factor = params.yarn(&mut rope, original_context()?, max_context)?;
                stretched = times(original_context()?, factor);
            }
            other => {
                return Err(self
                    .unsupported(&format!("rope scaling `{other}`"))
                    .with_hint("default, linear, dynamic, llama3 and yarn are computed"));
            }
        }
        Ok((rope, stretched))
    }

    /// `YaRN`'s settings; `self` is the object that holds them. Gives the factor.
    fn yarn(&self, rope: &mut RopeSettings, original_context: usize, max_context: usize) -> Result<f64> {
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
        Ok(factor)
    }

    /// All rotary settings as one object; one that is given twice must have one value.
    fn rope_parameters(&self) -> Result<Map<String, Value>> {
        let mut params = Map::new();
        let mut add = |key: &str, value: &Value| match params.insert(key.to_owned(), value.clone()) {
            Some(other) if !equal(&other, value) => {
                Err(self.error(format!("key `{key}` is given twice, as {} and as {}", shown(&other), shown(value))))
            }
            _ => Ok(()),
        };
        for group in ["rope_parameters", "rope_scaling"] {
            let object = self.typed(group, "an object", Value::as_object)?;
            for (key, value) in object.into_iter().flatten() {
                if value.is_object() {
                    return Err(self.unsupported(&format!("rope settings of their own for `{key}` (key `{group}`)")));
                }
                add(key, value)?;
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
