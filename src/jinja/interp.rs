//! Runs a template: the state of one rendering, its variables and functions. Statements, expressions, calls and limits
//! have files of their own.

mod calls;
mod expressions;
mod limits;
mod statements;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::mem;
use std::rc::{Rc, Weak};

use chrono::NaiveDateTime;

use super::ast::{Frame, Function, Load, Program, Sym};
use super::dict::Dict;
use super::error::Res;
use super::heap::bury;
use super::object::{Env, Object};
use super::string::{Str, StrBuf};
use super::value::Value;
use super::{Limits, functions};

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
