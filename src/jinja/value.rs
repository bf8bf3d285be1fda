//! Values of templates: Python's, immutable but for namespaces and iterators, their memory counted. Everything is freed
//! without recursion, however deep.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::mem;
use std::rc::Rc;

use super::Origin;
use super::error::{Res, failed, limit};
use super::iter::Iter;
use super::object::Object;
use super::string::Str;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static COPIED: Cell<usize> = const { Cell::new(0) };
    static DYING: RefCell<Option<Vec<Vec<Value>>>> = const { RefCell::new(None) };
}

/// Bytes of all values of this thread that are alive.
pub(super) fn live() -> usize {
    LIVE.get()
}

/// Counts bytes of text that are written.
pub(super) fn note_copied(bytes: usize) {
    COPIED.set(COPIED.get() + bytes);
}

/// How often so many bytes of text have been written since the last time this was asked.
pub(super) fn take_copied(unit: usize) -> usize {
    let copied = COPIED.get();
    if copied < unit {
        return 0;
    }
    COPIED.set(copied % unit);
    copied / unit
}

/// Memory that is counted as long as this lives.
#[derive(Debug, Default)]
pub(super) struct Charge(usize);

impl Charge {
    pub fn new(bytes: usize) -> Self {
        LIVE.set(LIVE.get() + bytes);
        Self(bytes)
    }

    fn grow(&mut self, bytes: usize) {
        LIVE.set(LIVE.get() + bytes);
        self.0 += bytes;
    }

    /// Counts bytes until [`Charge::end`].
    pub fn begin(bytes: usize) {
        LIVE.set(LIVE.get() + bytes);
    }

    pub fn end(bytes: usize) {
        LIVE.set(LIVE.get().saturating_sub(bytes));
    }

    /// Counts at least this much, for what grows.
    pub fn at_least(&mut self, bytes: usize) {
        self.grow(bytes.saturating_sub(self.0));
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        Self::new(self.0)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        LIVE.set(LIVE.get().saturating_sub(self.0));
    }
}

/// Frees values one after the other: what they hold is put in a queue, not freed from inside.
pub(super) fn bury(values: Vec<Value>) {
    if !values.iter().any(Value::holds_values) {
        return;
    }
    let first = DYING.with_borrow_mut(|queue| {
        let first = queue.is_none();
        queue.get_or_insert_default().push(values);
        first
    });
    if first {
        while let Some(next) = DYING.with_borrow_mut(|queue| queue.as_mut().and_then(Vec::pop)) {
            drop(next);
        }
        DYING.set(None);
    }
}

/// A value of a template.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Undefined(Rc<Undefined>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Str),
    List(Rc<Seq>),
    Tuple(Rc<Seq>),
    Dict(Rc<Dict>),
    Range(Range),
    View(Rc<Dict>, View),
    Iter(Rc<Iter>),
    Object(Rc<Object>),
}

/// Something undefined.
#[derive(Debug)]
pub(super) struct Undefined(Why, #[allow(dead_code, reason = "counts as long as it lives")] Charge);

/// Why something is undefined, for the error if it is used.
#[derive(Debug)]
pub(super) enum Why {
    Name(Str),
    /// Type of the object, as an error shows it, and the name of the attribute.
    Attr(String, Str),
    /// Type of the object, and the element as Python prints it.
    Item(String, String),
    Hint(String),
}

impl Undefined {
    pub fn message(&self) -> String {
        match &self.0 {
            Why::Name(name) => format!("'{}' is undefined", name.text()),
            Why::Attr(object, name) => format!("'{object}' has no attribute '{}'", name.text()),
            Why::Item(object, item) => format!("{object} has no element {item}"),
            Why::Hint(hint) => hint.clone(),
        }
    }
}

/// Which side of a dictionary is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Keys,
    Values,
    Items,
}

/// Python's `range`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub start: i64,
    pub stop: i64,
    pub step: i64,
    pub len: i64,
}

impl Range {
    pub fn get(self, idx: i64) -> Value {
        Value::Int(i128::from(self.start) + i128::from(self.step) * i128::from(idx))
    }

    pub fn contains(self, value: &Value) -> bool {
        let Some(number) = value.as_whole() else { return false };
        let offset = number - i128::from(self.start);
        let step = i128::from(self.step);
        offset % step == 0 && (0..i128::from(self.len)).contains(&(offset / step))
    }
}

impl Value {
    pub fn undefined(hint: impl Into<String>) -> Self {
        Self::undefined_for(Why::Hint(hint.into()))
    }

    pub fn undefined_for(why: Why) -> Self {
        Self::Undefined(Rc::new(Undefined(why, Charge::new(192))))
    }

    pub fn list(items: Vec<Self>) -> Self {
        Self::List(Rc::new(Seq::new(items, false)))
    }

    pub fn tuple(items: Vec<Self>) -> Self {
        Self::Tuple(Rc::new(Seq::new(items, false)))
    }

    pub fn object(object: Object) -> Self {
        Self::Object(object.counted())
    }

    /// Text of the program.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Str(Str::plain(text.into(), Origin::Template))
    }

    fn holds_values(&self) -> bool {
        !matches!(
            self,
            Self::Undefined(_)
                | Self::None
                | Self::Bool(_)
                | Self::Int(_)
                | Self::Float(_)
                | Self::Str(_)
                | Self::Range(_)
        )
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Python's truth of a value.
    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Object(object) => object.is_true(),
            _ => self.len() != Some(0),
        }
    }

    /// How many bytes are read to find the value in a dictionary.
    pub fn key_bytes(&self) -> usize {
        match self {
            Self::Str(text) => text.text().len(),
            Self::Tuple(items) => items
                .items
                .iter()
                .take(MAX_KEY_PARTS)
                .map(|item| match item {
                    Self::Str(text) => text.text().len(),
                    Self::Tuple(_) => item.len().unwrap_or(0) * 1000,
                    _ => 16,
                })
                .sum(),
            _ => 16,
        }
    }

    /// Python's `len`, where there is one.
    pub fn len(&self) -> Option<usize> {
        Some(match self {
            Self::Undefined(_) => 0,
            Self::Str(text) => text.len(),
            Self::List(items) | Self::Tuple(items) => items.items.len(),
            Self::Dict(dict) | Self::View(dict, _) => dict.entries.len(),
            Self::Range(range) => usize::try_from(range.len).unwrap_or(0),
            Self::Object(object) => return object.len(),
            _ => return None,
        })
    }

    /// Name of Python's type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(text) if text.is_safe() => "Markup",
            Self::Str(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Range(_) => "range",
            Self::View(_, View::Keys) => "dict_keys",
            Self::View(_, View::Values) => "dict_values",
            Self::View(_, View::Items) => "dict_items",
            Self::Iter(iter) => iter.type_name(),
            Self::Object(object) => object.type_name(),
        }
    }

    /// The type as Jinja 2 shows it where something is undefined.
    pub fn type_repr(&self) -> String {
        match self {
            Self::None => "None".into(),
            Self::Undefined(_) | Self::Object(_) => format!("jinja2.runtime.{} object", self.type_name()),
            Self::Str(text) if text.is_safe() => "markupsafe.Markup object".into(),
            _ => format!("{} object", self.type_name()),
        }
    }

    /// A whole number, be it an integer, a truth value or a float.
    pub fn as_whole(&self) -> Option<i128> {
        match *self {
            Self::Int(value) => Some(value),
            Self::Bool(value) => Some(value.into()),
            Self::Float(value) => super::number::to_whole(value).filter(|_| value.fract() == 0.0),
            _ => None,
        }
    }

    /// What Python takes for an integer.
    pub fn as_int(&self) -> Option<i128> {
        match *self {
            Self::Int(value) => Some(value),
            Self::Bool(value) => Some(value.into()),
            _ => None,
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "Python rounds, too")]
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            _ => self.as_int().map(|value| value as f64),
        }
    }

    pub fn as_str(&self) -> Option<&Str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The attributes of a namespace.
    pub fn as_namespace(&self) -> Option<&RefCell<Dict>> {
        match self {
            Self::Object(object) => match &**object {
                Object::Namespace(attrs) => Some(attrs),
                _ => None,
            },
            _ => None,
        }
    }

    /// Fails as Python does where an undefined value is used.
    pub fn defined(&self) -> Res<&Self> {
        match self {
            Self::Undefined(undefined) => Err(failed(undefined.message())),
            _ => Ok(self),
        }
    }

    /// Whether two values are the same object, as Python's `is` has it.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a == b,
            (Self::Undefined(a), Self::Undefined(b)) => Rc::ptr_eq(a, b),
            (Self::Str(a), Self::Str(b)) => a.is_same(b),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => Rc::ptr_eq(a, b),
            (Self::Dict(a), Self::Dict(b)) => Rc::ptr_eq(a, b),
            (Self::Iter(a), Self::Iter(b)) => Rc::ptr_eq(a, b),
            (Self::Object(a), Self::Object(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// The elements of a list or a tuple.
#[derive(Debug)]
pub(super) struct Seq {
    pub items: Vec<Value>,
    /// A pair of `groupby`, which has the attributes `grouper` and `list`.
    pub group: bool,
    _charge: Charge,
}

impl Seq {
    pub fn new(items: Vec<Value>, group: bool) -> Self {
        let charge = Charge::new(64 + items.capacity() * size_of::<Value>());
        Self { items, group, _charge: charge }
    }
}

impl Drop for Seq {
    fn drop(&mut self) {
        bury(mem::take(&mut self.items));
    }
}

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
    Object(*const Object),
}

/// How many values a key may consist of.
const MAX_KEY_PARTS: usize = 1000;

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
            Value::Object(object) => Self::Object(Rc::as_ptr(object)),
            Value::List(_) | Value::Dict(_) | Value::View(..) | Value::Iter(_) => {
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
