//! The filters of Jinja 2 by name, and those of one value. Others: `lists.rs`, `texts.rs`, `wrap.rs`, `json.rs`.

#![allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps, reason = "all filters have one type")]

use std::rc::Rc;

use super::dict::Dict;
use super::error::{Res, failed, unsupported};
use super::interp::Vm;
use super::object::CallArgs;
use super::string::Str;
use super::value::Value;
use super::{json, lists, methods, number, ops, printf, texts, wrap};

pub(super) type Filter = fn(&Vm, Value, CallArgs) -> Res<Value>;

/// The filter of a name, if Jinja 2 has it.
pub(super) fn find(name: &str) -> Option<Filter> {
    Some(match name {
        "abs" => abs,
        "attr" => attr,
        "batch" => lists::batch,
        "capitalize" => |vm, value, args| method(vm, &value, "capitalize", args, 0),
        "center" => |vm, value, args| {
            let [width] = args.bind("center", ["width"], 0)?;
            method(vm, &value, "center", CallArgs::of(vec![width.unwrap_or(Value::Int(80))]), 1)
        },
        "count" | "length" => length,
        "d" | "default" => default,
        "dictsort" => lists::dictsort,
        "e" | "escape" => |vm, value, args| {
            args.only::<0>("escape", 0)?;
            escaped(vm, &vm.str(&value)?).map(Value::Str)
        },
        "filesizeformat" => texts::filesizeformat,
        "first" => lists::first,
        "float" => float,
        "forceescape" => |vm, value, args| {
            args.only::<0>("forceescape", 0)?;
            escaped(vm, &vm.str(&value)?.with_safe(false)).map(Value::Str)
        },
        "format" => format,
        "groupby" => lists::groupby,
        "indent" => texts::indent,
        "int" => int,
        "items" => lists::items,
        "join" => lists::join,
        "last" => lists::last,
        "list" => |vm, value, args| {
            args.only::<0>("list", 0)?;
            vm.collect(&value).map(Value::list)
        },
        "lower" => |vm, value, args| method(vm, &value, "lower", args, 0),
        "map" => lists::map,
        "max" => |vm, value, args| lists::extreme(vm, &value, args, true),
        "min" => |vm, value, args| lists::extreme(vm, &value, args, false),
        "pprint" => |_, _, _| Err(unsupported("the filter `pprint`")),
        "random" => |_, _, _| Err(unsupported("the filter `random`")),
        "reject" => |vm, value, args| lists::select(vm, value, args, false, false),
        "rejectattr" => |vm, value, args| lists::select(vm, value, args, true, false),
        "replace" => replace,
        "reverse" => lists::reverse,
        "round" => round,
        "safe" => |vm, value, args| {
            args.only::<0>("safe", 0)?;
            Ok(Value::Str(vm.str(&value)?.with_safe(true)))
        },
        "select" => |vm, value, args| lists::select(vm, value, args, false, true),
        "selectattr" => |vm, value, args| lists::select(vm, value, args, true, true),
        "slice" => lists::slice,
        "sort" => lists::sort,
        "string" => |vm, value, args| {
            args.only::<0>("string", 0)?;
            vm.str(&value).map(Value::Str)
        },
        "striptags" => texts::striptags,
        "sum" => lists::sum,
        "title" => texts::title,
        "tojson" => json::tojson,
        "trim" => |vm, value, args| {
            let [chars] = args.bind("trim", ["chars"], 0)?;
            method(vm, &value, "strip", CallArgs::of(vec![chars.unwrap_or(Value::None)]), 1)
        },
        "truncate" => texts::truncate,
        "unique" => lists::unique,
        "upper" => |vm, value, args| method(vm, &value, "upper", args, 0),
        "urlencode" => texts::urlencode,
        "urlize" => |_, _, _| Err(unsupported("the filter `urlize`")),
        "wordcount" => texts::wordcount,
        "wordwrap" => wrap::wordwrap,
        "xmlattr" => texts::xmlattr,
        _ => return None,
    })
}

/// A method of the value's text.
fn method(vm: &Vm, value: &Value, name: &'static str, args: CallArgs, allowed: usize) -> Res<Value> {
    if args.positional.len() > allowed {
        return Err(failed(format!("the filter `{name}` takes no arguments")));
    }
    methods::call(vm, &Value::Str(vm.str(value)?), name, args)
}

/// A number of elements; what is too large for one is larger than any limit.
pub(super) fn count_of(value: &Value) -> Res<i128> {
    value.defined()?.as_int().ok_or_else(|| failed(format!("'{}' object is not an integer", value.type_name())))
}

/// What Python's `float` makes of a value; `None` where it would not.
pub(super) fn number_of(vm: &Vm, value: &Value) -> Res<Option<f64>> {
    match value.defined()? {
        Value::Str(text) => {
            vm.scanning(text.text().len() * 4)?;
            Ok(number::parse_float(text.text()))
        }
        other => Ok(other.as_float()),
    }
}

pub(super) fn clamped(number: i128) -> usize {
    usize::try_from(number.max(0)).unwrap_or(usize::MAX)
}

/// A text for HTML; markup stays as it is.
pub(super) fn escaped(vm: &Vm, text: &Str) -> Res<Str> {
    if text.is_safe() {
        return Ok(text.clone());
    }
    vm.scanning(text.text().len())?;
    let mut out = vm.buf();
    let mut plain = 0;
    for (at, c) in text.text().char_indices() {
        let entity = match c {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            '\'' => "&#39;",
            '"' => "&#34;",
            _ => continue,
        };
        out.push_slice(text, plain, at)?;
        out.push(entity, text.origin_at(at))?;
        plain = at + 1;
    }
    out.push_slice(text, plain, text.text().len())?;
    Ok(out.finish().with_safe(true))
}

pub(super) fn is_true(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}

/// A flag that Python takes as a number.
pub(super) fn flag(value: Option<Value>) -> Res<bool> {
    value.map_or(Ok(false), |value| Ok(count_of(&value)? != 0))
}

fn abs(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("abs", 0)?;
    ops::unary(&value, "abs()", i128::checked_abs, f64::abs)
}

fn attr(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [name] = args.bind("attr", ["name"], 1)?;
    let Some(Value::Str(name)) = name else { return Err(failed("attribute name must be string")) };
    match methods::own_attribute(vm, &value, &name)? {
        Some(found) => Ok(found),
        None => Ok(methods::missing(&value, &Value::Str(name))),
    }
}

fn length(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("len", 0)?;
    match value.len() {
        Some(len) => Ok(Value::Int(len as i128)),
        None => Err(failed(format!("object of type '{}' has no len()", value.type_name()))),
    }
}

fn default(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [default, boolean] = args.bind("default", ["default_value", "boolean"], 0)?;
    if value.is_undefined() || (is_true(boolean.as_ref()) && !value.is_true()) {
        return Ok(default.unwrap_or_else(|| Value::text("")));
    }
    Ok(value)
}

fn float(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [default] = args.bind("float", ["default"], 0)?;
    let found = number_of(vm, &value)?;
    Ok(found.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
}

fn int(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [default, base] = args.bind("int", ["default", "base"], 0)?;
    let base = base.map_or(Some(10), |base| base.as_int());
    let whole = |number: f64| {
        if number.is_finite() { number::to_whole(number).map(Some).ok_or_else(number::too_large) } else { Ok(None) }
    };
    let found = match &value {
        Value::Str(text) => {
            vm.scanning(text.text().len() * 4)?;
            let base =
                base.and_then(|base| u32::try_from(base).ok()).filter(|base| *base == 0 || (2..=36).contains(base));
            let read = base.map_or(Ok(None), |base| number::parse_int(text.text(), base))?;
            match read {
                Some(number) => Some(number),
                None => number::parse_float(text.text()).map_or(Ok(None), whole)?,
            }
        }
        Value::Float(number) if number.is_infinite() => {
            return Err(failed("cannot convert float infinity to integer"));
        }
        Value::Float(number) => whole(*number)?,
        _ => value.defined()?.as_int(),
    };
    Ok(found.map_or_else(|| default.unwrap_or(Value::Int(0)), Value::Int))
}

fn format(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let text = vm.str(&value)?;
    if !args.named.is_empty() && !args.positional.is_empty() {
        return Err(failed("can't handle positional and keyword arguments at the same time"));
    }
    let values = if args.named.is_empty() {
        Value::tuple(args.positional)
    } else {
        let mut dict = Dict::default();
        for (name, value) in args.named {
            dict.insert(Value::Str(name), value)?;
        }
        Value::Dict(Rc::new(dict))
    };
    printf::format(vm, &text, &values).map(Value::Str)
}

fn replace(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [old, new, count] = args.bind("replace", ["old", "new", "count"], 2)?;
    let mut parts = Vec::new();
    for part in [Some(value), old, new].into_iter().flatten() {
        parts.push(Value::Str(vm.str(&part)?.with_safe(false)));
    }
    let text = parts.remove(0);
    parts.extend(count.filter(|count| !count.is_none()));
    methods::call(vm, &text, "replace", CallArgs::of(parts))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "Python rounds, too")]
fn round(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [precision, how] = args.bind("round", ["precision", "method"], 0)?;
    let how = how.map_or(Some("common".to_owned()), |how| how.as_str().map(|how| how.text().to_owned()));
    let places = match &precision {
        Some(Value::None) => None,
        Some(precision) => Some(count_of(precision)?.clamp(-10_000, 10_000) as i64),
        None => Some(0),
    };
    let value = value.defined()?;
    match (how.as_deref(), value.as_int(), value.as_float(), places) {
        (Some("common"), Some(number), _, places) => number::round_int(number, places.unwrap_or(0)).map(Value::Int),
        (Some("common"), None, Some(number), Some(places)) => Ok(Value::Float(number::round(number, places))),
        (Some("common"), None, Some(number), None) => {
            number::to_whole(number::round(number, 0)).map(Value::Int).ok_or_else(number::too_large)
        }
        (Some(how @ ("ceil" | "floor")), _, Some(number), Some(places)) => {
            let scale = 10f64.powi(places as i32);
            let scaled = number * scale;
            Ok(Value::Float(if how == "ceil" { scaled.ceil() } else { scaled.floor() } / scale))
        }
        (Some("common" | "ceil" | "floor"), ..) => {
            Err(failed(format!("type {} doesn't define __round__ method", value.type_name())))
        }
        _ => Err(failed("method must be common, ceil or floor")),
    }
}
