//! Panels side by side below a title and a legend, each with its axes: what pictures of measurements have in common.

use super::axis::value_ticks;
use super::canvas::{Align, Canvas};
use super::color::{FAINT, INK, MUTED};
use super::legend::{SAMPLE, flow};
use super::text::{self, Size};
use crate::error::Result;

const MARGIN: i32 = 24;
/// Between a panel and the labels of the one on its right.
const PANEL_GAP: i32 = 40;

/// Marks of a vertical axis: heights in 0..=1, and labels.
pub(super) type Ticks = Vec<(f64, String)>;

/// A canvas with a title and a legend, and the left upper corners of the panels.
///
/// * `ticks`: of each panel
/// * `names`: the legend's entries
/// * `sample`: draws an entry's line from one place to the other
pub(super) fn sheet(
    (width, height): (i32, i32),
    title: &str,
    ticks: &[Ticks],
    names: &[impl AsRef<str>],
    sample: impl Fn(&mut Canvas, usize, [(f64, f64); 2]),
) -> Result<(Canvas, Vec<(i32, i32)>)> {
    let label_width = |(_, label): &(f64, String)| text::width(label, Size::Normal);
    let label_widths: Vec<i32> =
        ticks.iter().map(|ticks| ticks.iter().map(label_width).max().unwrap_or(0) + 8).collect();
    let num_panels = ticks.len() as i32;
    let content_width = label_widths.iter().sum::<i32>() + num_panels * width + (num_panels - 1) * PANEL_GAP;
    let entry = |name: &_| text::shorten(AsRef::as_ref(name), Size::Normal, content_width - SAMPLE - 8);
    let entries: Vec<String> = names.iter().map(entry).collect();
    let (places, legend_height) = flow(&entries, content_width);
    let legend_top = MARGIN + Size::Title.line() + 10;
    let top = legend_top + legend_height + 14 + Size::Normal.line() + 12;
    let mut canvas = Canvas::new(MARGIN + content_width + MARGIN, top + height + 48 + MARGIN)?;

    let title = text::shorten(title, Size::Title, content_width);
    canvas.text(&title, (MARGIN, MARGIN + Size::Title.digit()), Align::Left, Size::Title, INK);
    for (index, (entry, (x, y))) in entries.iter().zip(places).enumerate() {
        let (x, baseline) = (MARGIN + x, legend_top + y + 15);
        let middle = f64::from(baseline) - f64::from(Size::Normal.digit()) / 2.0;
        sample(&mut canvas, index, [(f64::from(x), middle), (f64::from(x + SAMPLE), middle)]);
        canvas.text(entry, (x + SAMPLE + 8, baseline), Align::Left, Size::Normal, INK);
    }
    let mut left = MARGIN;
    let mut corner = |label_width: &i32| {
        left += label_width + width + PANEL_GAP;
        (left - width - PANEL_GAP, top)
    };
    let corners = label_widths.iter().map(&mut corner).collect();
    Ok((canvas, corners))
}

/// Draws a panel's title and axes.
///
/// * `largest`: value on the horizontal axis, and the one at its end, somewhat more
/// * `quantity`: what stands below the horizontal axis
pub(super) fn frame(
    canvas: &mut Canvas,
    (left, top): (i32, i32),
    (width, height): (i32, i32),
    title: &str,
    ticks: &Ticks,
    (largest, full_scale): (f64, f64),
    quantity: &str,
) {
    let bottom = top + height;
    canvas.text(title, (left, top - 12), Align::Left, Size::Normal, INK);
    for (share, label) in ticks {
        let y = (f64::from(bottom) - share * f64::from(height)).round() as i32;
        canvas.fill((left, y), (width, 1), FAINT);
        canvas.text(label, (left - 8, y + Size::Normal.digit() / 2), Align::Right, Size::Normal, MUTED);
    }
    let (ticks, decimals) = value_ticks(largest);
    canvas.fill((left, bottom), (width, 1), INK);
    for tick in ticks.into_iter().filter(|&tick| tick <= full_scale) {
        let x = (f64::from(left) + tick / full_scale * f64::from(width)).round() as i32;
        canvas.fill((x, bottom + 1), (1, 4), INK);
        let baseline = (x, bottom + 10 + Size::Normal.digit());
        canvas.text(&format!("{tick:.decimals$}"), baseline, Align::Center, Size::Normal, MUTED);
    }
    canvas.text(quantity, (left + width / 2, bottom + 44), Align::Center, Size::Normal, INK);
}
