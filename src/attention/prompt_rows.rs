//! One layer's keys and values while a prompt is processed.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::HeadLayout;
use super::window::PromptWindow;
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::int16::{self, Bits, Panels};
use crate::kernels::vector::instruction_set;

/// Rows that a product of f32 takes at a time.
const FLOAT_ROWS: usize = 6;

/// Numbers in a cache line.
const CACHE_LINE: usize = 16;

/// Full keys and values of a prompt, behind copies of what every head holds.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptKv {
    /// Rotated keys.
    pub keys: PromptRows,
    /// Values.
    pub values: PromptRows,
}

/// One layer's keys or values while a prompt is processed: for each KV head `[past_len + len, head_dim]`, the rows that it
/// kept of earlier tokens and then the prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRows {
    /// `[num_kv_heads]`
    heads: Vec<HeadNumbers>,
    layout: HeadLayout,
    capacity: usize,
    len: usize,
    /// Present in a layer with a sliding window.
    window: Option<Arc<PromptWindow>>,
}

/// The order in which a head's numbers lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Row after row: what sums of rows (values) are fastest with.
    Rows,
    /// Column after column: what products of queries with all rows (keys) are fastest with.
    Columns {
        /// Numbers from one column to the next.
        stride: usize,
    },
}

/// One KV head's part of [`PromptRows`].
#[derive(Debug, Clone, PartialEq)]
struct HeadNumbers {
    /// Room for all rows; 0 where there is none yet.
    numbers: Vec<f32>,
    order: Order,
    past_len: usize,
    /// The rows, rounded for products that need not be exact; as many as [`PromptRows::round`] has found.
    rounded: Option<Panels>,
}

impl HeadNumbers {
    /// * `past`: `[past_len, head_dim]`
    fn by_rows(mut past: Vec<f32>, head_dim: usize, capacity: usize) -> Self {
        let past_len = past.len() / head_dim;
        past.resize((past_len + capacity) * head_dim, 0.0);
        Self { numbers: past, order: Order::Rows, past_len, rounded: None }
    }

    /// * `past`: `[past_len, head_dim]`
    fn by_columns(past: &[f32], head_dim: usize, capacity: usize) -> Self {
        let (mut head, _) = Self::columns(past.len() / head_dim, head_dim, capacity);
        head.set(0, past, head_dim, head_dim);
        head
    }

    /// Room, of zeros; and how many numbers are from one column to the next.
    fn columns(past_len: usize, head_dim: usize, capacity: usize) -> (Self, usize) {
        // Whole cache lines, and an odd number of them: columns that are a power of two apart would share few places of
        // the cache.
        let stride = ((past_len + capacity).div_ceil(CACHE_LINE) | 1) * CACHE_LINE;
        let numbers = vec![0.0; stride * head_dim];
        (Self { numbers, order: Order::Columns { stride }, past_len, rounded: None }, stride)
    }

    /// The keys of a head.
    fn columns_of(past: &HeadRows<'_>, capacity: usize) -> Self {
        let (mut head, stride) = Self::columns(past.len(), past.head_dim(), capacity);
        past.widen_keys(instruction_set(), &mut head.numbers, stride);
        head
    }

    /// The values of a head.
    fn rows_of(past: &HeadRows<'_>, capacity: usize) -> Self {
        let head_dim = past.head_dim();
        let mut numbers = vec![0.0; (past.len() + capacity) * head_dim];
        past.widen_values(instruction_set(), &mut numbers[..past.len() * head_dim]);
        Self { numbers, order: Order::Rows, past_len: past.len(), rounded: None }
    }

    /// Writes rows from index `first` on.
    ///
    /// * `rows`: `[num_rows, head_dim]`, with `row_stride` numbers from one to the next
    fn set(&mut self, first: usize, rows: &[f32], row_stride: usize, head_dim: usize) {
        match self.order {
            Order::Rows => {
                let own = self.numbers[first * head_dim..].chunks_exact_mut(head_dim);
                for (own, row) in own.zip(rows.chunks(row_stride)) {
                    own.copy_from_slice(&row[..head_dim]);
                }
            }
            Order::Columns { stride } => {
                for (column, own) in self.numbers.chunks_exact_mut(stride).enumerate() {
                    for (own, row) in own[first..].iter_mut().zip(rows.chunks(row_stride)) {
                        *own = row[column];
                    }
                }
            }
        }
    }
}

impl PromptKv {
    /// Rounds what is not yet, so that [`prefill`](super::prefill::prefill) attends in whole numbers of 16 bits, where the
    /// processor is faster so; about as exact as with f16.
    pub fn round(&mut self) {
        if instruction_set().is_wide() {
            self.keys.round();
            self.values.round();
        }
    }
}

impl PromptRows {
    /// Room for a prompt of `capacity` tokens with nothing before it.
    ///
    /// # Panics
    /// If the layout is none (see [`HeadLayout::check`]).
    #[must_use]
    pub fn with_capacity(layout: HeadLayout, capacity: usize) -> Self {
        assert!(layout.check().is_ok(), "{layout:?}");
        let head = HeadNumbers::by_rows(Vec::new(), layout.head_dim, capacity);
        Self { heads: vec![head; layout.num_kv_heads], layout, capacity, len: 0, window: None }
    }

    /// Keys and values, with room for a prompt of `capacity` tokens behind what each head keeps already.
    ///
    /// * `past`: `[num_kv_heads]`
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of heads, or heads of another dimension.
    pub fn after(layout: HeadLayout, capacity: usize, past: &[HeadRows<'_>]) -> Result<(Self, Self)> {
        Self::after_within(layout, capacity, past, None)
    }

    /// As [`after`](Self::after), in a layer with a sliding window: what each head keeps is put in the order of positions,
    /// and each row of the prompt sees what is in its window.
    ///
    /// * `window`: of the same heads
    ///
    /// # Errors
    /// As [`after`](Self::after).
    pub fn after_within(
        layout: HeadLayout,
        capacity: usize,
        past: &[HeadRows<'_>],
        window: Option<&PromptWindow>,
    ) -> Result<(Self, Self)> {
        layout.check()?;
        if past.len() != layout.num_kv_heads {
            return Err(Error::shape("cached heads", layout.num_kv_heads, past.len()));
        }
        let head_dim = layout.head_dim;
        let head = |(kv_head, rows): (usize, &HeadRows<'_>)| {
            if rows.head_dim() != head_dim {
                return Err(Error::shape("cached rows", head_dim, rows.head_dim()));
            }
            let order = window.map(|window| window.order(kv_head)).unwrap_or_default();
            if window.is_some() && order.len() != rows.len() {
                return Err(Error::shape("rows within a window", rows.len(), order.len()));
            }
            if order.is_sorted() {
                let keys = || HeadNumbers::columns_of(rows, capacity);
                return Ok(rayon::join(keys, || HeadNumbers::rows_of(rows, capacity)));
            }
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            rows.widen_to(&mut keys, &mut values);
            put_in_order(&mut keys, order, head_dim);
            put_in_order(&mut values, order, head_dim);
            Ok((HeadNumbers::by_columns(&keys, head_dim, capacity), HeadNumbers::by_rows(values, head_dim, capacity)))
        };
        let heads: Vec<_> = past.par_iter().enumerate().with_max_len(1).map(head).collect::<Result<_>>()?;
        let (keys, values) = heads.into_iter().unzip();
        let window = window.map(|window| Arc::new(window.clone()));
        let rows = |heads| Self { heads, layout, capacity, len: 0, window: window.clone() };
        Ok((rows(keys), rows(values)))
    }

    /// The keys or the values of a whole prompt.
    ///
    /// * `heads`: for each KV head its rows, `[past_lens[head] + len, head_dim]`
    /// * `past_lens`: `[num_kv_heads]` how many of them come before the prompt's first
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes do not fit.
    pub fn whole(layout: HeadLayout, heads: Vec<Vec<f32>>, past_lens: &[usize], len: usize) -> Result<Self> {
        layout.check()?;
        let lens: Vec<usize> = heads.iter().map(Vec::len).collect();
        let expected: Vec<usize> =
            past_lens.iter().map(|past_len| past_len.saturating_add(len).saturating_mul(layout.head_dim)).collect();
        if lens != expected || lens.len() != layout.num_kv_heads {
            return Err(Error::shape("a prompt's rows", expected, lens));
        }
        let head = |(numbers, &past_len)| HeadNumbers { numbers, order: Order::Rows, past_len, rounded: None };
        let heads = heads.into_iter().zip(past_lens).map(head).collect();
        Ok(Self { heads, layout, capacity: len, len, window: None })
    }

    /// Checks that these are the rows of such KV heads.
    pub(super) fn expect_layout(&self, what: &'static str, layout: HeadLayout) -> Result<()> {
        let sizes = |layout: HeadLayout| (layout.num_kv_heads, layout.head_dim);
        if sizes(self.layout) == sizes(layout) { Ok(()) } else { Err(Error::shape(what, layout, self.layout)) }
    }

    /// Tokens of the prompt that are stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tokens of the prompt that there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether no token of the prompt is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Rows of a KV head before the prompt's first.
    #[must_use]
    pub fn past_len(&self, kv_head: usize) -> usize {
        self.heads[kv_head].past_len
    }

    /// The keys of a head that a row of the prompt sees, its own the last; those before the prompt's first count.
    pub(super) fn seen(&self, kv_head: usize, row: usize) -> Range<usize> {
        match &self.window {
            Some(window) => window.seen(kv_head, row),
            None => 0..self.heads[kv_head].past_len + row + 1,
        }
    }

    /// Tokens that a row sees at most, itself included, if there is such a limit.
    pub(super) fn window_size(&self) -> Option<usize> {
        self.window.as_ref().map(|window| window.size())
    }

    /// The first row of the prompt that is profiled: all are, but those whose keys no later token sees.
    pub(super) fn first_profiled(&self) -> usize {
        self.window.as_ref().map_or(0, |window| window.first_profiled(self.capacity))
    }

    /// Adds tokens of the prompt.
    ///
    /// * `rows`: `[seq_len, num_kv_heads, head_dim]`
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` is not a whole number of tokens, or more than there is room for.
    pub fn push(&mut self, rows: &[f32]) -> Result<()> {
        let width = self.layout.kv_width();
        let head_dim = self.layout.head_dim;
        let seq_len = rows.len() / width;
        if rows.len() != seq_len * width || seq_len > self.capacity - self.len {
            return Err(Error::shape(
                "prompt rows",
                format!("at most {} x {width}", self.capacity - self.len),
                rows.len(),
            ));
        }
        for (index, head) in self.heads.iter_mut().enumerate() {
            head.set(head.past_len + self.len, rows.get(index * head_dim..).unwrap_or_default(), width, head_dim);
        }
        self.len += seq_len;
        Ok(())
    }

    /// Rounds the rows that are not yet, for [products in 16 bits](crate::kernels::int16): keys for products of queries with
    /// all of them, values for sums of them.
    fn round(&mut self) {
        let (head_dim, len, set) = (self.layout.head_dim, self.len, instruction_set());
        self.heads.par_iter_mut().for_each(|head| {
            let (new, stride) = match head.order {
                Order::Rows => (Panels::of_rows(Bits::Left, head_dim), head_dim),
                Order::Columns { stride } => (Panels::of_columns(Bits::Alike, head_dim), stride),
            };
            head.rounded.get_or_insert(new).extend(set, &head.numbers, stride, head.past_len + len);
        });
    }

    /// Rows of vectors and of weights that [`scores`](Self::scores) and [`sums`](Self::sums) take at a time.
    pub(super) fn row_step(&self) -> usize {
        let is_rounded = (0..self.heads.len()).all(|kv_head| self.rounded(kv_head, |_| true).is_some());
        if is_rounded { int16::ROWS } else { FLOAT_ROWS }
    }

    /// Rows of a head that [`scores`](Self::scores) and [`sums`](Self::sums) may begin at: all multiples of this.
    pub(super) fn first_step() -> usize {
        int16::RUN
    }

    /// Products of vectors with some rows of a head, on the calling thread.
    ///
    /// * `vectors`: `[count, head_dim]`
    /// * `rows`: from a multiple of [`first_step`](Self::first_step) on
    /// * `out`: `[count, rows.len()]`, overwritten with `scale` times the products
    ///
    /// # Panics
    /// If sizes do not fit, as of a matrix product.
    pub(super) fn scores(
        &self,
        kv_head: usize,
        vectors: &[f32],
        scale: f32,
        rows: Range<usize>,
        out: &mut [f32],
        buffer: &mut int16::Buffer,
    ) {
        let (head_dim, num_rows) = (self.layout.head_dim, rows.len());
        if let Some(columns) = self.rounded(kv_head, |order| order != Order::Rows) {
            let first = rows.start;
            let product = int16::Product { left: vectors, first, inner: head_dim, scale, out, cols: num_rows };
            columns.multiply(instruction_set(), product, buffer);
        } else {
            let count = vectors.len() / head_dim;
            MatrixMut::new(out, count, num_rows, num_rows).set_product(
                Matrix::new(vectors, count, head_dim, head_dim),
                self.matrix(kv_head, rows).transposed(),
                scale,
            );
        }
    }

    /// Sums of some rows of a head, on the calling thread.
    ///
    /// * `weights`: `[count, rows.len()]`
    /// * `rows`: from a multiple of [`first_step`](Self::first_step) on
    /// * `out`: `[count, head_dim]`, overwritten
    ///
    /// # Panics
    /// If sizes do not fit, as of a matrix product.
    pub(super) fn sums(
        &self,
        kv_head: usize,
        weights: &[f32],
        rows: Range<usize>,
        out: &mut [f32],
        buffer: &mut int16::Buffer,
    ) {
        let (head_dim, num_rows) = (self.layout.head_dim, rows.len());
        if let Some(by_rows) = self.rounded(kv_head, |order| order == Order::Rows) {
            let first = rows.start;
            let product = int16::Product { left: weights, first, inner: num_rows, scale: 1.0, out, cols: head_dim };
            by_rows.multiply(instruction_set(), product, buffer);
        } else {
            let count = out.len() / head_dim;
            MatrixMut::new(out, count, head_dim, head_dim).set_product(
                Matrix::new(weights, count, num_rows, num_rows),
                self.matrix(kv_head, rows),
                1.0,
            );
        }
    }

    /// All rows of a head, if they are rounded in an order that is wanted.
    fn rounded(&self, kv_head: usize, is_wanted: impl Fn(Order) -> bool) -> Option<&Panels> {
        let head = &self.heads[kv_head];
        let rounded = head.rounded.as_ref().filter(|_| is_wanted(head.order));
        rounded.filter(|rounded| rounded.len() == head.past_len + self.len)
    }

    /// Writes one row of a KV head to `out`, `[head_dim]`; those before the prompt's first count.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another size.
    pub fn copy_row(&self, kv_head: usize, row: usize, out: &mut [f32]) {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        assert!(row < head.past_len + self.len && out.len() == head_dim, "row {row} of a prompt's rows");
        match head.order {
            Order::Rows => out.copy_from_slice(&head.numbers[row * head_dim..(row + 1) * head_dim]),
            Order::Columns { stride } => {
                for (out, column) in out.iter_mut().zip(head.numbers.chunks_exact(stride)) {
                    *out = column[row];
                }
            }
        }
    }

    /// A copy of some rows of a KV head, `[rows.len(), head_dim]`; those before the prompt's first count.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn rows(&self, kv_head: usize, rows: Range<usize>) -> Vec<f32> {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        assert!(rows.start <= rows.end && rows.end <= head.past_len + self.len, "rows {rows:?} of a prompt's");
        match head.order {
            Order::Rows => head.numbers[rows.start * head_dim..rows.end * head_dim].to_vec(),
            Order::Columns { stride } => {
                let mut out = vec![0.0; rows.len() * head_dim];
                for (index, column) in head.numbers.chunks_exact(stride).enumerate() {
                    for (row, &number) in out.chunks_exact_mut(head_dim).zip(&column[rows.clone()]) {
                        row[index] = number;
                    }
                }
                out
            }
        }
    }

    /// The mean of the prompt's own rows of a KV head, `[head_dim]`; zeros if there are none.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // a mean in f32
    pub fn mean(&self, kv_head: usize) -> Vec<f32> {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        let own = head.past_len..head.past_len + self.len;
        let mut sums = vec![0.0_f64; head_dim];
        match head.order {
            Order::Rows => {
                for row in head.numbers[own.start * head_dim..own.end * head_dim].chunks_exact(head_dim) {
                    sums.iter_mut().zip(row).for_each(|(sum, &number)| *sum += f64::from(number));
                }
            }
            Order::Columns { stride } => {
                for (sum, column) in sums.iter_mut().zip(head.numbers.chunks_exact(stride)) {
                    *sum = column[own.clone()].iter().copied().map(f64::from).sum();
                }
            }
        }
        sums.into_iter().map(|sum| (sum / self.len.max(1) as f64) as f32).collect()
    }

    /// Some rows of one head, `[rows.len(), head_dim]`.
    pub(super) fn matrix(&self, kv_head: usize, rows: Range<usize>) -> Matrix<'_> {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        match head.order {
            Order::Rows => Matrix::new(&head.numbers[rows.start * head_dim..], rows.len(), head_dim, head_dim),
            Order::Columns { stride } => {
                Matrix::new(&head.numbers[rows.start..], head_dim, rows.len(), stride).transposed()
            }
        }
    }
}

/// Puts rows of `head_dim` numbers in another order.
///
/// * `order`: which row comes first, second and so on
fn put_in_order(rows: &mut Vec<f32>, order: &[usize], head_dim: usize) {
    if order.is_sorted() {
        return;
    }
    let mut ordered = Vec::with_capacity(rows.capacity());
    for &row in order {
        ordered.extend_from_slice(&rows[row * head_dim..(row + 1) * head_dim]);
    }
    *rows = ordered;
}
