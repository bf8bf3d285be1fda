//! Which facts of a text are found, over the text's length and the place where they stand.
//!
//! Not for asking: that is [`crate::eval`]'s work.

use std::path::Path;

use super::canvas::{Align, Canvas, check_count};
use super::color::{FAINT, INK, MUTED, Rgb, mix, text_on};
use super::text::{self, Size};
use crate::error::{Error, Result};

const MARGIN: i32 = 24;
const CELL: (i32, i32) = (64, 36);
/// Between two maps, beside and below one another.
const GAP: (i32, i32) = (36, 34);
/// A picture's width, but for a single map that is wider.
const WIDTH: i32 = 1600;
const MIN_MAP_WIDTH: i32 = 330;

/// All wrong, half right, all right: three colours of Okabe and Ito's, which people with any colour vision tell apart.
const SHADES: [Rgb; 3] = [[213, 94, 0], [240, 228, 66], [0, 158, 115]];

/// The facts of one task and one way to keep a cache.
#[derive(Debug, Clone, PartialEq)]
pub struct NeedleMap {
    pub title: String,
    /// Tokens of texts, ascending; at least one.
    pub lengths: Vec<usize>,
    /// Where facts stand, in 0..=1, ascending; at least one.
    pub depths: Vec<f64>,
    /// `[depths, lengths]` share of right answers, in 0..=1; `None` for what was not measured.
    pub cells: Vec<Option<f64>>,
}

/// Draws the maps, as many side by side as there is room for.
///
/// * `title`: of all; shortened if it is long
///
/// # Errors
/// [`Error::Shape`] if there is no map, or one is empty or has another number of cells; [`Error::Unsupported`] for more
/// than 20 000 cells; [`Error::Io`] if `path` cannot be written.
pub fn needle_maps(path: &Path, title: &str, maps: &[NeedleMap]) -> Result<()> {
    if maps.is_empty() {
        return Err(Error::shape("needle maps", "at least 1", 0));
    }
    for map in maps {
        let expected = (map.depths.len(), map.lengths.len());
        if map.cells.is_empty() || expected.0.checked_mul(expected.1) != Some(map.cells.len()) {
            return Err(Error::shape("cells of a needle map", expected, map.cells.len()));
        }
    }
    check_count(maps.iter().map(|map| map.cells.len()).sum(), "cells")?;
    draw(title, maps)?.save(path)
}

/// What stands at the edges of a map: of numbers on the left, of its title above, of numbers below.
struct Frame {
    left: i32,
    top: i32,
    bottom: i32,
}

fn draw(title: &str, maps: &[NeedleMap]) -> Result<Canvas> {
    let labels = maps.iter().flat_map(|map| &map.depths).map(|depth| text::width(&percent(*depth), Size::Normal));
    let frame = Frame {
        left: Size::Normal.line() + 10 + labels.max().unwrap_or(0) + 8,
        top: Size::Normal.line() + 10,
        bottom: 2 * Size::Normal.line() + 16,
    };
    let size = |map: &NeedleMap| {
        let width = frame.left + CELL.0 * map.lengths.len() as i32;
        (width.max(MIN_MAP_WIDTH), frame.top + CELL.1 * map.depths.len() as i32 + frame.bottom)
    };
    let mut places = Vec::with_capacity(maps.len());
    let (mut x, mut y, mut line_height, mut right) = (0, 0, 0, 0);
    for map in maps {
        let (width, height) = size(map);
        if x > 0 && x + width > WIDTH {
            (x, y, line_height) = (0, y + line_height + GAP.1, 0);
        }
        places.push((MARGIN + x, y));
        right = right.max(x + width);
        line_height = line_height.max(height);
        x += width + GAP.0;
    }
    let top = MARGIN + Size::Title.line() + 14;
    let mut canvas = Canvas::new(MARGIN + right + MARGIN, top + y + line_height + MARGIN)?;
    let title = text::shorten(title, Size::Title, right);
    canvas.text(&title, (MARGIN, MARGIN + Size::Title.digit()), Align::Left, Size::Title, INK);
    for (map, (x, y)) in maps.iter().zip(places) {
        map.draw(&mut canvas, (x, top + y), &frame, size(map).0);
    }
    Ok(canvas)
}

impl NeedleMap {
    fn draw(&self, canvas: &mut Canvas, (x, y): (i32, i32), frame: &Frame, width: i32) {
        let title = text::shorten(&self.title, Size::Normal, width);
        canvas.text(&title, (x, y + Size::Normal.digit()), Align::Left, Size::Normal, INK);
        let (left, top) = (x + frame.left, y + frame.top);
        let (columns, rows) = (self.lengths.len() as i32, self.depths.len() as i32);
        for (index, cell) in self.cells.iter().enumerate() {
            let (row, column) = (index / self.lengths.len(), index % self.lengths.len());
            let at = (left + column as i32 * CELL.0, top + row as i32 * CELL.1);
            let color = cell.map_or(FAINT, shade);
            canvas.fill(at, (CELL.0 - 1, CELL.1 - 1), color);
            let middle = (at.0 + CELL.0 / 2, at.1 + i32::midpoint(CELL.1, Size::Normal.digit()));
            let label = cell.map_or_else(|| "-".to_owned(), percent);
            canvas.text(&label, middle, Align::Center, Size::Normal, text_on(color));
        }
        for (row, depth) in self.depths.iter().enumerate() {
            let baseline = top + row as i32 * CELL.1 + i32::midpoint(CELL.1, Size::Normal.digit());
            canvas.text(&percent(*depth), (left - 8, baseline), Align::Right, Size::Normal, MUTED);
        }
        let bottom = top + rows * CELL.1;
        for (column, length) in self.lengths.iter().enumerate() {
            let middle = left + column as i32 * CELL.0 + CELL.0 / 2;
            let baseline = bottom + 6 + Size::Normal.digit();
            canvas.text(&length.to_string(), (middle, baseline), Align::Center, Size::Normal, MUTED);
        }
        let middle = (left + columns * CELL.0 / 2, bottom + 14 + Size::Normal.line() + Size::Normal.digit());
        canvas.text("tokens", middle, Align::Center, Size::Normal, INK);
        canvas.text_upwards("depth", (x + Size::Normal.digit(), top + rows * CELL.1 / 2), Size::Normal, INK);
    }
}

/// A share, in whole per cent.
fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn shade(share: f64) -> Rgb {
    let [wrong, half, right] = SHADES;
    let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) as f32 };
    if share < 0.5 { mix(wrong, half, 2.0 * share) } else { mix(half, right, 2.0 * share - 1.0) }
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    fn map(columns: usize, rows: usize) -> NeedleMap {
        let cells = (0..columns * rows).map(|index| (index % 5 != 4).then_some(index as f64 / 9.0)).collect();
        NeedleMap {
            title: "passkey: best, 25%, f16, 4 texts each".to_owned(),
            lengths: (1..=columns).map(|column| column * 1024).collect(),
            depths: (0..rows).map(|row| row as f64 / 10.0).collect(),
            cells,
        }
    }

    #[test]
    fn every_map_has_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.png");
        let mut sizes = Vec::new();
        for maps in [vec![map(1, 1)], vec![map(5, 9); 2], vec![map(5, 9); 9], vec![map(40, 3)]] {
            needle_maps(&path, &"a long title ".repeat(40), &maps).unwrap();
            sizes.push(test_png::size(&path).unwrap());
        }
        assert!(sizes[1].0 > sizes[0].0 && sizes[2].1 > 2 * sizes[1].1 && sizes[2].0 < 1700 && sizes[3].0 > 2560);
        assert_eq!(test_png::names(folder.path()), ["map.png"]);
    }

    #[test]
    fn cells_have_the_colour_of_their_share() {
        let mut map = map(3, 1);
        map.cells = vec![Some(0.0), Some(1.0), None];
        let canvas = draw("", &[map]).unwrap();
        let least = (CELL.0 * CELL.1 / 2) as usize;
        for color in [SHADES[0], SHADES[2], FAINT] {
            assert!(canvas.count(color) > least, "{color:?}");
        }
        assert_eq!(canvas.count(SHADES[1]), 0);
        assert_eq!((shade(0.5), shade(f64::NAN), shade(7.0)), (SHADES[1], SHADES[0], SHADES[2]));
    }

    #[test]
    fn cells_must_be_as_many_as_there_are_places() {
        let path = Path::new("map.png");
        let mut few = map(2, 2);
        few.cells.pop();
        let none = NeedleMap { lengths: Vec::new(), cells: Vec::new(), ..map(2, 2) };
        for maps in [vec![], vec![few], vec![map(2, 2), none]] {
            assert!(matches!(needle_maps(path, "", &maps), Err(Error::Shape { .. })));
        }
    }
}
