//! Values of templates: Python's, immutable but for namespaces and iterators.

use std::mem;
use std::rc::Rc;

use super::Origin;
use super::dict::{Dict, MAX_KEY_PARTS};
use super::error::{Res, failed};
use super::heap::{Charge, bury};
use super::iter::Iter;
use super::object::Object;
use super::string::Str;

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

impl View {
    pub fn of(self, (key, value): &(Value, Value)) -> Value {
        match self {
            Self::Keys => key.clone(),
            Self::Values => value.clone(),
            Self::Items => Value::tuple(vec![key.clone(), value.clone()]),
        }
    }
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

    /// A list, or a tuple if this is one.
    pub fn of_its_kind(&self, items: Vec<Self>) -> Self {
        if let Self::Tuple(_) = self { Self::tuple(items) } else { Self::list(items) }
    }

    pub fn object(object: Object) -> Self {
        Self::Object(object.counted())
    }

    /// Text of the program.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Str(Str::plain(text.into(), Origin::Template))
    }

    pub fn holds_values(&self) -> bool {
        use Value::{Dict, Iter, List, Object, Tuple, View};
        matches!(self, List(_) | Tuple(_) | Dict(_) | View(..) | Iter(_) | Object(_))
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
            Self::Float(value) => super::number::to_whole(value).filter(|_| value.fract() == 0.0),
            _ => self.as_int(),
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
