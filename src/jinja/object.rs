//! Values with an identity or a state, the variables of a call, and its arguments.

use std::cell::{Cell, RefCell};
use std::mem;
use std::rc::Rc;

use super::ast::Var;
use super::dict::Dict;
use super::error::{Res, failed};
use super::heap::{Charge, bury};
use super::interp::Vm;
use super::iter::Iter;
use super::ops;
use super::string::Str;
use super::value::{Seq, Value};

/// A value with an identity or a state.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "each lies in an `Rc` of its own")]
pub(super) enum Object {
    Namespace(RefCell<Dict>),
    Macro(u32, Rc<Env>),
    Loop(Loop),
    Cycler(Rc<Seq>, Cell<usize>),
    Joiner(Value, Cell<bool>),
    /// A method of a value.
    Method(Value, &'static str),
    /// A function of the program.
    Function(&'static str),
    /// `self`, and a block of it.
    Blocks,
    Block(u32),
}

impl Object {
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "Namespace",
            Self::Macro(..) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(..) => "Cycler",
            Self::Joiner(..) => "Joiner",
            Self::Method(..) => "builtin_function_or_method",
            Self::Function("dict") => "type",
            Self::Function(_) => "function",
            Self::Blocks => "TemplateReference",
            Self::Block(_) => "BlockReference",
        }
    }

    /// The object, its memory counted until it is dropped.
    pub fn counted(self) -> Rc<Self> {
        Charge::begin(OBJECT_BYTES);
        Rc::new(self)
    }

    pub fn len(&self) -> Option<usize> {
        if let Self::Loop(state) = self { state.length.get() } else { None }
    }

    pub fn is_callable(&self) -> bool {
        !matches!(self, Self::Namespace(_) | Self::Cycler(..) | Self::Blocks)
    }
}

/// What an object is counted for, apart from what it holds.
const OBJECT_BYTES: usize = 256;

impl Drop for Object {
    fn drop(&mut self) {
        Charge::end(OBJECT_BYTES);
        match self {
            Self::Namespace(attrs) => bury(attrs.get_mut().take_entries()),
            Self::Method(value, _) => bury(vec![mem::replace(value, Value::None)]),
            Self::Loop(state) => bury(state.take_values()),
            _ => {}
        }
    }
}

/// The variable `loop`.
#[derive(Debug)]
pub(super) struct Loop {
    pub id: u32,
    /// Where a recursive loop is called from.
    pub env: Rc<Env>,
    pub iter: RefCell<Rc<Iter>>,
    pub index0: Cell<i64>,
    pub length: Cell<Option<usize>>,
    pub ahead: RefCell<Option<Value>>,
    pub before: RefCell<Option<Value>>,
    pub current: RefCell<Option<Value>>,
    pub changed: RefCell<Option<Value>>,
    pub depth0: i64,
}

impl Loop {
    fn take_values(&mut self) -> Vec<Value> {
        let parts = [&mut self.ahead, &mut self.before, &mut self.current, &mut self.changed];
        let mut values: Vec<_> = parts.into_iter().filter_map(|part| part.get_mut().take()).collect();
        values.push(Value::Iter(Rc::clone(self.iter.get_mut())));
        values
    }

    pub fn next(&self, vm: &Vm) -> Res<Option<Value>> {
        let ahead = self.ahead.take();
        let found = if ahead.is_some() { ahead } else { self.advance(vm)? };
        if let Some(value) = &found {
            self.index0.set(self.index0.get() + 1);
            self.before.replace(self.current.replace(Some(value.clone())));
        }
        Ok(found)
    }

    fn advance(&self, vm: &Vm) -> Res<Option<Value>> {
        let iter = Rc::clone(&self.iter.borrow());
        iter.next(vm)
    }

    pub fn peek(&self, vm: &Vm) -> Res<Option<Value>> {
        if self.ahead.borrow().is_none() {
            let next = self.advance(vm)?;
            self.ahead.replace(next);
        }
        Ok(self.ahead.borrow().clone())
    }

    pub fn before(&self) -> Option<Value> {
        self.before.borrow().clone().filter(|_| self.index0.get() > 0)
    }

    /// The number of elements; those of a generator are fetched for it.
    pub fn length(&self, vm: &Vm) -> Res<i64> {
        if self.length.get().is_none() {
            let iter = Rc::clone(&self.iter.borrow());
            let (left, rest) = iter.rest_of(vm)?;
            self.iter.replace(rest);
            let done = usize::try_from(self.index0.get() + 1).unwrap_or(0);
            self.length.set(Some(left + done + usize::from(self.ahead.borrow().is_some())));
        }
        Ok(i64::try_from(self.length.get().unwrap_or(0)).unwrap_or(i64::MAX))
    }

    /// Whether the value differs from that of the last call.
    pub fn changed(&self, vm: &Vm, value: Value) -> Res<bool> {
        let same = match &*self.changed.borrow() {
            Some(last) => ops::equal(vm, last, &value)?,
            None => false,
        };
        if !same {
            self.changed.replace(Some(value));
        }
        Ok(!same)
    }
}

/// The variables of one call of a function.
#[derive(Debug)]
pub(super) struct Env {
    pub slots: RefCell<Vec<Option<Value>>>,
    parent: Option<Rc<Env>>,
    _charge: Charge,
}

impl Env {
    pub fn new(num_slots: u32, parent: Option<Rc<Self>>) -> Rc<Self> {
        let slots = vec![None; num_slots as usize];
        let charge = Charge::new(96 + slots.len() * size_of::<Value>());
        Rc::new(Self { slots: RefCell::new(slots), parent, _charge: charge })
    }

    fn find(&self, var: Var) -> &Self {
        let mut env = self;
        for _ in 0..var.hops {
            match &env.parent {
                Some(parent) => env = parent,
                None => break,
            }
        }
        env
    }

    pub fn get(&self, var: Var) -> Option<Value> {
        self.find(var).slots.borrow().get(var.slot as usize).cloned().flatten()
    }

    pub fn set(&self, var: Var, value: Option<Value>) {
        let old =
            self.find(var).slots.borrow_mut().get_mut(var.slot as usize).and_then(|slot| mem::replace(slot, value));
        // Freed only now, since that may look at variables.
        drop(old);
    }

    pub fn set_here(&self, slot: u32, value: Option<Value>) {
        self.set(Var { hops: 0, slot }, value);
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        bury(mem::take(self.slots.get_mut()).into_iter().flatten().collect());
    }
}

/// Arguments of a call.
#[derive(Debug, Clone, Default)]
pub(super) struct CallArgs {
    pub positional: Vec<Value>,
    pub named: Vec<(Str, Value)>,
    pub charge: Charge,
}

impl CallArgs {
    pub fn of(positional: Vec<Value>) -> Self {
        Self { positional, ..Self::default() }
    }

    pub fn len(&self) -> usize {
        self.positional.len() + self.named.len()
    }

    pub fn into_values(self) -> impl Iterator<Item = Value> {
        self.positional.into_iter().chain(self.named.into_iter().map(|(_, value)| value))
    }

    /// The arguments by the parameters' names, the first `required` of which must be there.
    ///
    /// # Errors
    /// As Python, if they don't fit.
    pub fn bind<const N: usize>(self, function: &str, names: [&str; N], required: usize) -> Res<[Option<Value>; N]> {
        let mut values = [const { None }; N];
        if self.positional.len() > N {
            return Err(failed(format!("{function}() takes at most {N} arguments ({} given)", self.positional.len())));
        }
        for (slot, value) in values.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            let Some(at) = names.iter().position(|known| *known == name.text()) else {
                return Err(failed(format!("{function}() got an unexpected keyword argument '{}'", name.text())));
            };
            if values[at].replace(value).is_some() {
                return Err(failed(format!("{function}() got multiple values for argument '{}'", name.text())));
            }
        }
        match values[..required].iter().position(Option::is_none) {
            Some(at) => Err(failed(format!("{function}() is missing the argument '{}'", names[at]))),
            None => Ok(values),
        }
    }

    /// Arguments that have no names.
    ///
    /// # Errors
    /// As Python, if they don't fit.
    pub fn only<const N: usize>(self, function: &str, required: usize) -> Res<[Option<Value>; N]> {
        if !self.named.is_empty() {
            return Err(failed(format!("{function}() takes no keyword arguments")));
        }
        self.bind(function, [function; N], required)
    }
}
