//! Attributes and items of values, and the methods that Python's types have.

use std::rc::Rc;

use super::Origin;
use super::error::{Res, failed, unsupported};
use super::filters::{escaped, flag};
use super::interp::{CallArgs, Object, Vm, elements};
use super::value::{Str, StrBuf, Value, View, Why};
use super::{format, number, ops, text};

const STR: [&str; 48] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
    "striptags",
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
    let method = |names: &[&'static str]| {
        let name = names.iter().find(|known| **known == name)?;
        Some(Value::object(Object::Method(value.clone(), name)))
    };
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
        Value::Object(object) => match &**object {
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
                    _ => method(&LOOP),
                }
            }
            Object::Cycler(items, at) => match name {
                "current" => items.items.get(at.get()).cloned(),
                "pos" => Some(Value::Int(at.get() as i128)),
                "items" => Some(Value::Tuple(Rc::clone(items))),
                _ => method(&CYCLER),
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
        },
        Value::Undefined(_) | Value::None | Value::Iter(_) => None,
    })
}

/// Calls a method.
pub(super) fn call(vm: &Vm, value: &Value, name: &'static str, args: CallArgs) -> Res<Value> {
    vm.step()?;
    match value {
        Value::Str(text) => str_method(vm, text, name, args),
        Value::List(_) | Value::Tuple(_) => {
            let Some(items) = elements(value) else { return Ok(Value::None) };
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
fn bounds(start: Option<Value>, stop: Option<Value>, len: usize) -> Res<(usize, usize)> {
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

fn wants_str(name: &str, value: &Value) -> super::TemplateError {
    failed(format!("{name}() argument must be str, not {}", value.type_name()))
}

fn str_arg(name: &str, value: Option<Value>) -> Res<Str> {
    match value {
        Some(Value::Str(text)) => Ok(text),
        Some(other) => Err(wants_str(name, &other)),
        None => Err(failed(format!("{name}() is missing an argument"))),
    }
}

fn size_arg(name: &str, value: Option<Value>, default: i128) -> Res<i128> {
    let Some(value) = value else { return Ok(default) };
    value
        .as_int()
        .ok_or_else(|| failed(format!("{name}(): '{}' object cannot be interpreted as an integer", value.type_name())))
}

/// A method of a string. Markup escapes what it takes and stays markup.
fn str_method(vm: &Vm, text: &Str, name: &'static str, mut args: CallArgs) -> Res<Value> {
    vm.scanning(text.text().len())?;
    if text.is_safe() && !matches!(name, "format" | "join" | "strip" | "lstrip" | "rstrip" | "find" | "count" | "index")
    {
        for value in &mut args.positional {
            if let Value::Str(part) = value {
                *value = Value::Str(escaped(vm, part)?);
            }
        }
    }
    let found = str_result(vm, text, name, args)?;
    Ok(match found {
        Value::Str(found) if text.is_safe() => Value::Str(found.with_safe(true)),
        other => other,
    })
}

fn str_result(vm: &Vm, text: &Str, name: &'static str, args: CallArgs) -> Res<Value> {
    let plain = text.text();
    match name {
        "upper" => mapped(vm, text, name, args, |c, out| out.extend(c.to_uppercase())),
        "casefold" => mapped(vm, text, name, args, |c, out| out.push_str(&text::fold(c))),
        "swapcase" => mapped(vm, text, name, args, |c, out| {
            if c.is_uppercase() {
                out.extend(c.to_lowercase());
            } else if c.is_lowercase() {
                out.extend(c.to_uppercase());
            } else {
                out.push(c);
            }
        }),
        "lower" => lower(vm, text, args).map(Value::Str),
        "capitalize" | "title" => titled(vm, text, name, args),
        "strip" | "lstrip" | "rstrip" => strip(vm, text, name, args),
        "split" | "rsplit" => split(vm, text, name, args),
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"], 0)?;
            let keep = flag(keep)?;
            let lines = text::lines(plain).map(|line| if keep { line } else { text::without_end(line) });
            parts(vm, text, lines)
        }
        "partition" | "rpartition" => {
            let [separator] = args.only::<1>(name, 1)?;
            let separator = str_arg(name, separator)?;
            if separator.is_empty() {
                return Err(failed("empty separator"));
            }
            let from_left = name == "partition";
            let at = if from_left { plain.find(separator.text()) } else { plain.rfind(separator.text()) };
            let empty = || Str::empty();
            let three = match at {
                Some(at) => {
                    let end = at + separator.text().len();
                    [text.slice(0, at), separator, text.slice(end, plain.len())]
                }
                None if from_left => [text.clone(), empty(), empty()],
                None => [empty(), empty(), text.clone()],
            };
            Ok(Value::tuple(three.into_iter().map(Value::Str).collect()))
        }
        "replace" => replace(vm, text, args),
        "removeprefix" | "removesuffix" => {
            let [affix] = args.only::<1>(name, 1)?;
            let affix = str_arg(name, affix)?;
            let rest = if name == "removeprefix" {
                plain.strip_prefix(affix.text())
            } else {
                plain.strip_suffix(affix.text())
            };
            Ok(Value::Str(rest.map_or_else(|| text.clone(), |rest| text.part(rest))))
        }
        "startswith" | "endswith" => affixed(text, name, args).map(Value::Bool),
        "find" | "rfind" | "index" | "rindex" | "count" => search(vm, text, name, args),
        "center" | "ljust" | "rjust" | "zfill" => pad(vm, text, name, args),
        "expandtabs" => expand_tabs(vm, text, args),
        "join" => {
            let [items] = args.only::<1>(name, 1)?;
            let mut out = vm.buf();
            for (at, item) in vm.collect(&items.unwrap_or(Value::None))?.into_iter().enumerate() {
                let Value::Str(mut item) = item else {
                    let got = item.type_name();
                    return Err(failed(format!("sequence item {at}: expected str instance, {got} found")));
                };
                vm.copying(item.text().len() + plain.len())?;
                if text.is_safe() {
                    item = escaped(vm, &item)?;
                }
                if at > 0 {
                    out.push_str(text)?;
                }
                out.push_str(&item)?;
            }
            Ok(Value::Str(out.finish()))
        }
        "format" => format::format(vm, text, &args).map(Value::Str),
        "format_map" => {
            let [map] = args.only::<1>(name, 1)?;
            let Some(Value::Dict(dict)) = map else { return Err(unsupported("format_map of no dictionary")) };
            let named = dict.entries.iter().filter_map(|(key, value)| Some((key.as_str()?.clone(), value.clone())));
            let mut args = CallArgs::default();
            args.named.extend(named);
            format::format(vm, text, &args).map(Value::Str)
        }
        "encode" | "translate" | "maketrans" | "striptags" => {
            Err(unsupported(format!("the method `{name}` of a string")))
        }
        _ => {
            args.only::<0>(name, 0)?;
            Ok(Value::Bool(classify(plain, name)))
        }
    }
}

/// The tests of a string's characters.
fn classify(text: &str, name: &str) -> bool {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    match name {
        "isascii" => text.is_ascii(),
        "isprintable" => text.chars().all(text::is_printable),
        "isalpha" => all(text::is_alpha),
        "isalnum" => all(text::is_alnum),
        "isdecimal" => all(|c| text::decimal(c).is_some()),
        "isdigit" => all(text::is_digit),
        "isnumeric" => all(text::is_numeric),
        "isspace" => all(text::is_space),
        "islower" => {
            text.chars().any(char::is_lowercase) && !text.chars().any(|c| c.is_uppercase() || text::is_title(c))
        }
        "isupper" => {
            text.chars().any(char::is_uppercase) && !text.chars().any(|c| c.is_lowercase() || text::is_title(c))
        }
        "isidentifier" => {
            let first = text.chars().next().is_some_and(|c| c == '_' || text::is_alpha(c));
            first && text.chars().all(|c| c == '_' || c.is_alphanumeric())
        }
        _ => {
            // `istitle`: capitals exactly where words begin.
            let (mut after_cased, mut any) = (false, false);
            for c in text.chars() {
                let starts = c.is_uppercase() || text::is_title(c);
                if (starts && after_cased) || (c.is_lowercase() && !after_cased) {
                    return false;
                }
                after_cased = text::is_cased(c);
                any |= after_cased;
            }
            any
        }
    }
}

/// Every character replaced by others, which keep its origin.
fn mapped(vm: &Vm, text: &Str, name: &str, args: CallArgs, change: fn(char, &mut String)) -> Res<Value> {
    args.only::<0>(name, 0)?;
    let mut out = vm.buf();
    let mut changed = String::new();
    for (start, end, origin) in text.runs(0, text.text().len()) {
        changed.clear();
        vm.scanning((end - start) * 3)?;
        text.text()[start..end].chars().for_each(|c| change(c, &mut changed));
        out.push(&changed, origin)?;
    }
    Ok(Value::Str(out.finish()))
}

/// Lower case; a sigma at the end of a word has a form of its own.
fn lower(vm: &Vm, text: &Str, args: CallArgs) -> Res<Str> {
    args.only::<0>("lower", 0)?;
    if !text.text().contains('\u{3A3}') {
        return match mapped(vm, text, "lower", CallArgs::default(), |c, out| out.extend(c.to_lowercase()))? {
            Value::Str(lower) => Ok(lower),
            _ => Ok(text.clone()),
        };
    }
    let whole = text.text().to_lowercase();
    let mut out = vm.buf();
    let mut rest = whole.as_str();
    for (at, c) in text.text().char_indices() {
        let len: usize = c.to_lowercase().map(char::len_utf8).sum();
        let (part, after) = rest.split_at(len);
        out.push(part, text.origin_at(at))?;
        rest = after;
    }
    Ok(out.finish())
}

fn titled(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    args.only::<0>(name, 0)?;
    let lower = lower(vm, text, CallArgs::default())?;
    vm.scanning(text.text().len() * 8)?;
    let mut out = vm.buf();
    let mut after_cased = false;
    let words = name == "title";
    let mut rest = lower.text();
    for (at, c) in text.text().char_indices() {
        let len: usize = c.to_lowercase().map(char::len_utf8).sum();
        let (part, after) = rest.split_at(len);
        rest = after;
        let upper = if words { !after_cased } else { at == 0 };
        let titled = text::title(c);
        out.push(if upper { &titled } else { part }, text.origin_at(at))?;
        after_cased = text::is_cased(c);
    }
    Ok(Value::Str(out.finish()))
}

fn strip(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    let [chars] = args.only::<1>(name, 0)?;
    let chars = match chars {
        None | Some(Value::None) => None,
        other => Some(str_arg(name, other)?),
    };
    let mut sorted: Vec<char> = chars.iter().flat_map(|chars| chars.text().chars()).collect();
    sorted.sort_unstable();
    vm.scanning(sorted.len() * 16)?;
    let goes = |c: char| if chars.is_some() { sorted.binary_search(&c).is_ok() } else { text::is_space(c) };
    let mut rest = text.text();
    if name != "rstrip" {
        rest = rest.trim_start_matches(goes);
    }
    if name != "lstrip" {
        rest = rest.trim_end_matches(goes);
    }
    vm.scanning((text.text().len() - rest.len()) * 4)?;
    Ok(Value::Str(text.part(rest)))
}

/// A list of parts of a text.
fn parts<'t>(vm: &Vm, text: &Str, parts: impl Iterator<Item = &'t str>) -> Res<Value> {
    let mut found = Vec::new();
    for part in parts {
        vm.copying(part.len())?;
        vm.push(&mut found, Value::Str(text.part(part)))?;
    }
    Ok(Value::list(found))
}

fn split(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    let [separator, limit] = args.bind(name, ["sep", "maxsplit"], 0)?;
    let limit = size_arg(name, limit, -1)?;
    let limit = if limit < 0 { usize::MAX } else { usize::try_from(limit).unwrap_or(usize::MAX) };
    let most = limit.saturating_add(1);
    let from_left = name == "split";
    let mut found: Vec<&str> = Vec::new();
    match separator {
        None | Some(Value::None) => {
            let mut rest = text.text();
            loop {
                rest = if from_left {
                    rest.trim_start_matches(text::is_space)
                } else {
                    rest.trim_end_matches(text::is_space)
                };
                if rest.is_empty() {
                    break;
                }
                vm.step()?;
                vm.fits(found.len() + 1)?;
                let end = if found.len() >= limit {
                    None
                } else if from_left {
                    rest.find(text::is_space)
                } else {
                    rest.char_indices().rev().find(|(_, c)| text::is_space(*c)).map(|(at, c)| at + c.len_utf8())
                };
                match end {
                    Some(end) if from_left => {
                        found.push(&rest[..end]);
                        rest = &rest[end..];
                    }
                    Some(end) => {
                        found.push(&rest[end..]);
                        rest = &rest[..end];
                    }
                    None => {
                        // The last one keeps the white space on its far side.
                        found.push(rest);
                        break;
                    }
                }
            }
            if found.len() <= limit {
                // Without a limit reached, there is none left on that side.
                if let Some(last) = found.last_mut() {
                    *last = if from_left {
                        last.trim_end_matches(text::is_space)
                    } else {
                        last.trim_start_matches(text::is_space)
                    };
                }
            }
        }
        Some(separator) => {
            let separator = str_arg(name, Some(separator))?;
            if separator.is_empty() {
                return Err(failed("empty separator"));
            }
            vm.fits(text.text().matches(separator.text()).count().min(most))?;
            if from_left {
                found.extend(text.text().splitn(most, separator.text()));
            } else {
                found.extend(text.text().rsplitn(most, separator.text()));
            }
        }
    }
    if !from_left {
        found.reverse();
    }
    parts(vm, text, found.into_iter())
}

fn replace(vm: &Vm, text: &Str, args: CallArgs) -> Res<Value> {
    let [old, new, count] = args.bind("replace", ["old", "new", "count"], 2)?;
    let (old, new) = (str_arg("replace", old)?, str_arg("replace", new)?);
    let count = size_arg("replace", count, -1)?;
    let count = if count < 0 { usize::MAX } else { usize::try_from(count).unwrap_or(usize::MAX) };
    let mut out = vm.buf();
    let mut at = 0;
    let plain = text.text();
    for (start, _) in plain.match_indices(old.text()).take(count) {
        vm.copying(new.text().len() + start - at)?;
        out.push_slice(text, at, start)?;
        out.push_str(&new)?;
        at = start + old.text().len();
    }
    out.push_slice(text, at, plain.len())?;
    Ok(Value::Str(out.finish()))
}

/// The part of a text that a search looks at: its start in bytes and in characters, and the text.
fn searched(text: &Str, start: Option<Value>, stop: Option<Value>) -> Res<Option<(usize, usize, &str)>> {
    let (start, stop) = bounds(start, stop, text.len())?;
    if start > text.len() || start > stop {
        return Ok(None);
    }
    let from = text.byte_at(start);
    Ok(Some((from, start, &text.text()[from..text.byte_at(stop)])))
}

fn affixed(text: &Str, name: &str, args: CallArgs) -> Res<bool> {
    let [affix, start, stop] = args.only::<3>(name, 1)?;
    let part = searched(text, start, stop)?;
    let matches = |affix: &Str| match part {
        Some((_, _, part)) if name == "startswith" => part.starts_with(affix.text()),
        Some((_, _, part)) => part.ends_with(affix.text()),
        None => false,
    };
    match affix.unwrap_or(Value::None) {
        Value::Str(affix) => Ok(matches(&affix)),
        Value::Tuple(affixes) => {
            for affix in &affixes.items {
                let Value::Str(affix) = affix else { return Err(wants_str(name, affix)) };
                if matches(affix) {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        other => {
            let got = other.type_name();
            Err(failed(format!("{name} first arg must be str or a tuple of str, not {got}")))
        }
    }
}

fn search(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    let [wanted, start, stop] = args.only::<3>(name, 1)?;
    let wanted = str_arg(name, wanted)?;
    vm.scanning(text.text().len())?;
    let part = searched(text, start, stop)?;
    if name == "count" {
        let count = part.map_or(0, |(_, _, part)| {
            if wanted.is_empty() { text::count_chars(part) + 1 } else { part.matches(wanted.text()).count() }
        });
        return Ok(Value::Int(count as i128));
    }
    let found = part.and_then(|(_, start, part)| {
        let at = if name.starts_with('r') { part.rfind(wanted.text()) } else { part.find(wanted.text()) };
        Some(start + text::count_chars(&part[..at?]))
    });
    match found {
        Some(at) => Ok(Value::Int(at as i128)),
        None if name.ends_with("index") => Err(failed("substring not found")),
        None => Ok(Value::Int(-1)),
    }
}

/// Adds a character on both sides.
pub(super) fn padded(vm: &Vm, text: &Str, left: usize, right: usize, fill: (char, Origin)) -> Res<Str> {
    vm.copying(text.text().len().saturating_add(left).saturating_add(right))?;
    let mut out = vm.buf();
    let push = |out: &mut StrBuf, count: usize| (0..count).try_for_each(|_| out.push_char(fill.0, fill.1));
    push(&mut out, left)?;
    out.push_str(text)?;
    push(&mut out, right)?;
    Ok(out.finish())
}

fn pad(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    let [width, fill] = args.only::<2>(name, 1)?;
    let width = usize::try_from(size_arg(name, width, 0)?.max(0)).unwrap_or(usize::MAX);
    let fill = match fill {
        Some(fill) if name != "zfill" => {
            let fill = str_arg(name, Some(fill))?;
            let mut chars = fill.text().chars();
            let (Some(c), None) = (chars.next(), chars.next()) else {
                return Err(failed("The fill character must be exactly one character long"));
            };
            (c, fill.origin_at(0))
        }
        _ => (if name == "zfill" { '0' } else { ' ' }, Origin::Template),
    };
    let missing = width.saturating_sub(text.len());
    if missing == 0 {
        return Ok(Value::Str(text.clone()));
    }
    let (left, right) = match name {
        "ljust" => (0, missing),
        "rjust" => (missing, 0),
        "zfill" => {
            let sign = usize::from(text.text().starts_with(['+', '-']));
            let zeros = padded(vm, &Str::empty(), missing, 0, fill)?;
            let mut out = vm.buf();
            out.push_slice(text, 0, sign)?;
            out.push_str(&zeros)?;
            out.push_slice(text, sign, text.text().len())?;
            return Ok(Value::Str(out.finish()));
        }
        // As CPython has it: the odd one is on the left if the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            (left, missing - left)
        }
    };
    padded(vm, text, left, right, fill).map(Value::Str)
}

fn expand_tabs(vm: &Vm, text: &Str, args: CallArgs) -> Res<Value> {
    let [size] = args.bind("expandtabs", ["tabsize"], 0)?;
    let size = usize::try_from(size_arg("expandtabs", size, 8)?.max(0)).unwrap_or(usize::MAX);
    let mut out = vm.buf();
    let mut column = 0;
    for (at, c) in text.text().char_indices() {
        let origin = text.origin_at(at);
        if c == '\t' {
            let count = if size == 0 { 0 } else { size - column % size };
            vm.copying(count)?;
            (0..count).try_for_each(|_| out.push(" ", origin))?;
            column = column.saturating_add(count);
        } else {
            out.push_char(c, origin)?;
            column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
        }
    }
    Ok(Value::Str(out.finish()))
}

/// The integer that a number method or a format takes.
pub(super) fn int_of(value: &Value) -> Res<i128> {
    match value {
        Value::Float(number) => number::to_whole(*number).ok_or_else(number::too_large),
        _ => value.as_int().ok_or_else(|| failed(format!("an integer is required, not {}", value.type_name()))),
    }
}
