//! Where the maps of [`super::layer_attention`] go: columns and rows, pixels per cell, and the strip's columns.
//!
//! Numbers only; drawing is [`super::picture`]'s work.

use crate::attention::map::{cell_of, first_of};

/// Most columns of maps.
const MAX_COLUMNS: usize = 8;

/// Widest map in pixels in a picture of so many columns; with its gaps the picture stays below 2400.
fn max_map_width(columns: usize) -> usize {
    match columns {
        1 => 1024,
        2 => 768,
        3 => 512,
        4 => 448,
        5 | 6 => 320,
        _ => 256,
    }
}

/// Columns for so many maps: near a square, with few empty places, the wider of equals.
fn columns_for(num_maps: usize) -> usize {
    let root = num_maps.isqrt() + usize::from(num_maps.isqrt().pow(2) < num_maps);
    let wide = (root + 3).min(num_maps);
    let empty = |columns: usize| num_maps.div_ceil(columns) * columns - num_maps;
    (root.max(1)..=wide)
        .filter(|&columns| columns <= MAX_COLUMNS)
        .min_by_key(|&columns| empty(columns))
        .unwrap_or(MAX_COLUMNS)
}

/// The grid of maps, and how a map's cells become pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapGrid {
    pub(super) columns: usize,
    pub(super) rows: usize,
    /// Positions of the prompt, at least 1.
    prompt_len: usize,
    /// Cells on a side of the given maps, at least 1.
    given_side: usize,
    /// Given cells on a side of a drawn one: more than 1 if the given maps have more cells than there are pixels.
    block: usize,
    /// Cells on a side of the drawn maps.
    pub(super) side: usize,
    /// Pixels on a side of a drawn cell.
    pub(super) cell_px: usize,
}

impl MapGrid {
    /// Lays out `num_maps` maps of `side` x `side` cells over `prompt_len` positions; all at least 1.
    pub(super) fn new(num_maps: usize, side: usize, prompt_len: usize) -> Self {
        let columns = columns_for(num_maps);
        let max_width = max_map_width(columns);
        let block = side.div_ceil(max_width).max(1);
        let drawn_side = side.div_ceil(block);
        // Wide enough to see something in, and no cell larger than it must be for that.
        let max_cell_px = (96 / drawn_side.max(1)).max(24);
        let cell_px = (max_width.min(400) / drawn_side.max(1)).clamp(1, max_cell_px);
        let rows = num_maps.div_ceil(columns);
        Self { columns, rows, prompt_len, given_side: side, block, side: drawn_side, cell_px }
    }

    /// Pixels on a side of a map.
    pub(super) fn map_px(&self) -> i32 {
        (self.side * self.cell_px) as i32
    }

    /// Drawn cell, in `0..side`, of a position in `0..prompt_len`.
    pub(super) fn cell_of(&self, position: usize) -> usize {
        cell_of(position, self.prompt_len, self.given_side) / self.block
    }

    /// Pixel in the middle of a position's cell, from the map's left or upper edge.
    pub(super) fn middle_of(&self, position: usize) -> i32 {
        (self.cell_of(position) * self.cell_px + self.cell_px / 2) as i32
    }

    /// Positions per drawn cell, on average.
    pub(super) fn positions_per_cell(&self) -> f64 {
        self.prompt_len as f64 / self.side as f64
    }

    /// The cells to draw, `[side, side]`: the given ones, `[given_side, given_side]`, or the maxima of their blocks.
    pub(super) fn drawn_cells(&self, given: &[f32]) -> Vec<f32> {
        let mut drawn = vec![0.0_f32; self.side * self.side];
        for (row, values) in given.chunks(self.given_side).take(self.given_side).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                let cell = &mut drawn[row / self.block * self.side + column / self.block];
                *cell = cell.max(value);
            }
        }
        drawn
    }

    /// Fraction of the positions of every drawn column that are kept, `[side]`, each in 0..=1.
    ///
    /// `kept`: positions; ones beyond the prompt count for nothing.
    pub(super) fn kept_fractions(&self, kept: &[u32]) -> Vec<f32> {
        let mut counts = vec![(0_usize, 0_usize); self.side];
        for cell in 0..self.given_side {
            let end = first_of(cell + 1, self.prompt_len, self.given_side);
            counts[cell / self.block].1 += end - first_of(cell, self.prompt_len, self.given_side);
        }
        for &position in kept {
            if (position as usize) < self.prompt_len {
                counts[self.cell_of(position as usize)].0 += 1;
            }
        }
        counts.iter().map(|&(kept, all)| if all == 0 { 0.0 } else { (kept as f32 / all as f32).min(1.0) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_numbers_of_heads_fill_their_grid() {
        let grids = [1, 2, 4, 6, 8, 9, 12, 16, 24, 32, 40, 64].map(|heads| (heads, MapGrid::new(heads, 9, 9)));
        for (heads, grid) in grids {
            assert_eq!(grid.columns * grid.rows, heads, "{heads}");
        }
        assert_eq!(MapGrid::new(9, 9, 9).columns, 3);
        assert_eq!(MapGrid::new(32, 128, 2000).columns, 8);
    }

    #[test]
    fn any_number_of_heads_and_cells_fits() {
        for heads in (1..70).chain([128, 1000]) {
            for side in [1, 2, 9, 16, 64, 128, 129, 256, 300, 512, 700, 1024, 3000] {
                let grid = MapGrid::new(heads, side, 4000);
                assert!(grid.columns <= MAX_COLUMNS && grid.columns * grid.rows >= heads);
                assert!(grid.columns * (grid.rows - 1) < heads, "an empty row");
                assert!(grid.cell_px >= 1 && grid.map_px() as usize <= max_map_width(grid.columns));
                assert!(grid.cell_of(3999) < grid.side);
            }
        }
    }

    #[test]
    fn small_prompts_get_large_cells() {
        assert_eq!((MapGrid::new(9, 9, 9).cell_px, MapGrid::new(9, 9, 9).map_px()), (24, 216));
        assert_eq!(MapGrid::new(9, 128, 345).cell_px, 3);
        assert_eq!(MapGrid::new(32, 128, 2000).cell_px, 2);
        assert_eq!(MapGrid::new(1, 1, 1).cell_px, 96);
    }

    #[test]
    fn too_many_cells_become_block_maxima() {
        let grid = MapGrid::new(64, 600, 1200);
        assert_eq!((grid.block, grid.side), (3, 200));
        let mut given = vec![0.0; 600 * 600];
        given[599 * 600 + 4] = 0.75;
        let drawn = grid.drawn_cells(&given);
        assert_eq!(drawn.iter().position(|&value| value > 0.0), Some(199 * 200 + 1));
        assert_eq!((grid.cell_of(1199), grid.cell_of(8), grid.cell_of(5)), (199, 1, 0));
    }

    #[test]
    fn strips_hold_fractions() {
        let grid = MapGrid::new(1, 3, 3);
        assert_eq!(grid.kept_fractions(&[0, 2, 7]), [1.0, 0.0, 1.0]);
        let grid = MapGrid::new(1, 2, 5);
        // Positions 0, 1, 2 and 3, 4.
        let fractions = grid.kept_fractions(&[1, 3, 4]);
        assert!((fractions[0] - 1.0 / 3.0).abs() < 1e-6 && (fractions[1] - 1.0).abs() < 1e-6);
    }
}
