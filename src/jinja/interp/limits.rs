//! What a rendering may use: steps, memory, depth, the size of a text or a list.

use std::cell::Cell;

use super::super::error::{Res, limit};
use super::super::heap::{live, take_copied};
use super::super::string::StrBuf;
use super::super::value::Value;
use super::Vm;

/// Bytes of text that are written in about the time of a step.
const COPIED_PER_STEP: usize = 256;

/// One level deeper, as long as it lives.
pub(in super::super) struct Deeper<'a>(&'a Cell<usize>);

impl Drop for Deeper<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Vm<'_> {
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
}
