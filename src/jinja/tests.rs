//! The tests of Jinja 2: what stands after `is`.

use super::ast::Compare;
use super::error::{Res, failed};
use super::interp::Vm;
use super::object::{CallArgs, Object};
use super::string::Str;
use super::value::{Value, View};
use super::{ast, filters, methods, ops};

pub(super) type Test = fn(&Vm, &Value, CallArgs) -> Res<bool>;

/// The test of a name, if Jinja 2 has it.
pub(super) fn find(name: &str) -> Option<Test> {
    Some(match name {
        "odd" => |vm, value, args| remainder(vm, value, args, 2, 1),
        "even" => |vm, value, args| remainder(vm, value, args, 2, 0),
        "divisibleby" => |vm, value, args| {
            let [divisor] = args.bind("divisibleby", ["num"], 1)?;
            let rest = ops::math(vm, ast::Math::Mod, value, &divisor.unwrap_or(Value::None))?;
            ops::equal(vm, &rest, &Value::Int(0))
        },
        "defined" => |_, value, args| plain(args, !value.is_undefined()),
        "undefined" => |_, value, args| plain(args, value.is_undefined()),
        "filter" => |_, value, args| named(value, args, |name| filters::find(name).is_some()),
        "test" => |_, value, args| named(value, args, |name| find(name).is_some()),
        "none" => |_, value, args| plain(args, value.is_none()),
        "boolean" => |_, value, args| plain(args, matches!(value, Value::Bool(_))),
        "false" => |_, value, args| plain(args, matches!(value, Value::Bool(false))),
        "true" => |_, value, args| plain(args, matches!(value, Value::Bool(true))),
        "integer" => |_, value, args| plain(args, matches!(value, Value::Int(_))),
        "float" => |_, value, args| plain(args, matches!(value, Value::Float(_))),
        "number" => |_, value, args| plain(args, matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_))),
        "lower" => |vm, value, args| cased(vm, value, args, "islower"),
        "upper" => |vm, value, args| cased(vm, value, args, "isupper"),
        "string" => |_, value, args| plain(args, matches!(value, Value::Str(_))),
        "mapping" => |_, value, args| plain(args, matches!(value, Value::Dict(_))),
        "sequence" => |_, value, args| plain(args, is_sequence(value)),
        "iterable" => |vm, value, args| {
            let is_loop = matches!(value, Value::Object(object) if matches!(**object, Object::Loop(_)));
            plain(args, is_loop || vm.iterator(value).is_ok())
        },
        "callable" => |_, value, args| match value {
            Value::Object(object) => plain(args, object.is_callable()),
            // `Undefined` has a `__call__`, which fails.
            _ => plain(args, value.is_undefined()),
        },
        "sameas" => |_, value, args| {
            let [other] = args.bind("sameas", ["other"], 1)?;
            Ok(other.is_some_and(|other| value.is_same(&other)))
        },
        "escaped" => |_, value, args| plain(args, value.as_str().is_some_and(Str::is_safe)),
        "in" => |vm, value, args| {
            let [seq] = args.bind("in", ["seq"], 1)?;
            ops::contains(vm, &seq.unwrap_or(Value::None), value)
        },
        "==" | "eq" | "equalto" => |vm, value, args| compared(vm, value, args, Compare::Eq),
        "!=" | "ne" => |vm, value, args| compared(vm, value, args, Compare::Ne),
        ">" | "gt" | "greaterthan" => |vm, value, args| compared(vm, value, args, Compare::Gt),
        ">=" | "ge" => |vm, value, args| compared(vm, value, args, Compare::Ge),
        "<" | "lt" | "lessthan" => |vm, value, args| compared(vm, value, args, Compare::Lt),
        "<=" | "le" => |vm, value, args| compared(vm, value, args, Compare::Le),
        _ => return None,
    })
}

fn plain(args: CallArgs, result: bool) -> Res<bool> {
    args.only::<0>("test", 0)?;
    Ok(result)
}

fn named(value: &Value, args: CallArgs, known: fn(&str) -> bool) -> Res<bool> {
    match value {
        Value::List(_) | Value::Dict(_) | Value::View(_, View::Keys | View::Items) => {
            Err(failed(format!("unhashable type: '{}'", value.type_name())))
        }
        _ => plain(args, value.as_str().is_some_and(|name| known(name.text()))),
    }
}

fn remainder(vm: &Vm, value: &Value, args: CallArgs, divisor: i128, wanted: i128) -> Res<bool> {
    args.only::<0>("test", 0)?;
    let rest = ops::math(vm, ast::Math::Mod, value, &Value::Int(divisor))?;
    ops::equal(vm, &rest, &Value::Int(wanted))
}

fn cased(vm: &Vm, value: &Value, args: CallArgs, method: &'static str) -> Res<bool> {
    args.only::<0>("test", 0)?;
    Ok(methods::call(vm, &Value::Str(vm.str(value)?), method, CallArgs::default())?.is_true())
}

fn compared(vm: &Vm, value: &Value, args: CallArgs, op: Compare) -> Res<bool> {
    let [other] = args.only::<1>("comparison", 1)?;
    ops::compare(vm, op, value, &other.unwrap_or(Value::None))
}

fn is_sequence(value: &Value) -> bool {
    matches!(
        value,
        Value::Undefined(_) | Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Range(_)
    )
}
