//! The methods of Python's strings. Characters keep their origin.

use super::Origin;
use super::error::{Res, failed, unsupported};
use super::filters::{clamped, escaped, flag};
use super::interp::Vm;
use super::methods::bounds;
use super::object::CallArgs;
use super::string::{Str, StrBuf};
use super::value::Value;
use super::{format, text};

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

/// How often at most; without end if it is not said, or negative.
fn limit_arg(name: &str, value: Option<Value>) -> Res<usize> {
    let limit = size_arg(name, value, -1)?;
    Ok(if limit < 0 { usize::MAX } else { clamped(limit) })
}

/// Calls a method. Markup escapes what it takes and stays markup.
pub(super) fn call(vm: &Vm, text: &Str, name: &'static str, mut args: CallArgs) -> Res<Value> {
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
        "upper" => mapped(vm, text, name, args, |c, out| out.extend(c.to_uppercase())).map(Value::Str),
        "casefold" => mapped(vm, text, name, args, |c, out| out.push_str(&text::fold(c))).map(Value::Str),
        "swapcase" => {
            let swap = |c: char, out: &mut String| match c {
                _ if c.is_uppercase() => out.extend(c.to_lowercase()),
                _ if c.is_lowercase() => out.extend(c.to_uppercase()),
                _ => out.push(c),
            };
            mapped(vm, text, name, args, swap).map(Value::Str)
        }
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
            let three = match at {
                Some(at) => {
                    let end = at + separator.text().len();
                    [text.slice(0, at), separator, text.slice(end, plain.len())]
                }
                None if from_left => [text.clone(), Str::empty(), Str::empty()],
                None => [Str::empty(), Str::empty(), text.clone()],
            };
            Ok(Value::tuple(three.map(|part| Value::Str(part.with_safe(text.is_safe()))).into()))
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
            vm.scanning(plain.len() * 4)?;
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
fn mapped(vm: &Vm, text: &Str, name: &str, args: CallArgs, change: fn(char, &mut String)) -> Res<Str> {
    args.only::<0>(name, 0)?;
    let mut out = vm.buf();
    let mut changed = String::new();
    for (start, end, origin) in text.runs(0, text.text().len()) {
        changed.clear();
        vm.scanning((end - start) * 6)?;
        text.text()[start..end].chars().for_each(|c| change(c, &mut changed));
        out.push(&changed, origin)?;
    }
    Ok(out.finish())
}

/// Lower case; a sigma at the end of a word has a form of its own.
fn lower(vm: &Vm, text: &Str, args: CallArgs) -> Res<Str> {
    if !text.text().contains('\u{3A3}') {
        return mapped(vm, text, "lower", args, |c, out| out.extend(c.to_lowercase()));
    }
    args.only::<0>("lower", 0)?;
    let mut out = vm.buf();
    for (at, _, part) in lowered(text, &text.text().to_lowercase()) {
        out.push(part, text.origin_at(at))?;
    }
    Ok(out.finish())
}

/// The characters of a text with their places, and what each is in lower case, which is a part of `lower`.
fn lowered<'t>(text: &'t Str, lower: &'t str) -> impl Iterator<Item = (usize, char, &'t str)> {
    let mut rest = lower;
    text.text().char_indices().map(move |(at, c)| {
        let (part, after) = rest.split_at(c.to_lowercase().map(char::len_utf8).sum());
        rest = after;
        (at, c, part)
    })
}

fn titled(vm: &Vm, text: &Str, name: &str, args: CallArgs) -> Res<Value> {
    args.only::<0>(name, 0)?;
    let lower = lower(vm, text, CallArgs::default())?;
    vm.scanning(text.text().len() * 8)?;
    let mut out = vm.buf();
    let mut after_cased = false;
    for (at, c, part) in lowered(text, lower.text()) {
        let upper = if name == "title" { !after_cased } else { at == 0 };
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
    let limit = limit_arg(name, limit)?;
    let from_left = name == "split";
    let plain = text.text();
    let mut found: Vec<&str> = Vec::new();
    if let Some(separator) = separator.filter(|separator| !separator.is_none()) {
        let separator = str_arg(name, Some(separator))?;
        if separator.is_empty() {
            return Err(failed("empty separator"));
        }
        let most = limit.saturating_add(1);
        vm.fits(plain.matches(separator.text()).count().min(most))?;
        if from_left {
            found.extend(plain.splitn(most, separator.text()));
        } else {
            found.extend(plain.rsplitn(most, separator.text()));
        }
    } else {
        let words = plain.split(text::is_space).filter(|word| !word.is_empty());
        let mut take = |word| {
            vm.step()?;
            vm.fits(found.len() + 1)?;
            found.push(word);
            Ok(())
        };
        // What is behind the limit is one part, and keeps the white space on its far side.
        let rest = if from_left {
            words.take(limit).try_for_each(&mut take)?;
            let taken = found.last().map_or(0, |last| text.place(last) + last.len());
            plain[taken..].trim_start_matches(text::is_space)
        } else {
            words.rev().take(limit).try_for_each(&mut take)?;
            plain[..found.last().map_or(plain.len(), |last| text.place(last))].trim_end_matches(text::is_space)
        };
        if !rest.is_empty() {
            found.push(rest);
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
    let count = limit_arg("replace", count)?;
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
    let width = clamped(size_arg(name, width, 0)?);
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
    let size = clamped(size_arg("expandtabs", size, 8)?);
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
