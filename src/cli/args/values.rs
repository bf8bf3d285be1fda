//! Numbers of options, within their ranges; what is wrong with others, as clap prints it.

use std::str::FromStr;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::BudgetOver;
use clap::builder::{PossibleValuesParser, TypedValueParser};

fn number<T: FromStr + Into<f64> + Copy>(text: &str, accept: impl Fn(f64) -> bool, what: &str) -> Result<T, String> {
    let is_accepted = |&value: &T| value.into().is_finite() && accept(value.into());
    text.parse().ok().filter(is_accepted).ok_or_else(|| format!("expected a number {what}"))
}

pub fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "of at least 0")
}

pub fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&value| value > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

/// A number of tokens, such as `4096` or `4k`, which is the same.
pub fn tokens(text: &str) -> Result<usize, String> {
    let (digits, unit) = text.strip_suffix(['k', 'K']).map_or((text, 1), |digits| (digits, 1024));
    let tokens = digits.parse().ok().and_then(|count: usize| count.checked_mul(unit)).filter(|&count| count > 0);
    tokens.ok_or_else(|| "expected a number of tokens, such as 4096 or 4k".to_owned())
}

pub fn penalty(text: &str) -> Result<f32, String> {
    number(text, |value| (0.1..=10.0).contains(&value), "in 0.1..=10")
}

/// A share; those that budgets are counted in are f64.
pub fn ratio<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |value| (0.0..=1.0).contains(&value), "in 0..=1")
}

/// Numbers of keys and values, by name.
pub fn kv_dtype() -> impl TypedValueParser<Value = KvDtype> {
    named(&KvDtype::ALL, KvDtype::name)
}

/// Numbers of keys alone, or of values, by name.
pub fn row_dtype() -> impl TypedValueParser<Value = KvDtype> {
    named(&KvDtype::UNIFORM, KvDtype::name)
}

/// Whose positions compete for a budget, by name.
pub fn budget_over() -> impl TypedValueParser<Value = BudgetOver> {
    named(&BudgetOver::ALL, BudgetOver::name)
}

/// One of the values by its name; a value that is added is offered, too.
fn named<T: Copy + Send + Sync>(all: &'static [T], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(|&value| name(value))).try_map(move |given| {
        all.iter().copied().find(|&value| name(value) == given).ok_or("expected one of the names")
    })
}

pub fn divergence(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0, "above 0")
}

pub fn kept_share(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "above 0, and at most 1")
}
