//! The objects of Hugging Face's JSON files, with errors that name the file and the key.
//!
//! Not for: what a key means.

use std::path::Path;

use serde_json::{Map, Value};

use super::super::files::read_json;
use super::MAX_SIZE;
use crate::error::{Error, Result};

/// An object of a JSON file, which errors can name. A key whose value is null counts as absent.
pub(super) struct Json<'a> {
    pub path: &'a Path,
    /// What a key's name begins with in messages: the path of the object in the file.
    pub prefix: &'static str,
    pub map: Map<String, Value>,
}

impl<'a> Json<'a> {
    pub fn read(path: &'a Path) -> Result<Self> {
        match read_json(path)? {
            Value::Object(map) => Ok(Self { path, prefix: "", map }),
            _ => Err(Error::bad_file(path, "it is not a JSON object")),
        }
    }

    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    pub fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(format!("{what} (`{}`)", self.path.display()))
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// What is wrong with a key's value.
    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.map.get(key).map_or("nothing".to_owned(), |value| format!("`{}`", shortened(value)));
        self.error(format!("key `{}{key}`: expected {expected}, got {got}", self.prefix))
    }

    pub fn typed<T>(&self, key: &str, expected: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, expected))
    }

    /// A size of at least 1.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number from 1 to 2^30", |value| {
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=MAX_SIZE).contains(size))
        })
    }

    pub fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a whole number from 1 to 2^30"))
    }

    /// A number above 0.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| value.as_f64().filter(|&x| x.is_finite() && x > 0.0))
    }

    pub fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.wrong(key, "a number above 0"))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// Token ids: one, or a list of them; empty if absent. What is no id of a token is left out, and `notes` say so.
    ///
    /// # Errors
    /// [`Error::BadFile`] for anything but numbers and null.
    pub fn token_ids(&self, key: &str, vocab_size: usize, notes: &mut Vec<String>) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let single = std::slice::from_ref(value);
        let items = value.as_array().map_or(single, Vec::as_slice);
        if !items.iter().all(|item| item.is_number() || item.is_null()) {
            return Err(self.wrong(key, "a token id or a list of them"));
        }
        let mut ids = Vec::new();
        for item in items {
            match token_id(item).filter(|&id| (id as usize) < vocab_size) {
                Some(id) => ids.push(id),
                None => notes.push(format!(
                    "key `{}{key}` of `{}` names the token {item}, but tokens are 0 to {}: it is left out",
                    self.prefix,
                    self.path.display(),
                    vocab_size - 1
                )),
            }
        }
        Ok(ids)
    }
}

/// A value as text for a message.
pub(super) fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= LONGEST { text } else { text.chars().take(LONGEST).chain("...".chars()).collect() }
}

/// The id that a number is, be it written as `2` or `2.0`.
fn token_id(value: &Value) -> Option<u32> {
    let whole = |number: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let id = number as u32;
        (f64::from(id) == number).then_some(id)
    };
    match value.as_u64() {
        Some(id) => u32::try_from(id).ok(),
        None => value.as_f64().and_then(whole),
    }
}
