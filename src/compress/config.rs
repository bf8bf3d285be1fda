//! The configuration of the adaptive cache: a JSON file, checked key by key.
//!
//! The file is one flat object. Some of its keys are for every method and declared here; the others are fields of what the
//! method is: of [`FastGen`], or of a [`Budget`] and of the method's own type. Both this program's keys and those of the
//! original `PyTorch` program are accepted, so that the original's file loads unchanged. A mistake is an error that names
//! the key and the file; nothing is ignored.
//!
//! Not for: options of a single run, such as the prompt or sampling.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::ser::{Error as _, SerializeMap};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::budget::allocation::Allocation;
use super::budget::methods::{METHODS, Method, StepAttention};
use super::budget::profile::{HeadPrior, HeadProfile};
use super::budget::{Budget, BudgetOver, BudgetedMethod};
use super::fastgen::{FASTGEN, FastGen};
use super::section::{Reject, Section, keys};
use super::values;
use crate::error::{Error, Result};
use crate::json::strict_json;
use crate::reading;

/// Most bytes of a configuration file; real ones have less than a thousand.
const MAX_BYTES: u64 = 1 << 20;

/// Everything that decides what an adaptive cache keeps. Serialises as a file that reads back as itself: every key that
/// has an effect, every default spelt out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdaptiveConfig {
    /// How it is decided what a head keeps of a prompt.
    pub method: Compression,
    /// What happens while decoding; default append.
    pub decode: DecodeMode,
    /// Whether the values of what is kept of a prompt are fitted to what its queries read before the rest went, see
    /// [`refit`](crate::attention::refit); default no.
    pub refit: bool,
}

/// The kinds of methods.
#[derive(Debug, Clone, PartialEq)]
pub enum Compression {
    /// A search for what recovers each head; the default.
    FastGen(FastGen),
    /// Scores, of which a budget keeps the best.
    Budgeted(BudgetedMethod),
}

impl Default for Compression {
    fn default() -> Self {
        Self::FastGen(FastGen::default())
    }
}

/// What happens to the cache while tokens are generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeMode {
    /// Every new token is kept by every head (the original).
    #[default]
    Append,
    /// Heads go on evicting, the newest tokens included; see [`Eviction`](super::Eviction). For `fastgen`, and for the
    /// methods that [say how](Method::eviction).
    Evict,
}

/// The keys that every method has.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Common {
    method: Value,
    #[serde(deserialize_with = "values::choice")]
    decode: DecodeMode,
    #[serde(deserialize_with = "values::flag")]
    refit: bool,
}

/// The keys that every method with a budget has, beside the [`Budget`] itself.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Sharing {
    #[serde(deserialize_with = "values::choice")]
    budget_over: BudgetOver,
    /// Relative to the configuration's folder.
    #[serde(deserialize_with = "values::path")]
    head_profile: Option<PathBuf>,
    #[serde(deserialize_with = "values::some_ratio")]
    head_profile_weight: Option<f64>,
}

impl Sharing {
    /// Reads the profile, if one is named.
    ///
    /// * `folder`: that its path is relative to
    fn prior(&self, method: &dyn Method, folder: &Path) -> std::result::Result<Option<HeadPrior>, Reject> {
        let Some(path) = &self.head_profile else {
            let unread = |_| {
                Reject::new(HeadPrior::WEIGHT_KEY, format!("has no effect without `{}`", HeadPrior::KEY))
                    .with_hint("leave this key out, or name a profile")
            };
            return self.head_profile_weight.map(unread).map_or(Ok(None), Err);
        };
        expect_competition(method, self.budget_over)?;
        // A copy of the configuration in another folder must find it, too.
        let path =
            std::path::absolute(folder.join(path)).map_err(|error| Reject::new(HeadPrior::KEY, error.to_string()))?;
        let profile = HeadProfile::from_file(&path).map_err(|error| Reject::from_error(HeadPrior::KEY, &error))?;
        if profile.method != method.name() {
            let reason = format!("`{}` was measured with the method `{}`", path.display(), profile.method);
            return Err(Reject::new(HeadPrior::KEY, reason).with_hint("measure this one with `tune --profile FILE`"));
        }
        let weight = self.head_profile_weight.unwrap_or(HeadPrior::DEFAULT_WEIGHT);
        Ok(Some(HeadPrior::new(Arc::new(profile), path, weight)))
    }
}

impl Default for Common {
    fn default() -> Self {
        Self { method: FASTGEN.into(), decode: DecodeMode::default(), refit: false }
    }
}

impl From<FastGen> for AdaptiveConfig {
    fn from(search: FastGen) -> Self {
        Self { method: Compression::FastGen(search), ..Self::default() }
    }
}

impl AdaptiveConfig {
    /// A method, with its settings as they are and a budget of half of everything.
    #[must_use]
    pub fn for_method(method: &dyn Method) -> Self {
        let (method, budget) = (method.to_arc(), Budget::default());
        let method = BudgetedMethod { method, budget, over: BudgetOver::Own, prior: None };
        Self { method: Compression::Budgeted(method), ..Self::default() }
    }

    /// Sets how much is kept.
    ///
    /// # Errors
    /// [`Error::Config`], with a hint, for `fastgen`, which has no budget, and for a budget out of range.
    pub fn with_budget(mut self, budget: Budget) -> Result<Self> {
        let key = budget.key();
        let reject = match (&mut self.method, budget) {
            (Compression::FastGen(_), _) => no_budget(key),
            (_, Budget::KeptRatio(ratio)) if !(0.0..=1.0).contains(&ratio) => {
                Reject::new(key, format!("expected a number in 0..=1, got `{ratio}`"))
            }
            (_, Budget::Bytes(0)) => Reject::new(key, "expected at least one byte"),
            (Compression::Budgeted(method), _) => {
                method.budget = budget;
                return Ok(self);
            }
        };
        Err(reject.into_error(None))
    }

    /// Sets whose positions compete for the budget.
    ///
    /// # Errors
    /// [`Error::Config`], with a hint, for `fastgen`, which has no budget, and for a method that has nothing to choose
    /// then.
    pub fn with_budget_over(mut self, over: BudgetOver) -> Result<Self> {
        let Compression::Budgeted(method) = &mut self.method else {
            return Err(no_budget(BudgetOver::KEY).into_error(None));
        };
        expect_choice(&*method.method, over)
            .and_then(|()| method.prior.iter().try_for_each(|_| expect_competition(&*method.method, over)))
            .map_err(|reject| reject.into_error(None))?;
        method.over = over;
        Ok(self)
    }

    /// The search, if that is the method.
    #[must_use]
    pub fn fastgen(&self) -> Option<&FastGen> {
        match &self.method {
            Compression::FastGen(search) => Some(search),
            Compression::Budgeted(_) => None,
        }
    }

    /// The method with a budget, if it is one.
    #[must_use]
    pub fn budgeted(&self) -> Option<&BudgetedMethod> {
        match &self.method {
            Compression::FastGen(_) => None,
            Compression::Budgeted(method) => Some(method),
        }
    }

    /// Whether what a sequence holds is judged together with what comes, so that all of it stays within a number of bytes.
    /// Heads that [go on evicting](DecodeMode::Evict) hold what the first prompt left them.
    #[must_use]
    pub fn rejudges(&self) -> bool {
        matches!(self.budget(), Some(Budget::Bytes(_))) && self.decode == DecodeMode::Append
    }

    /// How much is kept, if the method has a budget.
    #[must_use]
    pub fn budget(&self) -> Option<Budget> {
        self.budgeted().map(|method| method.budget)
    }

    /// The name of the method: [`FASTGEN`] or that of one of [`METHODS`].
    #[must_use]
    pub fn method_name(&self) -> &'static str {
        self.budgeted().map_or(FASTGEN, |method| method.method.name())
    }

    /// How many levels a head can end up at: those of the search; or for a method, that of the method, and `full`.
    #[must_use]
    pub fn num_levels(&self) -> usize {
        self.fastgen().map_or(2, |search| search.policies.num_levels())
    }

    /// What logs and reports say of a head at a level: the names of the search's policies, or of the method. `full`
    /// alone at the last level.
    #[must_use]
    pub fn level_names(&self, level: usize) -> Vec<&'static str> {
        match &self.method {
            Compression::FastGen(search) => search.policies.level_names(level),
            Compression::Budgeted(_) if level > 0 => vec!["full"],
            Compression::Budgeted(_) => vec![self.method_name()],
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
        Self::parse_with(text, path, METHODS)
    }

    /// Reads a configuration that may name methods of a program's own.
    ///
    /// * `methods`: that it may name beside `fastgen`, such as `[METHODS, &[&MyMethod]].concat()`
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn parse_with(text: &str, path: Option<&Path>, methods: &[&dyn Method]) -> Result<Self> {
        let bad = |reason: String| Error::bad_file(path.unwrap_or(Path::new("<configuration>")), reason);
        let value = strict_json(text).map_err(|error| bad(format!("not a JSON object: {error}")))?;
        let object = value.as_object().ok_or_else(|| bad("not a JSON object".to_owned()))?;
        let folder = path.and_then(Path::parent).unwrap_or(Path::new(""));
        Self::from_object(object, methods, folder).map_err(|reject| reject.into_error(path))
    }

    /// * `folder`: that paths are relative to
    fn from_object(
        object: &Map<String, Value>,
        methods: &[&dyn Method],
        folder: &Path,
    ) -> std::result::Result<Self, Reject> {
        let section = |keys: &[&str]| Section::new(object, keys);
        let common = section(keys::<Common>()).read(|section| Common::deserialize(section))?;
        let method = methods.iter().find(|method| common.method == method.name());
        if method.is_none() && common.method != FASTGEN {
            let known = std::iter::once(FASTGEN).chain(methods.iter().map(|method| method.name()));
            let known: Vec<_> = known.map(|name| format!("`{name}`")).collect();
            let reason = format!("unknown method {}, expected one of {}", common.method, known.join(", "));
            return Err(Reject::new("method", reason));
        }
        let (settings, budget) = match method {
            None => (keys::<FastGen>(), &[][..]),
            Some(method) => (method.keys(), keys::<Budget>()),
        };
        let sharing = if method.is_some() { keys::<Sharing>() } else { &[] };
        let read = [keys::<Common>(), settings, budget, sharing].concat();
        if let Some(key) = object.keys().find(|key| !read.contains(&&***key)) {
            return Err(unread(key, method.map_or(FASTGEN, |method| method.name()), methods));
        }
        let settings = section(settings);
        let method = match method {
            None => {
                let search = settings.read(|section| FastGen::deserialize(section))?;
                search.check()?;
                Compression::FastGen(search)
            }
            Some(method) => {
                let budget = section(budget);
                let mut given = budget.keys();
                let budget = match (given.next(), given.next()) {
                    (None, _) => Budget::default(),
                    (Some(_), None) => budget.read(|section| Budget::deserialize(section))?,
                    (Some(first), Some(second)) => {
                        let reason = format!("given beside `{first}`: a method has one budget");
                        return Err(Reject::new(second, reason).with_hint("keep one of them"));
                    }
                };
                let method = settings.read(|section| method.read(section))?;
                if common.decode == DecodeMode::Evict && method.eviction().is_none() {
                    return Err(no_eviction(&*method, methods));
                }
                let sharing = section(sharing).read(|section| Sharing::deserialize(section))?;
                let over = sharing.budget_over;
                expect_choice(&*method, over)?;
                if common.decode == DecodeMode::Evict {
                    expect_same_rows(&*method, over)?;
                }
                let prior = sharing.prior(&*method, folder)?;
                Compression::Budgeted(BudgetedMethod { method, budget, over, prior })
            }
        };
        Ok(Self { method, decode: common.decode, refit: common.refit })
    }
}

impl Serialize for AdaptiveConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let common =
            serde_json::to_value(Common { method: self.method_name().into(), decode: self.decode, refit: self.refit });
        let settings = match &self.method {
            Compression::FastGen(search) => serde_json::to_value(search),
            Compression::Budgeted(method) => method.method.settings(),
        };
        let mut map = serializer.serialize_map(None)?;
        let [common, settings] = [common.map_err(S::Error::custom)?, settings.map_err(S::Error::custom)?];
        for (key, value) in common.as_object().into_iter().chain(settings.as_object()).flatten() {
            map.serialize_entry(key, value)?;
        }
        match self.budget() {
            Some(budget @ Budget::KeptRatio(ratio)) => map.serialize_entry(budget.key(), &ratio)?,
            Some(budget @ Budget::Bytes(bytes)) => map.serialize_entry(budget.key(), &format!("{bytes}B"))?,
            None => {}
        }
        if let Some(method) = self.budgeted() {
            map.serialize_entry(BudgetOver::KEY, &method.over)?;
            if let Some(prior) = &method.prior {
                map.serialize_entry(HeadPrior::KEY, prior.path())?;
                map.serialize_entry(HeadPrior::WEIGHT_KEY, &prior.weight())?;
            }
        }
        map.end()
    }
}

/// A key that the method does not have.
fn unread(key: &str, method: &str, methods: &[&dyn Method]) -> Reject {
    let budget = [keys::<Budget>(), keys::<Sharing>()].concat();
    if method == FASTGEN && budget.contains(&key) {
        return no_budget(key);
    }
    let own = methods.iter().flat_map(|method| method.keys());
    let known: Vec<_> = [keys::<Common>(), keys::<FastGen>(), &budget].into_iter().flatten().chain(own).collect();
    if known.contains(&&key) {
        return Reject::new(key, format!("has no effect with the method `{method}`")).with_hint("leave this key out");
    }
    let reject = Reject::new(key, "unknown key");
    match known.into_iter().min_by_key(|known| strsim::damerau_levenshtein(known, key)) {
        Some(nearest) => reject.with_hint(format!("did you mean `{nearest}`?")),
        None => reject,
    }
}

fn no_budget(key: &str) -> Reject {
    Reject::new(key, format!("the method `{FASTGEN}` has no budget"))
        .with_hint("set `recovery_threshold` instead, or choose another `method`")
}

/// Refuses to let positions compete where a method has nothing to choose then.
fn expect_choice(method: &dyn Method, over: BudgetOver) -> std::result::Result<(), Reject> {
    match method.refuses(over) {
        None => Ok(()),
        Some(reason) => {
            let reason = format!("the method `{}` {reason}", method.name());
            Err(Reject::new(BudgetOver::KEY, reason).with_hint("choose another one, or leave the key out"))
        }
    }
}

/// Refuses to let heads keep different positions where the attention of all of them together tells what goes.
fn expect_same_rows(method: &dyn Method, over: BudgetOver) -> std::result::Result<(), Reject> {
    let is_of_all = method.eviction().is_some_and(|rows| rows.attention() == StepAttention::Newest);
    if !is_of_all || over.allocation(method) == Allocation::Uniform {
        return Ok(());
    }
    let reason =
        format!("the method `{}` evicts the same positions of all heads of a layer (\"evict\")", method.name());
    Err(Reject::new(BudgetOver::KEY, reason).with_hint("set it to \"head\", or `decode` to \"append\""))
}

/// Refuses a profile of heads where they do not compete.
fn expect_competition(method: &dyn Method, over: BudgetOver) -> std::result::Result<(), Reject> {
    if over.allocation(method).lets_heads_compete() {
        return Ok(());
    }
    let reason = "has no effect where heads do not compete for a budget";
    Err(Reject::new(HeadPrior::KEY, reason).with_hint("set `budget_over` to \"pool\" or \"layer\""))
}

/// A method that does not say what it evicts while decoding.
fn no_eviction(method: &dyn Method, methods: &[&dyn Method]) -> Reject {
    let evicting = methods.iter().filter(|method| method.eviction().is_some()).map(|method| method.name());
    let evicting: Vec<_> = std::iter::once(FASTGEN).chain(evicting).map(|name| format!("`{name}`")).collect();
    let reason = format!(
        "the method `{}` does not evict while decoding (\"evict\"); those that do: {}",
        method.name(),
        evicting.join(", ")
    );
    Reject::new("decode", reason).with_hint("set `decode` to \"append\": the prompt is compressed, new tokens are kept")
}

#[cfg(test)]
mod tests;
