//! Python's `str.format`, as the sandbox of Jinja 2 allows it.

use super::Origin;
use super::error::{Res, failed, unsupported};
use super::filters::escaped;
use super::interp::Vm;
use super::methods;
use super::object::CallArgs;
use super::printf::{self, closing, digits, zeros};
use super::string::{Str, StrBuf};
use super::strings::padded;
use super::value::Value;
use super::{number, repr};

/// How fields are numbered: not at all yet, by themselves, or by the template.
#[derive(PartialEq)]
enum Numbering {
    Unknown,
    Automatic(usize),
    Manual,
}

/// `format.format(*args)`
pub(super) fn format(vm: &Vm, format: &Str, args: &CallArgs) -> Res<Str> {
    let mut numbering = Numbering::Unknown;
    let text = expand(vm, format, args, &mut numbering, 2)?;
    Ok(text.with_safe(format.is_safe()))
}

fn expand(vm: &Vm, format: &Str, args: &CallArgs, numbering: &mut Numbering, depth: usize) -> Res<Str> {
    if depth == 0 {
        return Err(failed("Max string recursion exceeded"));
    }
    let text = format.text();
    let mut out = vm.buf();
    let mut at = 0;
    while let Some(start) = text[at..].find(['{', '}']).map(|start| at + start) {
        vm.step()?;
        let brace = &text[start..=start];
        if text[start + 1..].starts_with(brace) {
            out.push_slice(format, at, start + 1)?;
            at = start + 2;
            continue;
        }
        out.push_slice(format, at, start)?;
        if brace == "}" {
            return Err(failed("Single '}' encountered in format string"));
        }
        let end = closing(text, start, '{', '}').ok_or_else(|| failed("expected '}' before end of string"))?;
        field(vm, &format.slice(start + 1, end), args, numbering, depth, format.is_safe(), &mut out)?;
        at = end + 1;
    }
    out.push_slice(format, at, text.len())?;
    Ok(out.finish())
}

/// `name!conversion:spec`
fn field(
    vm: &Vm,
    field: &Str,
    args: &CallArgs,
    numbering: &mut Numbering,
    depth: usize,
    safe: bool,
    out: &mut StrBuf,
) -> Res<()> {
    let text = field.text();
    let mut in_brackets = false;
    let end = text.char_indices().find(|&(_, c)| {
        in_brackets = (in_brackets || c == '[') && c != ']';
        !in_brackets && matches!(c, '!' | ':')
    });
    let end = end.map_or(text.len(), |(at, _)| at);
    let (name, mut rest) = text.split_at(end);
    let mut value = lookup(vm, field, name, args, numbering)?;
    if let Some(after) = rest.strip_prefix('!') {
        let Some(kind) = after.chars().next() else {
            return Err(failed("end of string while looking for conversion specifier"));
        };
        rest = &after[kind.len_utf8()..];
        if !rest.is_empty() && !rest.starts_with(':') {
            return Err(failed("expected ':' after conversion specifier"));
        }
        value = match kind {
            's' => Value::Str(vm.str(&value)?),
            'r' => Value::Str(repr::text(vm, &value)?),
            _ => return Err(failed(format!("Unknown conversion specifier {kind}"))),
        };
    }
    let spec = match rest.strip_prefix(':') {
        Some(spec) if !spec.is_empty() => expand(vm, &field.part(spec), args, numbering, depth - 1)?,
        _ => Str::empty(),
    };
    let written = formatted(vm, &value, &spec)?;
    out.push_str(&if safe { escaped(vm, &written)? } else { written })
}

/// The value of `name.attribute[item]`.
fn lookup(vm: &Vm, field: &Str, name: &str, args: &CallArgs, numbering: &mut Numbering) -> Res<Value> {
    vm.work(args.named.len() as u64 / 4)?;
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let positional = |at: usize| {
        args.positional
            .get(at)
            .cloned()
            .ok_or_else(|| failed("Replacement index out of range for positional args tuple"))
    };
    let mut value = if first.is_empty() {
        let at = match numbering {
            Numbering::Unknown => 0,
            Numbering::Automatic(next) => *next,
            Numbering::Manual => {
                return Err(failed("cannot switch from manual field specification to automatic field numbering"));
            }
        };
        *numbering = Numbering::Automatic(at + 1);
        positional(at)?
    } else if first.bytes().all(|b| b.is_ascii_digit()) {
        if matches!(numbering, Numbering::Automatic(_)) {
            return Err(failed("cannot switch from automatic field numbering to manual field specification"));
        }
        *numbering = Numbering::Manual;
        positional(digits(first, 0)?.0.unwrap_or(0))?
    } else {
        let found = args.named.iter().find(|(known, _)| known.text() == first);
        found.map(|(_, value)| value.clone()).ok_or_else(|| failed(format!("no argument is named '{first}'")))?
    };
    while !rest.is_empty() {
        vm.step()?;
        if let Some(after) = rest.strip_prefix('[') {
            let Some(end) = after.find(']') else { return Err(failed("Missing ']' in format string")) };
            let item = &after[..end];
            rest = &after[end + 1..];
            if item.is_empty() {
                return Err(failed("Empty attribute in format string"));
            }
            let item = match number::parse_int(item, 10)? {
                Some(at) if item.bytes().all(|b| b.is_ascii_digit()) => Value::Int(at),
                _ => Value::Str(field.part(item)),
            };
            value = methods::item(vm, &value, &item)?;
        } else if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            if end == 0 {
                return Err(failed("Empty attribute in format string"));
            }
            value = methods::attribute(vm, &value, &field.part(&after[..end]))?;
            rest = &after[end..];
        } else {
            return Err(failed("Only '.' or '[' may follow ']' in format field specifier"));
        }
    }
    Ok(value)
}

/// How a value is written: `[[fill]align][sign][#][0][width][grouping][.precision][type]`.
pub(super) struct Spec {
    fill: (char, Origin),
    pub align: Option<char>,
    pub sign: Option<char>,
    pub alternate: bool,
    pub zero: bool,
    pub width: usize,
    grouping: Option<char>,
    pub precision: Option<usize>,
    /// Digits that an integer has at least.
    pub min_digits: usize,
    pub kind: Option<char>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            fill: (' ', Origin::Template),
            align: None,
            sign: None,
            alternate: false,
            zero: false,
            width: 0,
            grouping: None,
            precision: None,
            min_digits: 0,
            kind: None,
        }
    }
}

impl Spec {
    fn parse(spec: &Str) -> Res<Self> {
        let text = spec.text();
        let is_align = |c: char| matches!(c, '<' | '>' | '=' | '^');
        let (mut parsed, mut at) = (Self::default(), 0);
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(c), Some(next)) if is_align(next) => {
                parsed.fill = (c, spec.origin_at(0));
                parsed.align = Some(next);
                at = c.len_utf8() + 1;
            }
            (Some(c), _) if is_align(c) => {
                parsed.align = Some(c);
                at = 1;
            }
            _ => {}
        }
        let take = |at: &mut usize, allowed: &[char]| {
            let found = text[*at..].chars().next().filter(|c| allowed.contains(c));
            *at += found.map_or(0, char::len_utf8);
            found
        };
        parsed.sign = take(&mut at, &['+', '-', ' ']);
        parsed.alternate = take(&mut at, &['#']).is_some();
        parsed.zero = take(&mut at, &['0']).is_some();
        let (width, end) = digits(text, at)?;
        (parsed.width, at) = (width.unwrap_or(0), end);
        parsed.grouping = take(&mut at, &[',', '_']);
        if take(&mut at, &['.']).is_some() {
            let (found, end) = digits(text, at)?;
            at = end;
            parsed.precision = Some(found.ok_or_else(|| failed("Format specifier missing precision"))?);
        }
        parsed.kind = text[at..].chars().next();
        if text[at..].chars().nth(1).is_some() {
            return Err(failed("Invalid format specifier"));
        }
        Ok(parsed.filled())
    }

    /// Filled up with zeros, if it says so.
    pub fn filled(mut self) -> Self {
        if self.zero && self.align.is_none() {
            self.fill = ('0', Origin::Template);
        }
        self
    }

    pub fn aligned(&self, vm: &Vm, text: &Str, default: char) -> Res<Str> {
        let missing = self.width.saturating_sub(text.len());
        let (left, right) = match self.align.unwrap_or(default) {
            '<' => (0, missing),
            '^' => (missing / 2, missing - missing / 2),
            _ => (missing, 0),
        };
        padded(vm, text, left, right, self.fill)
    }
}

/// Python's `format(value, spec)`.
fn formatted(vm: &Vm, value: &Value, spec: &Str) -> Res<Str> {
    if spec.is_empty() {
        return vm.str(value);
    }
    let parsed = Spec::parse(spec)?;
    match value {
        Value::Str(text) => {
            if parsed.kind.is_some_and(|kind| kind != 's') {
                return Err(unknown_kind(&parsed, value));
            }
            if parsed.sign.is_some() || parsed.grouping.is_some() || parsed.alternate || parsed.align == Some('=') {
                return Err(failed("this format is not allowed in string format specifier"));
            }
            let end = text.byte_at(parsed.precision.unwrap_or(usize::MAX));
            parsed.aligned(vm, &text.slice(0, end).with_safe(false), '<')
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => number(vm, value, &parsed),
        _ => Err(failed(format!("unsupported format string passed to {}.__format__", value.type_name()))),
    }
}

fn unknown_kind(spec: &Spec, value: &Value) -> super::TemplateError {
    let kind = spec.kind.unwrap_or(' ');
    failed(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()))
}

/// A number, as `spec` says.
pub(super) fn number(vm: &Vm, value: &Value, spec: &Spec) -> Res<Str> {
    let kind = spec.kind.unwrap_or(if value.as_int().is_some() { 'd' } else { ' ' });
    let (negative, prefix, digits, suffix) = match (kind, value.as_int()) {
        ('d' | 'n' | 'x' | 'X' | 'o' | 'b' | 'c', Some(number)) => {
            if spec.precision.is_some() {
                return Err(failed("Precision not allowed in integer format specifier"));
            }
            let size = number.unsigned_abs();
            let (prefix, digits) = match kind {
                'x' => ("0x", format!("{size:x}")),
                'X' => ("0X", format!("{size:X}")),
                'o' => ("0o", format!("{size:o}")),
                'b' => ("0b", format!("{size:b}")),
                'c' => {
                    let c = u32::try_from(number).ok().and_then(char::from_u32);
                    let c = c.ok_or_else(|| failed("%c arg not in range(0x110000)"))?;
                    return spec.aligned(vm, &Str::plain(c.into(), Origin::Template), '<');
                }
                _ => ("", size.to_string()),
            };
            let digits = zeros(vm, &digits, spec.min_digits)?;
            (number < 0, if spec.alternate { prefix } else { "" }, digits, "")
        }
        ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' | ' ' | 'n', _) => {
            let number = value.as_float().unwrap_or(0.0);
            let size = number.abs();
            let digits = match (kind, spec.precision) {
                ('%', places) => printf::float(vm, size * 100.0, 'f', places.unwrap_or(6), spec.alternate)?,
                (' ', None) => number::float_repr(size),
                (' ', Some(places)) => with_point(printf::float(vm, size, 'g', places, spec.alternate)?),
                ('n', places) => printf::float(vm, size, 'g', places.unwrap_or(6), spec.alternate)?,
                (kind, places) => printf::float(vm, size, kind, places.unwrap_or(6), spec.alternate)?,
            };
            let negative = number.is_sign_negative() && !number.is_nan();
            (negative, "", digits, if kind == '%' { "%" } else { "" })
        }
        _ => return Err(unknown_kind(spec, value)),
    };
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let fills_zeros = spec.align == Some('=') || (spec.zero && spec.align.is_none());
    let before = sign.len() + prefix.len();
    let width = if fills_zeros && spec.fill.0 == '0' { spec.width.saturating_sub(before + suffix.len()) } else { 0 };
    let digits = match spec.grouping {
        Some(_) if kind == 'n' => return Err(failed("Cannot specify ',' with 'n'.")),
        Some(',') if matches!(kind, 'x' | 'X' | 'o' | 'b') => {
            return Err(failed(format!("Cannot specify ',' with '{kind}'.")));
        }
        Some(mark) => grouped(vm, &digits, mark, if matches!(kind, 'x' | 'X' | 'o' | 'b') { 4 } else { 3 }, width)?,
        None => digits,
    };
    let plain = |text: String| Str::plain(text, Origin::Template);
    if fills_zeros {
        let missing = spec.width.saturating_sub(before + digits.len() + suffix.len());
        let filled = padded(vm, &plain(digits + suffix), missing, 0, spec.fill)?;
        let mut out = vm.buf();
        out.push(sign, Origin::Template)?;
        out.push(prefix, Origin::Template)?;
        out.push_str(&filled)?;
        return Ok(out.finish());
    }
    spec.aligned(vm, &plain(format!("{sign}{prefix}{digits}{suffix}")), '>')
}

/// A float never looks like an integer.
fn with_point(digits: String) -> String {
    if digits.contains(['.', 'e', 'n']) { digits } else { digits + ".0" }
}

/// The whole part in groups, with zeros before it up to a width.
fn grouped(vm: &Vm, digits: &str, mark: char, size: usize, width: usize) -> Res<String> {
    vm.copying(width)?;
    if width > vm.limits.value_bytes {
        return Err(super::error::limit("a format asks for too many characters"));
    }
    let end = digits.find(['.', 'e', 'n', 'i']).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(if size == 4 { digits.len() } else { end });
    if whole.is_empty() {
        return Err(unsupported("grouping of what is no number"));
    }
    let mut reversed = String::new();
    let mut count = 0;
    let mut source = whole.bytes().rev();
    loop {
        let next = match source.next() {
            Some(digit) => char::from(digit),
            None if reversed.len() + rest.len() < width => '0',
            None => break,
        };
        if count > 0 && count % size == 0 {
            reversed.push(mark);
        }
        reversed.push(next);
        count += 1;
    }
    Ok(reversed.chars().rev().collect::<String>() + rest)
}
