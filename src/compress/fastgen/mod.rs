//! FastGen: for each head the smallest union of policies that recovers its attention (paper, section 3).
//!
//! Its settings are here; [`policies`] has one file for each policy, [`search`] tries their unions in order.
//!
//! Not for: methods that keep as much as a budget says (see [`super::budget`]).

pub mod policies;
pub mod search;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::section::Reject;
use super::values;
use policies::{POLICIES, Policy, by_name};

/// The name of the method in configurations.
pub const FASTGEN: &str = "fastgen";

/// Settings of the search. The original program's keys for some of them are read, too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FastGen {
    /// When a keep-set is good enough for a head; default `max_abs`.
    #[serde(deserialize_with = "values::choice")]
    pub criterion: Criterion,
    /// The recovery threshold T, in 0..=1; default 0.95.
    #[serde(alias = "t", deserialize_with = "values::ratio")]
    pub recovery_threshold: f64,
    /// `r_f`, in 0..=1: the share of the prompt that `frequency` keeps; default 0.8.
    #[serde(alias = "top_p_frequency", deserialize_with = "values::ratio")]
    pub frequency_ratio: f64,
    /// `r_l`, in 0..=1: the share of the prompt that `locality` keeps; default 0.8.
    #[serde(alias = "locality_length", deserialize_with = "values::ratio")]
    pub locality_ratio: f64,
    /// The search order; default: the registry's.
    pub policies: SearchOrder,
    /// How the query heads of a KV head are summed up; `mass` only.
    #[serde(deserialize_with = "values::choice")]
    pub gqa: GroupReduction,
    /// Which query rows are profiled; `mass` only.
    pub profile_rows: ProfileRows,
    /// How many leading positions `special` keeps whatever their token is; default 1.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
    /// Which ids are special.
    pub special_token_ids: TokenIds,
    /// The characters that make a token punctuation, when its ids are left to the tokenizer; default: the original's 30.
    #[serde(deserialize_with = "values::strings")]
    pub punctuation_list: Vec<String>,
    /// Which ids are punctuation.
    pub punctuation_token_ids: TokenIds,
}

impl Default for FastGen {
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
            special_token_ids: TokenIds::Auto,
            punctuation_list:
                r#", . ! ? ; : ( ) " ' - / \ @ # $ % ^ & * + = ~ ` < > [ ] { }"#.split(' ').map(str::to_owned).collect(),
            punctuation_token_ids: TokenIds::Auto,
        }
    }
}

impl FastGen {
    /// Refuses a setting that would have no effect.
    pub(super) fn check(&self) -> Result<(), Reject> {
        let key = match self {
            Self { criterion: Criterion::Mass, .. } => return Ok(()),
            Self { gqa: GroupReduction::Mean, .. } => "gqa",
            Self { profile_rows: ProfileRows::Last(_), .. } => "profile_rows",
            _ => return Ok(()),
        };
        Err(Reject::new(key, "has no effect with the criterion `max_abs`")
            .with_hint("set `criterion` to \"mass\", or leave this key out"))
    }
}

/// How it is decided that a keep-set recovers a head (see [`search`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// The original's: the largest difference between the full attention map and the softmax over kept keys alone.
    MaxAbs,
    /// The paper's (section 4.1): the share of attention that the kept positions hold.
    Mass,
}

/// How the recovered masses of the query heads that share a KV head become one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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

impl<'de> Deserialize<'de> for ProfileRows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(values::positive_or_all(deserializer)?.map_or(Self::All, Self::Last))
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

/// Token ids that a configuration lists, or leaves to the tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenIds {
    /// Taken from the loaded tokenizer.
    Auto,
    /// Listed. Negative ids (the original's file has -1) never match and are dropped.
    List(Vec<u32>),
}

impl<'de> Deserialize<'de> for TokenIds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(values::token_ids(deserializer)?.map_or(Self::Auto, Self::List))
    }
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
    fn from_names(names: &[String]) -> Result<Self, String> {
        let mut order: Vec<&'static dyn Policy> = Vec::new();
        for name in names {
            let policy = by_name(name).ok_or_else(|| {
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

impl<'de> Deserialize<'de> for SearchOrder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_names(&values::strings(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl Serialize for SearchOrder {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|policy| policy.name()))
    }
}
