//! Iterators: what Python's generators do, one element at a time, once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::mem;
use std::rc::Rc;

use super::ast::{Compare, Math};
use super::dict::Dict;
use super::error::{Res, TemplateError, failed};
use super::filters::{Filter, clamped, count_of};
use super::heap::{Charge, bury};
use super::interp::Vm;
use super::lists::Getter;
use super::object::{CallArgs, Env};
use super::ops;
use super::string::Str;
use super::tests::Test;
use super::value::{Range, Seq, Value, View};

/// An iterator in some state.
#[derive(Debug)]
pub(super) struct Iter {
    type_name: &'static str,
    /// What Python prints of it, without the address.
    shown: &'static str,
    state: RefCell<State>,
    _charge: Charge,
}

#[derive(Debug)]
enum State {
    Done,
    Seq(Rc<Seq>, usize),
    Chars(Str, usize),
    Range(Range, i64),
    Dict(Rc<Dict>, View, usize),
    Queue(VecDeque<Value>),
    /// A generator of a filter; `None` in place of the source: the source has not been asked yet.
    Lazy(Value, Option<Rc<Iter>>, Box<Lazy>),
}

pub(super) const SHOWN_MAP: &str = "generator object sync_do_map";
pub(super) const SHOWN_SELECT: &str = "generator object select_or_reject";
pub(super) const SHOWN_SLICE: &str = "generator object sync_do_slice";

/// What a generator does with each element of its source.
#[derive(Debug)]
pub(super) enum Lazy {
    Attr(Getter),
    Filter(Filter, CallArgs),
    /// `bool`: whether those that pass the test are kept.
    Select(Option<Getter>, Option<(Test, CallArgs)>, bool),
    /// The values that have been seen.
    Unique(Getter, Dict),
    /// How many in each, as it was given: what is no number of elements, is never as many.
    Batch(Value, Option<Value>),
    /// How many columns.
    Columns(i128, Option<Value>),
    /// The pairs of a mapping.
    Items,
    /// The condition of a `for` loop.
    Condition(u32, Rc<Env>),
    /// Wrong arguments, which a generator finds when its first element is asked for.
    Wrong(&'static str, TemplateError),
}

impl Iter {
    fn new(type_name: &'static str, shown: &'static str, state: State, bytes: usize) -> Rc<Self> {
        Rc::new(Self { type_name, shown, state: RefCell::new(state), _charge: Charge::new(bytes) })
    }

    fn with(type_name: &'static str, state: State) -> Rc<Self> {
        Self::new(type_name, type_name, state, 128)
    }

    pub fn lazy(source: Value, lazy: Lazy) -> Value {
        let shown = lazy.shown();
        let args = match &lazy {
            Lazy::Filter(_, args) | Lazy::Select(_, Some((_, args)), _) => args.len(),
            _ => 0,
        };
        let state = State::Lazy(source, None, Box::new(lazy));
        Value::Iter(Self::new("generator", shown, state, 256 + args * size_of::<Value>()))
    }

    /// An iterator over values that are known.
    pub fn queue(type_name: &'static str, values: Vec<Value>) -> Rc<Self> {
        let bytes = 128 + values.capacity() * size_of::<Value>();
        Self::new(type_name, type_name, State::Queue(values.into()), bytes)
    }

    pub fn type_name(&self) -> &'static str {
        self.type_name
    }

    pub fn shown(&self) -> &'static str {
        self.shown
    }

    /// The next element.
    ///
    /// # Errors
    /// Those of the filter or test behind it.
    pub fn next(&self, vm: &Vm) -> Res<Option<Value>> {
        vm.work(2)?;
        let _deeper = vm.deeper()?;
        let Ok(mut state) = self.state.try_borrow_mut() else { return Err(failed("generator already executing")) };
        let found = match &mut *state {
            State::Done => None,
            State::Seq(items, at) => {
                *at += 1;
                items.items.get(*at - 1).cloned()
            }
            State::Chars(text, at) => text.text()[*at..].chars().next().map(|c| {
                let start = *at;
                *at += c.len_utf8();
                Value::Str(text.slice(start, *at).with_safe(false))
            }),
            State::Range(range, at) => {
                *at += 1;
                (*at <= range.len).then(|| range.get(*at - 1))
            }
            State::Dict(dict, view, at) => {
                *at += 1;
                dict.entries.get(*at - 1).map(|entry| view.of(entry))
            }
            State::Queue(values) => values.pop_front(),
            State::Lazy(source, iter, lazy) => {
                let iter = if let Some(iter) = iter {
                    Rc::clone(iter)
                } else {
                    let opened = lazy.open(vm, source)?;
                    Rc::clone(iter.insert(opened))
                };
                if let Lazy::Columns(count, fill) = &**lazy {
                    let columns = columns(vm, &iter, *count, fill.as_ref())?;
                    *state = State::Queue(columns.into());
                    drop(state);
                    return self.next(vm);
                }
                lazy.next(vm, &iter)?
            }
        };
        if found.is_none() {
            *state = State::Done;
        }
        Ok(found)
    }

    /// All elements that are left.
    ///
    /// # Errors
    /// Those of [`Iter::next`], and if they are too many.
    pub fn collect(&self, vm: &Vm) -> Res<Vec<Value>> {
        let mut values = Vec::new();
        let mut charge = Charge::default();
        while let Some(value) = self.next(vm)? {
            vm.push(&mut values, value)?;
            charge.at_least(values.capacity() * size_of::<Value>());
        }
        Ok(values)
    }

    pub fn rest_of(self: &Rc<Self>, vm: &Vm) -> Res<(usize, Rc<Self>)> {
        let rest = self.collect(vm)?;
        Ok((rest.len(), Self::queue("list_iterator", rest)))
    }
}

impl Drop for Iter {
    fn drop(&mut self) {
        match mem::replace(self.state.get_mut(), State::Done) {
            State::Queue(values) => bury(values.into()),
            State::Lazy(source, iter, lazy) => {
                let mut values = vec![source];
                values.extend(iter.map(Value::Iter));
                if let Lazy::Filter(_, args) | Lazy::Select(_, Some((_, args)), _) = *lazy {
                    values.extend(args.into_values());
                }
                bury(values);
            }
            _ => {}
        }
    }
}

impl Lazy {
    /// What Python prints of the generator, without the address.
    fn shown(&self) -> &'static str {
        match self {
            Self::Attr(_) | Self::Filter(..) => SHOWN_MAP,
            Self::Select(..) => SHOWN_SELECT,
            Self::Unique(..) => "generator object sync_do_unique",
            Self::Batch(..) => "generator object do_batch",
            Self::Columns(..) => SHOWN_SLICE,
            Self::Items => "generator object do_items",
            Self::Condition(..) => "generator object",
            Self::Wrong(shown, _) => shown,
        }
    }

    /// Asks the source for its elements.
    fn open(&self, vm: &Vm, source: &Value) -> Res<Rc<Iter>> {
        let may_be_nothing = match self {
            Self::Attr(_) | Self::Filter(..) | Self::Select(..) => true,
            Self::Wrong(shown, _) => matches!(*shown, SHOWN_MAP | SHOWN_SELECT),
            _ => false,
        };
        if may_be_nothing && !source.is_true() {
            return Ok(Iter::queue("generator", Vec::new()));
        }
        match (self, source) {
            (Self::Wrong(_, error), _) => Err(error.clone()),
            (Self::Items, Value::Undefined(_)) => vm.iterator(source),
            (Self::Items, Value::Dict(dict)) => vm.iterator(&Value::View(Rc::clone(dict), View::Items)),
            (Self::Items, _) => Err(failed("Can only get item pairs from a mapping.")),
            _ => vm.iterator(source),
        }
    }

    fn next(&mut self, vm: &Vm, source: &Iter) -> Res<Option<Value>> {
        if let Self::Batch(size, fill) = self {
            let mut batch = Vec::new();
            let most = size.as_whole().filter(|&most| most > 0).map_or(usize::MAX, clamped);
            while batch.len() < most
                && let Some(value) = source.next(vm)?
            {
                vm.push(&mut batch, value)?;
            }
            if batch.is_empty() {
                return Ok(None);
            }
            let len = Value::Int(batch.len() as i128);
            if let Some(fill) = fill
                && ops::compare(vm, Compare::Lt, &len, size)?
            {
                let missing = count_of(&ops::math(vm, Math::Sub, size, &len)?)?;
                for _ in 0..missing {
                    vm.step()?;
                    vm.push(&mut batch, fill.clone())?;
                }
            }
            return Ok(Some(Value::list(batch)));
        }
        while let Some(value) = source.next(vm)? {
            let found = match self {
                Self::Attr(getter) => Some(getter.get(vm, &value)?),
                Self::Filter(filter, args) => {
                    vm.work(args.len() as u64)?;
                    Some(filter(vm, value, args.clone())?)
                }
                Self::Select(getter, test, keep) => {
                    let tested = match getter {
                        Some(getter) => getter.get(vm, &value)?,
                        None => value.clone(),
                    };
                    let passes = match test {
                        Some((test, args)) => {
                            vm.work(args.len() as u64)?;
                            test(vm, &tested, args.clone())?
                        }
                        None => tested.is_true(),
                    };
                    (passes == *keep).then_some(value)
                }
                Self::Unique(getter, seen) => {
                    vm.work(16)?;
                    let key = getter.get(vm, &value)?;
                    vm.keying(&key)?;
                    if seen.get(&key)?.is_some() {
                        None
                    } else {
                        seen.insert(key, Value::None)?;
                        Some(value)
                    }
                }
                Self::Condition(id, env) => vm.passes(*id, env, &value)?.then_some(value),
                Self::Items => Some(value),
                Self::Batch(..) | Self::Columns(..) | Self::Wrong(..) => None,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// What the filter `slice` makes: `count` lists of about the same length.
fn columns(vm: &Vm, source: &Iter, count: i128, fill: Option<&Value>) -> Res<Vec<Value>> {
    let items = source.collect(vm)?;
    if count == 0 {
        return Err(failed("integer division or modulo by zero"));
    }
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    let (each, extra) = (items.len() / count.max(1), items.len() % count.max(1));
    let (mut columns, mut start) = (Vec::new(), 0);
    for number in 0..count {
        vm.step()?;
        let end = start + each + usize::from(number < extra);
        let mut column = items[start..end].to_vec();
        if number >= extra {
            column.extend(fill.cloned());
        }
        start = end;
        vm.push(&mut columns, Value::list(column))?;
    }
    Ok(columns)
}

impl Vm<'_> {
    /// Python's `iter`.
    ///
    /// # Errors
    /// If the value is not iterable.
    #[allow(clippy::unused_self, reason = "like `collect`")]
    pub fn iterator(&self, value: &Value) -> Res<Rc<Iter>> {
        Ok(match value {
            Value::Undefined(_) => Iter::with("generator", State::Done),
            Value::Str(text) => Iter::with("str_iterator", State::Chars(text.clone(), 0)),
            Value::List(items) => Iter::with("list_iterator", State::Seq(Rc::clone(items), 0)),
            Value::Tuple(items) => Iter::with("tuple_iterator", State::Seq(Rc::clone(items), 0)),
            Value::Range(range) => Iter::with("range_iterator", State::Range(*range, 0)),
            Value::Dict(dict) => Iter::with("dict_keyiterator", State::Dict(Rc::clone(dict), View::Keys, 0)),
            Value::View(dict, view) => Iter::with("dict_iterator", State::Dict(Rc::clone(dict), *view, 0)),
            Value::Iter(iter) => Rc::clone(iter),
            _ => return Err(failed(format!("'{}' object is not iterable", value.type_name()))),
        })
    }

    /// All elements of a value.
    ///
    /// # Errors
    /// As [`Vm::iterator`] and [`Iter::collect`].
    pub fn collect(&self, value: &Value) -> Res<Vec<Value>> {
        match value {
            Value::List(items) | Value::Tuple(items) => {
                self.work(items.items.len() as u64 / 2)?;
                Ok(items.items.clone())
            }
            _ => self.iterator(value)?.collect(self),
        }
    }
}
