//! Filters over the elements of a list, a dictionary or a generator.

#![allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps, reason = "all filters have one type")]

use std::rc::Rc;

use super::dict::Dict;
use super::error::{Res, failed};
use super::filters::{count_of, find, flag, is_true};
use super::interp::Vm;
use super::iter::{Iter, Lazy, SHOWN_MAP, SHOWN_SELECT, SHOWN_SLICE};
use super::object::CallArgs;
use super::ops;
use super::string::Str;
use super::tests;
use super::value::{Seq, Value, View};
use super::{methods, number, text};

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

pub(super) fn batch(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [size, fill] = args.bind("batch", ["linecount", "fill_with"], 1)?;
    let (size, fill) = (size.unwrap_or(Value::None), fill.filter(|fill| !fill.is_none()));
    Ok(match size.as_whole() {
        // Before the first element, none is as many as wanted.
        Some(0) => {
            let items = vm.collect(&value)?;
            let batches = if items.is_empty() { Vec::new() } else { vec![Value::list(Vec::new()), Value::list(items)] };
            Value::Iter(Iter::queue("generator", batches))
        }
        _ => Iter::lazy(value, Lazy::Batch(size, fill)),
    })
}

pub(super) fn slice(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [slices, fill] = args.bind("slice", ["slices", "fill_with"], 1)?;
    let lazy = match count_of(&slices.unwrap_or(Value::None)) {
        Ok(slices) => Lazy::Columns(slices, fill.filter(|fill| !fill.is_none())),
        Err(error) => Lazy::Wrong(SHOWN_SLICE, error),
    };
    Ok(Iter::lazy(value, lazy))
}

pub(super) fn dictsort(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn first(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("first", 0)?;
    let found = vm.iterator(&value)?.next(vm)?;
    Ok(found.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

/// The elements of what Python can reverse.
fn reversible(vm: &Vm, value: &Value) -> Option<Res<Vec<Value>>> {
    (value.len().is_some() && !matches!(value, Value::Object(_))).then(|| vm.collect(value))
}

pub(super) fn last(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("last", 0)?;
    let Some(items) = reversible(vm, &value) else {
        return Err(failed(format!("'{}' object is not reversible", value.type_name())));
    };
    Ok(items?.pop().unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

pub(super) fn reverse(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn groupby(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn items(_: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("items", 0)?;
    Ok(Iter::lazy(value, Lazy::Items))
}

pub(super) fn join(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn map(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn select(vm: &Vm, value: Value, args: CallArgs, by_attribute: bool, keep: bool) -> Res<Value> {
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

pub(super) fn unique(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"], 0)?;
    let getter = Getter::new(vm, attribute, None, !is_true(case.as_ref()))?;
    Ok(Iter::lazy(value, Lazy::Unique(getter, Dict::default())))
}

pub(super) fn extreme(vm: &Vm, value: &Value, args: CallArgs, largest: bool) -> Res<Value> {
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

pub(super) fn sort(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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

pub(super) fn sum(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
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
