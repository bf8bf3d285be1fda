//! The configuration of the adaptive cache: a JSON file, checked key by key.
//!
//! Both this program's keys and those of the original `PyTorch` program are accepted, so that the original's file loads
//! unchanged. A mistake is an error that names the key and the file; nothing is ignored.
//!
//! Not for: options of a single run, such as the prompt or sampling.

mod budget;
mod keys;
mod search;

use std::path::Path;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::without_bom;
use crate::policy::{METHODS, Method, MethodSettings, PolicySettings, method_by_name};
use crate::reading;
pub use budget::{Budget, BudgetScale, BudgetedMethod, parse_size};
use keys::{
    COMMON_KEYS, FASTGEN_KEYS, KEYS, Pairs, Reject, canonical_key, choice, positive, ratio, strings, token_ids,
    unknown_key, whole,
};
pub use search::{Criterion, DecodeMode, GroupReduction, ProfileRows, SearchOrder, TokenIds};

/// The method that searches policies for each head and has no budget; the default.
pub const FASTGEN: &str = "fastgen";

/// Most bytes of a configuration file; real ones have less than a thousand.
const MAX_BYTES: u64 = 1 << 20;

/// Everything that decides what an adaptive cache keeps. Serialises as a file that reads back as itself: every key that
/// has an effect, every default spelt out.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptiveConfig {
    /// The method with a budget, if it is one; `None` is `fastgen`, which all fields up to `profile_rows` belong to.
    pub method: Option<BudgetedMethod>,
    /// When a keep-set is good enough for a head.
    pub criterion: Criterion,
    /// The recovery threshold T, in 0..=1; default 0.95.
    pub recovery_threshold: f64,
    /// `r_f`, in 0..=1: the share of the prompt that `frequency` keeps; default 0.8.
    pub frequency_ratio: f64,
    /// `r_l`, in 0..=1: the share of the prompt that `locality` keeps; default 0.8.
    pub locality_ratio: f64,
    /// The search order; default: the registry's.
    pub policies: SearchOrder,
    /// How the query heads of a KV head are summed up; `mass` only.
    pub gqa: GroupReduction,
    /// Which query rows are profiled; `mass` only.
    pub profile_rows: ProfileRows,
    /// How many leading positions are always kept: by the policy `special`, default 1; by methods that keep sinks,
    /// default 4.
    pub sink_tokens: usize,
    /// How many of the prompt's last rows the methods around `snapkv` observe, at least 1; default 64.
    pub observation_window: usize,
    /// Over how many neighbours these methods average observed attention, odd; default 5.
    pub pool_kernel: usize,
    /// Seed of the method `random`; default 0.
    pub seed: u64,
    /// What happens while decoding; default append.
    pub decode: DecodeMode,
    /// Which ids are special.
    pub special_token_ids: TokenIds,
    /// The characters that make a token punctuation, when its ids are left to the tokenizer.
    pub punctuation_list: Vec<String>,
    /// Which ids are punctuation.
    pub punctuation_token_ids: TokenIds,
}

impl Default for AdaptiveConfig {
    fn default() -> Self {
        Self {
            method: None,
            criterion: Criterion::MaxAbs,
            recovery_threshold: 0.95,
            frequency_ratio: 0.8,
            locality_ratio: 0.8,
            policies: SearchOrder::default(),
            gqa: GroupReduction::Min,
            profile_rows: ProfileRows::All,
            sink_tokens: 1,
            observation_window: MethodSettings::DEFAULT.observation_window,
            pool_kernel: MethodSettings::DEFAULT.pool_kernel,
            seed: MethodSettings::DEFAULT.seed,
            decode: DecodeMode::Append,
            special_token_ids: TokenIds::Auto,
            punctuation_list:
                r#", . ! ? ; : ( ) " ' - / \ @ # $ % ^ & * + = ~ ` < > [ ] { }"#.split(' ').map(str::to_owned).collect(),
            punctuation_token_ids: TokenIds::Auto,
        }
    }
}

impl AdaptiveConfig {
    /// A method with its default budget, half of everything, and default settings.
    #[must_use]
    pub fn for_method(method: &'static dyn Method) -> Self {
        let method = BudgetedMethod { method, budget: Budget::default() };
        Self { method: Some(method), sink_tokens: MethodSettings::DEFAULT.sink_tokens, ..Self::default() }
    }

    /// Sets how much is kept.
    ///
    /// # Errors
    /// [`Error::Config`], with a hint, for `fastgen`, which has no budget, and for a budget out of range.
    pub fn with_budget(mut self, budget: Budget) -> Result<Self> {
        let key = budget.key();
        let fail = |Reject { reason, hint }: Reject| Error::Config { path: None, key: key.to_owned(), reason, hint };
        let Some(method) = &mut self.method else { return Err(fail(no_budget())) };
        match budget {
            Budget::KeptRatio(ratio) if !(0.0..=1.0).contains(&ratio) => {
                return Err(fail(format!("expected a number in 0..=1, got `{ratio}`").into()));
            }
            Budget::Bytes(0) => return Err(fail("expected at least one byte".to_owned().into())),
            _ => method.budget = budget,
        }
        Ok(self)
    }

    /// The name of the method: [`FASTGEN`] or that of one of [`METHODS`].
    #[must_use]
    pub fn method_name(&self) -> &'static str {
        self.method.map_or(FASTGEN, |method| method.method.name())
    }

    /// How many levels a head can end up at: those of the search; or for a method, that of the method, and `full`.
    #[must_use]
    pub fn num_levels(&self) -> usize {
        if self.method.is_some() { 2 } else { self.policies.num_levels() }
    }

    /// What logs and reports say of a head at a level: the names of the search's policies, or of the method. `full`
    /// alone at the last level.
    #[must_use]
    pub fn level_names(&self, level: usize) -> Vec<&'static str> {
        match self.method {
            Some(method) if level == 0 => vec![method.method.name()],
            Some(_) => vec!["full"],
            None => self.policies.level_names(level),
        }
    }

    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::BadFile`] if it is not a JSON object; [`Error::Config`], with
    /// the key and the path, for an unknown key, a key given twice (also in both spellings), or a value out of range.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = reading::text(path, "read", MAX_BYTES)?;
        Self::parse(&text, Some(path))
    }

    /// Reads a configuration from JSON text; `path` is for messages only.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn parse(text: &str, path: Option<&Path>) -> Result<Self> {
        let text = without_bom(text);
        let pairs: Pairs = serde_json::from_str(text).map_err(|error| {
            Error::bad_file(path.unwrap_or(Path::new("<configuration>")), format!("not a JSON object: {error}"))
        })?;
        let fail = |key: &str, reject: Reject| Error::Config {
            path: path.map(Path::to_owned),
            key: key.to_owned(),
            reason: reject.reason,
            hint: reject.hint,
        };

        let mut config = Self::default();
        if let Some((key, value)) = pairs.0.iter().find(|(key, _)| key == "method") {
            config.method = method(value).map_err(|reject| fail(key, reject))?;
        }
        let mut given: Vec<(&'static str, String)> = Vec::new();
        for (key, value) in &pairs.0 {
            let Some(canonical) = canonical_key(key) else {
                return Err(fail(key, unknown_key(key)));
            };
            if let Some((_, earlier)) = given.iter().find(|(earlier, _)| *earlier == canonical) {
                let reason = if earlier == key {
                    "given twice".to_owned()
                } else {
                    format!("given twice, as `{earlier}` and as `{key}`")
                };
                return Err(fail(key, Reject { reason, hint: Some("keep one of them".to_owned()) }));
            }
            given.push((canonical, key.clone()));
            config.set(canonical, value).map_err(|reject| fail(key, reject))?;
        }
        if config.method.is_some() && !given.iter().any(|(key, _)| *key == "sink_tokens") {
            config.sink_tokens = MethodSettings::DEFAULT.sink_tokens;
        }
        config.check_combination(&given).map_err(|(key, reject)| fail(&key, reject))?;
        Ok(config)
    }

    /// The numbers that policies read.
    #[must_use]
    pub fn policy_settings(&self) -> PolicySettings {
        PolicySettings {
            frequency_ratio: self.frequency_ratio,
            locality_ratio: self.locality_ratio,
            sink_tokens: self.sink_tokens,
        }
    }

    /// The numbers that methods read.
    #[must_use]
    pub fn method_settings(&self) -> MethodSettings {
        MethodSettings {
            sink_tokens: self.sink_tokens,
            observation_window: self.observation_window,
            pool_kernel: self.pool_kernel,
            seed: self.seed,
        }
    }

    fn set(&mut self, key: &'static str, value: &Value) -> std::result::Result<(), Reject> {
        match key {
            // Read before the other keys, wherever they stand.
            "method" => {}
            "kept_ratio" => self.set_budget(Budget::KeptRatio(ratio(value)?))?,
            "kv_budget" => {
                let text = value.as_str().ok_or_else(|| format!("expected a size such as \"64MB\", got `{value}`"))?;
                let bytes = parse_size(text).map_err(|expected| format!("{expected}, got `{text}`"))?;
                self.set_budget(Budget::Bytes(bytes))?;
            }
            "observation_window" => self.observation_window = positive(value)?,
            "pool_kernel" => {
                self.pool_kernel = whole(value)
                    .filter(|kernel| kernel % 2 == 1)
                    .ok_or_else(|| format!("expected an odd whole number, got `{value}`"))?;
            }
            "seed" => {
                self.seed =
                    value.as_u64().ok_or_else(|| format!("expected a whole number of at least 0, got `{value}`"))?;
            }
            "criterion" => {
                self.criterion = choice(value, &[("max_abs", Criterion::MaxAbs), ("mass", Criterion::Mass)])?;
            }
            "recovery_threshold" => self.recovery_threshold = ratio(value)?,
            "frequency_ratio" => self.frequency_ratio = ratio(value)?,
            "locality_ratio" => self.locality_ratio = ratio(value)?,
            "policies" => self.policies = SearchOrder::from_names(&strings(value)?)?,
            "gqa" => self.gqa = choice(value, &[("min", GroupReduction::Min), ("mean", GroupReduction::Mean)])?,
            "profile_rows" => {
                self.profile_rows =
                    match value {
                        Value::String(text) if text == "all" => ProfileRows::All,
                        _ => ProfileRows::Last(whole(value).filter(|&rows| rows > 0).ok_or_else(|| {
                            format!("expected \"all\" or a whole number of at least 1, got `{value}`")
                        })?),
                    };
            }
            "sink_tokens" => {
                self.sink_tokens =
                    whole(value).ok_or_else(|| format!("expected a whole number of at least 0, got `{value}`"))?;
            }
            "decode" => {
                self.decode = choice(value, &[("append", DecodeMode::Append), ("evict", DecodeMode::Evict)])?;
            }
            "special_token_ids" => self.special_token_ids = token_ids(value)?,
            "punctuation_list" => self.punctuation_list = strings(value)?,
            "punctuation_token_ids" => self.punctuation_token_ids = token_ids(value)?,
            _ => return Err(unknown_key(key)),
        }
        Ok(())
    }

    fn set_budget(&mut self, budget: Budget) -> std::result::Result<(), Reject> {
        self.method.as_mut().ok_or_else(no_budget)?.budget = budget;
        Ok(())
    }

    /// Whether a key has an effect with the chosen method.
    fn reads(&self, key: &str) -> bool {
        COMMON_KEYS.contains(&key)
            || match self.method {
                None => FASTGEN_KEYS.contains(&key),
                Some(BudgetedMethod { method, budget }) => method.keys().contains(&key) || budget.key() == key,
            }
    }

    /// Refuses settings that would have no effect with the chosen method or criterion.
    fn check_combination(&self, given: &[(&'static str, String)]) -> std::result::Result<(), (String, Reject)> {
        let is_given = |wanted: &str| given.iter().any(|(key, _)| *key == wanted);
        if is_given("kept_ratio") && is_given("kv_budget") {
            let hint = Some("keep one of them".to_owned());
            let reason = "given beside `kept_ratio`: a method has one budget".to_owned();
            return Err(("kv_budget".to_owned(), Reject { reason, hint }));
        }
        if let Some((_, key)) = given.iter().find(|(key, _)| !self.reads(key)) {
            let reason = format!("has no effect with the method `{}`", self.method_name());
            return Err((key.clone(), Reject { reason, hint: Some("leave this key out".to_owned()) }));
        }
        if let Some(method) = self.method {
            return if self.decode == DecodeMode::Evict && method.method.eviction().is_none() {
                Err(("decode".to_owned(), no_eviction(method.method)))
            } else {
                Ok(())
            };
        }
        if self.criterion == Criterion::Mass {
            return Ok(());
        }
        for (key, default) in
            [("gqa", self.gqa == GroupReduction::Min), ("profile_rows", self.profile_rows == ProfileRows::All)]
        {
            if !default && given.iter().any(|(name, _)| *name == key) {
                return Err((
                    key.to_owned(),
                    Reject {
                        reason: "has no effect with the criterion `max_abs`".to_owned(),
                        hint: Some("set `criterion` to \"mass\", or leave this key out".to_owned()),
                    },
                ));
            }
        }
        Ok(())
    }
}

impl Serialize for AdaptiveConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, _) in KEYS.iter().filter(|(key, _)| self.reads(key)) {
            map.serialize_key(key)?;
            match *key {
                "method" => map.serialize_value(self.method_name()),
                "kept_ratio" | "kv_budget" => match self.method.map(|method| method.budget) {
                    Some(Budget::KeptRatio(ratio)) => map.serialize_value(&ratio),
                    Some(Budget::Bytes(bytes)) => map.serialize_value(&format!("{bytes}B")),
                    None => map.serialize_value(&()),
                },
                "observation_window" => map.serialize_value(&self.observation_window),
                "pool_kernel" => map.serialize_value(&self.pool_kernel),
                "seed" => map.serialize_value(&self.seed),
                "criterion" => map.serialize_value(&self.criterion),
                "recovery_threshold" => map.serialize_value(&self.recovery_threshold),
                "frequency_ratio" => map.serialize_value(&self.frequency_ratio),
                "locality_ratio" => map.serialize_value(&self.locality_ratio),
                "policies" => map.serialize_value(&self.policies),
                "gqa" => map.serialize_value(&self.gqa),
                "profile_rows" => map.serialize_value(&self.profile_rows),
                "sink_tokens" => map.serialize_value(&self.sink_tokens),
                "decode" => map.serialize_value(&self.decode),
                "special_token_ids" => map.serialize_value(&self.special_token_ids),
                "punctuation_list" => map.serialize_value(&self.punctuation_list),
                "punctuation_token_ids" => map.serialize_value(&self.punctuation_token_ids),
                _ => Err(serde::ser::Error::custom(format!("key `{key}` has no value"))),
            }?;
        }
        map.end()
    }
}

/// The method that a file names.
fn method(value: &Value) -> std::result::Result<Option<BudgetedMethod>, Reject> {
    if value.as_str() == Some(FASTGEN) {
        return Ok(None);
    }
    let method = value.as_str().and_then(method_by_name).ok_or_else(|| {
        let known = std::iter::once(FASTGEN).chain(METHODS.iter().map(|method| method.name()));
        let known: Vec<_> = known.map(|name| format!("`{name}`")).collect();
        format!("unknown method {value}, expected one of {}", known.join(", "))
    })?;
    Ok(Some(BudgetedMethod { method, budget: Budget::default() }))
}

fn no_budget() -> Reject {
    Reject {
        reason: format!("the method `{FASTGEN}` has no budget"),
        hint: Some("set `recovery_threshold` instead, or choose another `method`".to_owned()),
    }
}

/// A method that does not say what it evicts while decoding.
fn no_eviction(method: &dyn Method) -> Reject {
    let evicting = METHODS.iter().filter(|method| method.eviction().is_some()).map(|method| method.name());
    let evicting: Vec<_> = std::iter::once(FASTGEN).chain(evicting).map(|name| format!("`{name}`")).collect();
    Reject {
        reason: format!(
            "the method `{}` does not evict while decoding (\"evict\"); those that do: {}",
            method.name(),
            evicting.join(", ")
        ),
        hint: Some("set `decode` to \"append\": the prompt is compressed, new tokens are kept".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        let error = AdaptiveConfig::parse(text, Some(Path::new("c.json"))).unwrap_err();
        format!("{error} | {}", error.hint().unwrap_or("-"))
    }

    #[test]
    fn the_originals_file_loads_unchanged() {
        let text = r#"{"t": 0.9, "top_p_frequency": 0.4, "locality_length": 0.2, "special_token_ids": [-1, 0, 1, 2],
                       "punctuation_list": [",", "."], "punctuation_token_ids": [29892, 29889]}"#;
        let config = AdaptiveConfig::parse(text, None).unwrap();
        let expected = AdaptiveConfig {
            recovery_threshold: 0.9,
            frequency_ratio: 0.4,
            locality_ratio: 0.2,
            special_token_ids: TokenIds::List(vec![0, 1, 2]),
            punctuation_list: vec![",".to_owned(), ".".to_owned()],
            punctuation_token_ids: TokenIds::List(vec![29892, 29889]),
            ..AdaptiveConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn a_serialised_configuration_reads_back_as_itself() {
        let text = r#"{"criterion": "mass", "gqa": "mean", "profile_rows": 64, "policies": ["locality", "full"]}"#;
        let config = AdaptiveConfig::parse(text, None).unwrap();
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
        let spelt_out = |config: &AdaptiveConfig, written: &str| {
            KEYS.iter().all(|(key, _)| written.contains(&format!("\"{key}\":")) == config.reads(key))
        };
        assert!(spelt_out(&config, &written), "{written}");
        for &method in METHODS {
            for budget in [Budget::KeptRatio(0.1), Budget::Bytes((3 << 20) + 1)] {
                let config = AdaptiveConfig::for_method(method).with_budget(budget).unwrap();
                let written = serde_json::to_string(&config).unwrap();
                assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
                assert!(spelt_out(&config, &written), "{written}");
            }
        }
    }

    #[test]
    fn a_file_that_names_a_method_only_is_the_methods_default() {
        for &method in METHODS {
            let text = format!(r#"{{"method": "{}"}}"#, method.name());
            assert_eq!(AdaptiveConfig::parse(&text, None).unwrap(), AdaptiveConfig::for_method(method));
            assert!(method.keys().iter().all(|key| KEYS.iter().any(|(known, _)| known == key)), "{}", method.name());
        }
        assert_eq!(AdaptiveConfig::parse(r#"{"method": "fastgen"}"#, None).unwrap(), AdaptiveConfig::default());
    }

    #[test]
    fn eviction_while_decoding_is_for_the_search_and_for_methods_that_say_how() {
        let evicts = |method: &str| {
            let text = format!(r#"{{"decode": "evict", "method": "{method}"}}"#);
            let config = AdaptiveConfig::parse(&text, None).ok()?;
            let written = serde_json::to_string(&config).unwrap();
            assert!(written.contains(r#""decode":"evict""#), "{written}");
            assert_eq!(AdaptiveConfig::parse(&written, None).unwrap(), config);
            Some(config.decode)
        };
        for method in [FASTGEN, "streaming_llm", "h2o", "tova"] {
            assert_eq!(evicts(method), Some(DecodeMode::Evict), "{method}");
        }
        for method in METHODS.iter().filter(|method| method.eviction().is_none()) {
            assert_eq!(evicts(method.name()), None, "{}", method.name());
        }
        assert_eq!(AdaptiveConfig::parse(r#"{"decode": "append"}"#, None).unwrap(), AdaptiveConfig::default());
    }

    #[test]
    fn keys_may_stand_before_the_method_that_they_are_for() {
        let text = r#"{"kept_ratio": 0.25, "sink_tokens": 2, "method": "streaming_llm"}"#;
        let config = AdaptiveConfig::parse(text, None).unwrap();
        assert_eq!(config.method.unwrap().budget, Budget::KeptRatio(0.25));
        assert_eq!((config.sink_tokens, config.method_name()), (2, "streaming_llm"));
        let config = AdaptiveConfig::parse(r#"{"kv_budget": "1.5MB", "method": "h2o"}"#, None).unwrap();
        assert_eq!(config.method.unwrap().budget, Budget::Bytes(3 << 19));
    }

    #[test]
    fn budgets_become_counts_of_positions() {
        let scale = BudgetScale { num_layers: 3, num_kv_heads: 2, token_bytes: 10 };
        for (budget, len, expected) in [
            (Budget::KeptRatio(0.5), 9, 4.5),
            (Budget::KeptRatio(1.0), 10, 10.0),
            (Budget::KeptRatio(0.0), 10, 1.0),
            (Budget::KeptRatio(0.5), 0, 0.0),
            (Budget::Bytes(600), 100, 10.0), // 200 a layer, 100 a head
            (Budget::Bytes(659), 100, 10.0),
            (Budget::Bytes(660), 100, 11.0),
            (Budget::Bytes(600), 7, 7.0),
            (Budget::Bytes(1), 7, 1.0),
        ] {
            let average = budget.average(len, scale);
            assert!((average - expected).abs() < 1e-12, "{budget:?} of {len}: {average}");
        }
    }

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        for (text, bytes) in
            [("64MB", 64 << 20), ("64", 64 << 20), ("1.5 gb", 3 << 29), ("512k", 512 << 10), ("17B", 17)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MB", "-1MB", "0", "1TB", "0.5B", "1e300GB", "64 M B"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_budget_is_refused_where_there_is_none_and_out_of_range() {
        let message = |error: Error| format!("{error} | {}", error.hint().unwrap_or("-"));
        let fastgen = AdaptiveConfig::default().with_budget(Budget::KeptRatio(0.5)).unwrap_err();
        assert_eq!(
            message(fastgen),
            "`kept_ratio`: the method `fastgen` has no budget | set `recovery_threshold` instead, or choose another `method`"
        );
        let snapkv = || AdaptiveConfig::for_method(&crate::policy::methods::SnapKv);
        assert!(message(snapkv().with_budget(Budget::KeptRatio(1.1)).unwrap_err()).contains("in 0..=1, got `1.1`"));
        assert!(snapkv().with_budget(Budget::KeptRatio(f64::NAN)).is_err());
        assert!(
            message(snapkv().with_budget(Budget::Bytes(0)).unwrap_err()).contains("`kv_budget`: expected at least")
        );
    }

    #[test]
    fn the_default_punctuation_has_the_thirty_signs_of_the_original() {
        let list = AdaptiveConfig::default().punctuation_list;
        assert_eq!(list.len(), 30);
        assert!(list.iter().all(|sign| sign.chars().count() == 1));
    }

    #[test]
    fn mistakes_name_the_key_the_file_and_the_remedy() {
        for (text, expected) in [
            (
                r#"{"recovery_treshold": 1}"#,
                "`c.json`: `recovery_treshold`: unknown key | did you mean `recovery_threshold`?",
            ),
            (r#"{"t": 0.9, "recovery_threshold": 0.9}"#, "given twice, as `t` and as `recovery_threshold` | keep one"),
            (r#"{"t": 0.9, "t": 0.8}"#, "`t`: given twice | keep one"),
            (r#"{"frequency_ratio": 1.5}"#, "`frequency_ratio`: expected a number in 0..=1, got `1.5`"),
            (r#"{"locality_length": "x"}"#, "`locality_length`: expected a number in 0..=1, got `\"x\"`"),
            (r#"{"policies": ["special"]}"#, "`policies`: expected a list that ends in `full`"),
            (r#"{"policies": []}"#, "`policies`: expected a list that ends in `full`"),
            (r#"{"policies": ["full", "special"]}"#, "comes after `full`"),
            (r#"{"policies": ["special", "special", "full"]}"#, "listed twice"),
            (r#"{"policies": ["sinks", "full"]}"#, "unknown policy `sinks`"),
            (r#"{"profile_rows": 0}"#, "expected \"all\" or a whole number of at least 1, got `0`"),
            (r#"{"gqa": "mean"}"#, "`gqa`: has no effect with the criterion `max_abs`"),
            (
                r#"{"method": "snap"}"#,
                "`method`: unknown method \"snap\", expected one of `fastgen`, `streaming_llm`, `h2o`",
            ),
            (r#"{"method": 3}"#, "`method`: unknown method 3"),
            (r#"{"method": "h2o", "method": "h2o"}"#, "`method`: given twice"),
            (r#"{"kept_ratio": 0.5}"#, "`kept_ratio`: the method `fastgen` has no budget | set `recovery_threshold`"),
            (r#"{"kv_budget": "1MB"}"#, "`kv_budget`: the method `fastgen` has no budget"),
            (r#"{"method": "h2o", "kept_ratio": 2}"#, "expected a number in 0..=1, got `2`"),
            (
                r#"{"method": "h2o", "kv_budget": "x"}"#,
                "`kv_budget`: expected a size such as 64MB, 512KB or 1.5GB, got `x`",
            ),
            (r#"{"method": "h2o", "kv_budget": 64}"#, "`kv_budget`: expected a size such as \"64MB\", got `64`"),
            (r#"{"method": "h2o", "kv_budget": "1MB", "kept_ratio": 0.5}"#, "a method has one budget | keep one"),
            (r#"{"method": "h2o", "t": 0.9}"#, "`t`: has no effect with the method `h2o` | leave this key out"),
            (r#"{"method": "h2o", "pool_kernel": 5}"#, "`pool_kernel`: has no effect with the method `h2o`"),
            (r#"{"seed": 5}"#, "`seed`: has no effect with the method `fastgen`"),
            (r#"{"method": "snapkv", "sink_tokens": 4}"#, "`sink_tokens`: has no effect with the method `snapkv`"),
            (r#"{"method": "snapkv", "pool_kernel": 4}"#, "`pool_kernel`: expected an odd whole number, got `4`"),
            (r#"{"method": "snapkv", "observation_window": 0}"#, "expected a whole number of at least 1, got `0`"),
            (r#"{"method": "random", "seed": -1}"#, "`seed`: expected a whole number of at least 0, got `-1`"),
            (r#"{"sink_tokens": -1}"#, "expected a whole number of at least 0, got `-1`"),
            (r#"{"decode": "keep"}"#, "`decode`: expected \"append\" or \"evict\", got `\"keep\"`"),
            (
                r#"{"decode": "evict", "method": "snapkv"}"#,
                "`decode`: the method `snapkv` does not evict while decoding (\"evict\"); those that do: `fastgen`, \
                 `streaming_llm`, `h2o`, `tova` | set `decode` to \"append\"",
            ),
            (r#"{"special_token_ids": [1.5]}"#, "expected \"auto\" or a list of token ids"),
            ("[]", "`c.json` is not usable: not a JSON object"),
            ("{", "`c.json` is not usable: not a JSON object"),
        ] {
            assert!(message(text).contains(expected), "{text}: {}", message(text));
        }
    }

    #[test]
    fn the_last_level_is_full_alone() {
        let order = SearchOrder::default();
        assert_eq!(order.level_names(0), ["special"]);
        assert_eq!(order.level_names(2), ["special", "punctuation", "frequency"]);
        assert_eq!(order.level_names(4), ["full"]);
    }
}
