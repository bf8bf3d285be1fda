//! How values of a configuration are read: each by a function for `#[serde(deserialize_with)]` that says what was expected.
//!
//! Not for: which keys there are: the structs that these values are fields of declare them.

use std::path::PathBuf;

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::section::keys;

/// Reads a value; `expected` is what the message says if there is none.
fn expect<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &str,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Result<T, D::Error> {
    let value = Value::deserialize(deserializer)?;
    read(&value).ok_or_else(|| D::Error::custom(format!("expected {expected}, got `{value}`")))
}

fn to_whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// A number in 0..=1.
pub fn ratio<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    expect(deserializer, "a number in 0..=1", |value| value.as_f64().filter(|ratio| (0.0..=1.0).contains(ratio)))
}

/// A number in 0..=1 that may be left out.
pub fn some_ratio<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    ratio(deserializer).map(Some)
}

/// Yes or no.
pub fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    expect(deserializer, "true or false", Value::as_bool)
}

/// A number of at least 0.
pub fn non_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    #[expect(clippy::cast_possible_truncation)] // rounded
    let number = |value: &Value| value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
    expect(deserializer, "a number of at least 0", |value| number(value).filter(|&number| number >= 0.0))
}

/// A whole number of at least 0.
pub fn whole<'de, D: Deserializer<'de>, T: TryFrom<u64>>(deserializer: D) -> Result<T, D::Error> {
    expect(deserializer, "a whole number of at least 0", |value| T::try_from(value.as_u64()?).ok())
}

/// A whole number of at least 1.
pub fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    expect(deserializer, "a whole number of at least 1", |value| to_whole(value).filter(|&number| number > 0))
}

/// A whole number of at least 1, or `None` for the word "all".
pub fn positive_or_all<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    expect(deserializer, "\"all\" or a whole number of at least 1", |value| match value {
        Value::String(text) if text == "all" => Some(None),
        _ => to_whole(value).filter(|&number| number > 0).map(Some),
    })
}

/// An odd whole number.
pub fn odd<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    expect(deserializer, "an odd whole number", |value| to_whole(value).filter(|number| number % 2 == 1))
}

/// A list of strings.
pub fn strings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    expect(deserializer, "a list of strings", |value| {
        value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
    })
}

/// The path of a file.
pub fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(PathBuf::from);
    expect(deserializer, "the path of a file", text).map(Some)
}

/// One of the names of an enum without fields.
pub fn choice<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let names: Vec<_> = keys::<T>().iter().map(|name| format!("\"{name}\"")).collect();
    expect(deserializer, &names.join(" or "), |value| T::deserialize(value).ok())
}

/// A size in bytes as a person writes it, such as "64MB".
pub fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let text = expect(deserializer, "a size such as \"64MB\"", |value| value.as_str().map(str::to_owned))?;
    parse_size(&text).map_err(|expected| D::Error::custom(format!("{expected}, got `{text}`")))
}

/// Token ids, or `None` for the word "auto"; negative ids are left out.
pub fn token_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u32>>, D::Error> {
    let ids: Option<Vec<i64>> =
        expect(deserializer, "\"auto\" or a list of token ids", |value| match value.as_str() {
            Some("auto") => Some(None),
            _ => Some(Some(value.as_array()?.iter().map(Value::as_i64).collect::<Option<_>>()?)),
        })?;
    if let Some(id) = ids.iter().flatten().find(|&&id| id > i64::from(u32::MAX)) {
        return Err(D::Error::custom(format!("token id `{id}` is larger than any vocabulary")));
    }
    Ok(ids.map(|ids| ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect()))
}

/// A size in bytes, as a person writes it: a number, and KB, MB (the default) or GB, in powers of 1024, or B for bytes.
///
/// # Errors
/// What was expected, if it is anything else, or less than a byte.
pub fn parse_size(text: &str) -> Result<usize, String> {
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
