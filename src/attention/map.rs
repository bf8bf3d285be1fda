//! Collects attention rows into small maps while a prompt is read, without ever holding an n x n matrix.
//!
//! Only sums up what attention has computed; drawing the maps is [`crate::plot::layer_attention`]'s work.

use crate::error::{Error, Result};

/// Most cells on a side: beyond any use, and no product of sizes below overflows.
const MAX_SIDE: usize = 4096;

/// Cell, in `0..side`, of a position in `0..len`.
///
/// Cells hold equal numbers of positions, up to one: position `p` lies in cell `p * side / len`. `len` 0 gives 0.
pub(crate) fn cell_of(position: usize, len: usize, side: usize) -> usize {
    (position * side).checked_div(len).unwrap_or(0)
}

/// First position of a cell: the smallest one that [`cell_of`] maps to it. `cell == side` gives `len`.
pub(crate) fn first_of(cell: usize, len: usize, side: usize) -> usize {
    if side == 0 { 0 } else { (cell * len).div_ceil(side) }
}

/// One query head's attention map, reduced to at most `max_side` x `max_side` cells by block maximum.
#[derive(Debug, Clone)]
pub struct HeadGrid {
    prompt_len: usize,
    side: usize,
    cells: Vec<f32>, // [side, side], row = query, column = key
}

impl HeadGrid {
    fn new(prompt_len: usize, side: usize) -> Self {
        Self { prompt_len, side, cells: vec![0.0; side * side] }
    }

    /// Takes one row of the attention matrix into the map; every cell becomes the larger of itself and the new weights.
    ///
    /// Rows may come in any order. NaN weights are passed over.
    ///
    /// * `query_position`: in `0..prompt_len`
    /// * `weights`: `[query_position + 1]`, the softmaxed weights of keys `0..=query_position`, in 0..=1
    ///
    /// # Errors
    /// [`Error::Shape`] if the position lies beyond the prompt or the number of weights is another.
    pub fn add_row(&mut self, query_position: usize, weights: &[f32]) -> Result<()> {
        if query_position >= self.prompt_len {
            let expected = format_args!("below {}", self.prompt_len).to_string();
            return Err(Error::shape("query position of an attention map", expected, query_position));
        }
        if weights.len() != query_position + 1 {
            return Err(Error::shape("row of an attention map", query_position + 1, weights.len()));
        }
        let row = cell_of(query_position, self.prompt_len, self.side);
        let cells = self.cells.iter_mut().skip(row * self.side).take(row + 1);
        let mut rest = weights;
        let mut start = 0;
        for (column, cell) in cells.enumerate() {
            let end = first_of(column + 1, self.prompt_len, self.side);
            let (block, tail) = rest.split_at((end - start).min(rest.len()));
            for &weight in block {
                // A comparison and not `f32::max`: cheaper, and false for NaN.
                if weight > *cell {
                    *cell = weight;
                }
            }
            (rest, start) = (tail, end);
        }
        Ok(())
    }

    /// The map `[side, side]`, row-major, row = query, column = key; zero where nothing was added.
    #[must_use]
    pub fn cells(&self) -> &[f32] {
        &self.cells
    }

    /// Cells on one side of the map.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side
    }
}

/// The attention maps of all query heads of one layer over one prompt.
///
/// Holds `num_heads * side^2` numbers with `side = min(prompt_len, max_side)`, whatever the prompt's length. Threads
/// that work on different heads share it through [`heads_mut`](Self::heads_mut).
#[derive(Debug, Clone)]
pub struct MapAccumulator {
    side: usize,
    heads: Vec<HeadGrid>,
}

impl MapAccumulator {
    /// Makes empty maps.
    ///
    /// * `prompt_len`: positions of the prompt, below 2^32; 0 gives maps without cells
    /// * `max_side`: upper bound of the side in cells, in 1..=4096 (the nearest of these is taken). With 128, a map of
    ///   a long prompt is drawn 256 to 384 pixels wide.
    #[must_use]
    pub fn new(num_heads: usize, prompt_len: usize, max_side: usize) -> Self {
        let prompt_len = prompt_len.min(u32::MAX as usize);
        let side = prompt_len.min(max_side.clamp(1, MAX_SIDE));
        Self { side, heads: vec![HeadGrid::new(prompt_len, side); num_heads] }
    }

    /// Takes one row of a query head's attention matrix: see [`HeadGrid::add_row`].
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such head, or as [`HeadGrid::add_row`].
    pub fn add_row(&mut self, head: usize, query_position: usize, weights: &[f32]) -> Result<()> {
        let num_heads = self.heads.len();
        match self.heads.get_mut(head) {
            Some(grid) => grid.add_row(query_position, weights),
            None => Err(Error::shape("query head of an attention map", format!("below {num_heads}"), head)),
        }
    }

    /// A query head's map `[side, side]`: see [`HeadGrid::cells`]. Empty if there is no such head.
    #[must_use]
    pub fn cells(&self, head: usize) -> &[f32] {
        self.heads.get(head).map_or(&[], HeadGrid::cells)
    }

    /// All heads' maps, in head order, to be filled from several threads at once.
    pub fn heads_mut(&mut self) -> &mut [HeadGrid] {
        &mut self.heads
    }

    /// Cells on one side of every map: `min(prompt_len, max_side)`.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights that differ everywhere and are no order of anything.
    fn weight(head: usize, query: usize, key: usize) -> f32 {
        f32::from(u16::try_from((head * 7919 + query * 104_729 + key * 1_299_709) % 1009).unwrap()) / 1009.0
    }

    fn row(head: usize, query: usize) -> Vec<f32> {
        (0..=query).map(|key| weight(head, query, key)).collect()
    }

    /// The slow obvious way: the whole matrix, and every entry into its cell.
    fn naive(head: usize, prompt_len: usize, side: usize) -> Vec<f32> {
        let mut cells = vec![0.0_f32; side * side];
        for query in 0..prompt_len {
            for key in 0..=query {
                let cell = &mut cells[query * side / prompt_len * side + key * side / prompt_len];
                *cell = cell.max(weight(head, query, key));
            }
        }
        cells
    }

    #[test]
    fn maps_are_the_block_maxima_of_the_whole_matrix() {
        for prompt_len in [1, 2, 3, 7, 9, 16, 31, 100, 129] {
            for max_side in [1, 2, 3, 5, 8, 64, 128, 500] {
                let mut maps = MapAccumulator::new(2, prompt_len, max_side);
                for head in 0..2 {
                    for query in 0..prompt_len {
                        maps.add_row(head, query, &row(head, query)).unwrap();
                    }
                }
                assert_eq!(maps.side(), prompt_len.min(max_side));
                for head in 0..2 {
                    assert_eq!(maps.cells(head), naive(head, prompt_len, maps.side()), "{prompt_len}, {max_side}");
                }
            }
        }
    }

    #[test]
    fn cells_and_first_positions_agree() {
        for len in 1..70 {
            for side in 1..=len {
                for position in 0..len {
                    let cell = cell_of(position, len, side);
                    assert!(first_of(cell, len, side) <= position && position < first_of(cell + 1, len, side));
                }
                assert_eq!(first_of(side, len, side), len);
            }
        }
    }

    #[test]
    fn threads_fill_disjoint_heads() {
        let mut maps = MapAccumulator::new(4, 50, 8);
        std::thread::scope(|scope| {
            for (head, grid) in maps.heads_mut().iter_mut().enumerate() {
                scope.spawn(move || (0..50).for_each(|query| grid.add_row(query, &row(head, query)).unwrap()));
            }
        });
        (0..4).for_each(|head| assert_eq!(maps.cells(head), naive(head, 50, 8)));
    }

    #[test]
    fn wrong_sizes_are_refused_and_nan_is_passed_over() {
        let mut maps = MapAccumulator::new(1, 3, 8);
        assert!(matches!(maps.add_row(1, 0, &[1.0]), Err(Error::Shape { .. })));
        assert!(matches!(maps.add_row(0, 3, &[0.25; 4]), Err(Error::Shape { .. })));
        assert!(matches!(maps.add_row(0, 1, &[1.0]), Err(Error::Shape { .. })));
        assert!(maps.cells(1).is_empty());
        maps.add_row(0, 1, &[f32::NAN, 0.5]).unwrap();
        assert_eq!(maps.cells(0), [0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(MapAccumulator::new(2, 0, 8).side(), 0);
        assert_eq!(MapAccumulator::new(2, 5, 0).side(), 1);
    }
}
