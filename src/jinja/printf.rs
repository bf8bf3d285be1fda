//! Python's `text % values`, and how numbers are written for it and for `str.format`.

use super::Origin;
use super::error::{Res, failed, limit, unsupported};
use super::filters::{clamped, escaped};
use super::format::{self, Spec};
use super::interp::Vm;
use super::string::{Str, StrBuf};
use super::strings::padded;
use super::value::Value;
use super::{number, repr};

/// More decimal places than this are zeros in any float.
const MAX_PLACES: usize = 1100;

/// Where the values come from.
struct Values<'v> {
    all: &'v Value,
    list: &'v [Value],
    next: usize,
}

impl Values<'_> {
    fn take(&mut self) -> Res<Value> {
        let found = self.list.get(self.next).ok_or_else(|| failed("not enough arguments for format string"))?;
        self.next += 1;
        Ok(found.clone())
    }

    fn take_int(&mut self) -> Res<i128> {
        self.take()?.as_int().ok_or_else(|| failed("* wants int"))
    }
}

/// `format % values`
pub(super) fn format(vm: &Vm, format: &Str, values: &Value) -> Res<Str> {
    let single = std::slice::from_ref(values);
    let list = if let Value::Tuple(items) = values { items.items.as_slice() } else { single };
    let mut values = Values { all: values, list, next: 0 };
    let text = format.text();
    vm.scanning(text.len())?;
    let mut out = vm.buf();
    let mut at = 0;
    let mut by_name = false;
    while let Some(start) = text[at..].find('%').map(|start| at + start) {
        out.push_slice(format, at, start)?;
        at = start + 1;
        vm.step()?;
        let value = if text[at..].starts_with('(') {
            let end = closing(text, at, '(', ')').ok_or_else(|| failed("incomplete format key"))?;
            let key = &text[at + 1..end];
            at = end + 1;
            by_name = true;
            let Value::Dict(dict) = values.all else { return Err(failed("format requires a mapping")) };
            match dict.get_str(key) {
                Some(value) => Some(value.clone()),
                None => return Err(failed(format!("key '{key}' is not in the mapping"))),
            }
        } else {
            None
        };
        let mut spec = Spec::default();
        at = read(&mut spec, text, at, &mut values)?;
        let Some(kind) = text[at..].chars().next() else { return Err(failed("incomplete format")) };
        at += kind.len_utf8();
        if kind == '%' {
            out.push("%", format.origin_at(start))?;
            continue;
        }
        let value = value.map_or_else(|| values.take(), Ok)?;
        write(vm, spec, kind, &value, format.is_safe(), &mut out)?;
    }
    out.push_slice(format, at, text.len())?;
    let has_items = matches!(values.all, Value::Dict(_) | Value::List(_) | Value::Undefined(_) | Value::Range(_));
    if values.next < values.list.len() && !has_items && !by_name {
        return Err(failed("not all arguments converted during string formatting"));
    }
    Ok(out.finish().with_safe(format.is_safe()))
}

/// Where the bracket closes that opens at `start`; brackets nest.
pub(super) fn closing(text: &str, start: usize, open: char, close: char) -> Option<usize> {
    let mut depth = 0;
    let mut ends = |c: char| {
        depth += i32::from(c == open) - i32::from(c == close);
        depth == 0
    };
    text[start..].char_indices().find(|&(_, c)| ends(c)).map(|(at, _)| start + at)
}

/// A number in a format, and where it ends.
pub(super) fn digits(text: &str, at: usize) -> Res<(Option<usize>, usize)> {
    let end = text[at..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |end| at + end);
    if end == at {
        return Ok((None, at));
    }
    let number = text[at..end].parse().map_err(|_| limit("a format asks for too many characters"))?;
    Ok((Some(number), end))
}

/// Reads what stands between `%` and the type; returns where the type is.
fn read(spec: &mut Spec, text: &str, mut at: usize, values: &mut Values) -> Res<usize> {
    let bytes = text.as_bytes();
    loop {
        match bytes.get(at) {
            Some(b'-') => spec.align = Some('<'),
            Some(b'+') => spec.sign = Some('+'),
            Some(b' ') => _ = spec.sign.get_or_insert(' '),
            Some(b'#') => spec.alternate = true,
            Some(b'0') => spec.zero = true,
            _ => break,
        }
        at += 1;
    }
    if bytes.get(at) == Some(&b'*') {
        let width = values.take_int()?;
        if width < 0 {
            spec.align = Some('<');
        }
        spec.width = clamped(width.saturating_abs());
        at += 1;
    } else {
        let (width, end) = digits(text, at)?;
        spec.width = width.unwrap_or(0);
        at = end;
    }
    if bytes.get(at) == Some(&b'.') {
        at += 1;
        if bytes.get(at) == Some(&b'*') {
            spec.precision = Some(clamped(values.take_int()?));
            at += 1;
        } else {
            let (precision, end) = digits(text, at)?;
            spec.precision = Some(precision.unwrap_or(0));
            at = end;
        }
    }
    while matches!(bytes.get(at), Some(b'l' | b'h' | b'L')) {
        at += 1;
    }
    Ok(at)
}

fn write(vm: &Vm, mut spec: Spec, kind: char, value: &Value, safe: bool, out: &mut StrBuf) -> Res<()> {
    let written = match kind {
        's' | 'r' | 'a' => {
            let text = if kind == 's' { vm.str(value)? } else { repr::text(vm, value)? };
            if kind == 'a' && !text.is_ascii() {
                return Err(unsupported("`%a` of what is not ASCII"));
            }
            let text = if safe { escaped(vm, &text)? } else { text };
            let end = text.byte_at(spec.precision.unwrap_or(usize::MAX));
            spec.aligned(vm, &text.slice(0, end), '>')?
        }
        'c' => {
            let c = match value {
                Value::Str(text) if text.len() == 1 => text.clone(),
                Value::Str(_) => return Err(failed("%c requires int or char")),
                _ => {
                    let code = value.as_int().ok_or_else(|| failed("%c requires int or char"))?;
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    let c = c.ok_or_else(|| failed("%c arg not in range(0x110000)"))?;
                    Str::plain(c.into(), Origin::Template)
                }
            };
            spec.aligned(vm, &c, '>')?
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let is_decimal = matches!(kind, 'd' | 'i' | 'u');
            let number = match value.defined()? {
                Value::Float(number) if is_decimal => number::to_whole(*number).ok_or_else(number::too_large)?,
                _ => value.as_int().ok_or_else(|| {
                    let what = if is_decimal { "a real number" } else { "an integer" };
                    failed(format!("%{kind} format: {what} is required, not {}", value.type_name()))
                })?,
            };
            spec.min_digits = spec.precision.take().unwrap_or(0);
            spec.kind = Some(if is_decimal { 'd' } else { kind });
            format::number(vm, &Value::Int(number), &spec.filled())?
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let number = value.defined()?.as_float();
            let number = number.ok_or_else(|| failed(format!("must be real number, not {}", value.type_name())))?;
            spec.kind = Some(kind);
            format::number(vm, &Value::Float(number), &spec.filled())?
        }
        _ => return Err(failed(format!("unsupported format character '{kind}' (0x{:x})", kind as u32))),
    };
    out.push_str(&written)
}

/// Digits with zeros before them, up to a number of them.
pub(super) fn zeros(vm: &Vm, digits: &str, wanted: usize) -> Res<String> {
    let missing = wanted.saturating_sub(digits.len());
    if missing == 0 {
        return Ok(digits.to_owned());
    }
    let zeros = padded(vm, &Str::empty(), missing, 0, ('0', Origin::Template))?;
    Ok(format!("{}{digits}", zeros.text()))
}

/// A float that is not negative, in one of the formats `e`, `f`, `g` and their capitals.
pub(super) fn float(vm: &Vm, value: f64, kind: char, places: usize, alternate: bool) -> Res<String> {
    if !value.is_finite() {
        let text = if value.is_nan() { "nan" } else { "inf" };
        return Ok(if kind.is_ascii_uppercase() { text.to_uppercase() } else { text.into() });
    }
    let exact = places.min(MAX_PLACES);
    let more = padded(vm, &Str::empty(), places - exact, 0, ('0', Origin::Template))?;
    let more = more.text();
    let text = match kind.to_ascii_lowercase() {
        'f' => format!("{value:.exact$}{more}{}", if alternate && places == 0 { "." } else { "" }),
        'e' => {
            let (digits, exponent) = scientific(value, exact);
            format!("{digits}{more}{}{}", if alternate && places == 0 { "." } else { "" }, exponent_text(exponent))
        }
        _ => {
            let significant = exact.max(1);
            let (digits, exponent) = scientific(value, significant - 1);
            let short = |digits: &str| {
                if !alternate && digits.contains('.') {
                    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
                } else {
                    digits.to_owned()
                }
            };
            let places = i64::try_from(significant).unwrap_or(0) - 1 - i64::from(exponent);
            match usize::try_from(places) {
                Ok(places) if exponent >= -4 => short(&format!("{value:.places$}")),
                _ => short(&digits) + &exponent_text(exponent),
            }
        }
    };
    Ok(if kind.is_ascii_uppercase() { text.to_uppercase() } else { text })
}

fn scientific(value: f64, places: usize) -> (String, i32) {
    let text = format!("{value:.places$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    (digits.to_owned(), exponent.parse().unwrap_or(0))
}

fn exponent_text(exponent: i32) -> String {
    format!("e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}
