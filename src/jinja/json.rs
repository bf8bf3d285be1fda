//! `tojson`, as transformers defines it: Python's `json.dumps`.

use std::fmt::Write as _;
use std::rc::Rc;

use serde_json::{Number, Value as Json};

use super::Origin;
use super::dict::Dict;
use super::error::{Res, failed, limit};
use super::filters::clamped;
use super::interp::Vm;
use super::object::CallArgs;
use super::string::{Str, StrBuf};
use super::texts::spaces;
use super::value::Value;
use super::{number, ops};

/// How deep the input may be nested.
const MAX_DEPTH: usize = 256;

/// A value from outside; its strings have this origin.
pub(super) fn from_json(vm: &Vm, json: &Json, origin: Origin) -> Res<Value> {
    convert(vm, json, origin, MAX_DEPTH)
}

fn convert(vm: &Vm, json: &Json, origin: Origin, depth: usize) -> Res<Value> {
    if depth == 0 {
        return Err(limit(format!("a variable is nested more than {MAX_DEPTH} deep")));
    }
    // What is given is not the template's work; only its memory counts.
    vm.work(0)?;
    let text = |text: &str| Str::plain(text.to_owned(), origin);
    Ok(match json {
        Json::Null => Value::None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => from_number(number)?,
        Json::String(string) => Value::Str(text(string)),
        Json::Array(items) => {
            Value::list(items.iter().map(|item| convert(vm, item, origin, depth - 1)).collect::<Res<_>>()?)
        }
        Json::Object(entries) => {
            let mut dict = Dict::default();
            for (key, value) in entries {
                dict.insert(Value::Str(text(key)), convert(vm, value, origin, depth - 1)?)?;
            }
            Value::Dict(Rc::new(dict))
        }
    })
}

fn from_number(number: &Number) -> Res<Value> {
    if let Some(whole) = number.as_i128() {
        return Ok(Value::Int(whole));
    }
    number.as_f64().map(Value::Float).ok_or_else(number::too_large)
}

/// How `json.dumps` writes.
struct Style {
    ascii: bool,
    indent: Option<Str>,
    item_separator: Str,
    key_separator: Str,
    sort_keys: bool,
}

#[allow(clippy::needless_pass_by_value, reason = "all filters have one type")]
pub(super) fn tojson(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [ascii, indent, separators, sort_keys] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"], 0)?;
    let plain = |text: &str| Str::plain(text.to_owned(), Origin::Template);
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(indent)) => Some(indent),
        Some(indent) => {
            let Some(width) = indent.as_int() else {
                return Err(failed(format!("can't multiply sequence by non-int of type '{}'", indent.type_name())));
            };
            Some(spaces(vm, clamped(width))?)
        }
    };
    let (item_separator, key_separator) = match separators {
        None | Some(Value::None) => (plain(if indent.is_some() { "," } else { ", " }), plain(": ")),
        Some(separators) => match vm.collect(&separators)?.as_slice() {
            [Value::Str(item), Value::Str(key)] => (item.clone(), key.clone()),
            _ => return Err(failed("separators must be two strings")),
        },
    };
    let style = Style {
        ascii: ascii.is_some_and(|ascii| ascii.is_true()),
        indent,
        item_separator,
        key_separator,
        sort_keys: sort_keys.is_some_and(|sort| sort.is_true()),
    };
    let mut out = vm.buf();
    style.write(vm, &value, 0, &mut out)?;
    Ok(Value::Str(out.finish()))
}

impl Style {
    fn write(&self, vm: &Vm, value: &Value, level: usize, out: &mut StrBuf) -> Res<()> {
        vm.step()?;
        let _deeper = vm.deeper()?;
        match value {
            Value::Str(text) => self.string(vm, text, out),
            Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                out.push(&scalar(value), Origin::Template)
            }
            Value::List(items) | Value::Tuple(items) => {
                if items.items.is_empty() {
                    return out.push("[]", Origin::Template);
                }
                out.push("[", Origin::Template)?;
                for (at, item) in items.items.iter().enumerate() {
                    self.separate(vm, at, level + 1, out)?;
                    self.write(vm, item, level + 1, out)?;
                }
                self.line(vm, level, out)?;
                out.push("]", Origin::Template)
            }
            Value::Dict(dict) => {
                if dict.entries.is_empty() {
                    return out.push("{}", Origin::Template);
                }
                out.push("{", Origin::Template)?;
                for (at, (key, value)) in self.entries(vm, dict)?.into_iter().enumerate() {
                    self.separate(vm, at, level + 1, out)?;
                    match &key {
                        Value::Str(key) => self.string(vm, key, out)?,
                        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                            out.push(&format!("\"{}\"", scalar(&key)), Origin::Template)?;
                        }
                        _ => {
                            return Err(failed(format!(
                                "keys must be str, int, float, bool or None, not {}",
                                key.type_name()
                            )));
                        }
                    }
                    out.push_str(&self.key_separator)?;
                    self.write(vm, &value, level + 1, out)?;
                }
                self.line(vm, level, out)?;
                out.push("}", Origin::Template)
            }
            _ => Err(failed(format!("Object of type {} is not JSON serializable", value.type_name()))),
        }
    }

    fn entries(&self, vm: &Vm, dict: &Dict) -> Res<Vec<(Value, Value)>> {
        vm.work(dict.entries.len() as u64)?;
        if !self.sort_keys {
            return Ok(dict.entries.clone());
        }
        let pair = |(key, value): &(Value, Value)| (key.clone(), Value::tuple(vec![key.clone(), value.clone()]));
        // A single key has nothing to be compared with.
        let sorted = ops::sort(vm, dict.entries.iter().map(pair).collect(), false)?;
        let unpacked = sorted.into_iter().filter_map(|entry| match entry {
            Value::Tuple(pair) => Some((pair.items[0].clone(), pair.items[1].clone())),
            _ => None,
        });
        Ok(unpacked.collect())
    }

    fn separate(&self, vm: &Vm, at: usize, level: usize, out: &mut StrBuf) -> Res<()> {
        if at > 0 {
            out.push_str(&self.item_separator)?;
        }
        self.line(vm, level, out)
    }

    fn line(&self, vm: &Vm, level: usize, out: &mut StrBuf) -> Res<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.push("\n", Origin::Template)?;
        vm.copying(indent.text().len().saturating_mul(level))?;
        (0..level).try_for_each(|_| out.push_str(indent))
    }

    fn string(&self, vm: &Vm, text: &Str, out: &mut StrBuf) -> Res<()> {
        vm.scanning(text.text().len())?;
        out.push("\"", Origin::Template)?;
        let mut plain = 0;
        for (at, c) in text.text().char_indices() {
            let escaped = match c {
                '"' => "\\\"".into(),
                '\\' => "\\\\".into(),
                '\n' => "\\n".into(),
                '\r' => "\\r".into(),
                '\t' => "\\t".into(),
                '\x08' => "\\b".into(),
                '\x0C' => "\\f".into(),
                '\0'..='\x1F' => format!("\\u{:04x}", c as u32),
                '\x7F'.. if self.ascii => {
                    let mut escaped = String::new();
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(escaped, "\\u{unit:04x}");
                    }
                    escaped
                }
                _ => continue,
            };
            out.push_slice(text, plain, at)?;
            out.push(&escaped, text.origin_at(at))?;
            plain = at + c.len_utf8();
        }
        out.push_slice(text, plain, text.text().len())?;
        out.push("\"", Origin::Template)
    }
}

/// A number, a truth value or nothing, as JSON.
fn scalar(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) if value.is_nan() => "NaN".into(),
        Value::Float(value) if value.is_infinite() => if *value > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Value::Float(value) => number::float_repr(*value),
        _ => "null".into(),
    }
}
