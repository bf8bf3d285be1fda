//! Filters that write texts: for HTML and URLs, in a width.

#![allow(clippy::needless_pass_by_value, reason = "all filters have one type")]

use super::Origin;
use super::ast::{Compare, Math};
use super::error::{Res, failed};
use super::filters::{clamped, count_of, escaped, is_true, number_of};
use super::interp::Vm;
use super::object::CallArgs;
use super::string::{Str, StrBuf};
use super::strings::padded;
use super::value::{Value, View};
use super::{methods, ops, text};

#[allow(clippy::cast_possible_truncation, reason = "below 1024")]
pub(super) fn filesizeformat(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [binary] = args.bind("filesizeformat", ["binary"], 0)?;
    let bytes = number_of(vm, &value)?.ok_or_else(|| failed("could not convert the value to float"))?;
    vm.step()?;
    let binary = is_true(binary.as_ref());
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok(Value::text("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::text(format!("{} Bytes", bytes as i64)));
    }
    let mut unit = base;
    let prefixes = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    for (at, prefix) in prefixes.iter().enumerate() {
        unit *= base;
        if bytes < unit || at + 1 == prefixes.len() {
            let prefix = if binary { format!("{}i", prefix.to_uppercase()) } else { (*prefix).into() };
            return Ok(Value::text(format!("{:.1} {prefix}B", base * bytes / unit)));
        }
    }
    Ok(value)
}

pub(super) fn indent(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"], 0)?;
    let Value::Str(text) = value.defined()? else {
        return Err(failed(format!("can only concatenate str (not '{}') to str", value.type_name())));
    };
    let width = match width {
        Some(Value::Str(width)) => width,
        Some(other) => spaces(vm, clamped(count_of(&other)?))?,
        None => spaces(vm, 4)?,
    };
    let (first, blank) = (is_true(first.as_ref()), is_true(blank.as_ref()));
    vm.scanning(text.text().len())?;
    let mut out = vm.buf();
    if first {
        out.push_str(&width)?;
    }
    // The filter adds a line end before it splits: after one that is there, an empty line.
    let closing = text.text().chars().next_back().is_none_or(|c| c != '\r' && text::is_line_end(c));
    let lines = text::lines(text.text()).chain(closing.then_some(""));
    for (at, line) in lines.enumerate() {
        vm.copying(width.text().len() + line.len())?;
        let line = text::without_end(line);
        if at > 0 {
            out.push("\n", Origin::Template)?;
            if blank || !line.is_empty() {
                out.push_str(&width)?;
            }
        }
        if !line.is_empty() {
            let line = text.part(line);
            out.push_str(&line)?;
        }
    }
    Ok(Value::Str(out.finish().with_safe(text.is_safe())))
}

/// So many spaces.
pub(super) fn spaces(vm: &Vm, count: usize) -> Res<Str> {
    padded(vm, &Str::empty(), count, 0, (' ', Origin::Template))
}

pub(super) fn striptags(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("striptags", 0)?;
    let text = vm.str(&value)?.with_safe(false);
    vm.scanning(text.text().len() * 4)?;
    // Comments, then tags; what has no end stays.
    let kept = cut(vm, &cut(vm, &text, "<!--", "-->")?, "<", ">")?;
    let mut words = vm.buf();
    for (at, word) in kept.text().split(text::is_space).filter(|word| !word.is_empty()).enumerate() {
        if at > 0 {
            words.push(" ", Origin::Template)?;
        }
        words.push_str(&kept.part(word))?;
    }
    let mut words = words.finish();
    for (entity, plain) in [("&lt;", "<"), ("&gt;", ">"), ("&#39;", "'"), ("&#34;", "\""), ("&amp;", "&")] {
        if words.text().contains(entity) {
            let args = CallArgs::of(vec![Value::text(entity), Value::text(plain)]);
            if let Value::Str(text) = methods::call(vm, &Value::Str(words.clone()), "replace", args)? {
                words = text;
            }
        }
    }
    Ok(Value::Str(words))
}

/// A text without what lies between two marks.
fn cut(vm: &Vm, text: &Str, open: &str, close: &str) -> Res<Str> {
    let mut kept = vm.buf();
    let mut at = 0;
    while let Some(start) = text.text()[at..].find(open).map(|start| at + start) {
        let Some(end) = text.text()[start..].find(close).map(|end| start + end + close.len()) else { break };
        kept.push_slice(text, at, start)?;
        at = end;
    }
    kept.push_slice(text, at, text.text().len())?;
    Ok(kept.finish())
}

/// Capital letters after white space, hyphens and opening brackets only.
pub(super) fn title(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("title", 0)?;
    let text = vm.str(&value)?;
    vm.scanning(text.text().len() * 8)?;
    let is_break = |c: char| text::is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    let mut out = vm.buf();
    let mut at_start = true;
    for (at, c) in text.text().char_indices() {
        let cased: String = if at_start { c.to_uppercase().collect() } else { c.to_lowercase().collect() };
        out.push(&cased, text.origin_at(at))?;
        at_start = is_break(c);
    }
    Ok(Value::Str(out.finish()))
}

pub(super) fn truncate(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [length, kill, end, leeway] = args.bind("truncate", ["length", "killwords", "end", "leeway"], 0)?;
    let length = length.unwrap_or(Value::Int(255));
    let leeway = leeway.filter(|leeway| !leeway.is_none()).unwrap_or(Value::Int(5));
    let end = end.map_or(Ok(Str::plain("...".into(), Origin::Template)), |end| vm.str(&end))?;
    for (name, number, least) in [("length", &length, end.len()), ("leeway", &leeway, 0)] {
        if !ops::compare(vm, Compare::Ge, number, &Value::Int(least as i128))? {
            return Err(failed(format!("expected {name} >= {least}, got {}", vm.str(number)?.text())));
        }
    }
    let Some(len) = value.len() else {
        return Err(failed(format!("object of type '{}' has no len()", value.type_name())));
    };
    // A number that is not whole is one, as long as nothing is cut by it.
    if ops::compare(vm, Compare::Le, &Value::Int(len as i128), &ops::math(vm, Math::Add, &length, &leeway)?)? {
        return Ok(value);
    }
    let Value::Str(text) = &value else { return Err(failed("can only truncate a string")) };
    vm.scanning(text.text().len())?;
    let mut kept = text.byte_at(clamped(count_of(&length)? - end.len() as i128));
    if !is_true(kill.as_ref()) {
        kept = text.text()[..kept].rfind(' ').unwrap_or(kept);
    }
    ops::add_strings(vm, &text.slice(0, kept), &end).map(Value::Str)
}

fn quote(vm: &Vm, value: &Value, query: bool, out: &mut StrBuf) -> Res<()> {
    let text = vm.str(value)?;
    vm.scanning(text.text().len() * 8)?;
    for (at, c) in text.text().char_indices() {
        let origin = text.origin_at(at);
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '~') || (c == '/' && !query) {
            out.push_char(c, origin)?;
        } else if c == ' ' && query {
            out.push("+", origin)?;
        } else {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                out.push(&format!("%{byte:02X}"), origin)?;
            }
        }
    }
    Ok(())
}

pub(super) fn urlencode(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("urlencode", 0)?;
    let mut out = vm.buf();
    let iterable = !matches!(value, Value::Str(_)) && vm.iterator(&value).is_ok();
    if !iterable {
        quote(vm, &value, false, &mut out)?;
        return Ok(Value::Str(out.finish()));
    }
    let pairs = if let Value::Dict(dict) = value { Value::View(dict, View::Items) } else { value };
    for (at, pair) in vm.collect(&pairs)?.into_iter().enumerate() {
        let pair = vm.collect(&pair)?;
        let [key, value] = pair.as_slice() else { return Err(failed("expected pairs to encode")) };
        if at > 0 {
            out.push("&", Origin::Template)?;
        }
        quote(vm, key, true, &mut out)?;
        out.push("=", Origin::Template)?;
        quote(vm, value, true, &mut out)?;
    }
    Ok(Value::Str(out.finish()))
}

pub(super) fn wordcount(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    args.only::<0>("wordcount", 0)?;
    let text = vm.str(&value)?;
    vm.scanning(text.text().len() * 4)?;
    let words = text.text().split(|c| !text::is_word(c)).filter(|word| !word.is_empty()).count();
    Ok(Value::Int(words as i128))
}

pub(super) fn xmlattr(vm: &Vm, value: Value, args: CallArgs) -> Res<Value> {
    let [autospace] = args.bind("xmlattr", ["autospace"], 0)?;
    let Value::Dict(dict) = value.defined()? else {
        return Err(failed(format!("'{}' object has no attribute 'items'", value.type_name())));
    };
    let mut out = vm.buf();
    for (key, value) in &dict.entries {
        vm.step()?;
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let Value::Str(key) = key else { return Err(failed("expected string or bytes-like object")) };
        let invalid = |c: char| matches!(c, ' ' | '\t'..='\r' | '/' | '>' | '=');
        if key.text().contains(invalid) {
            return Err(failed(format!("Invalid character in attribute name: '{}'", key.text())));
        }
        if out.len() > 0 || autospace.as_ref().is_none_or(Value::is_true) {
            out.push(" ", Origin::Template)?;
        }
        out.push_str(&escaped(vm, key)?)?;
        out.push("=\"", Origin::Template)?;
        out.push_str(&escaped(vm, &vm.str(value)?)?)?;
        out.push("\"", Origin::Template)?;
    }
    Ok(Value::Str(out.finish()))
}
