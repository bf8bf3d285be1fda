//! A layer's keys and values while a prompt is processed, on the device, behind what each head keeps of earlier tokens.

use candle_core::{DType, Tensor};

use super::super::HeadLayout;
use crate::attention::prompt_rows::PromptRows;
use crate::attention::window::PromptWindow;
use crate::error::{Error, Result};
use crate::ops::{MASKED, Ops};

/// One layer's keys and values while a prompt is processed, all f32.
#[derive(Debug, Clone)]
pub struct PromptTensors {
    pub(super) layout: HeadLayout,
    /// `[num_kv_heads, past + capacity, head_dim]`
    pub(super) keys: Tensor,
    /// `[num_kv_heads, past + capacity, head_dim]`
    pub(super) values: Tensor,
    /// `[num_kv_heads]` rows that each head kept of earlier tokens; they end before column `past`.
    pub(super) past_lens: Vec<usize>,
    pub(super) past: usize,
    pub(super) capacity: usize,
    pub(super) len: usize,
    /// `[num_kv_heads, 1, 1, past + capacity]` what is added to scores, if some head's past is shorter than another's.
    pub(super) padding: Option<Tensor>,
    /// Present in a layer with a sliding window.
    pub(super) window: Option<WindowTensors>,
}

/// A sliding window, and where keys are that it may hide.
#[derive(Debug, Clone)]
pub(super) struct WindowTensors {
    pub(super) of_rows: PromptWindow,
    /// `[num_kv_heads, 1, 1, past + capacity]` positions of keys, f32.
    pub(super) positions: Tensor,
}

impl PromptTensors {
    /// Room for a prompt of `capacity` tokens behind what each head keeps already.
    ///
    /// * `past`: keys and values, `[num_kv_heads, longest, head_dim]`, each head's at the end; `None` if there are none
    /// * `past_lens`: `[num_kv_heads]` how many of them are the head's; the longest is `longest`
    ///
    /// # Errors
    /// [`Error::Tensor`] if sizes do not fit.
    pub fn new(
        ops: &Ops,
        layout: HeadLayout,
        past: Option<(Tensor, Tensor)>,
        past_lens: Vec<usize>,
        capacity: usize,
    ) -> Result<Self> {
        let longest = past_lens.iter().copied().max().unwrap_or(0);
        let HeadLayout { num_kv_heads, head_dim, .. } = layout;
        let room = || ops.zeros((num_kv_heads, longest + capacity, head_dim), DType::F32);
        let (keys, values) = (room()?, room()?);
        if let Some((past_keys, past_values)) = past.filter(|_| longest > 0) {
            ops.write(&keys, &past_keys, 1, 0)?;
            ops.write(&values, &past_values, 1, 0)?;
        }
        let padding = if past_lens.iter().all(|&len| len == longest) {
            None
        } else {
            #[expect(clippy::cast_possible_truncation)]
            let of_head = |&len: &usize| {
                (0..longest + capacity).map(move |column| if column + len < longest { MASKED as f32 } else { 0.0 })
            };
            let numbers: Vec<f32> = past_lens.iter().flat_map(of_head).collect();
            Some(ops.upload(&numbers, (num_kv_heads, 1, 1, longest + capacity))?)
        };
        Ok(Self { layout, keys, values, past_lens, past: longest, capacity, len: 0, padding, window: None })
    }

    /// Lets each row see what is in its window only.
    ///
    /// * `window`: of the same heads, whose past rows are in the order of their positions
    ///
    /// # Errors
    /// [`Error::Shape`] if heads have other numbers of rows, [`Error::Tensor`] if the device refuses.
    pub fn within(mut self, ops: &Ops, window: PromptWindow) -> Result<Self> {
        let lens: Vec<usize> = (0..self.past_lens.len()).map(|kv_head| window.positions(kv_head).len()).collect();
        if lens != self.past_lens {
            return Err(Error::shape("rows within a window", &self.past_lens, lens));
        }
        let columns = self.past + self.capacity;
        let mut numbers = Vec::with_capacity(self.past_lens.len() * columns);
        #[expect(clippy::cast_precision_loss)] // positions, and differences of them are looked at
        for (kv_head, len) in lens.into_iter().enumerate() {
            // No window reaches to where nothing is.
            numbers.extend(std::iter::repeat_n(f32::MIN, self.past - len));
            numbers.extend(window.positions(kv_head).iter().map(|&position| position as f32));
            numbers.extend((window.first_position()..).take(self.capacity).map(|position| position as f32));
        }
        let positions = ops.upload(&numbers, (self.past_lens.len(), 1, 1, columns))?;
        self.window = Some(WindowTensors { of_rows: window, positions });
        Ok(self)
    }

    /// The first column that a row of the prompt sees, of all heads.
    pub(super) fn first_column(&self, row: usize) -> usize {
        let Some(WindowTensors { of_rows, .. }) = &self.window else { return 0 };
        let of_head = |(kv_head, len): (usize, &usize)| self.past - len + of_rows.seen(kv_head, row).start;
        self.past_lens.iter().enumerate().map(of_head).min().unwrap_or(0)
    }

    /// The first row of the prompt that is profiled.
    pub(super) fn first_profiled(&self) -> usize {
        self.window.as_ref().map_or(0, |window| window.of_rows.first_profiled(self.capacity))
    }

    /// Tokens of the prompt that are stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token of the prompt is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `[num_kv_heads]` rows of each head before the prompt's first.
    #[must_use]
    pub fn past_lens(&self) -> &[usize] {
        &self.past_lens
    }

    /// Keys and values as rows one below the other, `[num_kv_heads * rows, head_dim]`, and the row in which one of a
    /// head's is, counted from its first past row on.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn flat(&self) -> Result<(Tensor, Tensor, impl Fn(usize, usize) -> usize + '_)> {
        let rows = self.past + self.capacity;
        let flat = |x: &Tensor| x.reshape((self.layout.num_kv_heads * rows, self.layout.head_dim));
        let row = move |kv_head: usize, row: usize| kv_head * rows + self.past - self.past_lens[kv_head] + row;
        Ok((flat(&self.keys)?, flat(&self.values)?, row))
    }

    /// Copies of all keys and of all values on the host.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn to_host(&self, ops: &Ops) -> Result<(PromptRows, PromptRows)> {
        let by_head = |x: &Tensor| -> Result<PromptRows> {
            let numbers = ops.download(x)?;
            let width = self.layout.head_dim;
            let heads = numbers.chunks_exact((self.past + self.capacity) * width).zip(&self.past_lens);
            let own = heads.map(|(head, len)| head[(self.past - len) * width..(self.past + self.len) * width].to_vec());
            PromptRows::whole(self.layout, own.collect(), &self.past_lens, self.len)
        };
        Ok((by_head(&self.keys)?, by_head(&self.values)?))
    }

    /// Adds tokens of the prompt.
    ///
    /// * `keys`, `values`: `[num_kv_heads, seq_len, head_dim]`, f32, keys rotated
    ///
    /// # Errors
    /// [`Error::Shape`] for more than there is room for, [`Error::Tensor`] if sizes do not fit.
    pub fn push(&mut self, ops: &Ops, keys: &Tensor, values: &Tensor) -> Result<()> {
        let seq_len = keys.dim(1)?;
        if seq_len > self.capacity - self.len {
            return Err(Error::shape("prompt rows", format!("at most {}", self.capacity - self.len), seq_len));
        }
        ops.write(&self.keys, keys, 1, self.past + self.len)?;
        ops.write(&self.values, values, 1, self.past + self.len)?;
        self.len += seq_len;
        Ok(())
    }
}
