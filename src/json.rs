//! JSON that people write: a byte-order mark is dropped, and a key that is given twice is an error.
//!
//! `serde_json` alone takes the last of two equal keys in silence. Not for: weights' headers and other files that programs
//! write, which are read by their own modules.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Most values that a text may hold, those inside others included: a bound on memory, since a list of two bytes takes
/// some hundred.
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

/// Reads JSON in which no object, at any depth, gives a key twice.
///
/// # Errors
/// What is wrong and where, for a message, if it is not JSON, gives a key twice, or holds more than a million values.
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    let left = Cell::new(MAX_VALUES);
    let mut deserializer = serde_json::Deserializer::from_slice(bytes_without_bom(bytes));
    let value = Strict(&left).deserialize(&mut deserializer);
    value.and_then(|value| deserializer.end().map(|()| value)).map_err(|error| error.to_string())
}

/// Reads one value; holds how many more there may be.
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

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
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

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = object.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` is given twice")));
            }
            let value = object.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_serde_jsons_value_in_the_order_written() {
        let text = r#" {"z": [1, -2, 1.5, 1e300, 18446744073709551615, "é\n", null, true, {}], "a": {"z": 1, "b": {"z": 2}}} "#;
        let (ours, theirs) = (parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(ours, theirs);
        assert_eq!(ours.to_string(), theirs.to_string());
        assert_eq!(parse(format!("\u{feff}{text}").as_bytes()).unwrap(), ours);
        assert_eq!(without_bom("\u{feff}\u{feff}x"), "\u{feff}x");
    }

    #[test]
    fn keys_given_twice_and_what_is_not_json_are_refused() {
        for (text, reason) in [
            (r#"{"a": 1, "b": 2, "a": 1}"#, "the key `a` is given twice"),
            (r#"[0, {"x": {"q": 1, "q": 2}}]"#, "the key `q` is given twice"),
            (r#"{"a": 1, "\u0061": 1}"#, "the key `a` is given twice"),
            ("[1] 2", "trailing characters"),
            ("", "EOF"),
            ("[1,", "EOF"),
            ("\u{feff}\u{feff}1", "expected value"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(parse(&[b'"', 0xFF, b'"']).is_err());
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
        assert!(parse(format!("[{}]", "[],".repeat(1_000_000)).as_bytes()).unwrap_err().contains("more than"));
    }
}
