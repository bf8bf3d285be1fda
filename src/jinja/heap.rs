//! The memory of values: counted while they live, and freed without recursion, however deep they are.

use std::cell::{Cell, RefCell};

use super::value::Value;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static COPIED: Cell<usize> = const { Cell::new(0) };
    static DYING: RefCell<Option<Vec<Vec<Value>>>> = const { RefCell::new(None) };
}

/// Bytes of all values of this thread that are alive.
pub(super) fn live() -> usize {
    LIVE.get()
}

/// Counts bytes of text that are written.
pub(super) fn note_copied(bytes: usize) {
    COPIED.set(COPIED.get() + bytes);
}

/// How often so many bytes of text have been written since the last time this was asked.
pub(super) fn take_copied(unit: usize) -> usize {
    let copied = COPIED.get();
    if copied < unit {
        return 0;
    }
    COPIED.set(copied % unit);
    copied / unit
}

/// Memory that is counted as long as this lives.
#[derive(Debug, Default)]
pub(super) struct Charge(usize);

impl Charge {
    pub fn new(bytes: usize) -> Self {
        LIVE.set(LIVE.get() + bytes);
        Self(bytes)
    }

    pub fn grow(&mut self, bytes: usize) {
        LIVE.set(LIVE.get() + bytes);
        self.0 += bytes;
    }

    /// Counts bytes until [`Charge::end`].
    pub fn begin(bytes: usize) {
        LIVE.set(LIVE.get() + bytes);
    }

    pub fn end(bytes: usize) {
        LIVE.set(LIVE.get().saturating_sub(bytes));
    }

    /// Counts at least this much, for what grows.
    pub fn at_least(&mut self, bytes: usize) {
        self.grow(bytes.saturating_sub(self.0));
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        Self::new(self.0)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        LIVE.set(LIVE.get().saturating_sub(self.0));
    }
}

/// Frees values one after the other: what they hold is put in a queue, not freed from inside.
pub(super) fn bury(values: Vec<Value>) {
    if !values.iter().any(Value::holds_values) {
        return;
    }
    let first = DYING.with_borrow_mut(|queue| {
        let first = queue.is_none();
        queue.get_or_insert_default().push(values);
        first
    });
    if first {
        while let Some(next) = DYING.with_borrow_mut(|queue| queue.as_mut().and_then(Vec::pop)) {
            drop(next);
        }
        DYING.set(None);
    }
}
