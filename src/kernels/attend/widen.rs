//! Stored rows as f32: for prompts, whose products take plain matrices.

use super::{HeadRows, Keys, MixedRows, Pair, Stored, Values};
use crate::kernels::simd::{self, InstructionSet, LANES, Lanes, dispatch};
use crate::kernels::vector::MAX_HEAD_DIM;

impl HeadRows<'_> {
    /// Writes all keys, one column for each number.
    ///
    /// * `columns`: `[head_dim]` of `stride` numbers, the first [`len`](Self::len) of each are written
    ///
    /// # Panics
    /// If there is no room.
    pub fn widen_keys(&self, set: InstructionSet, columns: &mut [f32], stride: usize) {
        assert!(self.len <= stride && columns.len() == stride * self.head_dim, "room for {} keys", self.len);
        let head_dim = self.head_dim;
        each_stored!(
            self.stored,
            rows => dispatch(set, KeyColumns { keys: &rows.keys, columns, stride, first: 0, head_dim }),
            MixedRows { settled, newest } => {
                let first = settled.keys.len();
                dispatch(set, KeyColumns { keys: &settled.keys, columns: &mut *columns, stride, first: 0, head_dim });
                dispatch(set, KeyColumns { keys: &newest.keys, columns, stride, first, head_dim });
            }
        );
    }

    /// Writes all values, row after row.
    ///
    /// * `rows`: `[len, head_dim]`
    ///
    /// # Panics
    /// If there is another number of rows.
    pub fn widen_values(&self, set: InstructionSet, rows: &mut [f32]) {
        assert_eq!(rows.len(), self.len * self.head_dim, "values");
        let head_dim = self.head_dim;
        each_stored!(
            self.stored,
            stored => dispatch(set, ValueRows { values: &stored.values, rows, head_dim }),
            MixedRows { settled, newest } => {
                let (first, others) = rows.split_at_mut(settled.keys.len() * head_dim);
                dispatch(set, ValueRows { values: &settled.values, rows: first, head_dim });
                dispatch(set, ValueRows { values: &newest.values, rows: others, head_dim });
            }
        );
    }

    /// Adds all keys and values to buffers as f32, row after row.
    pub fn widen_to(&self, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        each_stored!(self.stored, rows => self.widen_rows(rows, keys, values), MixedRows { settled, newest } => {
            self.widen_rows(settled, keys, values);
            self.widen_rows(newest, keys, values);
        });
    }

    fn widen_rows<K: Keys, V: Values>(&self, rows: Pair<K, V>, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let (from_key, from_value) = (keys.len(), values.len());
        let numbers = rows.keys.len() * self.head_dim;
        keys.resize(from_key + numbers, 0.0);
        values.resize(from_value + numbers, 0.0);
        for (row, key) in keys[from_key..].chunks_exact_mut(self.head_dim).enumerate() {
            rows.keys.key(row, key);
        }
        for (row, value) in values[from_value..].chunks_exact_mut(self.head_dim).enumerate() {
            rows.values.value(row, value);
        }
    }
}

/// Keys that become columns, from row `first` on.
struct KeyColumns<'a, K> {
    keys: &'a K,
    columns: &'a mut [f32],
    stride: usize,
    first: usize,
    head_dim: usize,
}

impl<K: Keys> simd::Work for KeyColumns<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { keys, columns, stride, first, head_dim } = self;
        let mut tile_columns = vec![[0.0; LANES]; head_dim];
        let tiles = keys.len() / LANES;
        for tile in 0..tiles {
            keys.widen_tile::<L>(tile, &mut tile_columns);
            let at = first + tile * LANES;
            for (column, numbers) in columns.chunks_exact_mut(stride).zip(&tile_columns) {
                column[at..at + LANES].copy_from_slice(numbers);
            }
        }
        let mut key = [0.0; MAX_HEAD_DIM];
        for row in tiles * LANES..keys.len() {
            keys.key(row, &mut key[..head_dim]);
            for (column, &number) in columns.chunks_exact_mut(stride).zip(&key) {
                column[first + row] = number;
            }
        }
    }
}

/// Values that become rows of f32.
struct ValueRows<'a, V> {
    values: &'a V,
    rows: &'a mut [f32],
    head_dim: usize,
}

impl<V: Values> simd::Work for ValueRows<'_, V> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (row, value) in self.rows.chunks_exact_mut(self.head_dim).enumerate() {
            self.values.widen_row::<L>(row, value);
        }
    }
}
