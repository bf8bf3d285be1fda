//! The configuration of the adaptive cache: a JSON file, checked key by key.
//!
//! Both this program's keys and those of the original `PyTorch` program are accepted, so that the original's file loads
//! unchanged. A mistake is an error that names the key and the file; nothing is ignored.
//!
//! Not for: options of a single run, such as the prompt or sampling.

use std::path::Path;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::policy::{self, METHODS, Method, MethodSettings, POLICIES, Policy, PolicySettings, method_by_name};

/// The method that searches policies for each head and has no budget; the default.
pub const FASTGEN: &str = "fastgen";

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
    /// for the methods that [say how](Method::eviction).
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

/// How much a method keeps of each segment that it decides about: of a prompt, or of a further prompt together with what
/// was generated since the one before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// This share of the segment, in 0..=1, for every head on average.
    KeptRatio(f64),
    /// Bytes of kept keys and values of the segment, all layers together, in the cache's own format; at least 1.
    Bytes(usize),
}

/// The cache that a [`Budget`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetScale {
    /// Layers of the model.
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_kv_heads: usize,
    /// Bytes of one stored key and its value.
    pub token_bytes: usize,
}

impl Budget {
    /// How many of `len` positions a head keeps on average: the share of them, not rounded; or the whole positions that
    /// the head's equal part of the layer's equal part of the bytes has room for. At least 1, whatever the budget, unless
    /// `len` is 0: a head that keeps nothing has nothing to attend to.
    ///
    /// Where all heads keep the same, that is this number rounded down, as [`ratio_count`](crate::policy::ratio_count)
    /// does.
    #[must_use]
    #[expect(clippy::cast_precision_loss)] // counts of tokens
    pub fn average(self, len: usize, scale: BudgetScale) -> f64 {
        let average = match self {
            Self::KeptRatio(ratio) => ratio * len as f64,
            Self::Bytes(bytes) => {
                let layer_bytes = bytes / scale.num_layers.max(1);
                (layer_bytes / (scale.num_kv_heads * scale.token_bytes).max(1)) as f64
            }
        };
        average.clamp(1.min(len) as f64, len as f64)
    }

    /// How many positions all heads of all layers keep together, where one list decides about all: the share of all of
    /// them, or what the bytes have room for, rounded down; at least one for each head.
    #[must_use]
    pub fn total(self, len: usize, scale: BudgetScale) -> usize {
        let heads = scale.num_layers * scale.num_kv_heads;
        let total = match self {
            Self::KeptRatio(ratio) => policy::ratio_count(ratio, len * heads),
            Self::Bytes(bytes) => bytes / scale.token_bytes.max(1),
        };
        total.clamp(heads.min(len * heads), len * heads)
    }

    /// The key that sets it.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::KeptRatio(_) => "kept_ratio",
            Self::Bytes(_) => "kv_budget",
        }
    }
}

impl Default for Budget {
    /// Half of everything.
    fn default() -> Self {
        Self::KeptRatio(0.5)
    }
}

/// A size in bytes, as a person writes it: a number, and KB, MB (the default) or GB, in powers of 1024, or B for bytes.
///
/// # Errors
/// What was expected, if it is anything else, or less than a byte.
pub fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let text = text.trim();
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let unit = match text[end..].to_ascii_uppercase().as_str() {
        "B" => 1u64,
        "" | "MB" | "M" | "MIB" => 1 << 20,
        "KB" | "K" | "KIB" => 1 << 10,
        "GB" | "G" | "GIB" => 1 << 30,
        _ => 0,
    };
    let number: Option<f64> = text[..end].trim().parse().ok();
    #[expect(clippy::cast_precision_loss)]
    let bytes = number.filter(|number| number.is_finite() && *number > 0.0).map(|number| number * unit as f64);
    match bytes {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Some(bytes) if (1.0..1e15).contains(&bytes) => Ok(bytes as usize),
        _ => Err("expected a size such as 64MB, 512KB or 1.5GB".to_owned()),
    }
}

/// A method with a budget, and how large that is.
#[derive(Debug, Clone, Copy)]
pub struct BudgetedMethod {
    /// One of [`METHODS`].
    pub method: &'static dyn Method,
    /// How much it keeps.
    pub budget: Budget,
}

impl PartialEq for BudgetedMethod {
    fn eq(&self, other: &Self) -> bool {
        self.method.name() == other.method.name() && self.budget == other.budget
    }
}

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

/// Canonical key, and the original program's name for it where there is one.
const KEYS: &[(&str, Option<&str>)] = &[
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
const COMMON_KEYS: &[&str] = &["method", "decode"];

/// Keys that `fastgen` reads, besides the common ones.
const FASTGEN_KEYS: &[&str] = &[
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

fn positive(value: &Value) -> std::result::Result<usize, Reject> {
    whole(value)
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("expected a whole number of at least 1, got `{value}`").into())
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
        let snapkv = || AdaptiveConfig::for_method(&policy::methods::SnapKv);
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
