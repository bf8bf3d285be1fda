//! Runs a template: statements, expressions, calls, all within the limits.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::mem;
use std::rc::{Rc, Weak};

use chrono::NaiveDateTime;

use super::ast::{
    Args, Expr, ExprKind, For, Frame, Function, Load, Macro, Op, OpKind, Program, Stmt, StmtKind, Sym, Target, Var,
};
use super::error::{Res, TemplateError, TemplateErrorKind, failed, limit, syntax, unsupported};
use super::iter::{Iter, Lazy};
use super::object::{CallArgs, Env, Loop, Object};
use super::string::{Str, StrBuf};
use super::value::{Charge, Dict, Value, Why, bury, live, take_copied};
use super::{Limits, Origin, functions, methods, ops};

/// Bytes of text that are written in about the time of a step.
const COPIED_PER_STEP: usize = 256;

/// How statements ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// What may own itself, through a variable or an attribute.
enum Cyclic {
    Object(Weak<Object>),
    Env(Weak<Env>),
}

/// One rendering.
pub(super) struct Vm<'t> {
    pub program: &'t Program,
    pub strings: Vec<Str>,
    /// What names stand for that no scope assigns.
    context: RefCell<HashMap<String, Value>>,
    pub limits: Limits,
    pub now: Option<NaiveDateTime>,
    steps: Cell<u64>,
    depth: Cell<usize>,
    cyclic: RefCell<Vec<Cyclic>>,
    pub printing: RefCell<Vec<*const Object>>,
}

/// One level deeper, as long as it lives.
pub(super) struct Deeper<'a>(&'a Cell<usize>);

impl Drop for Deeper<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl<'t> Vm<'t> {
    pub fn new(program: &'t Program, limits: Limits, now: Option<NaiveDateTime>) -> Self {
        Self {
            program,
            strings: program.strings.iter().map(|text| Str::shared(text.clone())).collect(),
            context: RefCell::new(functions::globals()),
            limits,
            now,
            steps: Cell::new(limits.steps),
            depth: Cell::new(0),
            cyclic: RefCell::new(Vec::new()),
            printing: RefCell::new(Vec::new()),
        }
    }

    pub fn define(&self, name: &str, value: Value) {
        self.context.borrow_mut().insert(name.to_owned(), value);
    }

    /// Renders the whole template.
    pub fn render(&self) -> Res<StrBuf> {
        let mut out = StrBuf::new(self.limits.output_bytes);
        self.run_function(&self.program.root, None, &mut out)?;
        Ok(out)
    }

    // Limits.

    pub fn step(&self) -> Res<()> {
        self.work(1)
    }

    /// Takes steps from the budget, and looks at the memory.
    pub fn work(&self, steps: u64) -> Res<()> {
        let copied = take_copied(COPIED_PER_STEP) as u64;
        match self.steps.get().checked_sub(steps + copied) {
            Some(left) => self.steps.set(left),
            None => return Err(limit(format!("it takes more than {} steps", self.limits.steps))),
        }
        if live() > self.limits.memory_bytes {
            return Err(limit(format!("its values take more than {} bytes", self.limits.memory_bytes)));
        }
        Ok(())
    }

    /// The work of copying bytes that are not written to a text, or may be too many to begin with it.
    pub fn copying(&self, bytes: usize) -> Res<()> {
        self.work(1 + (bytes / COPIED_PER_STEP) as u64)
    }

    /// The work of looking at every byte.
    pub fn scanning(&self, bytes: usize) -> Res<()> {
        self.work(1 + bytes as u64 / 8)
    }

    /// The work of finding a value in a dictionary.
    pub fn keying(&self, key: &Value) -> Res<()> {
        self.scanning(key.key_bytes())
    }

    pub fn deeper(&self) -> Res<Deeper<'_>> {
        if self.depth.get() >= self.limits.depth {
            return Err(limit(format!("it nests calls or values more than {} deep", self.limits.depth)));
        }
        self.depth.set(self.depth.get() + 1);
        Ok(Deeper(&self.depth))
    }

    pub fn buf(&self) -> StrBuf {
        StrBuf::new(self.limits.value_bytes)
    }

    /// Checks the size of a list before it is made.
    pub fn fits(&self, elements: usize) -> Res<()> {
        if elements.saturating_mul(size_of::<Value>()) > self.limits.value_bytes {
            return Err(limit(format!("a list grows beyond {} bytes", self.limits.value_bytes)));
        }
        Ok(())
    }

    pub fn push(&self, values: &mut Vec<Value>, value: Value) -> Res<()> {
        self.fits(values.len() + 1)?;
        values.push(value);
        Ok(())
    }

    /// Remembers what must be taken apart at the end, since it may own itself.
    fn remember(&self, cyclic: Cyclic) {
        let mut all = self.cyclic.borrow_mut();
        if all.len() == all.capacity() {
            all.retain(|one| match one {
                Cyclic::Object(object) => object.strong_count() > 0,
                Cyclic::Env(env) => env.strong_count() > 0,
            });
            let len = all.len();
            all.reserve(len.max(64));
        }
        all.push(cyclic);
    }

    pub fn namespace(&self, attrs: Dict) -> Value {
        let object = Object::Namespace(RefCell::new(attrs)).counted();
        self.remember(Cyclic::Object(Rc::downgrade(&object)));
        Value::Object(object)
    }

    fn macro_value(&self, id: u32, env: &Rc<Env>) -> Value {
        self.remember(Cyclic::Env(Rc::downgrade(env)));
        Value::object(Object::Macro(id, Rc::clone(env)))
    }

    // Functions and scopes.

    fn run_function(&self, function: &Function, block: Option<u32>, out: &mut StrBuf) -> Res<()> {
        let env = self.env(function.num_slots, None)?;
        if let Some(slot) = function.self_slot {
            env.set_here(slot, Some(Value::object(Object::Blocks)));
        }
        if let (Some(slot), Some(id)) = (function.super_slot, block) {
            let name = self.string(self.program.blocks[id as usize].name);
            let hint = format!("there is no parent block called '{}'.", name.text());
            env.set_here(slot, Some(Value::undefined(hint)));
        }
        self.enter(&function.frame, &env)?;
        self.body(&function.body, &env, out).map(drop)
    }

    fn env(&self, num_slots: u32, outer: Option<&Rc<Env>>) -> Res<Rc<Env>> {
        self.work(1 + u64::from(num_slots) / 8)?;
        Ok(Env::new(num_slots, outer.cloned()))
    }

    fn string(&self, symbol: Sym) -> &Str {
        &self.strings[symbol as usize]
    }

    fn enter(&self, frame: &Frame, env: &Rc<Env>) -> Res<()> {
        self.work(frame.loads.len() as u64)?;
        for &(slot, load) in &frame.loads {
            match load {
                Load::Parameter => {}
                Load::Undefined => env.set_here(slot, None),
                Load::Alias(var) => env.set_here(slot, env.get(var)),
                Load::Resolve(name) => {
                    let found = self.context.borrow().get(self.string(name).text()).cloned();
                    env.set_here(slot, found);
                }
            }
        }
        Ok(())
    }

    fn leave(frame: &Frame, env: &Rc<Env>) {
        frame.loads.iter().for_each(|&(slot, _)| env.set_here(slot, None));
    }

    fn body(&self, body: &[Stmt], env: &Rc<Env>, out: &mut StrBuf) -> Res<Flow> {
        let _deeper = self.deeper()?;
        for stmt in body {
            let flow = self.statement(stmt, env, out).map_err(|error| error.at(stmt.line))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&self, stmt: &Stmt, env: &Rc<Env>, out: &mut StrBuf) -> Res<Flow> {
        self.step()?;
        match &stmt.kind {
            StmtKind::Text(text) => {
                let text = self.string(*text);
                self.copying(text.text().len())?;
                out.push_str(text)?;
            }
            StmtKind::Print(values) => {
                for value in values {
                    let value = self.eval(value, env)?;
                    self.write(&value, out)?;
                }
            }
            StmtKind::Set(target, value, top) => {
                let value = self.eval(value, env)?;
                self.assign(target, value, env)?;
                self.export(target, *top, env);
            }
            StmtKind::SetBlock { frame, target, ops, body, top } => {
                self.enter(frame, env)?;
                let value = match self.captured(body, ops, env)? {
                    Ok(value) => value,
                    Err(flow) => return Ok(flow),
                };
                self.assign(target, value, env)?;
                self.export(target, *top, env);
                Self::leave(frame, env);
            }
            StmtKind::If(branches, other) => {
                for (test, body) in branches {
                    if self.eval(test, env)?.is_true() {
                        return self.body(body, env, out);
                    }
                }
                return self.body(other, env, out);
            }
            StmtKind::For(id) => {
                let part = &self.program.loops[*id as usize];
                let items = self.eval(&part.iter, env)?;
                if part.recursive {
                    let text = self.recursive_loop(*id, &items, env, 0)?;
                    out.push_str(&text)?;
                } else {
                    return self.run_loop(*id, part, &items, env, env, out, 0);
                }
            }
            StmtKind::With { frame, targets, body } => {
                self.enter(frame, env)?;
                for (target, value) in targets {
                    let value = self.eval(value, env)?;
                    self.assign(target, value, env)?;
                }
                let flow = self.body(body, env, out)?;
                Self::leave(frame, env);
                return Ok(flow);
            }
            StmtKind::Autoescape { frame, value, body } => {
                self.enter(frame, env)?;
                if self.eval(value, env)?.is_true() {
                    return Err(unsupported("automatic escaping"));
                }
                let flow = self.body(body, env, out)?;
                Self::leave(frame, env);
                return Ok(flow);
            }
            StmtKind::FilterBlock { frame, ops, body } => {
                self.enter(frame, env)?;
                let value = match self.captured(body, ops, env)? {
                    Ok(value) => value,
                    Err(flow) => return Ok(flow),
                };
                self.write(&value, out)?;
                Self::leave(frame, env);
            }
            StmtKind::Macro(id, var, top) => {
                let value = self.macro_value(*id, env);
                if *top && let Some(name) = self.program.macros[*id as usize].name {
                    self.define(self.string(name).text(), value.clone());
                }
                env.set(*var, Some(value));
            }
            StmtKind::Call(id, call) => {
                let caller = self.macro_value(*id, env);
                let value = self.eval_with(call, env, Some(caller))?;
                self.write(&value, out)?;
            }
            StmtKind::Generation(id) => {
                let text = self.call_macro(*id, env, CallArgs::default())?;
                out.push_str(&text)?;
            }
            StmtKind::Block(id, seen) => self.block(*id, seen.as_deref(), env, out)?,
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
            StmtKind::Loader(value, _) => {
                self.eval(value, env)?;
                return Err(failed("no loader for this environment specified: a chat template stands alone"));
            }
        }
        Ok(Flow::Next)
    }

    fn block(&self, id: u32, seen: Option<&[(Sym, Var)]>, env: &Rc<Env>, out: &mut StrBuf) -> Res<()> {
        let block = &self.program.blocks[id as usize];
        if block.required {
            return Err(failed(format!("Required block '{}' not found", self.string(block.name).text())));
        }
        let outside = seen.map(|seen| {
            let outside = self.context.borrow().clone();
            for (name, var) in seen {
                if let Some(value) = env.get(*var) {
                    self.define(self.string(*name).text(), value);
                }
            }
            outside
        });
        let copied = outside.as_ref().map_or(0, HashMap::len);
        self.work(copied as u64)?;
        let _charge = Charge::new(copied * 128);
        let done = self.run_function(&block.function, Some(id), out);
        if let Some(outside) = outside {
            self.context.replace(outside);
        }
        done
    }

    /// Prints a value.
    fn write(&self, value: &Value, out: &mut StrBuf) -> Res<()> {
        match value {
            Value::Str(text) => {
                self.copying(text.text().len())?;
                out.push_str(text)
            }
            Value::Undefined(_) => Ok(()),
            _ => ops::repr(self, value, out),
        }
    }

    fn assign(&self, target: &Target, value: Value, env: &Rc<Env>) -> Res<()> {
        match target {
            Target::Name(_, var) => env.set(*var, Some(value)),
            Target::Attr(name, var, attr) => {
                let object = self.variable(*name, *var, env);
                let Some(attrs) = object.as_namespace() else {
                    return Err(failed("cannot assign attribute on non-namespace object"));
                };
                let old = attrs.borrow_mut().replace(Value::Str(self.string(*attr).clone()), value)?;
                drop(old);
            }
            Target::Tuple(targets) => {
                let values = match self.iterator(&value) {
                    Ok(iter) => iter.collect(self)?,
                    Err(_) => return Err(failed(format!("cannot unpack non-iterable {} object", value.type_name()))),
                };
                if values.len() != targets.len() {
                    let (wanted, got) = (targets.len(), values.len());
                    let which = if got > wanted { "too many" } else { "not enough" };
                    return Err(failed(format!("{which} values to unpack (expected {wanted}, got {got})")));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, env)?;
                }
            }
        }
        Ok(())
    }

    /// Shows blocks what the top level assigns.
    fn export(&self, target: &Target, top: bool, env: &Rc<Env>) {
        if !top || self.program.blocks.is_empty() {
            return;
        }
        match target {
            Target::Name(name, var) => {
                if let Some(value) = env.get(*var) {
                    self.define(self.string(*name).text(), value);
                }
            }
            Target::Attr(..) => {}
            Target::Tuple(items) => items.iter().for_each(|item| self.export(item, top, env)),
        }
    }

    // Loops.

    fn recursive_loop(&self, id: u32, items: &Value, outer: &Rc<Env>, depth0: i64) -> Res<Str> {
        let part = &self.program.loops[id as usize];
        let env = self.env(part.num_slots, Some(outer))?;
        let mut text = self.buf();
        self.run_loop(id, part, items, &env, outer, &mut text, depth0)?;
        Ok(text.finish())
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one loop")]
    fn run_loop(
        &self,
        id: u32,
        part: &For,
        items: &Value,
        env: &Rc<Env>,
        outer: &Rc<Env>,
        out: &mut StrBuf,
        depth0: i64,
    ) -> Res<Flow> {
        let (iter, length) = if part.test.is_some() {
            let condition = Iter::lazy(items.clone(), Lazy::Condition(id, Rc::clone(outer)));
            (self.iterator(&condition)?, None)
        } else {
            (self.iterator(items)?, items.len())
        };
        let state = part.loop_slot.map(|slot| {
            let state = Loop {
                id,
                env: Rc::clone(outer),
                iter: RefCell::new(Rc::clone(&iter)),
                index0: Cell::new(-1),
                length: Cell::new(length),
                ahead: RefCell::default(),
                before: RefCell::default(),
                current: RefCell::default(),
                changed: RefCell::default(),
                depth0,
            };
            (slot, Object::Loop(state).counted())
        });
        let mut empty = true;
        loop {
            let item = match state.as_ref().map(|(_, object)| &**object) {
                Some(Object::Loop(state)) => state.next(self)?,
                _ => iter.next(self)?,
            };
            let Some(item) = item else { break };
            self.assign(&part.target, item, env)?;
            if let Some((slot, object)) = &state {
                env.set_here(*slot, Some(Value::Object(Rc::clone(object))));
            }
            self.enter(&part.frame, env)?;
            match self.body(&part.body, env, out)? {
                Flow::Next => empty = false,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        Self::leave(&part.frame, env);
        // As in Jinja 2, a loop is empty if no turn came to its end.
        if empty && !part.other.is_empty() {
            self.enter(&part.other_frame, env)?;
            let flow = self.body(&part.other, env, out)?;
            Self::leave(&part.other_frame, env);
            return Ok(flow);
        }
        Ok(Flow::Next)
    }

    /// Whether an element passes the condition of a loop.
    pub fn passes(&self, id: u32, env: &Rc<Env>, value: &Value) -> Res<bool> {
        let part = &self.program.loops[id as usize];
        let Some((target, test, frame)) = &part.test else { return Ok(true) };
        self.enter(frame, env)?;
        self.assign(target, value.clone(), env)?;
        Ok(self.eval(test, env).map_err(|error| error.at(part.line))?.is_true())
    }

    // Calls.

    fn call_macro(&self, id: u32, outer: &Rc<Env>, args: CallArgs) -> Res<Str> {
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

    fn args(&self, args: &Args, env: &Rc<Env>) -> Res<CallArgs> {
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

    // Expressions.

    fn variable(&self, name: Sym, var: Var, env: &Env) -> Value {
        env.get(var).unwrap_or_else(|| Value::undefined_for(Why::Name(self.string(name).clone())))
    }

    fn eval(&self, expr: &Expr, env: &Rc<Env>) -> Res<Value> {
        self.eval_with(expr, env, None)
    }

    fn eval_all(&self, exprs: &[Expr], env: &Rc<Env>) -> Res<Vec<Value>> {
        self.fits(exprs.len())?;
        exprs.iter().map(|expr| self.eval(expr, env)).collect()
    }

    /// `caller`: passed on by the last call of the expression.
    fn eval_with(&self, expr: &Expr, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        self.step()?;
        Ok(match &expr.kind {
            ExprKind::None => Value::None,
            ExprKind::Bool(value) => Value::Bool(*value),
            ExprKind::Int(value) => Value::Int(*value),
            ExprKind::Float(value) => Value::Float(*value),
            ExprKind::Str(text) => Value::Str(self.string(*text).clone()),
            ExprKind::Name(name, var) => self.variable(*name, *var, env),
            _ => {
                let _deeper = self.deeper()?;
                return self.eval_nested(expr, env, caller).map_err(|error| error.at(expr.line));
            }
        })
    }

    fn eval_nested(&self, expr: &Expr, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        Ok(match &expr.kind {
            ExprKind::List(items) => Value::list(self.eval_all(items, env)?),
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items, env)?),
            ExprKind::Dict(entries) => {
                let mut dict = Dict::default();
                for (key, value) in entries {
                    let key = self.eval(key, env)?;
                    self.keying(&key)?;
                    dict.insert(key, self.eval(value, env)?)?;
                }
                Value::Dict(Rc::new(dict))
            }
            ExprKind::Negative(operand) => ops::negative(&self.eval(operand, env)?)?,
            ExprKind::Positive(operand) => ops::positive(&self.eval(operand, env)?)?,
            ExprKind::Not(operand) => Value::Bool(!self.eval(operand, env)?.is_true()),
            ExprKind::Math(first, rest) => {
                let mut value = self.eval(first, env)?;
                for (op, operand) in rest {
                    let operand = self.eval(operand, env)?;
                    value = ops::math(self, *op, &value, &operand)?;
                }
                value
            }
            ExprKind::Concat(parts) => {
                let values = self.eval_all(parts, env)?;
                let mut text = self.buf();
                values.iter().try_for_each(|value| self.write(value, &mut text))?;
                Value::Str(text.finish())
            }
            ExprKind::And(parts) => self.logic(parts, env, false)?,
            ExprKind::Or(parts) => self.logic(parts, env, true)?,
            ExprKind::Compare(first, rest) => {
                let mut left = self.eval(first, env)?;
                for (op, operand) in rest {
                    let right = self.eval(operand, env)?;
                    if !ops::compare(self, *op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            ExprKind::Cond { test, then, other } => {
                if self.eval(test, env)?.is_true() {
                    self.eval(then, env)?
                } else if let Some(other) = other {
                    self.eval(other, env)?
                } else {
                    Value::undefined("the inline if-expression evaluated to false and no else section was defined.")
                }
            }
            ExprKind::Postfix(base, ops) => {
                let mut value = self.eval(base, env)?;
                let mut caller = caller;
                for (at, op) in ops.iter().enumerate() {
                    let caller = if at + 1 == ops.len() { caller.take() } else { None };
                    value = self.apply(value, op, env, caller).map_err(|error| error.at(op.line))?;
                }
                value
            }
            _ => self.eval(expr, env)?,
        })
    }

    fn logic(&self, parts: &[Expr], env: &Rc<Env>, stop: bool) -> Res<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.eval(part, env)?;
            if value.is_true() == stop {
                break;
            }
        }
        Ok(value)
    }

    /// What statements print, taken through filters; or how they broke off.
    fn captured(&self, body: &[Stmt], ops: &[Op], env: &Rc<Env>) -> Res<Result<Value, Flow>> {
        let mut out = self.buf();
        Ok(match self.body(body, env, &mut out)? {
            Flow::Next => Ok(self.apply_all(Value::Str(out.finish()), ops, env)?),
            flow => Err(flow),
        })
    }

    fn apply_all(&self, mut value: Value, ops: &[Op], env: &Rc<Env>) -> Res<Value> {
        for op in ops {
            value = self.apply(value, op, env, None).map_err(|error| error.at(op.line))?;
        }
        Ok(value)
    }

    fn apply(&self, value: Value, op: &Op, env: &Rc<Env>, caller: Option<Value>) -> Res<Value> {
        self.step()?;
        match &op.kind {
            OpKind::Attr(name) => methods::attribute(self, &value, self.string(*name)),
            OpKind::Item(item) => {
                let item = self.eval(item, env)?;
                methods::item(self, &value, &item)
            }
            OpKind::Slice(parts) => {
                let mut bounds = [Value::None, Value::None, Value::None];
                for (bound, part) in bounds.iter_mut().zip(&**parts) {
                    if let Some(part) = part {
                        *bound = self.eval(part, env)?;
                    }
                }
                ops::slice(self, &value, &bounds)
            }
            OpKind::Call(args) => {
                let mut args = self.args(args, env)?;
                if let Some(caller) = caller {
                    args.named.push((Str::plain("caller".into(), Origin::Template), caller));
                }
                self.call(&value, args)
            }
            OpKind::Filter(name, filter, args) => {
                let args = self.args(args, env)?;
                let Some(filter) = filter else {
                    return Err(syntax(format!("no filter named `{}`", self.string(*name).text())));
                };
                let _deeper = self.deeper()?;
                filter(self, value, args)
            }
            OpKind::Test(name, test, args, negated) => {
                let args = self.args(args, env)?;
                let Some(test) = test else {
                    return Err(syntax(format!("no test named `{}`", self.string(*name).text())));
                };
                Ok(Value::Bool(test(self, &value, args)? != *negated))
            }
        }
    }

    /// The text of a value, as Python's `str`.
    pub fn str(&self, value: &Value) -> Res<Str> {
        if let Value::Str(text) = value {
            return Ok(text.clone());
        }
        let mut text = self.buf();
        self.write(value, &mut text)?;
        Ok(text.finish())
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        self.context.get_mut().clear();
        for cyclic in mem::take(self.cyclic.get_mut()) {
            match cyclic {
                Cyclic::Object(object) => {
                    if let Some(object) = object.upgrade()
                        && let Object::Namespace(attrs) = &*object
                    {
                        let attrs = attrs.borrow_mut().take_entries();
                        drop(attrs);
                    }
                }
                Cyclic::Env(env) => {
                    if let Some(env) = env.upgrade() {
                        let slots = mem::take(&mut *env.slots.borrow_mut());
                        bury(slots.into_iter().flatten().collect());
                    }
                }
            }
        }
    }
}

/// The error of `raise_exception`.
pub(super) fn refusal(message: &str) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Refused, message)
}
