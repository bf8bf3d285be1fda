//! Statements: what a template writes, assigns and repeats.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::super::ast::{For, Frame, Op, Stmt, StmtKind, Sym, Target, Var};
use super::super::error::{Res, failed, unsupported};
use super::super::heap::Charge;
use super::super::iter::{Iter, Lazy};
use super::super::object::{CallArgs, Env, Loop, Object};
use super::super::repr;
use super::super::string::{Str, StrBuf};
use super::super::value::Value;
use super::Vm;

/// How statements ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

impl Vm<'_> {
    pub(super) fn body(&self, body: &[Stmt], env: &Rc<Env>, out: &mut StrBuf) -> Res<Flow> {
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
                let value = match self.captured(frame, body, ops, env)? {
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
                match self.captured(frame, body, ops, env)? {
                    Ok(value) => self.write(&value, out)?,
                    Err(flow) => return Ok(flow),
                }
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

    /// What a body writes, filtered; `Err` if a loop outside goes on from within it.
    fn captured(&self, frame: &Frame, body: &[Stmt], ops: &[Op], env: &Rc<Env>) -> Res<Result<Value, Flow>> {
        self.enter(frame, env)?;
        let mut inner = self.buf();
        Ok(match self.body(body, env, &mut inner)? {
            Flow::Next => Ok(self.apply_all(Value::Str(inner.finish()), ops, env, None)?),
            flow => Err(flow),
        })
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
    pub(super) fn write(&self, value: &Value, out: &mut StrBuf) -> Res<()> {
        match value {
            Value::Str(text) => {
                self.copying(text.text().len())?;
                out.push_str(text)
            }
            Value::Undefined(_) => Ok(()),
            _ => repr::repr(self, value, out),
        }
    }

    fn assign(&self, target: &Target, value: Value, env: &Rc<Env>) -> Res<()> {
        let no_namespace = || failed("cannot assign attribute on non-namespace object");
        match target {
            Target::Name(_, var) => env.set(*var, Some(value)),
            Target::Attr(name, var, attr) => {
                let Value::Object(object) = self.variable(*name, *var, env) else { return Err(no_namespace()) };
                let Object::Namespace(attrs) = &*object else { return Err(no_namespace()) };
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

    pub(super) fn recursive_loop(&self, id: u32, items: &Value, outer: &Rc<Env>, depth0: i64) -> Res<Str> {
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
}
