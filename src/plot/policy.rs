//! `policies.png`: which policy every KV head of every layer got, and how much it kept.

use std::path::Path;

use super::axis::{counted, index_ticks, label_gap};
use super::canvas::{Align, Canvas, check_count};
use super::color::{INK, MUTED, Rgb, kept_fraction, level, text_on};
use super::text::{self, Size};
use crate::error::{Error, Result};

const MARGIN: i32 = 24;
/// Side of a legend's square.
const SWATCH: i32 = 12;
/// Narrowest picture inside its margins: room for the title.
const MIN_WIDTH: i32 = 520;
/// Height of the legend's lines.
const LEGEND_LINE: i32 = 20;
/// Width of the bar of shades, and height with its percentages.
const SCALE_WIDTH: i32 = 300;
const SCALE_HEIGHT: i32 = 2 * LEGEND_LINE;

/// The chosen policies of a model's KV heads.
#[derive(Debug, Clone, Copy)]
pub struct PolicyGrid<'a> {
    /// Layers of the model, at least 1.
    pub num_layers: usize,
    /// KV heads per layer, at least 1.
    pub num_kv_heads: usize,
    /// `[num_layers, num_kv_heads]`, layer-major: index into `level_names` of the policy that a head got.
    pub levels: &'a [u8],
    /// Names of the policies, from the cheapest to the full cache.
    pub level_names: &'a [String],
    /// `[num_layers, num_kv_heads]`, layer-major: kept / seen, in 0..=1; printed in percent where a cell has room.
    pub kept_ratio: &'a [f32],
    /// Name of the method with a budget that chose for all heads, which makes levels say nothing: cells are shaded by
    /// `kept_ratio`. `None` where policies were searched.
    pub method: Option<&'a str>,
}

/// Draws layers (across) and KV heads (down) coloured by policy, or shaded by the share that a method kept of each.
///
/// The legend has every level with the number of heads that got it. The first eight colours are told apart with any
/// colour vision.
///
/// # Errors
/// [`Error::Shape`] if a length is not `num_layers * num_kv_heads`, or this is 0, a level has no name or a ratio is not
/// in 0..=1; [`Error::Unsupported`] for more than 20 000 layers or heads; [`Error::Io`] if `path` cannot be written.
pub fn policies(path: &Path, grid: &PolicyGrid<'_>) -> Result<()> {
    let num_heads = grid.num_layers.saturating_mul(grid.num_kv_heads);
    if num_heads == 0 {
        return Err(Error::shape("policies to draw", "at least 1 KV head", 0));
    }
    if grid.levels.len() != num_heads {
        return Err(Error::shape("policy levels", num_heads, grid.levels.len()));
    }
    if grid.kept_ratio.len() != num_heads {
        return Err(Error::shape("kept ratios", num_heads, grid.kept_ratio.len()));
    }
    if let Some(&odd) = grid.kept_ratio.iter().find(|&&ratio| !(0.0..=1.0).contains(&ratio)) {
        return Err(Error::shape("kept ratio", "in 0..=1", odd));
    }
    if let Some(&unknown) = grid.levels.iter().find(|&&level| usize::from(level) >= grid.level_names.len()) {
        return Err(Error::shape("policy level", format!("below {}", grid.level_names.len()), unknown));
    }
    check_count(grid.num_layers.max(grid.num_kv_heads), "layers or heads")?;
    draw(grid)?.save(path)
}

/// One line of the legend's text and its colour, placed from the legend's top left.
struct Entry {
    text: String,
    color: Rgb,
    at: (i32, i32),
}

/// Places the legend's entries in columns of equal width; gives them and the legend's height.
fn legend(grid: &PolicyGrid<'_>, width: i32) -> (Vec<Entry>, i32) {
    let texts: Vec<String> = grid
        .level_names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let heads = grid.levels.iter().filter(|&&level| usize::from(level) == index).count();
            text::shorten(&format!("{name} ({})", counted(heads, "head")), Size::Normal, width - SWATCH - 6)
        })
        .collect();
    let widest = texts.iter().map(|text| text::width(text, Size::Normal)).max().unwrap_or(0);
    let pitch = SWATCH + 6 + widest + 24;
    let columns = ((width + 24) / pitch).clamp(1, texts.len().max(1) as i32);
    // Down first, so that the order of the levels stays visible.
    let rows = (texts.len() as i32 + columns - 1) / columns;
    let entries = texts.into_iter().zip(0..).map(|(text, index)| {
        let at = (index / rows * pitch, index % rows * LEGEND_LINE);
        Entry { text, color: level(index as usize), at }
    });
    (entries.collect(), rows * LEGEND_LINE)
}

/// What the shades stand for, from the legend's top left: a bar from nothing to everything, with percentages below it.
fn scale(canvas: &mut Canvas, (left, top): (i32, i32)) {
    for x in 0..SCALE_WIDTH {
        canvas.fill((left + x, top), (1, SWATCH), kept_fraction(x as f32 / (SCALE_WIDTH - 1) as f32));
    }
    let baseline = top + SWATCH + 6 + Size::Normal.digit();
    for (percent, align) in
        [(0, Align::Left), (25, Align::Center), (50, Align::Center), (75, Align::Center), (100, Align::Right)]
    {
        let x = left + (SCALE_WIDTH - 1) * percent / 100;
        canvas.fill((x, top + SWATCH), (1, 3), INK);
        canvas.text(&format!("{percent} %"), (x, baseline), align, Size::Normal, MUTED);
    }
    canvas.text(
        "share kept of the prompt",
        (left + SCALE_WIDTH + 16, top + SWATCH - 1),
        Align::Left,
        Size::Normal,
        INK,
    );
}

fn draw(grid: &PolicyGrid<'_>) -> Result<Canvas> {
    let (num_layers, num_kv_heads) = (grid.num_layers, grid.num_kv_heads);
    // Cells at least a pixel; where the count of heads allows it, large enough for a number.
    let cell_width = (2240 / num_layers.min(2240) as i32).clamp(1, 44);
    let cell_height = (2240 / num_kv_heads.min(2240) as i32).clamp(1, 26);
    let cell_gap = i32::from(cell_width >= 8 && cell_height >= 8);
    let (grid_width, grid_height) = (cell_width * num_layers as i32, cell_height * num_kv_heads as i32);
    let label_width = text::width(&num_kv_heads.saturating_sub(1).to_string(), Size::Normal);
    let left = MARGIN + Size::Normal.line() + 12 + label_width + 8;
    let content_width = grid_width.max(MIN_WIDTH);

    let (entries, legend_height) = match grid.method {
        Some(_) => (Vec::new(), SCALE_HEIGHT),
        None => legend(grid, content_width),
    };
    // What every cell has room for, the same in all.
    let fits = |size: Size, unit: &str| {
        let width = text::width(&format!("100{unit}"), size);
        size.line() + 2 <= cell_height && width + 2 <= cell_width
    };
    let cell_text =
        [(Size::Normal, "%"), (Size::Tiny, "%"), (Size::Tiny, "")].into_iter().find(|&(size, unit)| fits(size, unit));
    let mean = grid.kept_ratio.iter().map(|&ratio| f64::from(ratio)).sum::<f64>() / grid.kept_ratio.len() as f64;
    let cells = if cell_text.is_some() { "; in the cells: each head's own, in percent" } else { "" };
    let notes = text::wrap(&format!("mean kept ratio {:.1} %{cells}", mean * 100.0), Size::Normal, content_width, 2);
    let heads = format!("{} × {}", counted(num_layers, "layer"), counted(num_kv_heads, "KV head"));
    let title = match grid.method {
        Some(method) => format!("Kept by {method}, per KV head ({heads})"),
        None => format!("Policy per KV head ({heads})"),
    };
    let title = text::wrap(&title, Size::Title, content_width, 2);
    let legend_top = MARGIN + title.len() as i32 * (Size::Title.line() + 4) + notes.len() as i32 * LEGEND_LINE + 8;
    let top = legend_top + legend_height + 14;
    let bottom = top + grid_height;
    let mut canvas = Canvas::new(left + content_width + MARGIN, bottom + 48 + MARGIN)?;

    let mut baseline = MARGIN + Size::Title.digit();
    for line in title {
        canvas.text(&line, (left, baseline), Align::Left, Size::Title, INK);
        baseline += Size::Title.line() + 4;
    }
    for line in notes {
        canvas.text(&line, (left, baseline), Align::Left, Size::Normal, MUTED);
        baseline += LEGEND_LINE;
    }
    if grid.method.is_some() {
        scale(&mut canvas, (left, legend_top));
    }
    for Entry { text, color, at: (x, y) } in entries {
        let (x, baseline) = (left + x, legend_top + y + 14);
        canvas.fill((x, baseline - SWATCH + 1), (SWATCH, SWATCH), color);
        canvas.text(&text, (x + SWATCH + 6, baseline), Align::Left, Size::Normal, INK);
    }

    for (index, (&head_level, &ratio)) in grid.levels.iter().zip(grid.kept_ratio).enumerate() {
        let (layer, head) = ((index / num_kv_heads) as i32, (index % num_kv_heads) as i32);
        let corner = (left + layer * cell_width, top + head * cell_height);
        let color = if grid.method.is_some() { kept_fraction(ratio) } else { level(usize::from(head_level)) };
        canvas.fill(corner, (cell_width - cell_gap, cell_height - cell_gap), color);
        if let Some((size, unit)) = cell_text {
            let label = format!("{:.0}{unit}", ratio * 100.0);
            let baseline = corner.1 + (cell_height - cell_gap) / 2 + size.digit() / 2;
            canvas.text(&label, (corner.0 + cell_width / 2, baseline), Align::Center, size, text_on(color));
        }
    }
    axes(&mut canvas, grid, (left, top), (cell_width, cell_height));
    Ok(canvas)
}

/// Ticks and titles of both axes, around the grid whose upper left corner is given.
fn axes(canvas: &mut Canvas, grid: &PolicyGrid<'_>, (left, top): (i32, i32), (cell_width, cell_height): (i32, i32)) {
    let grid_width = cell_width * grid.num_layers as i32;
    let grid_height = cell_height * grid.num_kv_heads as i32;
    let bottom = top + grid_height;
    for layer in index_ticks(grid.num_layers, grid_width, label_gap(grid.num_layers)) {
        let x = left + layer as i32 * cell_width + cell_width / 2;
        canvas.fill((x, bottom + 1), (1, 4), INK);
        canvas.text(&layer.to_string(), (x, bottom + 10 + Size::Normal.digit()), Align::Center, Size::Normal, MUTED);
    }
    canvas.text("layer", (left + grid_width / 2, bottom + 44), Align::Center, Size::Normal, INK);
    for head in index_ticks(grid.num_kv_heads, grid_height, Size::Normal.line() + 4) {
        let y = top + head as i32 * cell_height + cell_height / 2;
        canvas.fill((left - 5, y), (4, 1), INK);
        let baseline = (left - 8, y + Size::Normal.digit() / 2);
        canvas.text(&head.to_string(), baseline, Align::Right, Size::Normal, MUTED);
    }
    let middle = (MARGIN + Size::Normal.digit(), top + grid_height / 2);
    canvas.text_upwards("KV head", middle, Size::Normal, INK);
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("special+punctuation+level{index}")).collect()
    }

    #[test]
    fn every_model_has_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policies.png");
        for (num_layers, num_kv_heads) in [(1, 1), (30, 3), (32, 32), (80, 8), (126, 8), (1, 200), (3000, 2)] {
            let levels: Vec<u8> = (0..num_layers * num_kv_heads).map(|index| (index % 5) as u8).collect();
            let kept_ratio: Vec<f32> = levels.iter().map(|&level| f32::from(level) / 4.0).collect();
            let level_names = names(5);
            let grid = PolicyGrid {
                num_layers,
                num_kv_heads,
                levels: &levels,
                level_names: &level_names,
                kept_ratio: &kept_ratio,
                method: None,
            };
            for method in [None, Some("streaming_llm")] {
                policies(&path, &PolicyGrid { method, ..grid }).unwrap();
                let (width, height) = test_png::size(&path).unwrap();
                assert!((520..2400).contains(&width) || num_layers > 2300, "{num_layers}: {width} x {height}");
            }
        }
        assert_eq!(test_png::names(folder.path()), ["policies.png"]);
    }

    #[test]
    fn the_legend_counts_heads_and_stays_inside() {
        let level_names = names(12);
        let grid = PolicyGrid {
            num_layers: 2,
            num_kv_heads: 2,
            levels: &[0, 3, 3, 3],
            level_names: &level_names,
            kept_ratio: &[1.0; 4],
            method: None,
        };
        let (entries, height) = legend(&grid, 700);
        assert_eq!(entries.len(), 12);
        assert!(entries[0].text.ends_with("(1 head)") && entries[3].text.ends_with("(3 heads)"));
        for Entry { text, at: (x, y), .. } in &entries {
            assert!(x + SWATCH + 6 + text::width(text, Size::Normal) <= 700 && y + LEGEND_LINE <= height);
        }
    }

    #[test]
    fn a_methods_cells_are_shaded_by_what_is_kept() {
        let level_names = names(1);
        let picture = |kept_ratio: [f32; 2], method: Option<&str>| {
            let (num_layers, num_kv_heads) = (1, 2);
            let grid = PolicyGrid {
                num_layers,
                num_kv_heads,
                levels: &[0, 0],
                level_names: &level_names,
                kept_ratio: &kept_ratio,
                method,
            };
            draw(&grid).unwrap()
        };
        let (few, many) = (kept_fraction(0.2), kept_fraction(0.9));
        // A cell has 44 x 26 pixels, some of which are text; the scale has some of each shade, too.
        let shaded = picture([0.2, 0.9], Some("tova"));
        assert!(shaded.count(few) > 700 && shaded.count(many) > 700 && shaded.count(level(0)) == 0);
        let same = picture([0.2, 0.2], Some("tova"));
        assert!(same.count(few) > 1400 && same.count(many) < 200);
        let policies = picture([0.2, 0.9], None);
        assert!(policies.count(level(0)) > 1400 && policies.count(many) == 0);
    }

    #[test]
    fn sizes_must_agree() {
        let path = Path::new("/nowhere/policies.png");
        let level_names = names(2);
        let good = PolicyGrid {
            num_layers: 1,
            num_kv_heads: 2,
            levels: &[0, 1],
            level_names: &level_names,
            kept_ratio: &[0.5, 1.0],
            method: None,
        };
        for bad in [
            PolicyGrid { num_layers: 0, ..good },
            PolicyGrid { levels: &[0], ..good },
            PolicyGrid { levels: &[0, 2], ..good },
            PolicyGrid { kept_ratio: &[], ..good },
            PolicyGrid { kept_ratio: &[f32::NAN, 1.0], ..good },
            PolicyGrid { kept_ratio: &[0.5, 1.5], ..good },
            PolicyGrid { num_layers: usize::MAX, ..good },
        ] {
            assert!(matches!(policies(path, &bad), Err(Error::Shape { .. })));
        }
        assert!(policies(path, &good).unwrap_err().to_string().contains("/nowhere/policies.png"));
    }
}
