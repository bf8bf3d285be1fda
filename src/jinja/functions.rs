//! The functions of every template: Jinja 2's globals and those that transformers adds.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::Write as _;

use chrono::{Local, NaiveDateTime};

use super::Origin;
use super::dict::Dict;
use super::error::{Res, failed, limit, refused, unsupported};
use super::interp::Vm;
use super::object::{CallArgs, Object};
use super::value::{Range, Seq, Value};

/// What the sandbox of Jinja 2 allows.
const MAX_RANGE: i64 = 100_000;

/// Each of its directives may grow tenfold.
const MAX_TIME_FORMAT: usize = 10_000;

pub(super) fn globals() -> HashMap<String, Value> {
    ["range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now"]
        .map(|name| (name.to_owned(), Value::object(Object::Function(name))))
        .into()
}

pub(super) fn call(vm: &Vm, name: &str, args: CallArgs) -> Res<Value> {
    match name {
        "range" => range(args),
        "dict" => dict(vm, args).map(|dict| Value::Dict(dict.into())),
        "namespace" => dict(vm, args).map(|attrs| vm.namespace(attrs)),
        "cycler" => {
            if args.positional.is_empty() {
                return Err(failed("at least one item has to be provided"));
            }
            if !args.named.is_empty() {
                return Err(failed("cycler() takes no keyword arguments"));
            }
            Ok(Value::object(Object::Cycler(Seq::new(args.positional, false).into(), Cell::new(0))))
        }
        "joiner" => {
            let [separator] = args.bind("joiner", ["sep"], 0)?;
            let separator = separator.unwrap_or_else(|| Value::text(", "));
            Ok(Value::object(Object::Joiner(separator, Cell::new(false))))
        }
        "raise_exception" => {
            let [message] = args.bind("raise_exception", ["message"], 1)?;
            let message = vm.str(&message.unwrap_or(Value::None))?;
            Err(refused(message.text()))
        }
        "strftime_now" => {
            let [format] = args.bind("strftime_now", ["format"], 1)?;
            let Some(Value::Str(format)) = format else { return Err(failed("strftime_now() wants a string")) };
            vm.scanning(format.text().len() * 16)?;
            if format.text().len() > MAX_TIME_FORMAT {
                return Err(limit(format!("a format of the time is longer than {MAX_TIME_FORMAT} bytes")));
            }
            let now = vm.now.unwrap_or_else(|| Local::now().naive_local());
            let mut text = vm.buf();
            text.push(&strftime(now, format.text()), Origin::Template)?;
            Ok(Value::Str(text.finish()))
        }
        _ => Err(unsupported(format!("the function `{name}`"))),
    }
}

fn range(args: CallArgs) -> Res<Value> {
    let [first, second, step] = args.only::<3>("range", 1)?;
    let number = |value: Option<Value>| match value {
        None => Ok(None),
        Some(value) => match value.defined()?.as_int() {
            Some(number) => Ok(Some(number)),
            None => Err(failed(format!("'{}' object cannot be interpreted as an integer", value.type_name()))),
        },
    };
    let (first, second, step) = (number(first)?.unwrap_or(0), number(second)?, number(step)?.unwrap_or(1));
    let (start, stop) = second.map_or((0, first), |second| (first, second));
    if step == 0 {
        return Err(failed("range() arg 3 must not be zero"));
    }
    let span = if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
    let len = if span <= 0 { 0 } else { (span - 1) / step.saturating_abs() + 1 };
    if len > i128::from(MAX_RANGE) {
        return Err(failed(format!("Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE}).")));
    }
    let small = |number: i128| i64::try_from(number).map_err(|_| unsupported("a range of large numbers"));
    Ok(Value::Range(Range { start: small(start)?, stop: small(stop)?, step: small(step)?, len: small(len)? }))
}

/// What `dict(...)` makes of its arguments.
fn dict(vm: &Vm, mut args: CallArgs) -> Res<Dict> {
    if args.positional.len() > 1 {
        return Err(failed(format!("dict expected at most 1 argument, got {}", args.positional.len())));
    }
    let mut dict = Dict::default();
    match args.positional.pop() {
        None => {}
        Some(Value::Dict(other)) => {
            for (key, value) in &other.entries {
                vm.work(8)?;
                dict.insert(key.clone(), value.clone())?;
            }
        }
        Some(pairs) => {
            for pair in vm.collect(&pairs)? {
                vm.work(8)?;
                let mut pair = vm.collect(&pair)?;
                let (Some(value), Some(key), true) = (pair.pop(), pair.pop(), pair.is_empty()) else {
                    return Err(failed("dictionary update sequence elements must have length 2"));
                };
                vm.keying(&key)?;
                dict.insert(key, value)?;
            }
        }
    }
    for (name, value) in args.named {
        vm.work(8)?;
        vm.copying(name.text().len())?;
        dict.insert(Value::Str(name), value)?;
    }
    Ok(dict)
}

/// The time as C's `strftime` writes it in the C locale; what it does not know stays as it is.
fn strftime(now: NaiveDateTime, format: &str) -> String {
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let flag = rest[1..].chars().next().filter(|c| matches!(c, '-' | '_' | '0' | '^' | '#'));
        let Some(directive) = rest[1 + flag.map_or(0, char::len_utf8)..].chars().next() else { break };
        let len = 1 + flag.map_or(0, char::len_utf8) + directive.len_utf8();
        let known = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYP%";
        if directive == 'f' {
            let _ = write!(text, "{}", now.format("%6f"));
        } else if matches!(directive, 'z' | 'Z') {
            // The time has no zone.
        } else if known.contains(directive) {
            let flag_of_number =
                flag.filter(|c| matches!(c, '-' | '_' | '0') && !"aAbBcDFhnprRtTxXP%".contains(directive));
            let item = flag_of_number.map_or(format!("%{directive}"), |flag| format!("%{flag}{directive}"));
            let item = now.format(&item).to_string();
            match flag {
                Some('^') => text.push_str(&item.to_uppercase()),
                Some('#') if directive == 'p' => text.push_str(&item.to_lowercase()),
                Some('#') if "aAbBh".contains(directive) => text.push_str(&item.to_uppercase()),
                _ => text.push_str(&item),
            }
        } else {
            text.push_str(&rest[..len]);
        }
        rest = &rest[len..];
    }
    text.push_str(rest);
    text
}
