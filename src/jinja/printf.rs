//! Python's `text % values`, and how numbers are written for it and for `str.format`.

use super::Origin;
use super::error::{Res, failed, limit, unsupported};
use super::filters::escaped;
use super::interp::Vm;
use super::methods::int_of;
use super::repr;
use super::string::{Str, StrBuf};
use super::strings::padded;
use super::value::Value;

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

/// One `%...`.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "the flags of a directive")]
struct Directive {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    precision: Option<usize>,
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
            let (key, end) = name(text, at)?;
            at = end;
            by_name = true;
            let Value::Dict(dict) = values.all else { return Err(failed("format requires a mapping")) };
            match dict.get_str(key) {
                Some(value) => Some(value.clone()),
                None => return Err(failed(format!("key '{key}' is not in the mapping"))),
            }
        } else {
            None
        };
        let mut directive = Directive::default();
        at = directive.read(text, at, &mut values)?;
        let Some(kind) = text[at..].chars().next() else { return Err(failed("incomplete format")) };
        at += kind.len_utf8();
        if kind == '%' {
            out.push("%", format.origin_at(start))?;
            continue;
        }
        let value = value.map_or_else(|| values.take(), Ok)?;
        directive.write(vm, kind, &value, format.is_safe(), &mut out)?;
    }
    out.push_slice(format, at, text.len())?;
    let has_items = matches!(values.all, Value::Dict(_) | Value::List(_) | Value::Undefined(_) | Value::Range(_));
    if values.next < values.list.len() && !has_items && !by_name {
        return Err(failed("not all arguments converted during string formatting"));
    }
    Ok(out.finish().with_safe(format.is_safe()))
}

/// The name in `(name)`, in which parentheses nest, and where it ends.
fn name(text: &str, start: usize) -> Res<(&str, usize)> {
    let mut depth = 0;
    for (at, c) in text[start..].char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok((&text[start + 1..start + at], start + at + 1));
        }
    }
    Err(failed("incomplete format key"))
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

impl Directive {
    fn read(&mut self, text: &str, mut at: usize, values: &mut Values) -> Res<usize> {
        let bytes = text.as_bytes();
        loop {
            match bytes.get(at) {
                Some(b'-') => self.left = true,
                Some(b'+') => self.plus = true,
                Some(b' ') => self.space = true,
                Some(b'#') => self.alternate = true,
                Some(b'0') => self.zero = true,
                _ => break,
            }
            at += 1;
        }
        let size = |number: i128| usize::try_from(number.max(0)).unwrap_or(usize::MAX);
        if bytes.get(at) == Some(&b'*') {
            let width = values.take_int()?;
            self.left |= width < 0;
            self.width = size(width.saturating_abs());
            at += 1;
        } else {
            let (width, end) = digits(text, at)?;
            self.width = width.unwrap_or(0);
            at = end;
        }
        if bytes.get(at) == Some(&b'.') {
            at += 1;
            if bytes.get(at) == Some(&b'*') {
                self.precision = Some(size(values.take_int()?));
                at += 1;
            } else {
                let (precision, end) = digits(text, at)?;
                self.precision = Some(precision.unwrap_or(0));
                at = end;
            }
        }
        while matches!(bytes.get(at), Some(b'l' | b'h' | b'L')) {
            at += 1;
        }
        Ok(at)
    }

    fn write(&self, vm: &Vm, kind: char, value: &Value, safe: bool, out: &mut StrBuf) -> Res<()> {
        let text = match kind {
            's' | 'r' | 'a' => {
                let text = if kind == 's' { vm.str(value)? } else { repr::text(vm, value)? };
                if kind == 'a' && !text.is_ascii() {
                    return Err(unsupported("`%a` of what is not ASCII"));
                }
                let text = if safe { escaped(vm, &text)? } else { text };
                let end = text.byte_at(self.precision.unwrap_or(usize::MAX));
                text.slice(0, end)
            }
            'c' => match value {
                Value::Str(text) if text.len() == 1 => text.clone(),
                Value::Str(_) => return Err(failed("%c requires int or char")),
                _ => {
                    let code = value.as_int().ok_or_else(|| failed("%c requires int or char"))?;
                    let c = u32::try_from(code).ok().and_then(char::from_u32);
                    let c = c.ok_or_else(|| failed("%c arg not in range(0x110000)"))?;
                    Str::plain(c.into(), Origin::Template)
                }
            },
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                let whole = value.as_int().is_some();
                if !(whole || matches!(value, Value::Float(_)) && matches!(kind, 'd' | 'i' | 'u')) {
                    value.defined()?;
                    let what = if matches!(kind, 'd' | 'i' | 'u') { "a real number" } else { "an integer" };
                    return Err(failed(format!("%{kind} format: {what} is required, not {}", value.type_name())));
                }
                let number = int_of(value)?;
                let (prefix, digits) = match kind {
                    'x' => ("0x", format!("{:x}", number.unsigned_abs())),
                    'X' => ("0X", format!("{:X}", number.unsigned_abs())),
                    'o' => ("0o", format!("{:o}", number.unsigned_abs())),
                    _ => ("", number.unsigned_abs().to_string()),
                };
                let digits = zeros(vm, &digits, self.precision.unwrap_or(0))?;
                return self.number(vm, number < 0, if self.alternate { prefix } else { "" }, &digits, out);
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                let number = value.defined()?.as_float();
                let number = number.ok_or_else(|| failed(format!("must be real number, not {}", value.type_name())))?;
                let digits = float(vm, number.abs(), kind, self.precision.unwrap_or(6), self.alternate)?;
                return self.number(vm, number.is_sign_negative() && !number.is_nan(), "", &digits, out);
            }
            _ => return Err(failed(format!("unsupported format character '{kind}' (0x{:x})", kind as u32))),
        };
        let missing = self.width.saturating_sub(text.len());
        let (left, right) = if self.left { (0, missing) } else { (missing, 0) };
        out.push_str(&padded(vm, &text, left, right, (' ', Origin::Template))?)
    }

    fn number(&self, vm: &Vm, negative: bool, prefix: &str, digits: &str, out: &mut StrBuf) -> Res<()> {
        let sign = match (negative, self.plus, self.space) {
            (true, ..) => "-",
            (_, true, _) => "+",
            (_, _, true) => " ",
            _ => "",
        };
        let missing = self.width.saturating_sub(sign.len() + prefix.len() + digits.len());
        let plain = |text: &str| Str::plain(text.to_owned(), Origin::Template);
        let zero_filled = self.zero && !self.left && digits.starts_with(|c: char| c.is_ascii_hexdigit());
        if zero_filled {
            out.push(sign, Origin::Template)?;
            out.push(prefix, Origin::Template)?;
            return out.push_str(&padded(vm, &plain(digits), missing, 0, ('0', Origin::Template))?);
        }
        let text = plain(&format!("{sign}{prefix}{digits}"));
        let (left, right) = if self.left { (0, missing) } else { (missing, 0) };
        out.push_str(&padded(vm, &text, left, right, (' ', Origin::Template))?)
    }
}

/// Digits with zeros before them, up to a number of them.
fn zeros(vm: &Vm, digits: &str, wanted: usize) -> Res<String> {
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
