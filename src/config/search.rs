//! Settings of the search for what each head needs (`fastgen`), and of what happens while decoding.

use serde::{Serialize, Serializer};

use crate::policy::{self, POLICIES, Policy};

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
    /// Heads go on evicting, the newest tokens included; see [`Eviction`](crate::profile::Eviction). For `fastgen`, and
    /// for the methods that [say how](crate::policy::Method::eviction).
    Evict,
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
    pub(super) fn from_names(names: &[String]) -> std::result::Result<Self, String> {
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
