//! Python's `repr`: how values are printed.

use std::cell::Cell;
use std::rc::Rc;

use super::Origin;
use super::dict::Dict;
use super::error::{Res, failed};
use super::interp::Vm;
use super::object::Object;
use super::string::{Str, StrBuf};
use super::value::Value;
use super::{number, text};

/// Python's `repr`.
pub(super) fn text(vm: &Vm, value: &Value) -> Res<Str> {
    let mut text = vm.buf();
    repr(vm, value, &mut text)?;
    Ok(text.finish())
}

/// Python's `repr`, into a text.
pub(super) fn repr(vm: &Vm, value: &Value, out: &mut StrBuf) -> Res<()> {
    vm.step()?;
    let mut plain = |text: &str| out.push(text, Origin::Template);
    match value {
        Value::Undefined(_) => plain("Undefined"),
        Value::None => plain("None"),
        Value::Bool(value) => plain(if *value { "True" } else { "False" }),
        Value::Int(value) => plain(&value.to_string()),
        Value::Float(value) => plain(&number::float_repr(*value)),
        Value::Str(text) => repr_str(vm, text, out),
        Value::List(items) => repr_items(vm, &items.items, ["[", "]"], out),
        Value::Tuple(items) => {
            let end = if items.items.len() == 1 { ",)" } else { ")" };
            repr_items(vm, &items.items, ["(", end], out)
        }
        Value::Dict(dict) => repr_dict(vm, dict, out),
        Value::View(dict, view) => {
            let items: Vec<_> = dict.entries.iter().map(|entry| view.of(entry)).collect();
            plain(value.type_name())?;
            repr_items(vm, &items, ["([", "])"], out)
        }
        Value::Range(range) => {
            let (start, stop) = (range.start, range.stop);
            plain(&match range.step {
                1 => format!("range({start}, {stop})"),
                step => format!("range({start}, {stop}, {step})"),
            })
        }
        // Where it is in memory is anyone's guess in Python, too.
        Value::Iter(iter) => plain(&format!("<{} at 0x7f0000000000>", iter.shown())),
        Value::Object(object) => repr_object(vm, object, out),
    }
}

fn repr_items(vm: &Vm, items: &[Value], brackets: [&str; 2], out: &mut StrBuf) -> Res<()> {
    let _deeper = vm.deeper()?;
    out.push(brackets[0], Origin::Template)?;
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(", ", Origin::Template)?;
        }
        repr(vm, item, out)?;
    }
    out.push(brackets[1], Origin::Template)
}

fn repr_dict(vm: &Vm, dict: &Dict, out: &mut StrBuf) -> Res<()> {
    let _deeper = vm.deeper()?;
    out.push("{", Origin::Template)?;
    for (at, (key, value)) in dict.entries.iter().enumerate() {
        if at > 0 {
            out.push(", ", Origin::Template)?;
        }
        repr(vm, key, out)?;
        out.push(": ", Origin::Template)?;
        repr(vm, value, out)?;
    }
    out.push("}", Origin::Template)
}

fn repr_object(vm: &Vm, object: &Rc<Object>, out: &mut StrBuf) -> Res<()> {
    let text = match &**object {
        Object::Namespace(attrs) => {
            let this = Rc::as_ptr(object);
            out.push("<Namespace ", Origin::Template)?;
            if vm.printing.borrow().contains(&this) {
                // Python has an abbreviation; a prompt with that in it is no prompt.
                return Err(failed("a namespace that holds itself cannot be printed"));
            }
            vm.printing.borrow_mut().push(this);
            let done = repr_dict(vm, &attrs.borrow(), out);
            vm.printing.borrow_mut().pop();
            done?;
            ">".into()
        }
        Object::Macro(id, _) => match vm.program.macros[*id as usize].name {
            Some(name) => format!("<Macro '{}'>", vm.strings[name as usize].text()),
            None => "<Macro anonymous>".into(),
        },
        Object::Loop(state) => format!("<LoopContext {}/{}>", state.index0.get() + 1, state.length(vm)?),
        Object::Method(value, name) => {
            format!("<built-in method {name} of {} object at 0x7f0000000000>", value.type_name())
        }
        Object::Function("dict") => "<class 'dict'>".into(),
        Object::Function("namespace") => "<class 'jinja2.utils.Namespace'>".into(),
        Object::Function(name) => format!("<function {name} at 0x7f0000000000>"),
        Object::Blocks => "<TemplateReference None>".into(),
        Object::Cycler(..) | Object::Joiner(..) | Object::Block(_) => {
            format!("<jinja2.{} object at 0x7f0000000000>", object.type_name())
        }
    };
    out.push(&text, Origin::Template)
}

fn repr_str(vm: &Vm, text: &Str, out: &mut StrBuf) -> Res<()> {
    vm.scanning(text.text().len() * 8)?;
    let quote = if text.text().contains('\'') && !text.text().contains('"') { '"' } else { '\'' };
    if text.is_safe() {
        out.push("Markup(", Origin::Template)?;
    }
    out.push_char(quote, Origin::Template)?;
    let plain = Cell::new(0);
    let special = |c: char| c == quote || c == '\\' || !text::is_printable(c);
    for (at, c) in text.text().char_indices().filter(|&(_, c)| special(c)) {
        out.push_slice(text, plain.replace(at + c.len_utf8()), at)?;
        let code = c as u32;
        let escaped = match c {
            '\n' => "\\n".into(),
            '\r' => "\\r".into(),
            '\t' => "\\t".into(),
            '\\' | '\'' | '"' => format!("\\{c}"),
            _ if code <= 0xFF => format!("\\x{code:02x}"),
            _ if code <= 0xFFFF => format!("\\u{code:04x}"),
            _ => format!("\\U{code:08x}"),
        };
        out.push(&escaped, text.origin_at(at))?;
    }
    out.push_slice(text, plain.get(), text.text().len())?;
    out.push_char(quote, Origin::Template)?;
    if text.is_safe() {
        out.push(")", Origin::Template)?;
    }
    Ok(())
}
