//! Parts of a flat JSON object, each read by `serde` into a struct that declares its keys.
//!
//! That is what `#[serde(flatten)]` beside `#[serde(deny_unknown_fields)]` would be, which serde does not have; and errors
//! know the key that they are about.
//!
//! Not for: which parts a configuration has (see [`super::config`]), or what a value must be (see [`super::values`]).

use std::cell::Cell;
use std::path::Path;

use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{DeserializeOwned, Error as _, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};
use serde_json::{Map, Value};

use crate::error::Error;

/// The keys that a type declares, their other names included; of an enum, its variants. Empty for a type without any.
///
/// The type is asked to read itself from a source that only listens to what it says it is.
#[must_use]
pub fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Listener<'n>(&'n Cell<&'static [&'static str]>);

    impl<'de> Deserializer<'de> for Listener<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
            Err(Self::Error::custom("nothing to read"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.set(fields);
            self.deserialize_any(visitor)
        }

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _name: &'static str,
            variants: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.set(variants);
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map identifier ignored_any
        }
    }

    let names: Cell<&'static [&'static str]> = Cell::new(&[]);
    let _ = T::deserialize(Listener(&names));
    names.get()
}

/// A key of a configuration that cannot be used: why, and perhaps a remedy.
#[derive(Debug)]
pub(super) struct Reject {
    pub key: String,
    pub reason: String,
    pub hint: Option<String>,
}

impl Reject {
    pub fn new(key: &str, reason: impl Into<String>) -> Self {
        Self { key: key.to_owned(), reason: reason.into(), hint: None }
    }

    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// A file that the key names and that cannot be used.
    pub fn from_error(key: &str, error: &Error) -> Self {
        Self { key: key.to_owned(), reason: error.to_string(), hint: error.hint().map(str::to_owned) }
    }

    /// * `path`: of the file that the key is in
    pub fn into_error(self, path: Option<&Path>) -> Error {
        let Self { key, reason, hint } = self;
        Error::Config { path: path.map(Path::to_owned), key, reason, hint }
    }
}

/// Those pairs of a JSON object whose keys somebody declares.
#[derive(Debug)]
pub struct Section<'a> {
    pairs: Vec<(&'a str, &'a Value)>,
    /// The key that is being read.
    current: Cell<Option<&'a str>>,
}

impl<'a> Section<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, keys: &[&str]) -> Self {
        let own = object.iter().map(|(key, value)| (&**key, value)).filter(|(key, _)| keys.contains(key));
        Self { pairs: own.collect(), current: Cell::new(None) }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().map(|(key, _)| *key)
    }

    /// What `read` makes of it.
    pub(super) fn read<T>(&self, read: impl Fn(&Self) -> serde_json::Result<T>) -> Result<T, Reject> {
        read(self).map_err(|error| {
            let (key, reason) = (self.current.get().unwrap_or_default(), error.to_string());
            let is_repetition = |reason: &str| reason.starts_with("duplicate field");
            if !is_repetition(&reason) {
                return Reject::new(key, reason);
            }
            // Two names of one field: nothing but reading both tells which.
            let both = |other: &str| {
                let pairs = self.pairs.iter().copied().filter(|(own, _)| [key, other].contains(own));
                read(&Self { pairs: pairs.collect(), current: Cell::new(None) })
            };
            let mut others = self.keys().filter(|other| *other != key);
            let other = others.find(|other| both(other).is_err_and(|error| is_repetition(&error.to_string())));
            let other = other.unwrap_or_default();
            Reject::new(key, format!("given twice, as `{other}` and as `{key}`")).with_hint("keep one of them")
        })
    }

    fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.pairs.iter().map(|&(key, value)| {
            self.current.set(Some(key));
            (key, value)
        })
    }
}

/// As the object that only these pairs make up; an enum as its first pair.
impl<'de> Deserializer<'de> for &Section<'de> {
    type Error = serde_json::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_map(MapDeserializer::new(self.entries()))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_enum(MapAccessDeserializer::new(MapDeserializer::new(self.entries())))
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit newtype_struct seq
        tuple tuple_struct map struct identifier ignored_any
    }
}
