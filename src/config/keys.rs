//! The keys of a configuration file, and how their values are read: each by a function that says what was expected.

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::TokenIds;

/// Canonical key, and the original program's name for it where there is one.
pub(super) const KEYS: &[(&str, Option<&str>)] = &[
    ("method", None),
    ("kept_ratio", None),
    ("kv_budget", None),
    ("observation_window", None),
    ("pool_kernel", None),
    ("seed", None),
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

/// Keys that every method reads.
pub(super) const COMMON_KEYS: &[&str] = &["method", "decode"];

/// Keys that `fastgen` reads, besides the common ones.
pub(super) const FASTGEN_KEYS: &[&str] = &[
    "criterion",
    "recovery_threshold",
    "frequency_ratio",
    "locality_ratio",
    "policies",
    "gqa",
    "profile_rows",
    "sink_tokens",
    "special_token_ids",
    "punctuation_list",
    "punctuation_token_ids",
];

/// A setting that cannot be used: the reason and perhaps a remedy.
pub(super) struct Reject {
    pub(super) reason: String,
    pub(super) hint: Option<String>,
}

impl From<String> for Reject {
    fn from(reason: String) -> Self {
        Self { reason, hint: None }
    }
}

pub(super) fn canonical_key(key: &str) -> Option<&'static str> {
    KEYS.iter()
        .find(|(canonical, original)| *canonical == key || *original == Some(key))
        .map(|(canonical, _)| *canonical)
}

pub(super) fn unknown_key(key: &str) -> Reject {
    let known = KEYS.iter().flat_map(|(canonical, original)| std::iter::once(*canonical).chain(*original));
    let nearest = known.min_by_key(|known| strsim::damerau_levenshtein(known, key));
    Reject { reason: "unknown key".to_owned(), hint: nearest.map(|nearest| format!("did you mean `{nearest}`?")) }
}

pub(super) fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> std::result::Result<T, Reject> {
    choices.iter().find(|(name, _)| value.as_str() == Some(name)).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        format!("expected {}, got `{value}`", names.join(" or ")).into()
    })
}

pub(super) fn ratio(value: &Value) -> std::result::Result<f64, Reject> {
    value
        .as_f64()
        .filter(|ratio| (0.0..=1.0).contains(ratio))
        .ok_or_else(|| format!("expected a number in 0..=1, got `{value}`").into())
}

pub(super) fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

pub(super) fn positive(value: &Value) -> std::result::Result<usize, Reject> {
    whole(value)
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("expected a whole number of at least 1, got `{value}`").into())
}

pub(super) fn strings(value: &Value) -> std::result::Result<Vec<String>, Reject> {
    value
        .as_array()
        .and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect())
        .ok_or_else(|| format!("expected a list of strings, got `{value}`").into())
}

pub(super) fn token_ids(value: &Value) -> std::result::Result<TokenIds, Reject> {
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
pub(super) struct Pairs(pub(super) Vec<(String, Value)>);

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
