//! Python's operators.

use std::cmp::Ordering;
use std::rc::Rc;

use super::ast::{Compare, Math};
use super::dict::Dict;
use super::error::{Res, failed, unsupported};
use super::interp::Vm;
use super::string::Str;
use super::value::{Range, Value, View};
use super::{filters, number, printf};

fn wrong_types(op: &str, a: &Value, b: &Value) -> super::TemplateError {
    failed(format!("unsupported operand type(s) for {op}: '{}' and '{}'", a.type_name(), b.type_name()))
}

/// `a op b` for arithmetic.
pub(super) fn math(vm: &Vm, op: Math, a: &Value, b: &Value) -> Res<Value> {
    vm.step()?;
    if let (Math::Mod, Value::Str(format)) = (op, a) {
        return printf::format(vm, format, b).map(Value::Str);
    }
    a.defined()?;
    b.defined()?;
    match (op, a, b) {
        (Math::Add, Value::Str(a), Value::Str(b)) => return add_strings(vm, a, b).map(Value::Str),
        (Math::Add, Value::List(left), Value::List(right)) | (Math::Add, Value::Tuple(left), Value::Tuple(right)) => {
            vm.fits(left.items.len() + right.items.len())?;
            vm.work((left.items.len() + right.items.len()) as u64 / 2)?;
            return Ok(a.of_its_kind([left.items.as_slice(), &right.items].concat()));
        }
        (Math::Mul, Value::Str(_) | Value::List(_) | Value::Tuple(_), _) if b.as_int().is_some() => {
            return repeat(vm, a, b.as_int().unwrap_or(0));
        }
        (Math::Mul, _, Value::Str(_) | Value::List(_) | Value::Tuple(_)) if a.as_int().is_some() => {
            return repeat(vm, b, a.as_int().unwrap_or(0));
        }
        (Math::Sub, Value::View(_, View::Keys | View::Items), _)
        | (Math::Sub, _, Value::View(_, View::Keys | View::Items)) => {
            return Err(unsupported("the difference of dictionary views"));
        }
        _ => {}
    }
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return int_math(op, a, b);
    }
    let name = match op {
        Math::Add => "+",
        Math::Sub => "-",
        Math::Mul => "*",
        Math::Div => "/",
        Math::FloorDiv => "//",
        Math::Mod => "%",
        Math::Pow => "** or pow()",
    };
    let (Some(x), Some(y)) = (a.as_float(), b.as_float()) else { return Err(wrong_types(name, a, b)) };
    if y == 0.0 && matches!(op, Math::Div | Math::FloorDiv | Math::Mod) {
        return Err(failed("float division by zero"));
    }
    Ok(Value::Float(match op {
        Math::Add => x + y,
        Math::Sub => x - y,
        Math::Mul => x * y,
        Math::Div => x / y,
        Math::FloorDiv => number::floor_div(x, y),
        Math::Mod => number::modulo(x, y),
        Math::Pow => number::pow_float(x, y)?,
    }))
}

#[allow(clippy::cast_precision_loss, reason = "Python rounds, too")]
fn int_math(op: Math, a: i128, b: i128) -> Res<Value> {
    if b == 0 && matches!(op, Math::Div | Math::FloorDiv | Math::Mod) {
        let what = if op == Math::Div { "division by zero" } else { "integer division or modulo by zero" };
        return Err(failed(what));
    }
    let value = match op {
        Math::Add => a.checked_add(b),
        Math::Sub => a.checked_sub(b),
        Math::Mul => a.checked_mul(b),
        Math::Div => return Ok(Value::Float(a as f64 / b as f64)),
        Math::FloorDiv => a.checked_div_euclid(b).map(|q| if b < 0 && a.rem_euclid(b) != 0 { q - 1 } else { q }),
        Math::Mod => a.checked_rem_euclid(b).map(|rest| if b < 0 && rest != 0 { rest + b } else { rest }),
        Math::Pow if b < 0 => return number::pow_float(a as f64, b as f64).map(Value::Float),
        Math::Pow => Some(number::pow_int(a, b)?),
    };
    value.map(Value::Int).ok_or_else(number::too_large)
}

/// Markup escapes what it is joined with.
pub(super) fn add_strings(vm: &Vm, a: &Str, b: &Str) -> Res<Str> {
    vm.copying(a.text().len() + b.text().len())?;
    let safe = a.is_safe() || b.is_safe();
    let mut text = vm.buf();
    for part in [a, b] {
        if safe {
            text.push_str(&filters::escaped(vm, part)?)?;
        } else {
            text.push_str(part)?;
        }
    }
    Ok(text.finish().with_safe(safe))
}

fn repeat(vm: &Vm, value: &Value, times: i128) -> Res<Value> {
    let times = filters::clamped(times);
    if let Value::Str(part) = value {
        vm.copying(part.text().len().saturating_mul(times))?;
        let mut text = vm.buf();
        for _ in 0..if part.is_empty() { 0 } else { times } {
            text.push_str(part)?;
        }
        return Ok(Value::Str(text.finish().with_safe(part.is_safe())));
    }
    let (Value::List(items) | Value::Tuple(items)) = value else { return Err(failed("can't multiply sequence")) };
    let len = items.items.len().saturating_mul(times);
    vm.fits(len)?;
    vm.work(len as u64 / 2)?;
    let repeated = std::iter::repeat_n(&items.items, if len == 0 { 0 } else { times }).flatten().cloned().collect();
    Ok(value.of_its_kind(repeated))
}

/// `-value` and the like, by `name` for errors.
pub(super) fn unary(value: &Value, name: &str, int: fn(i128) -> Option<i128>, float: fn(f64) -> f64) -> Res<Value> {
    match (value.defined()?.as_int(), value) {
        (Some(number), _) => int(number).map(Value::Int).ok_or_else(number::too_large),
        (None, Value::Float(number)) => Ok(Value::Float(float(*number))),
        _ => Err(failed(format!("bad operand type for {name}: '{}'", value.type_name()))),
    }
}

/// `a op b` for comparisons.
pub(super) fn compare(vm: &Vm, op: Compare, a: &Value, b: &Value) -> Res<bool> {
    let order = |name, passes: fn(Ordering) -> bool| Ok(order(vm, name, a, b)?.is_some_and(passes));
    match op {
        Compare::Eq => equal(vm, a, b),
        Compare::Ne => Ok(!equal(vm, a, b)?),
        Compare::Lt => order("<", Ordering::is_lt),
        Compare::Le => order("<=", Ordering::is_le),
        Compare::Gt => order(">", Ordering::is_gt),
        Compare::Ge => order(">=", Ordering::is_ge),
        Compare::In => contains(vm, b, a),
        Compare::NotIn => Ok(!contains(vm, b, a)?),
    }
}

/// Python's `==`.
pub(super) fn equal(vm: &Vm, a: &Value, b: &Value) -> Res<bool> {
    vm.step()?;
    Ok(match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            if a.text().len() == b.text().len() {
                vm.copying(a.text().len())?;
            }
            a == b
        }
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            if a.items.len() != b.items.len() {
                return Ok(false);
            }
            let _deeper = vm.deeper()?;
            for (a, b) in a.items.iter().zip(&b.items) {
                if !a.is_same(b) && !equal(vm, a, b)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b) || equal_dicts(vm, a, b)?,
        (Value::View(a, View::Keys), Value::View(b, View::Keys)) => {
            if a.entries.len() != b.entries.len() {
                return Ok(false);
            }
            for (key, _) in &a.entries {
                vm.keying(key)?;
                if b.get(key)?.is_none() {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Undefined(_), Value::Undefined(_)) => true,
        (Value::Range(a), Value::Range(b)) => {
            a.len == b.len && (a.len == 0 || a.start == b.start && (a.len == 1 || a.step == b.step))
        }
        _ => match numbers(a, b) {
            Some(order) => order == Some(Ordering::Equal),
            None => !matches!(a, Value::Float(_)) && a.is_same(b),
        },
    })
}

fn equal_dicts(vm: &Vm, a: &Dict, b: &Dict) -> Res<bool> {
    if a.entries.len() != b.entries.len() {
        return Ok(false);
    }
    let _deeper = vm.deeper()?;
    for (key, value) in &a.entries {
        vm.keying(key)?;
        match b.get(key)? {
            Some(other) if value.is_same(other) || equal(vm, value, other)? => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// The order of two numbers; `None` if one is not a number, `Some(None)` if one is NaN.
#[allow(clippy::option_option, reason = "two different things")]
fn numbers(a: &Value, b: &Value) -> Option<Option<Ordering>> {
    match (a.as_int(), b.as_int()) {
        (Some(a), Some(b)) => Some(Some(a.cmp(&b))),
        (Some(a), None) => Some(int_to_float(a, b.as_float()?)),
        (None, Some(b)) => Some(int_to_float(b, a.as_float()?).map(Ordering::reverse)),
        (None, None) => Some(a.as_float()?.partial_cmp(&b.as_float()?)),
    }
}

fn int_to_float(a: i128, b: f64) -> Option<Ordering> {
    if b.is_nan() {
        return None;
    }
    let Some(whole) = number::to_whole(b) else {
        return Some(if b > 0.0 { Ordering::Less } else { Ordering::Greater });
    };
    Some(a.cmp(&whole).then_with(|| 0f64.partial_cmp(&b.fract()).unwrap_or(Ordering::Equal)))
}

/// The order of two values; `None` with NaN.
///
/// # Errors
/// If Python has no order for them.
pub(super) fn order(vm: &Vm, op: &str, a: &Value, b: &Value) -> Res<Option<Ordering>> {
    vm.step()?;
    a.defined()?;
    b.defined()?;
    if let Some(order) = numbers(a, b) {
        return Ok(order);
    }
    match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            vm.copying(a.text().len().min(b.text().len()))?;
            Ok(Some(a.text().cmp(b.text())))
        }
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            let _deeper = vm.deeper()?;
            for (a, b) in a.items.iter().zip(&b.items) {
                if !a.is_same(b) && !equal(vm, a, b)? {
                    return order(vm, op, a, b);
                }
            }
            Ok(Some(a.items.len().cmp(&b.items.len())))
        }
        (Value::View(..), Value::View(..)) => Err(unsupported("the order of dictionary views")),
        _ => Err(failed(format!(
            "'{op}' not supported between instances of '{}' and '{}'",
            a.type_name(),
            b.type_name()
        ))),
    }
}

/// Sorts stably by a key.
pub(super) fn sort(vm: &Vm, mut items: Vec<(Value, Value)>, reverse: bool) -> Res<Vec<Value>> {
    // Bottom up, since a comparison may fail.
    let mut width = 1;
    while width < items.len() {
        let mut merged = Vec::with_capacity(items.len());
        let mut runs = items.into_iter().peekable();
        while runs.peek().is_some() {
            let left: Vec<_> = runs.by_ref().take(width).collect();
            let right: Vec<_> = runs.by_ref().take(width).collect();
            let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
            while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
                vm.work(2)?;
                let swap = if reverse { order(vm, "<", &a.0, &b.0)? } else { order(vm, "<", &b.0, &a.0)? };
                merged.extend(if swap == Some(Ordering::Less) { right.next() } else { left.next() });
            }
            merged.extend(left);
            merged.extend(right);
        }
        items = merged;
        width *= 2;
    }
    Ok(items.into_iter().map(|(_, value)| value).collect())
}

/// Python's `needle in haystack`.
pub(super) fn contains(vm: &Vm, haystack: &Value, needle: &Value) -> Res<bool> {
    vm.step()?;
    Ok(match haystack {
        Value::Str(text) => {
            let Value::Str(part) = needle else {
                return Err(failed(format!(
                    "'in <string>' requires string as left operand, not {}",
                    needle.type_name()
                )));
            };
            vm.scanning(text.text().len())?;
            text.text().contains(part.text())
        }
        Value::List(items) | Value::Tuple(items) => {
            for item in &items.items {
                if item.is_same(needle) || equal(vm, item, needle)? {
                    return Ok(true);
                }
            }
            false
        }
        Value::Dict(dict) | Value::View(dict, View::Keys) => {
            vm.keying(needle)?;
            dict.get(needle)?.is_some()
        }
        Value::Range(range) => range.contains(needle),
        _ => {
            let not_iterable = |_| failed(format!("argument of type '{}' is not iterable", haystack.type_name()));
            let iter = vm.iterator(haystack).map_err(not_iterable)?;
            while let Some(item) = iter.next(vm)? {
                if item.is_same(needle) || equal(vm, &item, needle)? {
                    return Ok(true);
                }
            }
            false
        }
    })
}

/// The bounds of a slice for a sequence of `len`.
fn slice_bounds(bounds: &[Value; 3], len: usize) -> Res<Range> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let number = |value: &Value| match value {
        Value::None => Ok(None),
        _ => match value.as_int() {
            Some(number) => {
                let far = i128::from(i64::MAX / 4);
                Ok(Some(i64::try_from(number.clamp(-far, far)).unwrap_or(0)))
            }
            None => Err(failed("slice indices must be integers or None or have an __index__ method")),
        },
    };
    let step = number(&bounds[2])?.unwrap_or(1);
    if step == 0 {
        return Err(failed("slice step cannot be zero"));
    }
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let place = |at: Option<i64>, default: i64| match at {
        None => default,
        Some(at) if at < 0 => (at + len).max(low),
        Some(at) => at.min(high),
    };
    let start = place(number(&bounds[0])?, if step > 0 { 0 } else { len - 1 });
    let stop = place(number(&bounds[1])?, if step > 0 { len } else { -1 });
    let span = if step > 0 { stop - start } else { start - stop };
    let count = if span <= 0 { 0 } else { (span - 1) / step.abs() + 1 };
    Ok(Range { start, stop, step, len: count })
}

/// `value[start:stop:step]`
pub(super) fn slice(vm: &Vm, value: &Value, bounds: &[Value; 3]) -> Res<Value> {
    let Some(len) = value.defined()?.len().filter(|_| !matches!(value, Value::Dict(_) | Value::View(..))) else {
        return Err(failed(format!("'{}' object is not subscriptable", value.type_name())));
    };
    let Range { start, stop, step, len: count } = slice_bounds(bounds, len)?;
    let places = (0..count).map(|at| usize::try_from(start + at * step).unwrap_or(0));
    Ok(match value {
        Value::Str(text) => {
            vm.copying(text.text().len() * if text.is_ascii() { 1 } else { 8 })?;
            let first = usize::try_from(start).unwrap_or(0);
            let taken = usize::try_from(count).unwrap_or(0);
            if step == 1 {
                let (from, to) = (text.byte_at(first), text.byte_at(first + taken));
                return Ok(Value::Str(text.slice(from, to)));
            }
            vm.scanning(text.text().len() * 4)?;
            vm.fits(len)?;
            let chars: Vec<(usize, char)> = text.text().char_indices().collect();
            let mut part = vm.buf();
            for place in places {
                let (at, c) = chars[place];
                part.push_char(c, text.origin_at(at))?;
            }
            Value::Str(part.finish().with_safe(text.is_safe()))
        }
        Value::List(items) | Value::Tuple(items) => {
            vm.work(1 + count.unsigned_abs() / 2)?;
            value.of_its_kind(places.map(|place| items.items[place].clone()).collect())
        }
        Value::Range(range) => {
            let at = |idx: i64| idx.checked_mul(range.step).and_then(|offset| range.start.checked_add(offset));
            let (Some(start), Some(stop), Some(step)) = (at(start), at(stop), range.step.checked_mul(step)) else {
                return Err(unsupported("a range of large numbers"));
            };
            Value::Range(Range { start, stop, step, len: count })
        }
        _ => return Err(failed(format!("'{}' object is not subscriptable", value.type_name()))),
    })
}
