//! Python's dictionary, and what it finds its entries by.

use std::collections::HashMap;
use std::mem;
use std::rc::Rc;

use super::error::{Res, failed, limit, unsupported};
use super::heap::{Charge, bury};
use super::string::Str;
use super::value::{Value, View};

/// What a dictionary finds its entries by: equal for equal values.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    None,
    Undefined,
    Int(i128),
    Float(u64),
    Str(Str),
    Range(i64, i64, i64),
    Tuple(Vec<Key>),
    /// What is equal to itself only.
    Object(*const ()),
}

/// How many values a key may consist of.
pub(super) const MAX_KEY_PARTS: usize = 1000;

impl Key {
    fn of(value: &Value) -> Res<Self> {
        Self::counted(value).map(|(key, _)| key)
    }

    /// A key, and how many values it consists of.
    fn counted(value: &Value) -> Res<(Self, usize)> {
        let mut left = MAX_KEY_PARTS;
        let key = Self::new(value, 64, &mut left)?;
        Ok((key, MAX_KEY_PARTS - left))
    }

    fn new(value: &Value, depth: usize, left: &mut usize) -> Res<Self> {
        if depth == 0 || *left == 0 {
            return Err(limit("a key of a dictionary is nested too deeply, or has too many parts"));
        }
        *left -= 1;
        Ok(match value {
            Value::None => Self::None,
            Value::Undefined(_) => Self::Undefined,
            Value::Str(text) => Self::Str(text.clone()),
            Value::Float(number) if value.as_whole().is_none() => Self::Float(number.to_bits()),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) => Self::Int(value.as_whole().unwrap_or_default()),
            Value::Tuple(items) => {
                Self::Tuple(items.items.iter().map(|item| Self::new(item, depth - 1, left)).collect::<Res<_>>()?)
            }
            Value::Range(range) => Self::Range(range.start, range.step, range.len),
            Value::Object(object) => Self::Object(Rc::as_ptr(object).cast()),
            Value::Iter(iter) => Self::Object(Rc::as_ptr(iter).cast()),
            // Each call of `values` makes another one, which is not remembered.
            Value::View(_, View::Values) => return Err(unsupported("a view of a dictionary's values as a key")),
            Value::List(_) | Value::Dict(_) | Value::View(..) => {
                return Err(failed(format!("unhashable type: '{}'", value.type_name())));
            }
        })
    }
}

/// How many entries are searched one by one.
const UNINDEXED: usize = 8;

/// Python's dictionary: in the order of insertion.
#[derive(Debug)]
pub(super) struct Dict {
    pub entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    charge: Charge,
}

impl Default for Dict {
    fn default() -> Self {
        Self { entries: Vec::new(), index: HashMap::new(), charge: Charge::new(160) }
    }
}

impl Dict {
    fn position(&self, key: &Value) -> Res<Option<usize>> {
        if let Value::Str(text) = key
            && self.entries.len() <= UNINDEXED
        {
            return Ok(self.entries.iter().position(|(k, _)| k.as_str() == Some(text)));
        }
        let key = Key::of(key)?;
        if self.entries.len() > UNINDEXED {
            return Ok(self.index.get(&key).copied());
        }
        Ok(self.entries.iter().position(|(k, _)| Key::of(k).is_ok_and(|k| k == key)))
    }

    /// # Errors
    /// If the key cannot be one.
    pub fn get(&self, key: &Value) -> Res<Option<&Value>> {
        Ok(self.position(key)?.map(|at| &self.entries[at].1))
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        if self.entries.len() <= UNINDEXED {
            let same = |k: &Value| k.as_str().is_some_and(|k| k.text() == key);
            return self.entries.iter().find(|(k, _)| same(k)).map(|(_, value)| value);
        }
        self.get(&Value::text(key)).ok().flatten()
    }

    /// # Errors
    /// If the key cannot be one.
    pub fn insert(&mut self, key: Value, value: Value) -> Res<()> {
        self.replace(key, value).map(drop)
    }

    /// Inserts and returns what was there. An equal key stays as it was first written, as in Python.
    ///
    /// # Errors
    /// If the key cannot be one.
    pub fn replace(&mut self, key: Value, value: Value) -> Res<Option<Value>> {
        if let Some(at) = self.position(&key)? {
            return Ok(Some(mem::replace(&mut self.entries[at].1, value)));
        }
        let at = self.entries.len();
        if at == UNINDEXED {
            for (at, (key, _)) in self.entries.iter().enumerate() {
                self.index.insert(Key::of(key)?, at);
            }
        }
        let (found, parts) = Key::counted(&key)?;
        if at >= UNINDEXED {
            self.index.insert(found, at);
        }
        self.charge.grow(if at >= UNINDEXED { 112 + 48 * parts } else { 64 });
        self.entries.push((key, value));
        Ok(None)
    }

    pub fn take_entries(&mut self) -> Vec<Value> {
        self.index.clear();
        mem::take(&mut self.entries).into_iter().flat_map(|(key, value)| [key, value]).collect()
    }
}

impl Drop for Dict {
    fn drop(&mut self) {
        if self.entries.iter().any(|(key, value)| key.holds_values() || value.holds_values()) {
            bury(self.take_entries());
        }
    }
}
