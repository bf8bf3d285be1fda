//! JSON text as a value, read strictly: of a key that an object holds twice, nobody can tell which value was meant.
//!
//! Not for: files that other programs write (tokenizers, checkpoints), which are read as those programs read them.

mod object;

use std::cell::Cell;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

pub(crate) use object::{Object, cut, shown};

/// Most values that a text may hold, those inside others included: a bound on memory, since a value of two bytes takes some
/// hundred.
const MAX_VALUES: usize = 1_000_000;

/// A text without the byte-order mark that some editors put first.
#[must_use]
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Bytes without the UTF-8 byte-order mark that some editors put first.
#[must_use]
pub fn bytes_without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// Reads one value. A byte-order mark in front of it is skipped; keys keep their order.
///
/// # Errors
/// What is wrong, with line and column: text that is no JSON, anything behind the value, or a key that an object, at any
/// depth, holds twice; that key is named. Also more than a million values.
pub fn strict_json(text: &str) -> serde_json::Result<Value> {
    let mut deserializer = serde_json::Deserializer::from_str(without_bom(text));
    let value = Strict(&Cell::new(MAX_VALUES)).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// Builds a value, and watches the keys of its objects; holds how many more values there may be.
#[derive(Clone, Copy)]
struct Strict<'c>(&'c Cell<usize>);

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let Some(left) = self.0.get().checked_sub(1) else {
            return Err(D::Error::custom(format!("there are more than {MAX_VALUES} values")));
        };
        self.0.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = pairs.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{}` is given twice", cut(&key))));
            }
            let value = pairs.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_serde_json_reads_it() {
        for text in [
            "null",
            " true ",
            "-0",
            "18446744073709551615",
            "-9223372036854775808",
            "1e300",
            "0.1",
            r#""a\u00e9\ud83d\ude00\"""#,
            "[]",
            "{}",
            r#"{"b": [1, {"a": null, "": {}}], "a": {"b": 2}}"#,
        ] {
            let expected: Value = serde_json::from_str(text).unwrap();
            let value = strict_json(text).unwrap();
            assert_eq!(value, expected, "{text}");
            assert_eq!(value.to_string(), expected.to_string(), "{text}");
            assert_eq!(strict_json(&format!("\u{feff}{text}")).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_json_is_refused_with_its_place() {
        for text in ["", "{", "[1,]", "{\"a\" 1}", "1 2", "\u{feff}\u{feff}1", "nul", "1e999", &"[".repeat(100_000)] {
            let error = strict_json(text).unwrap_err().to_string();
            assert!(error.contains("line 1 column"), "{error}");
        }
    }

    #[test]
    fn many_values_are_refused_and_marks_dropped_once() {
        let error = strict_json(&format!("[{}1]", "[],".repeat(1_000_000))).unwrap_err().to_string();
        assert!(error.contains("more than 1000000 values"), "{error}");
        assert_eq!(without_bom("\u{feff}\u{feff}x"), "\u{feff}x");
        assert_eq!(bytes_without_bom("\u{feff}x".as_bytes()), b"x");
    }

    #[test]
    fn a_key_given_twice_is_refused_by_name_at_any_depth() {
        for (text, key) in [
            (r#"{"a": 1, "a": 1}"#, "`a`"),
            (r#"[{"b": {"role": 1, "x": 2, "role": 3}}]"#, "`role`"),
            // Spelt differently, but the same key.
            (r#"{"id": 1, "\u0069d": 2}"#, "`id`"),
            (r#"{"": 1, "": 2}"#, "``"),
        ] {
            let error = strict_json(text).unwrap_err().to_string();
            assert!(error.contains(&format!("the key {key} is given twice at line 1 column")), "{error}");
        }
        let long = "k".repeat(10_000);
        let error = strict_json(&format!("{{\"{long}\": 1, \"{long}\": 2}}")).unwrap_err().to_string();
        assert!(error.len() < 200 && error.contains("kkk..."), "{error}");
        // Different objects may hold the same key.
        assert!(strict_json(r#"[{"a": {"a": 1}}, {"a": 2}]"#).is_ok());
    }
}
