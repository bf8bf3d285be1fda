//! One layer's cache as tensors on a device: what attention made of candle operations reads.
//!
//! What is kept of prompts lies in one tensor for keys and one for values, head after head in the order of
//! [`Slots`], and does not change until the next prompt. Tokens since then are the same for all heads, so they lie in a
//! tail with room for all heads alike, which is written in place and grown with bounded slack. A prompt on top merges the
//! tail into what is kept. With [`DecodeWith::Ragged`] heads lie in their own order without padding, and where each one's rows
//! are goes to the device once for each prompt. Rows that go are not copied along, and their tensors' memory goes back to the device's
//! allocator with the last use of them.
//!
//! Not for: knowing whose rows they are (see [`Ledger`]), or attending (see [`crate::attention::device`]).

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::attention::HeadLayout;
use crate::attention::device::{GroupedRows, PromptTensors, Slots};
use crate::attention::ragged::{self, RaggedRows};
use crate::attention::window::PromptWindow;
use crate::cache::{CacheLayer, HeadPlan, HeadStep, KvDtype, Ledger, Plan, Rows, growth};
use crate::error::{Error, Result};
use crate::ops::{DecodeWith, Ops};
use crate::tokens::TokenClass;

/// Keys and values of one layer, as tensors.
///
/// A clone shares what is kept of prompts, and gets a tail of its own when one of the two goes on.
#[derive(Debug, Clone)]
pub struct CandleRows {
    layout: HeadLayout,
    dtype: KvDtype,
    ops: Ops,
    /// `[num_kv_heads]` rows of each head, the tail's included.
    lens: Vec<usize>,
    slots: Slots,
    /// `[slots.num_rows(), head_dim]`; `None` if there are none.
    kept: Option<Pair>,
    /// `[num_kv_heads, tail_capacity, head_dim]` in the order of slots; `None` if nothing came since the last prompt.
    tail: Option<Arc<Pair>>,
    tail_len: usize,
    /// See [`GroupedRows::visible`]; made for the tail's capacity.
    visible: Option<Tensor>,
    /// The head in each slot and the slot of each head; `None` if they are in order.
    order: Option<[Tensor; 2]>,
    /// The kept rows for attention in one launch; made with the first token after a prompt, if that is how it is done.
    ragged: Option<Arc<RaggedRows>>,
}

/// A layer's cache in tensors.
pub type CandleLayer = CacheLayer<CandleRows>;

/// Keys and values.
#[derive(Debug, Clone)]
struct Pair {
    keys: Tensor,
    values: Tensor,
}

impl Pair {
    fn each(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { keys: f(&self.keys)?, values: f(&self.values)? })
    }

    fn bytes(&self) -> usize {
        tensor_bytes(&self.keys) + tensor_bytes(&self.values)
    }
}

fn tensor_bytes(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

impl CandleRows {
    /// No rows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a quantised format.
    pub fn new(layout: HeadLayout, dtype: KvDtype, ops: &Ops) -> Result<Self> {
        dtype.tensor_dtype()?;
        Ok(Self {
            layout,
            dtype,
            ops: ops.clone(),
            lens: vec![0; layout.num_kv_heads],
            slots: Slots::new(&vec![0; layout.num_kv_heads]),
            kept: None,
            tail: None,
            tail_len: 0,
            visible: None,
            order: None,
            ragged: None,
        })
    }

    /// Groups in which heads are attended to: with [`DecodeWith::Ragged`], all of them at once.
    #[must_use]
    pub fn num_groups(&self) -> usize {
        match self.decode_with() {
            DecodeWith::Groups => self.slots.groups.len(),
            DecodeWith::Ragged => 1,
        }
    }

    /// What attends from new tokens to this layer.
    #[must_use]
    pub fn decode_with(&self) -> DecodeWith {
        decode_with(self.layout, &self.ops)
    }

    /// Room for the keys and values of a prompt of `capacity` tokens, behind copies of what every head holds now.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn prompt(&self, capacity: usize) -> Result<PromptTensors> {
        self.prompt_within(capacity, None)
    }

    /// As [`prompt`](Self::prompt), in a layer with a sliding window: rows are then in the order of their positions.
    ///
    /// # Errors
    /// [`Error::Shape`] if the window is of other heads, [`Error::Tensor`] if the device refuses.
    pub fn prompt_within(&self, capacity: usize, window: Option<&PromptWindow>) -> Result<PromptTensors> {
        let prompt = self.prompt_tensors(capacity, window)?;
        match window {
            Some(window) => prompt.within(&self.ops, window.clone()),
            None => Ok(prompt),
        }
    }

    fn prompt_tensors(&self, capacity: usize, window: Option<&PromptWindow>) -> Result<PromptTensors> {
        let lens = self.lens.clone();
        let longest = lens.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return PromptTensors::new(&self.ops, self.layout, None, lens, capacity);
        }
        let mut rows = Vec::with_capacity(longest * lens.len());
        for (kv_head, &len) in lens.iter().enumerate() {
            rows.extend(std::iter::repeat_n(0, longest - len));
            match window {
                Some(window) => rows.extend(window.order(kv_head).iter().map(|&row| self.flat_row(kv_head, row))),
                None => rows.extend((0..len).map(|row| self.flat_row(kv_head, row))),
            }
        }
        let picked = self.pick(&self.flat()?, &rows)?;
        let HeadLayout { num_kv_heads, head_dim, .. } = self.layout;
        let past = picked.each(|x| Ok(self.ops.cast(x, DType::F32)?.reshape((num_kv_heads, longest, head_dim))?))?;
        PromptTensors::new(&self.ops, self.layout, Some((past.keys, past.values)), lens, capacity)
    }

    /// All rows one below the other: kept ones, then the tail's, slot after slot.
    fn flat(&self) -> Result<Pair> {
        let rows = (self.layout.num_kv_heads * self.tail_capacity(), self.layout.head_dim);
        let tail = self.tail.as_ref().map(|tail| tail.each(|x| Ok(x.reshape(rows)?))).transpose()?;
        match (&self.kept, tail) {
            (Some(kept), Some(tail)) => Ok(Pair {
                keys: self.ops.cat(&[kept.keys.clone(), tail.keys], 0)?,
                values: self.ops.cat(&[kept.values.clone(), tail.values], 0)?,
            }),
            (Some(kept), None) => Ok(kept.clone()),
            (None, Some(tail)) => Ok(tail),
            (None, None) => Err(Error::shape("cached rows", "at least 1", 0)),
        }
    }

    /// A head's keys in the order of its rows, `[rows, head_dim]`, in the numbers that they are stored in.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are none.
    pub fn keys_of(&self, kv_head: usize) -> Result<Tensor> {
        let rows: Vec<usize> = (0..self.lens[kv_head]).map(|row| self.flat_row(kv_head, row)).collect();
        Ok(self.pick(&self.flat()?, &rows)?.keys)
    }

    /// Where a head's row is among the [flat](Self::flat) ones.
    fn flat_row(&self, kv_head: usize, row: usize) -> usize {
        let slot = self.slots.heads.iter().position(|&head| head == kv_head).unwrap_or(kv_head);
        let kept = self.lens[kv_head] - self.tail_len;
        match row.checked_sub(kept) {
            None => self.slots.first_rows[slot] + row,
            Some(row) => self.slots.num_rows() + slot * self.tail_capacity() + row,
        }
    }

    fn tail_capacity(&self) -> usize {
        self.tail.as_ref().and_then(|tail| tail.keys.dim(1).ok()).unwrap_or(0)
    }

    fn pick(&self, from: &Pair, rows: &[usize]) -> Result<Pair> {
        let rows = as_indices(rows)?;
        let rows = self.ops.upload(&rows, rows.len())?;
        from.each(|x| self.ops.index_select(x, &rows, 0))
    }

    /// Makes rows of other tensors all that is kept, in groups; the tail is gone.
    ///
    /// * `rows`: `[num_kv_heads]` which rows of `from` each head keeps
    fn regroup(&mut self, from: &Pair, rows: &[Vec<usize>]) -> Result<()> {
        let lens: Vec<usize> = rows.iter().map(Vec::len).collect();
        let slots = match self.decode_with() {
            DecodeWith::Groups => Slots::new(&lens),
            DecodeWith::Ragged => Slots::ungrouped(&lens),
        };
        let mut picked = Vec::with_capacity(slots.num_rows());
        for group in &slots.groups {
            for slot in group.first_slot..group.first_slot + group.num_heads {
                let rows = &rows[slots.heads[slot]];
                // A padding row is some row that the head itself keeps, and gets no weight.
                let padding = std::iter::repeat_n(rows.last().copied().unwrap_or(0), group.len - rows.len());
                picked.extend(rows.iter().copied().chain(padding));
            }
        }
        let dtype = self.dtype.tensor_dtype()?;
        let kept =
            if picked.is_empty() { None } else { Some(self.pick(from, &picked)?.each(|x| self.ops.cast(x, dtype))?) };
        let order = if slots.is_in_order() {
            None
        } else {
            let upload = |indices: &[usize]| -> Result<Tensor> {
                let indices = as_indices(indices)?;
                self.ops.upload(&indices, indices.len())
            };
            Some([upload(&slots.heads)?, upload(&slots.of_heads())?])
        };
        (self.kept, self.order, self.slots, self.lens) = (kept, order, slots, lens);
        (self.tail, self.tail_len, self.visible, self.ragged) = (None, 0, None, None);
        Ok(())
    }

    /// Adds a row to every head.
    ///
    /// * `keys`, `values`: `[num_kv_heads, 1, head_dim]`, f32, keys rotated
    ///
    /// # Errors
    /// [`Error::Tensor`] if sizes do not fit; nothing is added then.
    fn push(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let dtype = self.dtype.tensor_dtype()?;
        let token = Pair { keys: keys.clone(), values: values.clone() }.each(|x| {
            let x = match &self.order {
                Some([order, _]) => self.ops.index_select(x, order, 0)?,
                None => x.clone(),
            };
            self.ops.cast(&x, dtype)
        })?;
        self.make_room()?;
        let tail = self.tail.as_ref().ok_or_else(|| Error::shape("a cache's tail", "room for a token", 0))?;
        self.ops.write(&tail.keys, &token.keys, 1, self.tail_len)?;
        self.ops.write(&tail.values, &token.values, 1, self.tail_len)?;
        self.lens.iter_mut().for_each(|len| *len += 1);
        self.tail_len += 1;
        Ok(())
    }

    /// Makes the tail this cache's own, with room for one more token.
    fn make_room(&mut self) -> Result<()> {
        let capacity = self.tail_capacity();
        if self.tail_len < capacity {
            if let Some(tail) = &mut self.tail
                && Arc::get_mut(tail).is_none()
            {
                *tail = Arc::new(tail.each(|x| self.ops.copy(x))?);
            }
            return Ok(());
        }
        let HeadLayout { num_kv_heads, head_dim, .. } = self.layout;
        let held: usize = self.lens.iter().sum();
        let room = capacity + growth(held / num_kv_heads.max(1));
        let dtype = self.dtype.tensor_dtype()?;
        let zeros = || self.ops.zeros((num_kv_heads, room, head_dim), dtype);
        let grown = Pair { keys: zeros()?, values: zeros()? };
        if let Some(tail) = &self.tail {
            self.ops.write(&grown.keys, &tail.keys, 1, 0)?;
            self.ops.write(&grown.values, &tail.values, 1, 0)?;
        }
        if self.decode_with() == DecodeWith::Ragged {
            if self.ragged.is_none() {
                self.ragged = Some(Arc::new(self.ragged_rows()?));
            }
            self.tail = Some(Arc::new(grown));
            return Ok(());
        }
        let longest = self.slots.longest();
        let lens = || self.slots.heads.iter().map(|&head| self.lens[head] - self.tail_len);
        let visible = if lens().all(|len| len == longest) {
            None
        } else {
            let of_slot =
                |len: usize| (0..longest + room).map(move |column| u8::from(column < len || column >= longest));
            let numbers: Vec<u8> = lens().flat_map(of_slot).collect();
            Some(self.ops.upload(&numbers, (num_kv_heads, 1, longest + room))?)
        };
        (self.tail, self.visible) = (Some(Arc::new(grown)), visible);
        Ok(())
    }

    /// The kept rows for attention in one launch; the heads' places go to the device.
    fn ragged_rows(&self) -> Result<RaggedRows> {
        let kept = self.kept.as_ref().map(|kept| (kept.keys.clone(), kept.values.clone()));
        let slots = self.slots.heads.iter().zip(&self.slots.first_rows).map(|(&kv_head, &first)| {
            let len = self.lens[kv_head] - self.tail_len;
            ragged::Slot { rows: first..first + len, kv_head }
        });
        self.ops.count(2);
        RaggedRows::new(self.ops.device(), self.layout, self.dtype.tensor_dtype()?, kept, slots.collect())
    }

    /// The rows of every head, for attention; at least one token must have come since the last prompt.
    ///
    /// # Errors
    /// [`Error::Shape`] if none has.
    pub fn for_attention(&self) -> Result<GroupedRows<'_>> {
        let tail = self.tail.as_ref().ok_or_else(|| Error::shape("cached rows", "the newest token's at least", 0))?;
        let tail = tail.each(|x| Ok(x.narrow(1, 0, self.tail_len)?))?;
        Ok(GroupedRows {
            slots: &self.slots,
            kept: self.kept.as_ref().map(|kept| (&kept.keys, &kept.values)),
            tail: (tail.keys, tail.values),
            visible: self.visible.as_ref(),
            order: self.order.as_ref().map(|[order, _]| order),
            restore: self.order.as_ref().map(|[_, restore]| restore),
            ragged: self.ragged.as_deref(),
        })
    }
}

impl Rows for CandleRows {
    type Prompt = PromptTensors;

    fn emptied(&self) -> Self {
        Self {
            lens: vec![0; self.lens.len()],
            slots: Slots::new(&vec![0; self.lens.len()]),
            kept: None,
            tail: None,
            tail_len: 0,
            visible: None,
            order: None,
            ragged: None,
            ..self.clone()
        }
    }

    fn layout(&self) -> HeadLayout {
        self.layout
    }

    fn dtype(&self) -> KvDtype {
        self.dtype
    }

    fn allocated(&self) -> usize {
        self.kept.as_ref().map_or(0, Pair::bytes)
            + self.tail.as_ref().map_or(0, |tail| tail.bytes())
            + self.visible.iter().chain(self.order.iter().flatten()).map(tensor_bytes).sum::<usize>()
            + self.ragged.as_ref().map_or(0, |ragged| ragged.index_bytes())
    }

    fn prompt_lens(&self, prompt: &PromptTensors) -> (usize, Vec<usize>) {
        (prompt.len(), prompt.past_lens().to_vec())
    }

    fn carry_out(&mut self, ledger: &Ledger, plan: &Plan, prompt: Option<&PromptTensors>) -> Result<()> {
        let Some(prompt) = prompt else {
            let of_head = |(kv_head, head): (usize, &HeadPlan)| {
                head.stay.iter().map(|&row| self.flat_row(kv_head, row)).collect()
            };
            let rows: Vec<Vec<usize>> = plan.heads.iter().enumerate().map(of_head).collect();
            return self.regroup(&self.flat()?, &rows);
        };
        // The prompt's rows lie behind copies of all that is held, which a window has put in the order of positions.
        let (keys, values, flat_row) = prompt.flat()?;
        let all_positions = ledger.positions();
        let of_head = |((kv_head, head), &held): ((usize, &HeadPlan), &usize)| {
            let positions = &all_positions[kv_head];
            let mut ordered = positions.clone();
            ordered.sort_unstable();
            let place = |row: usize| match ledger.window() {
                Some(_) => ordered.partition_point(|&position| position < positions[row]),
                None => row,
            };
            let rows = head.stay.iter().map(|&row| place(row)).chain(head.prompt.iter().map(|row| held + row));
            rows.map(|row| flat_row(kv_head, row)).collect()
        };
        let rows: Vec<Vec<usize>> = plan.heads.iter().enumerate().zip(&self.lens).map(of_head).collect();
        self.regroup(&Pair { keys, values }, &rows)
    }

    fn evict(&mut self, _: &Ledger, steps: &[HeadStep]) -> Result<()> {
        let of_head = |((kv_head, step), &len): ((usize, &HeadStep), &usize)| {
            let mut rows: Vec<usize> = (0..len).map(|row| self.flat_row(kv_head, row)).collect();
            for &row in step.evicted() {
                rows.swap_remove(row);
            }
            rows
        };
        let rows: Vec<Vec<usize>> = steps.iter().enumerate().zip(&self.lens).map(of_head).collect();
        self.regroup(&self.flat()?, &rows)
    }
}

impl CacheLayer<CandleRows> {
    /// Keeps one new token in every head.
    ///
    /// * `keys`, `values`: `[num_kv_heads, 1, head_dim]`, f32, keys rotated
    /// * `position`: the number of tokens seen before it
    /// * `class`: may tell how long it stays
    ///
    /// # Errors
    /// [`Error::Shape`] if the position does not fit, [`Error::Tensor`] if sizes do not; nothing is kept then.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor, position: usize, class: TokenClass) -> Result<()> {
        let (ledger, rows) = self.parts_mut();
        ledger.check_next(position)?;
        rows.push(keys, values)?;
        ledger.advance(class);
        Ok(())
    }
}

/// What attends from new tokens to layers of such heads.
pub(super) fn decode_with(layout: HeadLayout, ops: &Ops) -> DecodeWith {
    if ragged::fits(layout) { ops.decode_with() } else { DecodeWith::Groups }
}

fn as_indices(rows: &[usize]) -> Result<Vec<u32>> {
    let index = |&row| u32::try_from(row).map_err(|_| Error::shape("a row", "below 2^32", row));
    rows.iter().map(index).collect()
}
