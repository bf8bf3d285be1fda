//! The filters of Jinja 2, and `tojson` as transformers replaces it.

#![allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps, reason = "all filters have one type")]

use std::rc::Rc;

use super::error::{Res, failed, unsupported};
use super::interp::Vm;
use super::iter::{Iter, Lazy, SHOWN_MAP, SHOWN_SELECT, SHOWN_SLICE};
use super::object::CallArgs;
use super::ops;
use super::string::Str;
use super::tests;
use super::value::{Dict, Seq, Value, View};
use super::{json, methods, number, printf, text, texts, wrap};

pub(super) type Filter = fn(&Vm, Value, CallArgs) -> Res<Value>;

/// The filter of a name, if Jinja 2 has it.
pub(super) fn find(name: &str) -> Option<Filter> {
    Some(match name {
        "abs" => abs,
        "attr" => attr,
        "batch" => batch,
        "capitalize" => |vm, value, args| method(vm, &value, "capitalize", args, 0),
        "center" => |vm, value, args| {
            let [width] = args.bind("center", ["width"], 0)?;
            method(vm, &value, "center", CallArgs::one(width.unwrap_or(Value::Int(80))), 1)
        },
        "count" | "length" => length,
        "d" | "default" => default,
        "dictsort" => dictsort,
        "e" | "escape" => |vm, value, args| {
            args.only::<0>("escape", 0)?;
            escaped(vm, &vm.str(&value)?).map(Value::Str)
        },
        "filesizeformat" => texts::filesizeformat,
        "first" => first,
        "float" => float,
        "forceescape" => |vm, value, args| {
            args.only::<0>("forceescape", 0)?;
            escaped(vm, &vm.str(&value)?.with_safe(false)).map(Value::Str)
        },
        "format" => format,
        "groupby" => groupby,
        "indent" => texts::indent,
        "int" => int,
        "items" => items,
        "join" => join,
        "last" => last,
        "list" => |vm, value, args| {
            args.only::<0>("list", 0)?;
            vm.collect(&value).map(Value::list)
        },
        "lower" => |vm, value, args| method(vm, &value, "lower", args, 0),
        "map" => map,
        "max" => |vm, value, args| extreme(vm, &value, args, true),
        "min" => |vm, value, args| extreme(vm, &value, args, false),
        "pprint" => |_, _, _| Err(unsupported("the filter `pprint`")),
        "random" => |_, _, _| Err(unsupported("the filter `random`")),
        "reject" => |vm, value, args| select(vm, value, args, false, false),
        "rejectattr" => |vm, value, args| select(vm, value, args, true, false),
        "replace" => replace,
        "reverse" => reverse,
        "round" => round,
        "safe" => |vm, value, args| {
            args.only::<0>("safe", 0)?;
            Ok(Value::Str(vm.str(&value)?.with_safe(true)))
        },
        "select" => |vm, value, args| select(vm, value, args, false, true),
        "selectattr" => |vm, value, args| select(vm, value, args, true, true),
        "slice" => slice,
        "sort" => sort,
        "string" => |vm, value, args| {
            args.only::<0>("string", 0)?;
            vm.str(&value).map(Value::Str)
        },
        "striptags" => texts::striptags,
        "sum" => sum,
        "title" => texts::title,
        "tojson" => json::tojson,
        "trim" => |vm, value, args| {
            let [chars] = args.bind("trim", ["chars"], 0)?;
            method(vm, &value, "strip", CallArgs::one(chars.unwrap_or(Value::None)), 1)
        },
        "truncate" => texts::truncate,
        "unique" => unique,
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

/// What `attribute=` names: a path of attributes and numbers.
#[derive(Debug)]
pub(super) struct Getter {
    parts: Vec<Value>,
    default: Option<Value>,
    ignore_case: bool,
}

impl Getter {
    fn new(vm: &Vm, attribute: Option<Value>, default: Option<Value>, ignore_case: bool) -> Res<Self> {
        let parts = match attribute {
            None | Some(Value::None) => Vec::new(),
            Some(Value::Str(path)) => path
                .text()
                .split('.')
                .map(|part| {
                    vm.step()?;
                    if part.is_empty() || !part.chars().all(text::is_digit) {
                        return Ok(Value::Str(path.part(part)));
                    }
                    let number = number::parse_int(part, 10)?;
                    let invalid = || failed(format!("invalid literal for int() with base 10: '{part}'"));
                    number.map(Value::Int).ok_or_else(invalid)
                })
                .collect::<Res<_>>()?,
            Some(other) => vec![other],
        };
        Ok(Self { parts, default: default.filter(|value| !value.is_none()), ignore_case })
    }

    pub fn get(&self, vm: &Vm, value: &Value) -> Res<Value> {
        let mut value = value.clone();
        for part in &self.parts {
            value = methods::item(vm, &value, part)?;
            if let (Some(default), true) = (&self.default, value.is_undefined()) {
                value = default.clone();
            }
        }
        match &value {
            Value::Str(_) if self.ignore_case => methods::call(vm, &value, "lower", CallArgs::default()),
            _ => Ok(value),
        }
    }
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
    match (value.defined()?.as_int(), &value) {
        (Some(number), _) => number.checked_abs().map(Value::Int).ok_or_else(number::too_large),
        (None, Value::Float(number)) => Ok(Value::Float(number.abs())),
        _ => Err(failed(format!("bad operand type for abs(): '{}'", value.type_name()))),
    }
}

fn attr(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [name] = args.bind("attr", ["name"], 1)?;
    let Some(Value::Str(name)) = name else { return Err(failed("attribute name must be string")) };
    match methods::own_attribute(vm, &value, &name)? {
        Some(found) => Ok(found),
        None => Ok(methods::missing(&value, &Value::Str(name))),
    }
}

fn batch(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [size, fill] = args.bind("batch", ["linecount", "fill_with"], 1)?;
    let (size, fill) = (size.unwrap_or(Value::None), fill.filter(|fill| !fill.is_none()));
    Ok(match size.as_whole() {
        // Before the first element, none is as many as wanted.
        Some(0) => {
            let items = vm.collect(&value)?;
            let batches = if items.is_empty() { Vec::new() } else { vec![Value::list(Vec::new()), Value::list(items)] };
            Value::Iter(Iter::queue("generator", batches))
        }
        Some(1..) => Iter::lazy(value, Lazy::Batch(clamped(size.as_whole().unwrap_or(0)), fill)),
        _ if fill.is_some() && size.as_float().is_none() => Err(failed("the number of a batch must be a number"))?,
        _ => Iter::lazy(value, Lazy::Batch(usize::MAX, None)),
    })
}

fn slice(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [slices, fill] = args.bind("slice", ["slices", "fill_with"], 1)?;
    let lazy = match count_of(&slices.unwrap_or(Value::None)) {
        Ok(slices) => Lazy::Columns(slices, fill.filter(|fill| !fill.is_none())),
        Err(error) => Lazy::Wrong(SHOWN_SLICE, error),
    };
    Ok(Iter::lazy(value, lazy))
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

fn dictsort(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"], 0)?;
    let Value::Dict(dict) = value.defined()? else {
        return Err(failed(format!("'{}' object has no attribute 'items'", value.type_name())));
    };
    let by_value = match by.as_ref().map(|by| by.as_str().map(Str::text)) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        _ => return Err(failed("You can only sort by either \"key\" or \"value\"")),
    };
    let getter = Getter::new(vm, None, None, !is_true(case.as_ref()))?;
    let pairs = dict.entries.iter().map(|(key, value)| {
        vm.step()?;
        let sort_key = getter.get(vm, if by_value { value } else { key })?;
        Ok((sort_key, Value::tuple(vec![key.clone(), value.clone()])))
    });
    let pairs = pairs.collect::<Res<_>>()?;
    ops::sort(vm, pairs, flag(reverse)?).map(Value::list)
}

fn first(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("first", 0)?;
    let found = vm.iterator(&value)?.next(vm)?;
    Ok(found.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

/// The elements of what Python can reverse.
fn reversible(vm: &Vm, value: &Value) -> Option<Res<Vec<Value>>> {
    let known = matches!(
        value,
        Value::Undefined(_)
            | Value::Str(_)
            | Value::List(_)
            | Value::Tuple(_)
            | Value::Range(_)
            | Value::Dict(_)
            | Value::View(..)
    );
    known.then(|| vm.collect(value))
}

fn last(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("last", 0)?;
    let Some(items) = reversible(vm, &value) else {
        return Err(failed(format!("'{}' object is not reversible", value.type_name())));
    };
    Ok(items?.pop().unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

fn reverse(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("reverse", 0)?;
    if let Value::Str(_) = value {
        return ops::slice(vm, &value, &[Value::None, Value::None, Value::Int(-1)]);
    }
    if let Some(items) = reversible(vm, &value) {
        let mut items = items?;
        items.reverse();
        let name = match value {
            Value::Dict(_) | Value::View(_, View::Keys) => "dict_reversekeyiterator object",
            Value::View(_, View::Values) => "dict_reversevalueiterator object",
            Value::View(_, View::Items) => "dict_reverseitemiterator object",
            Value::List(_) => "list_reverseiterator object",
            Value::Range(_) => "range_iterator object",
            _ => "reversed object",
        };
        return Ok(Value::Iter(Iter::queue(name, items)));
    }
    let mut items = vm.iterator(&value).map_err(|_| failed("argument must be iterable"))?.collect(vm)?;
    items.reverse();
    Ok(Value::list(items))
}

fn float(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [default] = args.bind("float", ["default"], 0)?;
    let found = match &value {
        Value::Str(text) => {
            vm.scanning(text.text().len() * 4)?;
            number::parse_float(text.text())
        }
        _ => value.defined()?.as_float(),
    };
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

fn groupby(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [attribute, default, case] = args.bind("groupby", ["attribute", "default", "case_sensitive"], 1)?;
    let ignore_case = !is_true(case.as_ref());
    let getter = Getter::new(vm, attribute, default, ignore_case)?;
    let shown = Getter { parts: getter.parts.clone(), default: getter.default.clone(), ignore_case: false };
    let mut keyed = Vec::new();
    for item in vm.collect(&value)? {
        vm.work(16)?;
        keyed.push((getter.get(vm, &item)?, item));
    }
    let sorted = ops::sort(vm, keyed, false)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for item in sorted {
        let key = getter.get(vm, &item)?;
        match groups.last_mut() {
            Some((last, group)) if last.is_same(&key) || ops::equal(vm, last, &key)? => group.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut found = Vec::new();
    for (key, group) in groups {
        let key = if ignore_case { shown.get(vm, &group[0])? } else { key };
        found.push(Value::Tuple(Rc::new(Seq::new(vec![key, Value::list(group)], true))));
    }
    Ok(Value::list(found))
}

fn items(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("items", 0)?;
    Ok(Iter::lazy(value, Lazy::Items))
}

fn join(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"], 0)?;
    let separator = separator.map_or(Ok(Str::empty()), |separator| vm.str(&separator))?;
    let getter = Getter::new(vm, attribute, None, false)?;
    let iter = vm.iterator(&value)?;
    let mut out = vm.buf();
    let mut first = true;
    while let Some(item) = iter.next(vm)? {
        if !first {
            out.push_str(&separator)?;
        }
        first = false;
        let item = getter.get(vm, &item)?;
        vm.work(4)?;
        let part = vm.str(&item)?;
        vm.copying(separator.text().len() + part.text().len())?;
        out.push_str(&part)?;
    }
    Ok(Value::Str(out.finish()))
}

fn map(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let lazy = mapping(vm, args).unwrap_or_else(|error| Lazy::Wrong(SHOWN_MAP, error));
    Ok(Iter::lazy(value, lazy))
}

fn mapping(vm: &Vm, mut args: CallArgs) -> Res<Lazy> {
    if args.positional.is_empty() && args.named.iter().any(|(name, _)| name.text() == "attribute") {
        let [attribute, default] = args.bind("map", ["attribute", "default"], 1)?;
        return Ok(Lazy::Attr(Getter::new(vm, attribute, default, false)?));
    }
    if args.positional.is_empty() {
        return Err(failed("map requires a filter argument"));
    }
    let name = args.positional.remove(0);
    match name.as_str().and_then(|name| find(name.text())) {
        Some(filter) => Ok(Lazy::Filter(filter, args)),
        None => Err(failed(format!("No filter named '{}'.", vm.str(&name)?.text()))),
    }
}

fn select(vm: &Vm, value: Value, args: CallArgs, by_attribute: bool, keep: bool) -> Res<Value> {
    let lazy = selection(vm, args, by_attribute, keep).unwrap_or_else(|error| Lazy::Wrong(SHOWN_SELECT, error));
    Ok(Iter::lazy(value, lazy))
}

fn selection(vm: &Vm, mut args: CallArgs, by_attribute: bool, keep: bool) -> Res<Lazy> {
    let getter = if by_attribute {
        if args.positional.is_empty() {
            return Err(failed("Missing parameter for attribute name"));
        }
        Some(Getter::new(vm, Some(args.positional.remove(0)), None, false)?)
    } else {
        None
    };
    if args.positional.is_empty() {
        return Ok(Lazy::Select(getter, None, keep));
    }
    let name = args.positional.remove(0);
    match name.as_str().and_then(|name| tests::find(name.text())) {
        Some(test) => Ok(Lazy::Select(getter, Some((test, args)), keep)),
        None => Err(failed(format!("No test named '{}'.", vm.str(&name)?.text()))),
    }
}

fn unique(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"], 0)?;
    let getter = Getter::new(vm, attribute, None, !is_true(case.as_ref()))?;
    Ok(Iter::lazy(value, Lazy::Unique(getter, Dict::default())))
}

fn extreme(vm: &Vm, value: &Value, args: CallArgs, largest: bool) -> Res<Value> {
    let [case, attribute] = args.bind("min", ["case_sensitive", "attribute"], 0)?;
    let iter = vm.iterator(value)?;
    let getter = Getter::new(vm, attribute, None, !is_true(case.as_ref()))?;
    let mut best: Option<(Value, Value)> = None;
    while let Some(item) = iter.next(vm)? {
        let key = getter.get(vm, &item)?;
        let better = match &best {
            None => true,
            Some((last, _)) if largest => ops::order(vm, ">", &key, last)?.is_some_and(std::cmp::Ordering::is_gt),
            Some((last, _)) => ops::order(vm, "<", &key, last)?.is_some_and(std::cmp::Ordering::is_lt),
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map_or_else(|| Value::undefined("No aggregated item, sequence was empty."), |(_, item)| item))
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

fn sort(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [reverse, case, attribute] = args.bind("sort", ["reverse", "case_sensitive", "attribute"], 0)?;
    let ignore_case = !is_true(case.as_ref());
    let getters: Vec<Getter> = match attribute {
        Some(Value::Str(names)) => names
            .text()
            .split(',')
            .map(|name| {
                vm.step()?;
                Getter::new(vm, Some(Value::Str(names.part(name))), None, ignore_case)
            })
            .collect::<Res<_>>()?,
        other => vec![Getter::new(vm, other, None, ignore_case)?],
    };
    let mut keyed = Vec::new();
    for item in vm.collect(&value)? {
        let keys = getters.iter().map(|getter| getter.get(vm, &item)).collect::<Res<Vec<_>>>()?;
        keyed.push((Value::list(keys), item));
        vm.step()?;
    }
    ops::sort(vm, keyed, flag(reverse)?).map(Value::list)
}

fn sum(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"], 0)?;
    let getter = Getter::new(vm, attribute, None, false)?;
    let mut total = start.unwrap_or(Value::Int(0));
    if let Value::Str(_) = total {
        return Err(failed("sum() can't sum strings [use ''.join(seq) instead]"));
    }
    let iter = vm.iterator(&value)?;
    while let Some(item) = iter.next(vm)? {
        total = ops::math(vm, super::ast::Math::Add, &total, &getter.get(vm, &item)?)?;
    }
    Ok(total)
}
