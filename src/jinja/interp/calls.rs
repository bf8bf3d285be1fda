//! Calls: of macros, methods, functions and loops, and their arguments.

use std::rc::Rc;

use super::super::ast::{Args, Macro, Var};
use super::super::dict::Dict;
use super::super::error::{Res, failed};
use super::super::object::{CallArgs, Env, Object};
use super::super::string::Str;
use super::super::value::Value;
use super::super::{functions, methods};
use super::Vm;

impl Vm<'_> {
    pub(super) fn call_macro(&self, id: u32, outer: &Rc<Env>, args: CallArgs) -> Res<Str> {
        let part = &self.program.macros[id as usize];
        let env = self.env(part.function.num_slots, Some(outer))?;
        self.bind_macro(part, &env, args)?;
        let mut text = self.buf();
        self.body(&part.function.body, &env, &mut text)?;
        Ok(text.finish())
    }

    fn bind_macro(&self, part: &Macro, env: &Rc<Env>, mut args: CallArgs) -> Res<()> {
        let name = part.name.map_or("None".into(), |name| format!("'{}'", self.string(name).text()));
        let mut take = |wanted: &str| {
            let at = args.named.iter().position(|(name, _)| name.text() == wanted)?;
            Some(args.named.remove(at).1)
        };
        let given = args.positional.len().min(part.params.len());
        let rest = args.positional.split_off(given);
        let mut positional = args.positional.into_iter();
        let mut found_caller = part.explicit_caller && given == part.params.len();
        let mut values = Vec::new();
        for (param, slot) in &part.params {
            let param = self.string(*param);
            let value = positional.next().or_else(|| {
                found_caller |= param.text() == "caller";
                take(param.text())
            });
            values.push((*slot, value));
        }
        if part.accesses_caller && !found_caller {
            let caller = take("caller").filter(|caller| !caller.is_none());
            if let Some(slot) = part.caller {
                env.set_here(slot, Some(caller.unwrap_or_else(|| Value::undefined("No caller defined"))));
            }
        }
        if let Some(slot) = part.kwargs {
            let mut named = Dict::default();
            for (name, value) in args.named {
                self.work(8)?;
                named.insert(Value::Str(name), value)?;
            }
            env.set_here(slot, Some(Value::Dict(Rc::new(named))));
        } else if let Some((extra, _)) = args.named.first() {
            return Err(failed(format!("macro {name} takes no keyword argument '{}'", extra.text())));
        }
        if let Some(slot) = part.varargs {
            env.set_here(slot, Some(Value::tuple(rest)));
        } else if !rest.is_empty() {
            return Err(failed(format!("macro {name} takes not more than {} argument(s)", part.params.len())));
        }
        for (slot, value) in values {
            env.set_here(slot, value);
        }
        self.enter(&part.function.frame, env)?;
        let required = part.params.len() - part.defaults.len();
        for (at, (param, slot)) in part.params.iter().enumerate() {
            if env.get(Var { hops: 0, slot: *slot }).is_some() {
                continue;
            }
            let value = if let Some(at) = at.checked_sub(required) {
                self.eval(&part.defaults[at], env)?
            } else {
                Value::undefined(format!("parameter '{}' was not provided", self.string(*param).text()))
            };
            env.set_here(*slot, Some(value));
        }
        Ok(())
    }

    /// Calls a value.
    pub fn call(&self, callee: &Value, args: CallArgs) -> Res<Value> {
        self.step()?;
        let _deeper = self.deeper()?;
        let Value::Object(object) = callee.defined()? else {
            return Err(failed(format!("'{}' object is not callable", callee.type_name())));
        };
        match &**object {
            Object::Macro(id, env) => self.call_macro(*id, env, args).map(Value::Str),
            Object::Method(value, name) => methods::call(self, value, name, args),
            Object::Function(name) => functions::call(self, name, args),
            Object::Loop(state) => {
                let [items] = args.bind("loop", ["iterable"], 1)?;
                if !self.program.loops[state.id as usize].recursive {
                    return Err(failed("The loop must have the 'recursive' marker to be called recursively."));
                }
                let items = items.unwrap_or(Value::None);
                self.recursive_loop(state.id, &items, &state.env, state.depth0 + 1).map(Value::Str)
            }
            Object::Joiner(separator, used) => {
                args.only::<0>("joiner", 0)?;
                Ok(if used.replace(true) { separator.clone() } else { Value::text("") })
            }
            Object::Block(id) => {
                args.only::<0>("block", 0)?;
                let mut text = self.buf();
                self.run_function(&self.program.blocks[*id as usize].function, Some(*id), &mut text)?;
                Ok(Value::Str(text.finish()))
            }
            Object::Namespace(_) | Object::Cycler(..) | Object::Blocks => {
                Err(failed(format!("'{}' object is not callable", object.type_name())))
            }
        }
    }

    pub(super) fn args(&self, args: &Args, env: &Rc<Env>) -> Res<CallArgs> {
        let mut values = CallArgs::default();
        for arg in &args.positional {
            values.positional.push(self.eval(arg, env)?);
        }
        if let Some(star) = &args.star {
            let star = self.eval(star, env)?;
            for value in self.collect(&star)? {
                self.push(&mut values.positional, value)?;
            }
            values.charge.at_least(values.positional.capacity() * size_of::<Value>());
        }
        for (name, arg) in &args.named {
            let value = self.eval(arg, env)?;
            values.named.push((self.string(*name).clone(), value));
        }
        if let Some(star) = &args.star_star {
            let star = self.eval(star, env)?;
            let Value::Dict(dict) = &star else { return Err(failed("argument after ** must be a mapping")) };
            self.work(dict.entries.len() as u64 * (values.named.len() + 1) as u64)?;
            let explicit = values.named.len();
            for (key, value) in &dict.entries {
                let Some(key) = key.as_str() else { return Err(failed("keywords must be strings")) };
                if values.named[..explicit].iter().any(|(name, _)| name == key) {
                    return Err(failed(format!("multiple values for keyword argument '{}'", key.text())));
                }
                values.named.push((key.clone(), value.clone()));
            }
        }
        Ok(values)
    }
}
