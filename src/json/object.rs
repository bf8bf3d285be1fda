//! An object of a JSON file, read key by key, with errors that name the file, the key and what was expected.
//!
//! Not for: what a key means.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest size that is believed.
const MAX_SIZE: usize = 1 << 30;

/// Most characters of a value that a message shows.
const SHOWN_CHARS: usize = 60;

/// An object, and where it is from. A key whose value is null counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Object<'v> {
    pub path: &'v Path,
    /// What a key's name begins with in messages: the path of the object in the file.
    pub prefix: &'static str,
    pub map: &'v Map<String, Value>,
}

impl<'v> Object<'v> {
    /// # Errors
    /// [`Error::BadFile`] if the value is not an object.
    pub fn new(value: &'v Value, path: &'v Path) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { path, prefix: "", map }),
            other => Err(Error::bad_file(path, format!("expected a JSON object, got {}", shown(other)))),
        }
    }

    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    pub fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(format!("{what} (`{}`)", self.path.display()))
    }

    /// What is wrong with a key, in words.
    pub fn bad(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        self.error(format!("key `{}{}`: {reason}", self.prefix, cut(key)))
    }

    /// What is wrong with a key's value.
    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        self.wrong_value(key, expected, self.map.get(key))
    }

    /// As [`Self::wrong`], of a value inside of the key's.
    pub fn wrong_value(&self, key: &str, expected: &str, got: Option<&Value>) -> Error {
        self.bad(key, format!("expected {expected}, got {}", got.map_or("nothing".to_owned(), shown)))
    }

    /// A key's value, unless it is null.
    pub fn get(&self, key: &str) -> Option<&'v Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn typed<T>(&self, key: &str, expected: &str, convert: impl Fn(&'v Value) -> Option<T>) -> Result<Option<T>> {
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

    pub fn text(&self, key: &str) -> Result<Option<&'v str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn list(&self, key: &str) -> Result<Option<&'v [Value]>> {
        self.typed(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }
}

/// A value for a message: short, whatever it is.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > SHOWN_CHARS => "a long string".to_owned(),
        other => format!("`{other}`"),
    }
}

/// The beginning of a text, for a message.
pub(crate) fn cut(text: &str) -> String {
    let shown: String = text.chars().take(SHOWN_CHARS).collect();
    let more = if shown.len() < text.len() { "..." } else { "" };
    shown + more
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_name_file_key_and_value() {
        let value = json!({"a": 0, "b": "x".repeat(1000), "c": null, "d": [1], "e": 1.5});
        let mut object = Object::new(&value, Path::new("x.json")).unwrap();
        object.prefix = "outer.";
        for (error, got) in [
            (object.size("a").unwrap_err(), "key `outer.a`: expected a whole number from 1 to 2^30, got `0`"),
            (object.flag("b").unwrap_err(), "key `outer.b`: expected true or false, got a long string"),
            (object.required_positive("c").unwrap_err(), "key `outer.c`: expected a number above 0, got `null`"),
            (object.text("d").unwrap_err(), "key `outer.d`: expected a string, got a list"),
            (
                object.required_size("f").unwrap_err(),
                "key `outer.f`: expected a whole number from 1 to 2^30, got nothing",
            ),
        ] {
            let text = error.to_string();
            assert!(text.contains("x.json") && text.contains(got), "{text}");
        }
        assert_eq!((object.size("c").unwrap(), object.positive("e").unwrap()), (None, Some(1.5)));
        assert_eq!(object.list("d").unwrap().unwrap().len(), 1);
        let error = Object::new(&json!([]), Path::new("x.json")).err().unwrap().to_string();
        assert!(error.contains("expected a JSON object, got a list"), "{error}");
    }
}
