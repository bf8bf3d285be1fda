//! The configuration of the adaptive cache: a JSON file, checked key by key.
//!
//! Both this program's keys and those of the original `PyTorch` program are accepted, so that the original's file loads
//! unchanged. A mistake is an error that names the key and the file; nothing is ignored.
//!
//! Not for: options of a single run, such as the prompt or sampling.

use std::path::Path;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::policy::{self, POLICIES, Policy, PolicySettings};

/// How it is decided that a keep-set recovers a head (see [`crate::profile`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// The original's: the largest difference between the full attention map and the softmax over kept keys alone.
    MaxAbs,
    /// The paper's (section 4.1): the share of attention that the kept positions hold.
    Mass,
}

/// How the recovered masses of the query heads that share a KV head become one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupReduction {
    /// The smallest: every query head must be recovered.
    Min,
    /// The mean.
    Mean,
}

/// Which query rows of the prompt count for the recovered mass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileRows {
    /// All rows (the paper).
    All,
    /// The last `n` rows, an observation window; `n >= 1`.
    Last(usize),
}

impl ProfileRows {
    /// How many rows of a prompt of `prompt_len` tokens are profiled.
    #[must_use]
    pub fn count(self, prompt_len: usize) -> usize {
        match self {
            Self::All => prompt_len,
            Self::Last(rows) => rows.min(prompt_len),
        }
    }
}

impl Serialize for ProfileRows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("all"),
            Self::Last(rows) => serializer.serialize_u64(*rows as u64),
        }
    }
}

/// What happens to the cache while tokens are generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeMode {
    /// Every new token is kept by every head (the original).
    Append,
}

/// Token ids that a configuration lists, or leaves to the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenIds {
    /// Taken from the loaded tokenizer.
    Auto,
    /// Listed. Negative ids (the original's file has -1) never match and are dropped.
    List(Vec<u32>),
}

impl Serialize for TokenIds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::List(ids) => ids.serialize(serializer),
        }
    }
}

/// The search order: each level is the union of the policies up to it; the last keeps everything.
#[derive(Debug, Clone)]
pub struct SearchOrder(Vec<&'static dyn Policy>);

impl SearchOrder {
    /// The policies, in the order in which the search adds them; the last is `full`.
    #[must_use]
    pub fn policies(&self) -> &[&'static dyn Policy] {
        &self.0
    }

    /// The policies that make up level `level`: the first `level + 1`, or `full` alone at the last level.
    #[must_use]
    pub fn level(&self, level: usize) -> &[&'static dyn Policy] {
        let end = (level + 1).min(self.0.len());
        if end == self.0.len() { &self.0[end - 1..] } else { &self.0[..end] }
    }

    /// How many levels there are, `full` included; at least 1.
    #[must_use]
    pub fn num_levels(&self) -> usize {
        self.0.len()
    }

    /// The names of the policies of a level, as logs and reports give them.
    #[must_use]
    pub fn level_names(&self, level: usize) -> Vec<&'static str> {
        self.level(level).iter().map(|policy| policy.name()).collect()
    }

    /// Checks names against the registry: known, no repetition, `full` last and only last.
    fn from_names(names: &[String]) -> std::result::Result<Self, String> {
        let mut order: Vec<&'static dyn Policy> = Vec::new();
        for name in names {
            let policy = policy::by_name(name).ok_or_else(|| {
                let known: Vec<_> = POLICIES.iter().map(|policy| format!("`{}`", policy.name())).collect();
                format!("unknown policy `{name}`, expected some of {}", known.join(", "))
            })?;
            if order.iter().any(|earlier| earlier.name() == policy.name()) {
                return Err(format!("policy `{name}` is listed twice"));
            }
            if order.last().is_some_and(|earlier| earlier.keeps_all()) {
                return Err(format!("policy `{name}` comes after `full`, which ends the search"));
            }
            order.push(policy);
        }
        match order.last() {
            Some(last) if last.keeps_all() => Ok(Self(order)),
            _ => Err("expected a list that ends in `full`".to_owned()),
        }
    }
}

impl Default for SearchOrder {
    fn default() -> Self {
        Self(POLICIES.to_vec())
    }
}

impl PartialEq for SearchOrder {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().map(|policy| policy.name()).eq(other.0.iter().map(|policy| policy.name()))
    }
}

impl Serialize for SearchOrder {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|policy| policy.name()))
    }
}

/// Everything that decides what an adaptive cache keeps. Serialises with every default spelt out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdaptiveConfig {
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
    /// How many leading positions `special` keeps; default 1.
    pub sink_tokens: usize,
    /// What happens while decoding.
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
            criterion: Criterion::MaxAbs,
            recovery_threshold: 0.95,
            frequency_ratio: 0.8,
            locality_ratio: 0.8,
            policies: SearchOrder::default(),
            gqa: GroupReduction::Min,
            profile_rows: ProfileRows::All,
            sink_tokens: 1,
            decode: DecodeMode::Append,
            special_token_ids: TokenIds::Auto,
            punctuation_list:
                r#", . ! ? ; : ( ) " ' - / \ @ # $ % ^ & * + = ~ ` < > [ ] { }"#.split(' ').map(str::to_owned).collect(),
            punctuation_token_ids: TokenIds::Auto,
        }
    }
}

/// Canonical key, and the original program's name for it where there is one.
const KEYS: &[(&str, Option<&str>)] = &[
    ("criterion", None),
    ("recovery_threshold", Some("t")),
    ("frequency_ratio", Some("top_p_frequency")),
    ("locality_ratio", Some("locality_length")),
    ("policies", None),
    ("gqa", None),
    ("profile_rows", None),
    ("sink_tokens", None),
    ("decode", None),
    ("special_token_ids", None),
    ("punctuation_list", None),
    ("punctuation_token_ids", None),
];

/// A setting that cannot be used: the reason and perhaps a remedy.
struct Reject {
    reason: String,
    hint: Option<String>,
}

impl From<String> for Reject {
    fn from(reason: String) -> Self {
        Self { reason, hint: None }
    }
}

impl AdaptiveConfig {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::BadFile`] if it is not a JSON object; [`Error::Config`], with
    /// the key and the path, for an unknown key, a key given twice (also in both spellings), or a value out of range.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
        Self::parse(&text, Some(path))
    }

    /// Reads a configuration from JSON text; `path` is for messages only.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn parse(text: &str, path: Option<&Path>) -> Result<Self> {
        let text = text.trim_start_matches('\u{feff}'); // some editors put a byte-order mark first
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

    fn set(&mut self, key: &'static str, value: &Value) -> std::result::Result<(), Reject> {
        match key {
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
                if value.as_str() == Some("evict") {
                    return Err(Reject {
                        reason: "eviction while decoding (`evict`) is not supported yet".to_owned(),
                        hint: Some("set `decode` to \"append\": the prompt is compressed, new tokens are kept".into()),
                    });
                }
                self.decode = choice(value, &[("append", DecodeMode::Append)])?;
            }
            "special_token_ids" => self.special_token_ids = token_ids(value)?,
            "punctuation_list" => self.punctuation_list = strings(value)?,
            "punctuation_token_ids" => self.punctuation_token_ids = token_ids(value)?,
            _ => return Err(unknown_key(key)),
        }
        Ok(())
    }

    /// Refuses settings that would have no effect with the chosen criterion.
    fn check_combination(&self, given: &[(&'static str, String)]) -> std::result::Result<(), (String, Reject)> {
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

fn canonical_key(key: &str) -> Option<&'static str> {
    KEYS.iter()
        .find(|(canonical, original)| *canonical == key || *original == Some(key))
        .map(|(canonical, _)| *canonical)
}

fn unknown_key(key: &str) -> Reject {
    let known = KEYS.iter().flat_map(|(canonical, original)| std::iter::once(*canonical).chain(*original));
    let nearest = known.min_by_key(|known| strsim::damerau_levenshtein(known, key));
    Reject { reason: "unknown key".to_owned(), hint: nearest.map(|nearest| format!("did you mean `{nearest}`?")) }
}

fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> std::result::Result<T, Reject> {
    choices.iter().find(|(name, _)| value.as_str() == Some(name)).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        format!("expected {}, got `{value}`", names.join(" or ")).into()
    })
}

fn ratio(value: &Value) -> std::result::Result<f64, Reject> {
    value
        .as_f64()
        .filter(|ratio| (0.0..=1.0).contains(ratio))
        .ok_or_else(|| format!("expected a number in 0..=1, got `{value}`").into())
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

fn strings(value: &Value) -> std::result::Result<Vec<String>, Reject> {
    value
        .as_array()
        .and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect())
        .ok_or_else(|| format!("expected a list of strings, got `{value}`").into())
}

fn token_ids(value: &Value) -> std::result::Result<TokenIds, Reject> {
    if value.as_str() == Some("auto") {
        return Ok(TokenIds::Auto);
    }
    let ids: Option<Vec<i64>> = value.as_array().and_then(|items| items.iter().map(Value::as_i64).collect());
    let ids = ids.ok_or_else(|| format!("expected \"auto\" or a list of token ids, got `{value}`"))?;
    if let Some(id) = ids.iter().find(|&&id| id > i64::from(u32::MAX)) {
        return Err(format!("token id `{id}` is larger than any vocabulary").into());
    }
    Ok(TokenIds::List(ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()))
}

/// A JSON object as written: keys in order, repetitions included.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
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
        assert!(KEYS.iter().all(|(key, _)| written.contains(&format!("\"{key}\":"))), "{written}");
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
            (r#"{"sink_tokens": -1}"#, "expected a whole number of at least 0, got `-1`"),
            (r#"{"decode": "evict"}"#, "not supported yet | set `decode` to \"append\""),
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
