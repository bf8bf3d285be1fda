//! `kv_memory.png`: the memory of keys and values per layer, before and after eviction.

use std::path::Path;

use super::axis::{MB, counted, index_ticks, label_gap, megabytes, percent, value_ticks};
use super::canvas::{Align, Canvas, check_count};
use super::color::{FAINT, INK, KEPT, MUTED, RAW};
use super::text::{self, Size};
use crate::error::{Error, Result};

const MARGIN: i32 = 24;
const PLOT_HEIGHT: i32 = 360;
const MIN_PLOT_WIDTH: i32 = 520;
/// Side of a legend's square.
const SWATCH: i32 = 12;

/// Draws two bars per layer: the bytes of a full cache, and the bytes that are held after eviction.
///
/// * `raw_bytes`, `kept_bytes`: `[num_layers]`; shown in MB of 1024 x 1024 bytes
///
/// # Errors
/// [`Error::Shape`] if the lengths differ or are 0; [`Error::Unsupported`] for more than 20 000 layers;
/// [`Error::Io`] if `path` cannot be written.
pub fn kv_memory(path: &Path, raw_bytes: &[u64], kept_bytes: &[u64]) -> Result<()> {
    if raw_bytes.len() != kept_bytes.len() {
        return Err(Error::shape("KV memory per layer", raw_bytes.len(), kept_bytes.len()));
    }
    if raw_bytes.is_empty() {
        return Err(Error::shape("KV memory per layer", "at least 1 layer", 0));
    }
    check_count(raw_bytes.len(), "layers")?;
    draw(raw_bytes, kept_bytes)?.save(path)
}

fn draw(raw_bytes: &[u64], kept_bytes: &[u64]) -> Result<Canvas> {
    let num_layers = raw_bytes.len();
    // A few layers get wider bars.
    let widest = (MIN_PLOT_WIDTH / (num_layers as i32 + 1)).clamp(44, 120);
    let slot = (2000 / num_layers as i32).clamp(1, widest);
    let groups_span = slot * num_layers as i32;
    let plot_width = groups_span.max(MIN_PLOT_WIDTH);
    let largest = raw_bytes.iter().chain(kept_bytes).max().map_or(0.0, |&bytes| bytes as f64 / MB);
    let (ticks, decimals) = value_ticks(largest);
    let labels: Vec<String> = ticks.iter().map(|tick| format!("{tick:.decimals$}")).collect();
    let label_width = labels.iter().map(|label| text::width(label, Size::Normal)).max().unwrap_or(0);

    let left = MARGIN + Size::Normal.line() + 10 + label_width + 8;
    let top = MARGIN + Size::Title.line() + 60;
    let bottom = top + PLOT_HEIGHT;
    let mut canvas = Canvas::new(left + plot_width + MARGIN, bottom + 48 + MARGIN)?;

    header(&mut canvas, left, plot_width, raw_bytes, kept_bytes);
    let full_scale = ticks.last().copied().unwrap_or(1.0);
    let height_of = |megabytes: f64| (megabytes / full_scale * f64::from(PLOT_HEIGHT)).round() as i32;
    for (&tick, label) in ticks.iter().zip(&labels) {
        let y = bottom - height_of(tick);
        canvas.fill((left, y), (plot_width, 1), FAINT);
        let baseline = (left - 8, y + Size::Normal.digit() / 2);
        canvas.text(label, baseline, Align::Right, Size::Normal, MUTED);
    }
    let axis_title = "KV memory in MB (1 MB = 1024 × 1024 bytes)";
    let middle = top + PLOT_HEIGHT / 2;
    canvas.text_upwards(axis_title, (MARGIN + Size::Normal.digit(), middle), Size::Normal, INK);

    // A few layers stand in the middle of the plot.
    let first = left + (plot_width - groups_span) / 2;
    let bar_width = (slot * 2 / 5).max(1);
    for (layer, (&raw, &kept)) in raw_bytes.iter().zip(kept_bytes).enumerate() {
        let middle = first + slot * layer as i32 + slot / 2;
        for (bytes, x, color) in [(raw, middle - bar_width, RAW), (kept, middle, KEPT)] {
            let height = height_of(bytes as f64 / MB);
            // Nothing has no bar, something always has one.
            let height = if bytes > 0 { height.max(1) } else { 0 };
            canvas.fill((x, bottom - height), (bar_width, height), color);
        }
    }
    canvas.fill((left, bottom), (plot_width, 1), INK);
    for layer in index_ticks(num_layers, groups_span, label_gap(num_layers)) {
        let x = first + slot * layer as i32 + slot / 2;
        canvas.fill((x, bottom + 1), (1, 4), INK);
        let baseline = (x, bottom + 10 + Size::Normal.digit());
        canvas.text(&layer.to_string(), baseline, Align::Center, Size::Normal, MUTED);
    }
    canvas.text("layer", (left + plot_width / 2, bottom + 44), Align::Center, Size::Normal, INK);
    Ok(canvas)
}

/// Title, totals and legend, above the plot.
fn header(canvas: &mut Canvas, left: i32, plot_width: i32, raw_bytes: &[u64], kept_bytes: &[u64]) {
    let total = |bytes: &[u64]| bytes.iter().map(|&bytes| bytes as f64).sum::<f64>();
    let (raw, kept) = (total(raw_bytes), total(kept_bytes));
    let title = format!("KV memory: {} → {}, {} saved", megabytes(raw), megabytes(kept), percent(raw - kept, raw));
    let baseline = MARGIN + Size::Title.digit();
    let title = text::shorten(&title, Size::Title, plot_width);
    canvas.text(&title, (left, baseline), Align::Left, Size::Title, INK);

    let baseline = baseline + 34;
    let layers = counted(raw_bytes.len(), "layer");
    let mut x = left;
    for (label, color) in [("raw: every token kept".to_owned(), RAW), (format!("kept after eviction ({layers})"), KEPT)]
    {
        canvas.fill((x, baseline - SWATCH + 1), (SWATCH, SWATCH), color);
        canvas.text(&label, (x + SWATCH + 6, baseline), Align::Left, Size::Normal, INK);
        x += SWATCH + 6 + text::width(&label, Size::Normal) + 24;
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    #[test]
    fn every_number_of_layers_and_bytes_has_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kv_memory.png");
        for (num_layers, raw) in [(1, 3240), (2, 0), (30, 3240), (32, 64 << 20), (80, u64::MAX), (500, 1)] {
            kv_memory(&path, &vec![raw; num_layers], &vec![raw / 3; num_layers]).unwrap();
            let (width, height) = test_png::size(&path).unwrap();
            assert!((520..2400).contains(&width) && height == 536, "{num_layers}: {width} x {height}");
        }
        assert_eq!(test_png::names(folder.path()), ["kv_memory.png"]);
    }

    #[test]
    fn sizes_must_agree() {
        let path = Path::new("/nowhere/kv_memory.png");
        assert!(matches!(kv_memory(path, &[1, 2], &[1]), Err(Error::Shape { .. })));
        assert!(matches!(kv_memory(path, &[], &[]), Err(Error::Shape { .. })));
        assert!(kv_memory(path, &[2], &[1]).unwrap_err().to_string().contains("/nowhere/kv_memory.png"));
    }
}
