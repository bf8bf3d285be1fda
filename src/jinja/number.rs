//! Numbers as Python reads, rounds and prints them. Integers have 128 bits; what needs more is an error.

use super::error::{Res, TemplateError, failed, unsupported};
use super::text;

pub(super) fn too_large() -> TemplateError {
    unsupported("an integer of more than 128 bits")
}

/// A float's whole part, if 128 bits hold it.
#[allow(clippy::cast_possible_truncation, reason = "within the bounds")]
pub(super) fn to_whole(value: f64) -> Option<i128> {
    (value.abs() < 1e38).then(|| value.trunc() as i128)
}

/// `repr` of a float: the shortest digits that read back the same.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let short = format!("{value:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// The value without its sign, and the sign, of a text without the white space around it.
fn signed(text: &str) -> (&str, bool) {
    let text = text.trim_matches(text::is_space);
    match text.strip_prefix(['-', '+']) {
        Some(rest) => (rest, text.starts_with('-')),
        None => (text, false),
    }
}

/// The digits without single underscores between them, in ASCII.
fn digits(text: &str) -> Option<String> {
    let mut plain = String::new();
    let mut after_digit = false;
    for c in text.chars() {
        if c == '_' {
            if !after_digit {
                return None;
            }
            after_digit = false;
            continue;
        }
        after_digit = true;
        match text::decimal(c) {
            Some(value) => plain.push(char::from_digit(value, 10)?),
            None if c.is_ascii() => plain.push(c),
            None => return None,
        }
    }
    after_digit.then_some(plain)
}

/// `int(text, base)`; `None` if Python would not read it.
///
/// # Errors
/// If it is too large.
pub(super) fn parse_int(text: &str, base: u32) -> Res<Option<i128>> {
    let (rest, negative) = signed(text);
    let lower = rest.get(..2).unwrap_or_default().to_ascii_lowercase();
    let prefixed = match (lower.as_str(), base) {
        ("0x", 0 | 16) => Some(16),
        ("0o", 0 | 8) => Some(8),
        ("0b", 0 | 2) => Some(2),
        _ => None,
    };
    let (rest, radix) = match prefixed {
        Some(radix) => (rest[2..].strip_prefix('_').unwrap_or(&rest[2..]), radix),
        None if base == 0 => {
            if rest.starts_with('0') && rest.contains(|c| c != '0' && c != '_') {
                return Ok(None);
            }
            (rest, 10)
        }
        None => (rest, base),
    };
    let Some(plain) = digits(rest).filter(|plain| plain.chars().all(|c| c.is_digit(radix))) else { return Ok(None) };
    let plain = plain.trim_start_matches('0');
    if plain.is_empty() {
        return Ok(Some(0));
    }
    let value = i128::from_str_radix(plain, radix).map_err(|_| too_large())?;
    Ok(Some(if negative { -value } else { value }))
}

/// `float(text)`; `None` if Python would not read it.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let (rest, negative) = signed(text);
    let lower = rest.to_ascii_lowercase();
    let value = match lower.as_str() {
        "nan" => f64::NAN,
        "inf" | "infinity" => f64::INFINITY,
        _ => {
            // An underscore must stand between digits; so must it here.
            let bytes = rest.as_bytes();
            let digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
            let single = (0..bytes.len())
                .filter(|&at| bytes[at] == b'_')
                .all(|at| digit(at.checked_sub(1)) && digit(Some(at + 1)));
            let plain = digits(rest).filter(|_| single)?;
            if !plain.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-')) {
                return None;
            }
            plain.parse().ok()?
        }
    };
    Some(if negative { -value } else { value })
}

/// `round(value, places)` of a float.
pub(super) fn round(value: f64, places: i64) -> f64 {
    let Ok(places) = i32::try_from(places) else { return if places > 0 { value } else { 0.0 * value } };
    if !value.is_finite() || places > 330 {
        return value;
    }
    if places < -310 {
        return 0.0 * value;
    }
    let Ok(digits) = usize::try_from(places) else {
        // Python rounds to even what lies halfway; the scaled value is exact enough for that.
        let scale = 10f64.powi(-places);
        let scaled = value / scale;
        let rounded = scaled.round();
        let rounded = if (scaled - rounded).abs() == 0.5 { 2.0 * (scaled / 2.0).round() } else { rounded };
        return rounded * scale;
    };
    // Decimal digits of the exact value, rounded half to even.
    format!("{value:.digits$}").parse().unwrap_or(value)
}

/// `round(value, places)` of an integer, half to even.
///
/// # Errors
/// If it is too large.
pub(super) fn round_int(value: i128, places: i64) -> Res<i128> {
    let Ok(places) = u32::try_from(places.saturating_neg()) else { return Ok(value) };
    if places == 0 {
        return Ok(value);
    }
    let Some(scale) = 10i128.checked_pow(places) else { return Ok(0) };
    let (down, rest) = (value.div_euclid(scale), value.rem_euclid(scale));
    let up = rest * 2 > scale || (rest * 2 == scale && down % 2 != 0);
    (down + i128::from(up)).checked_mul(scale).ok_or_else(too_large)
}

/// `base ** exponent` of integers, the exponent not negative.
///
/// # Errors
/// If it is too large.
pub(super) fn pow_int(base: i128, exponent: i128) -> Res<i128> {
    match (base, exponent) {
        (_, 0) | (1, _) => Ok(1),
        (0, _) => Ok(0),
        (-1, _) => Ok(if exponent % 2 == 0 { 1 } else { -1 }),
        _ => u32::try_from(exponent).ok().and_then(|exponent| base.checked_pow(exponent)).ok_or_else(too_large),
    }
}

/// `base ** exponent` of floats.
///
/// # Errors
/// As Python: zero to a negative power, a result too large; a complex result is not supported.
pub(super) fn pow_float(base: f64, exponent: f64) -> Res<f64> {
    if base == 0.0 && exponent < 0.0 {
        return Err(failed("0.0 cannot be raised to a negative power"));
    }
    if base < 0.0 && base.is_finite() && exponent.is_finite() && exponent.fract() != 0.0 {
        return Err(unsupported("a complex number"));
    }
    let value = base.powf(exponent);
    if value.is_infinite() && base.is_finite() && exponent.is_finite() {
        return Err(failed("numerical result out of range"));
    }
    Ok(value)
}

/// Python's `%` of floats: the sign of the divisor.
pub(super) fn modulo(a: f64, b: f64) -> f64 {
    let rest = a % b;
    if rest == 0.0 {
        0f64.copysign(b)
    } else if (rest < 0.0) == (b < 0.0) {
        rest
    } else {
        rest + b
    }
}

/// Python's `//` of floats.
pub(super) fn floor_div(a: f64, b: f64) -> f64 {
    let rest = a % b;
    let mut quotient = (a - rest) / b;
    if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
        quotient -= 1.0;
    }
    if quotient == 0.0 {
        return 0f64.copysign(a / b);
    }
    let floor = quotient.floor();
    if quotient - floor > 0.5 { floor + 1.0 } else { floor }
}
