//! Attributes and items of values, and the methods that Python's types have.

use std::rc::Rc;

use super::error::{Res, failed, unsupported};
use super::interp::Vm;
use super::object::{CallArgs, Object};
use super::string::Str;
use super::value::{Value, View, Why};
use super::{ops, strings};

#[rustfmt::skip]
const STR: [&str; 48] = [
    "capitalize", "casefold", "center", "count", "encode", "endswith", "expandtabs", "find", "format", "format_map",
    "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric",
    "isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "maketrans", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "translate", "upper", "zfill", "striptags",
];
const LIST: [&str; 3] = ["copy", "count", "index"];
const LIST_UNSAFE: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const TUPLE: [&str; 2] = ["count", "index"];
const DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const DICT_UNSAFE: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const INT: [&str; 6] = ["as_integer_ratio", "bit_count", "bit_length", "conjugate", "from_bytes", "to_bytes"];
const FLOAT: [&str; 5] = ["as_integer_ratio", "conjugate", "fromhex", "hex", "is_integer"];
const VIEW: [&str; 1] = ["isdisjoint"];
const LOOP: [&str; 2] = ["changed", "cycle"];
const CYCLER: [&str; 2] = ["next", "reset"];

/// What is there instead of an attribute or an item that is not.
pub(super) fn missing(value: &Value, name: &Value) -> Value {
    let object = value.type_repr();
    Value::undefined_for(match name {
        Value::Str(name) => Why::Attr(object, name.clone()),
        Value::Int(at) => Why::Item(object, at.to_string()),
        _ => Why::Item(object, format!("of type {}", name.type_name())),
    })
}

fn unsafe_attribute(value: &Value, name: &str) -> Value {
    Value::undefined(format!("access to attribute '{name}' of '{}' object is unsafe.", value.type_name()))
}

/// `value.name`: an attribute, else an item.
pub(super) fn attribute(vm: &Vm, value: &Value, name: &Str) -> Res<Value> {
    value.defined()?;
    if let Some(found) = own_attribute(vm, value, name)? {
        return Ok(found);
    }
    let name = Value::Str(name.clone());
    Ok(direct_item(vm, value, &name)?.unwrap_or_else(|| missing(value, &name)))
}

/// `value[name]`: an item, else an attribute.
pub(super) fn item(vm: &Vm, value: &Value, name: &Value) -> Res<Value> {
    value.defined()?;
    if let Some(found) = direct_item(vm, value, name)? {
        return Ok(found);
    }
    if let Value::Str(name) = name
        && let Some(found) = own_attribute(vm, value, name)?
    {
        return Ok(found);
    }
    Ok(missing(value, name))
}

fn char_at(text: &Str, at: usize) -> Value {
    let start = text.byte_at(at);
    let end = start + text.text()[start..].chars().next().map_or(0, char::len_utf8);
    Value::Str(text.slice(start, end))
}

fn direct_item(vm: &Vm, value: &Value, name: &Value) -> Res<Option<Value>> {
    let place = |len: usize| {
        let at = name.as_int()?;
        let at = if at < 0 { at + len as i128 } else { at };
        usize::try_from(at).ok().filter(|at| *at < len)
    };
    Ok(match value {
        Value::List(items) | Value::Tuple(items) => place(items.items.len()).map(|at| items.items[at].clone()),
        Value::Str(text) if !text.is_ascii() && name.as_int().is_some() => {
            vm.scanning(text.text().len())?;
            place(text.len()).map(|at| char_at(text, at))
        }
        Value::Str(text) => place(text.len()).map(|at| char_at(text, at)),
        Value::Range(range) => {
            let len = usize::try_from(range.len).unwrap_or(0);
            place(len).map(|at| range.get(i64::try_from(at).unwrap_or(0)))
        }
        Value::Dict(dict) => {
            vm.keying(name)?;
            // A key that cannot be one is not there.
            dict.get(name).ok().flatten().cloned()
        }
        _ => None,
    })
}

/// An attribute as Python's `getattr` finds it, if the sandbox allows it.
pub(super) fn own_attribute(vm: &Vm, value: &Value, name: &Str) -> Res<Option<Value>> {
    vm.copying(name.text().len())?;
    let name = name.text();
    let value = value.defined()?;
    if name.starts_with("__") && name.ends_with("__") {
        return Ok(Some(unsafe_attribute(value, name)));
    }
    let method = |names: &[&'static str]| method_of(value, names, name);
    Ok(match value {
        Value::Str(text) => method(&STR).filter(|_| name != "striptags" || text.is_safe()),
        Value::List(_) if LIST_UNSAFE.contains(&name) => Some(unsafe_attribute(value, name)),
        Value::List(_) => method(&LIST),
        Value::Tuple(items) if items.group && name == "grouper" => items.items.first().cloned(),
        Value::Tuple(items) if items.group && name == "list" => items.items.get(1).cloned(),
        Value::Tuple(_) => method(&TUPLE),
        Value::Dict(_) if DICT_UNSAFE.contains(&name) => Some(unsafe_attribute(value, name)),
        Value::Dict(_) => method(&DICT),
        Value::View(..) => method(&VIEW),
        Value::Int(_) | Value::Bool(_) => match name {
            "real" | "numerator" => value.as_int().map(Value::Int),
            "imag" => Some(Value::Int(0)),
            "denominator" => Some(Value::Int(1)),
            _ => method(&INT),
        },
        Value::Float(_) => match name {
            "real" => Some(value.clone()),
            "imag" => Some(Value::Float(0.0)),
            _ => method(&FLOAT),
        },
        Value::Range(range) => match name {
            "start" => Some(Value::Int(range.start.into())),
            "stop" => Some(Value::Int(range.stop.into())),
            "step" => Some(Value::Int(range.step.into())),
            _ => method(&TUPLE),
        },
        Value::Object(object) => object_attribute(vm, value, object, name)?,
        Value::Undefined(_) | Value::None | Value::Iter(_) => None,
    })
}

/// A method of a value, if it is one of those of its type.
fn method_of(value: &Value, names: &[&'static str], name: &str) -> Option<Value> {
    let name = names.iter().find(|known| **known == name)?;
    Some(Value::object(Object::Method(value.clone(), name)))
}

fn object_attribute(vm: &Vm, value: &Value, object: &Object, name: &str) -> Res<Option<Value>> {
    Ok(match object {
        Object::Namespace(attrs) => match attrs.borrow().get_str(name) {
            Some(_) if name.starts_with('_') => Some(unsafe_attribute(value, name)),
            found => found.cloned(),
        },
        Object::Loop(state) => {
            let count = |number: i64| Some(Value::Int(number.into()));
            let or_undefined = |found: Option<Value>, what: &str| {
                Some(found.unwrap_or_else(|| Value::undefined(format!("there is no {what} item"))))
            };
            match name {
                "index" => count(state.index0.get() + 1),
                "index0" => count(state.index0.get()),
                "revindex" => count(state.length(vm)? - state.index0.get()),
                "revindex0" => count(state.length(vm)? - state.index0.get() - 1),
                "length" => count(state.length(vm)?),
                "depth" => count(state.depth0 + 1),
                "depth0" => count(state.depth0),
                "first" => Some(Value::Bool(state.index0.get() == 0)),
                "last" => Some(Value::Bool(state.peek(vm)?.is_none())),
                "previtem" => or_undefined(state.before(), "previous"),
                "nextitem" => or_undefined(state.peek(vm)?, "next"),
                _ => method_of(value, &LOOP, name),
            }
        }
        Object::Cycler(items, at) => match name {
            "current" => items.items.get(at.get()).cloned(),
            "pos" => Some(Value::Int(at.get() as i128)),
            "items" => Some(Value::Tuple(Rc::clone(items))),
            _ => method_of(value, &CYCLER, name),
        },
        Object::Joiner(separator, used) => match name {
            "sep" => Some(separator.clone()),
            "used" => Some(Value::Bool(used.get())),
            _ => None,
        },
        Object::Macro(id, _) => {
            let part = &vm.program.macros[*id as usize];
            let text = |symbol: u32| Value::Str(vm.strings[symbol as usize].clone());
            match name {
                "name" => Some(part.name.map_or(Value::None, text)),
                "arguments" => Some(Value::tuple(part.params.iter().map(|(param, _)| text(*param)).collect())),
                "catch_kwargs" => Some(Value::Bool(part.kwargs.is_some())),
                "catch_varargs" => Some(Value::Bool(part.varargs.is_some())),
                "caller" => Some(Value::Bool(part.accesses_caller)),
                "explicit_caller" => Some(Value::Bool(part.explicit_caller)),
                _ => None,
            }
        }
        Object::Blocks => {
            let is_named = |symbol: u32| vm.strings[symbol as usize].text() == name;
            vm.work(vm.program.blocks.len() as u64 / 4)?;
            let at = vm.program.blocks.iter().position(|block| is_named(block.name));
            at.and_then(|at| u32::try_from(at).ok()).map(|at| Value::object(Object::Block(at)))
        }
        Object::Block(id) if name == "super" => {
            let block = vm.strings[vm.program.blocks[*id as usize].name as usize].text();
            Some(Value::undefined(format!("there is no parent block called '{block}'.")))
        }
        Object::Method(..) | Object::Function(_) | Object::Block(_) => None,
    })
}

/// Calls a method.
pub(super) fn call(vm: &Vm, value: &Value, name: &'static str, args: CallArgs) -> Res<Value> {
    vm.step()?;
    match value {
        Value::Str(text) => strings::call(vm, text, name, args),
        Value::List(items) | Value::Tuple(items) => {
            if name == "copy" {
                args.only::<0>(name, 0)?;
                vm.work(items.items.len() as u64 / 4)?;
                return Ok(Value::list(items.items.clone()));
            }
            let [wanted, start, stop] = args.only::<3>(name, 1)?;
            let wanted = wanted.unwrap_or(Value::None);
            if name == "count" {
                let mut count = 0;
                for item in &items.items {
                    count += i128::from(item.is_same(&wanted) || ops::equal(vm, item, &wanted)?);
                }
                return Ok(Value::Int(count));
            }
            let (start, stop) = bounds(start, stop, items.items.len())?;
            for (at, item) in items.items.iter().enumerate().take(stop).skip(start) {
                if item.is_same(&wanted) || ops::equal(vm, item, &wanted)? {
                    return Ok(Value::Int(at as i128));
                }
            }
            Err(failed(format!("the value is not in {}", value.type_name())))
        }
        Value::Dict(dict) => match name {
            "get" => {
                let [key, default] = args.only::<2>(name, 1)?;
                let key = key.unwrap_or(Value::None);
                vm.keying(&key)?;
                let found = dict.get(&key)?;
                Ok(found.cloned().or(default).unwrap_or(Value::None))
            }
            "items" | "keys" | "values" => {
                args.only::<0>(name, 0)?;
                let view = match name {
                    "items" => View::Items,
                    "keys" => View::Keys,
                    _ => View::Values,
                };
                Ok(Value::View(Rc::clone(dict), view))
            }
            "copy" => {
                args.only::<0>(name, 0)?;
                Ok(value.clone())
            }
            _ => Err(unsupported(format!("the method `{name}` of a dictionary"))),
        },
        Value::Range(range) => {
            let [wanted] = args.only::<1>(name, 1)?;
            let wanted = wanted.unwrap_or(Value::None);
            let found = range.contains(&wanted);
            match wanted.as_whole().filter(|_| found) {
                _ if name == "count" => Ok(Value::Int(found.into())),
                Some(number) => Ok(Value::Int((number - i128::from(range.start)) / i128::from(range.step))),
                None => Err(failed("the value is not in range")),
            }
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => {
            args.only::<0>(name, 0)?;
            match (name, value) {
                ("conjugate", Value::Float(_)) => Ok(value.clone()),
                ("conjugate", _) => Ok(Value::Int(value.as_int().unwrap_or(0))),
                ("is_integer", Value::Float(number)) => Ok(Value::Bool(number.is_finite() && number.fract() == 0.0)),
                ("bit_length", _) => {
                    let bits = value.as_int().unwrap_or(0).unsigned_abs();
                    Ok(Value::Int((128 - bits.leading_zeros()).into()))
                }
                ("bit_count", _) => Ok(Value::Int(value.as_int().unwrap_or(0).unsigned_abs().count_ones().into())),
                _ => Err(unsupported(format!("the method `{name}` of a number"))),
            }
        }
        Value::Object(object) => match &**object {
            Object::Loop(state) if name == "cycle" => {
                if args.positional.is_empty() {
                    return Err(failed("no items for cycling given"));
                }
                let at = usize::try_from(state.index0.get()).unwrap_or(0) % args.positional.len();
                Ok(args.positional[at].clone())
            }
            Object::Loop(state) => Ok(Value::Bool(state.changed(vm, Value::tuple(args.positional))?)),
            Object::Cycler(items, at) => {
                args.only::<0>(name, 0)?;
                let now = at.get();
                at.set(if name == "next" { (now + 1) % items.items.len() } else { 0 });
                Ok(if name == "next" { items.items[now].clone() } else { Value::None })
            }
            _ => Err(unsupported(format!("the method `{name}`"))),
        },
        _ => Err(unsupported(format!("the method `{name}` of {}", value.type_name()))),
    }
}

/// Optional bounds of a search in a sequence of `len`.
pub(super) fn bounds(start: Option<Value>, stop: Option<Value>, len: usize) -> Res<(usize, usize)> {
    let place = |bound: Option<Value>, default: usize| match bound {
        None | Some(Value::None) => Ok(default),
        Some(bound) => {
            let Some(at) = bound.as_int() else { return Err(failed("slice indices must be integers or None")) };
            let at = if at < 0 { (at + len as i128).max(0) } else { at };
            Ok(usize::try_from(at).unwrap_or(usize::MAX))
        }
    };
    Ok((place(start, 0)?, place(stop, len)?.min(len)))
}
