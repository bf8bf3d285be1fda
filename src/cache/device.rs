//! One layer's cache as tensors on a device: what attention made of candle operations reads.
//!
//! What is kept of prompts lies in one tensor for keys and one for values, head after head in the order of
//! [`Slots`], and does not change until the next prompt. Tokens since then are the same for all heads, so they lie in a
//! tail with room for all heads alike, which is written in place and grown with bounded slack. A prompt on top merges the
//! tail into what is kept. With [`DecodeWith::Ragged`] heads lie in their own order without padding, and where each one's rows
//! are goes to the device once for each prompt. Rows that go are not copied along, and their tensors' memory goes back to the device's
//! allocator with the last use of them.
//!
//! Positions are on the host: no choice needs a tensor. Not for: choosing (see [`crate::profile`]) or attending (see
//! [`crate::attention::device`]).

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::head::growth;
use super::layer::{as_position, check_kept, summaries};
use super::storage::KvDtype;
use super::{CacheBytes, HeadSummary, LayerSummary};
use crate::attention::HeadLayout;
use crate::attention::device::{GroupedRows, PromptTensors, Slots};
use crate::attention::ragged::{self, RaggedRows};
use crate::error::{Error, Result};
use crate::ops::{DecodeWith, Ops};
use crate::profile::HeadChoice;

/// Keys and values of one layer, as tensors.
///
/// A clone shares what is kept of prompts, and gets a tail of its own when one of the two goes on.
#[derive(Debug, Clone)]
pub struct DeviceLayer {
    layer: usize,
    layout: HeadLayout,
    dtype: KvDtype,
    ops: Ops,
    /// `[num_kv_heads]` positions of the kept tokens, the tail's included, ascending.
    positions: Vec<Vec<u32>>,
    seen: usize,
    /// Position up to which an earlier profile has decided: what is kept below it stays.
    settled: usize,
    slots: Slots,
    /// `[slots.num_rows(), head_dim]`; `None` if there are none.
    kept: Option<Rows>,
    /// `[num_kv_heads, tail_capacity, head_dim]` in the order of slots; `None` if nothing came since the last prompt.
    tail: Option<Arc<Rows>>,
    tail_len: usize,
    /// See [`GroupedRows::visible`]; made for the tail's capacity.
    visible: Option<Tensor>,
    /// The head in each slot and the slot of each head; `None` if they are in order.
    order: Option<[Tensor; 2]>,
    /// The kept rows for attention in one launch; made with the first token after a prompt, if that is how it is done.
    ragged: Option<Arc<RaggedRows>>,
}

/// Keys and values.
#[derive(Debug, Clone)]
struct Rows {
    keys: Tensor,
    values: Tensor,
}

impl Rows {
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

impl DeviceLayer {
    /// # Errors
    /// [`Error::Unsupported`] for a quantised format.
    pub(super) fn new(layer: usize, layout: HeadLayout, dtype: KvDtype, ops: &Ops) -> Result<Self> {
        dtype.tensor_dtype()?;
        Ok(Self::empty(layer, layout, dtype, ops.clone()))
    }

    pub(super) fn emptied(&self) -> Self {
        Self::empty(self.layer, self.layout, self.dtype, self.ops.clone())
    }

    /// * `dtype`: one that tensors have
    fn empty(layer: usize, layout: HeadLayout, dtype: KvDtype, ops: Ops) -> Self {
        let positions = vec![Vec::new(); layout.num_kv_heads];
        Self {
            layer,
            layout,
            dtype,
            ops,
            slots: Slots::new(&vec![0; positions.len()]),
            positions,
            seen: 0,
            settled: 0,
            kept: None,
            tail: None,
            tail_len: 0,
            visible: None,
            order: None,
            ragged: None,
        }
    }

    pub(super) fn layout(&self) -> HeadLayout {
        self.layout
    }

    pub(super) fn seen(&self) -> usize {
        self.seen
    }

    /// `[num_kv_heads]` absolute positions of the kept tokens of each head, ascending.
    #[must_use]
    pub fn positions(&self) -> &[Vec<u32>] {
        &self.positions
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
        if ragged::fits(self.layout) { self.ops.decode_with() } else { DecodeWith::Groups }
    }

    /// Bytes of one stored key and its value.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        2 * self.dtype.row_bytes(self.layout.head_dim)
    }

    /// Bytes of this layer: of its tensors, padding and slack included, and of positions on the host. What is shared with
    /// a clone is counted in both.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        let token = self.token_bytes();
        let tensors = self.kept.as_ref().map_or(0, Rows::bytes)
            + self.tail.as_ref().map_or(0, |tail| tail.bytes())
            + self.visible.iter().chain(self.order.iter().flatten()).map(tensor_bytes).sum::<usize>()
            + self.ragged.as_ref().map_or(0, |ragged| ragged.index_bytes());
        let positions: usize = self.positions.iter().map(|head| head.capacity() * size_of::<u32>()).sum();
        CacheBytes {
            raw: self.seen * self.layout.num_kv_heads * token,
            kept: self.positions.iter().map(Vec::len).sum::<usize>() * token,
            allocated: tensors + positions,
        }
    }

    /// Room for the keys and values of a prompt of `capacity` tokens, behind copies of what every head holds now.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn prompt_tensors(&self, capacity: usize) -> Result<PromptTensors> {
        let lens: Vec<usize> = self.positions.iter().map(Vec::len).collect();
        let longest = lens.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return PromptTensors::new(&self.ops, self.layout, None, lens, capacity);
        }
        let mut rows = Vec::with_capacity(longest * lens.len());
        for (kv_head, &len) in lens.iter().enumerate() {
            let padding = std::iter::repeat_n(0, longest - len);
            rows.extend(padding.chain((0..len).map(|row| self.flat_row(kv_head, row))));
        }
        let picked = self.pick(&self.flat()?, &rows)?;
        let HeadLayout { num_kv_heads, head_dim, .. } = self.layout;
        let past = picked.each(|x| Ok(self.ops.cast(x, DType::F32)?.reshape((num_kv_heads, longest, head_dim))?))?;
        PromptTensors::new(&self.ops, self.layout, Some((past.keys, past.values)), lens, capacity)
    }

    /// All rows one below the other: kept ones, then the tail's, slot after slot.
    fn flat(&self) -> Result<Rows> {
        let rows = (self.layout.num_kv_heads * self.tail_capacity(), self.layout.head_dim);
        let tail = self.tail.as_ref().map(|tail| tail.each(|x| Ok(x.reshape(rows)?))).transpose()?;
        match (&self.kept, tail) {
            (Some(kept), Some(tail)) => Ok(Rows {
                keys: self.ops.cat(&[kept.keys.clone(), tail.keys], 0)?,
                values: self.ops.cat(&[kept.values.clone(), tail.values], 0)?,
            }),
            (Some(kept), None) => Ok(kept.clone()),
            (None, Some(tail)) => Ok(tail),
            (None, None) => Err(Error::shape("cached rows", "at least 1", 0)),
        }
    }

    /// Where a head's row is among the [flat](Self::flat) ones.
    fn flat_row(&self, kv_head: usize, row: usize) -> usize {
        let slot = self.slots.heads.iter().position(|&head| head == kv_head).unwrap_or(kv_head);
        let kept = self.positions[kv_head].len() - self.tail_len;
        match row.checked_sub(kept) {
            None => self.slots.first_rows[slot] + row,
            Some(row) => self.slots.num_rows() + slot * self.tail_capacity() + row,
        }
    }

    fn tail_capacity(&self) -> usize {
        self.tail.as_ref().and_then(|tail| tail.keys.dim(1).ok()).unwrap_or(0)
    }

    fn pick(&self, from: &Rows, rows: &[usize]) -> Result<Rows> {
        let rows: Vec<u32> = rows.iter().map(|&row| as_position(row)).collect::<Result<_>>()?;
        let rows = self.ops.upload(&rows, rows.len())?;
        from.each(|x| self.ops.index_select(x, &rows, 0))
    }

    /// Makes rows of other tensors all that is kept, in groups; the tail is gone.
    ///
    /// * `rows`: `[num_kv_heads]` which rows of `from` each head keeps
    fn regroup(&mut self, from: &Rows, rows: &[Vec<usize>]) -> Result<()> {
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
                let indices: Vec<u32> = indices.iter().map(|&index| as_position(index)).collect::<Result<_>>()?;
                self.ops.upload(&indices, indices.len())
            };
            Some([upload(&slots.heads)?, upload(&slots.of_heads())?])
        };
        (self.kept, self.order, self.slots) = (kept, order, slots);
        (self.tail, self.tail_len, self.visible, self.ragged) = (None, 0, None, None);
        Ok(())
    }

    /// Stores a prompt's keys and values, as [`LayerCacheManager::store_prompt`](super::LayerCacheManager::store_prompt)
    /// does: for every KV head, the positions that were chosen, or all of them.
    ///
    /// * `prompt`: from [`prompt_tensors`](Self::prompt_tensors), filled
    /// * `choices`: one for each KV head, in order; `None` keeps everything
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts, rows or positions do not fit, [`Error::Tensor`] if the device refuses; nothing is
    /// stored then.
    pub fn store_prompt(&mut self, prompt: &PromptTensors, choices: Option<Vec<HeadChoice>>) -> Result<LayerSummary> {
        let num_kv_heads = self.layout.num_kv_heads;
        let (first, new) = (as_position(self.settled)?, as_position(self.seen)?);
        let end = as_position(self.seen + prompt.len())?;
        let summaries = summaries(choices, num_kv_heads, first..end);
        check_kept(num_kv_heads, first..end, &summaries)?;
        let held: Vec<usize> = self.positions.iter().map(Vec::len).collect();
        if prompt.past_lens() != held {
            return Err(Error::shape("the rows before a prompt", held, prompt.past_lens()));
        }
        let (keys, values, flat_row) = prompt.flat()?;
        let mut positions = Vec::with_capacity(num_kv_heads);
        let mut rows = Vec::with_capacity(num_kv_heads);
        for (held, summary) in self.positions.iter().zip(&summaries) {
            let stays = |position: u32| position < first || summary.positions.binary_search(&position).is_ok();
            let past = held.iter().enumerate().filter(|(_, position)| stays(**position));
            let from_prompt = &summary.positions[summary.positions.partition_point(|&position| position < new)..];
            let from_prompt = from_prompt.iter().map(|position| (held.len() + (position - new) as usize, position));
            let (head_rows, head_positions): (Vec<usize>, Vec<u32>) =
                past.chain(from_prompt).map(|(row, &position)| (flat_row(summary.kv_head, row), position)).unzip();
            rows.push(head_rows);
            positions.push(head_positions);
        }
        self.regroup(&Rows { keys, values }, &rows)?;
        self.hold(positions);
        self.seen = end as usize;
        self.settled = self.seen;
        Ok(self.summary((end - first) as usize, summaries))
    }

    /// Evicts more of the last prompt that was stored, as
    /// [`LayerCacheManager::keep_of_prompt`](super::LayerCacheManager::keep_of_prompt) does.
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts or positions do not fit, [`Error::Tensor`] if the device refuses; nothing is evicted
    /// then.
    pub fn keep_of_prompt(&mut self, first_position: usize, choices: Vec<HeadChoice>) -> Result<LayerSummary> {
        let (first, end) = (as_position(first_position)?, as_position(self.seen)?);
        let num_kv_heads = self.layout.num_kv_heads;
        let summaries = summaries(Some(choices), num_kv_heads, first..end);
        check_kept(num_kv_heads, first..end, &summaries)?;
        let mut positions = Vec::with_capacity(num_kv_heads);
        let mut rows = Vec::with_capacity(num_kv_heads);
        for (held, summary) in self.positions.iter().zip(&summaries) {
            let stays = |position: u32| position < first || summary.positions.binary_search(&position).is_ok();
            let stay = held.iter().enumerate().filter(|(_, position)| stays(**position));
            let (head_rows, head_positions): (Vec<usize>, Vec<u32>) =
                stay.map(|(row, &position)| (self.flat_row(summary.kv_head, row), position)).unzip();
            rows.push(head_rows);
            positions.push(head_positions);
        }
        if positions.iter().map(Vec::len).ne(self.positions.iter().map(Vec::len)) {
            self.regroup(&self.flat()?, &rows)?;
            self.hold(positions);
        }
        Ok(self.summary((end - first) as usize, summaries))
    }

    fn hold(&mut self, mut positions: Vec<Vec<u32>>) {
        positions.iter_mut().for_each(Vec::shrink_to_fit);
        self.positions = positions;
    }

    fn summary(&self, prompt_len: usize, heads: Vec<HeadSummary>) -> LayerSummary {
        LayerSummary { layer: self.layer, prompt_len, heads, bytes: self.bytes() }
    }

    /// Keeps one new token in every head.
    ///
    /// * `keys`, `values`: `[num_kv_heads, 1, head_dim]`, f32, keys rotated
    /// * `position`: the number of tokens seen before it
    ///
    /// # Errors
    /// [`Error::Shape`] if the position does not fit, [`Error::Tensor`] if sizes do not; nothing is kept then.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor, position: usize) -> Result<()> {
        if position != self.seen {
            return Err(Error::shape("the position of a new token", self.seen, position));
        }
        let position = as_position(position)?;
        let dtype = self.dtype.tensor_dtype()?;
        let token = Rows { keys: keys.clone(), values: values.clone() }.each(|x| {
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
        self.positions.iter_mut().for_each(|head| push(head, position));
        self.tail_len += 1;
        self.seen += 1;
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
        let held: usize = self.positions.iter().map(Vec::len).sum();
        let room = capacity + growth(held / num_kv_heads.max(1));
        let dtype = self.dtype.tensor_dtype()?;
        let zeros = || self.ops.zeros((num_kv_heads, room, head_dim), dtype);
        let grown = Rows { keys: zeros()?, values: zeros()? };
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
        let lens = || self.slots.heads.iter().map(|&head| self.positions[head].len() - self.tail_len);
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
            let len = self.positions[kv_head].len() - self.tail_len;
            ragged::Slot { rows: first..first + len, kv_head }
        });
        self.ops.count(2);
        RaggedRows::new(self.ops.device(), self.layout, self.dtype.tensor_dtype()?, kept, slots.collect())
    }

    /// The rows of every head, for attention; at least one token must have come since the last prompt.
    ///
    /// # Errors
    /// [`Error::Shape`] if none has.
    pub fn rows(&self) -> Result<GroupedRows<'_>> {
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

/// Adds a position, with as little slack as the rows have.
fn push(positions: &mut Vec<u32>, position: u32) {
    if positions.len() == positions.capacity() {
        positions.reserve_exact(growth(positions.len()));
    }
    positions.push(position);
}
