//! Lines over a quantity, in panels side by side, below one title and one legend.
//!
//! Not for: what the lines mean, or how a vertical axis is divided (see [`Axis`]).

use super::axis::{Axis, value_ticks};
use super::canvas::{Align, Canvas};
use super::color::{FAINT, INK, MUTED, Rgb, WHITE};
use super::legend::{SAMPLE, flow};
use super::text::{self, Size};
use crate::error::Result;

const MARGIN: i32 = 24;
pub(super) const PANEL_WIDTH: i32 = 400;
const PANEL_HEIGHT: i32 = 290;
/// Between a panel and the labels of the one on its right.
const PANEL_GAP: i32 = 40;
const LINE_WIDTH: f64 = 2.0;
/// Diameter of a measured point.
const DOT: f64 = 8.0;
/// Half the width of an error bar's ends.
const CAP: f64 = 5.0;
/// Diameter of the ring around a marked point, and of the gap within it.
const RING: f64 = 17.0;
const RING_GAP: f64 = 13.0;
/// The horizontal axis in units of its largest value: dots stay clear of the edge.
const ROOM: f64 = 1.04;

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Style {
    pub color: Rgb,
    /// Pixels of a dash and of the gap behind it.
    pub dash: Option<(f64, f64)>,
}

/// A measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub x: f64,
    pub y: f64,
    /// Drawn as a bar of so much above and below; 0 for none.
    pub error: f64,
}

/// What points are held against: a line across the panel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Limit {
    X(f64),
    Y(f64),
}

/// One quantity over another.
pub(super) struct Panel<'a> {
    pub title: &'a str,
    pub vertical: Axis,
    pub horizontal: &'a str,
    /// What the horizontal axis has room for.
    pub largest_x: f64,
    /// Points by ascending `x`.
    pub lines: Vec<(Style, Vec<Point>)>,
    pub limit: Option<Limit>,
    /// A point with a ring around it.
    pub marked: Option<Point>,
}

/// Draws panels.
///
/// * `title`: shortened if it is long
/// * `legend`: names of styles
pub(super) fn draw(title: &str, legend: &[(String, Style)], panels: &[Panel<'_>]) -> Result<Canvas> {
    let labels = |panel: &Panel| {
        panel.vertical.ticks.iter().map(|(_, label)| text::width(label, Size::Normal)).max().unwrap_or(0) + 8
    };
    let label_widths: Vec<i32> = panels.iter().map(labels).collect();
    let num_panels = panels.len() as i32;
    let content_width = label_widths.iter().sum::<i32>() + num_panels * PANEL_WIDTH + (num_panels - 1) * PANEL_GAP;
    let entries: Vec<String> =
        legend.iter().map(|(name, _)| text::shorten(name, Size::Normal, content_width - SAMPLE - 8)).collect();
    let (places, legend_height) = flow(&entries, content_width);
    let legend_top = MARGIN + Size::Title.line() + 10;
    let top = legend_top + legend_height + 14 + Size::Normal.line() + 12;
    let mut canvas = Canvas::new(MARGIN + content_width + MARGIN, top + PANEL_HEIGHT + 48 + MARGIN)?;

    let title = text::shorten(title, Size::Title, content_width);
    canvas.text(&title, (MARGIN, MARGIN + Size::Title.digit()), Align::Left, Size::Title, INK);
    for ((entry, (_, style)), (x, y)) in entries.iter().zip(legend).zip(places) {
        let (x, baseline) = (MARGIN + x, legend_top + y + 15);
        let middle = f64::from(baseline) - f64::from(Size::Normal.digit()) / 2.0;
        let (start, end) = (f64::from(x), f64::from(x + SAMPLE));
        style.path(&mut canvas, &[(start, middle), (end, middle)]);
        style.dot(&mut canvas, (f64::midpoint(start, end), middle));
        canvas.text(entry, (x + SAMPLE + 8, baseline), Align::Left, Size::Normal, INK);
    }
    let mut left = MARGIN;
    for (panel, label_width) in panels.iter().zip(label_widths) {
        left += label_width;
        panel.draw(&mut canvas, (left, top));
        left += PANEL_WIDTH + PANEL_GAP;
    }
    Ok(canvas)
}

impl Style {
    fn path(self, canvas: &mut Canvas, points: &[(f64, f64)]) {
        for (from, to) in dashes(points, self.dash) {
            canvas.line(from, to, LINE_WIDTH, self.color);
        }
    }

    fn dot(self, canvas: &mut Canvas, at: (f64, f64)) {
        canvas.line(at, at, DOT, self.color);
    }

    /// A bar from `low` to `high`, with ends.
    fn bar(self, canvas: &mut Canvas, x: f64, (low, high): (f64, f64)) {
        canvas.line((x, high), (x, low), LINE_WIDTH / 2.0, self.color);
        for y in [high, low] {
            canvas.line((x - CAP, y), (x + CAP, y), LINE_WIDTH / 2.0, self.color);
        }
    }
}

/// The pieces of a path through `points` that are drawn; dashes go on around corners.
fn dashes(points: &[(f64, f64)], dash: Option<(f64, f64)>) -> Vec<((f64, f64), (f64, f64))> {
    let mut pieces = Vec::new();
    let mut done = 0.0;
    for pair in points.windows(2) {
        let [(x, y), to] = [pair[0], pair[1]];
        let Some((on, off)) = dash else {
            pieces.push((pair[0], to));
            continue;
        };
        let (dx, dy) = (to.0 - x, to.1 - y);
        let length = dx.hypot(dy);
        let at = |along: f64| {
            let share = if length > 0.0 { ((along - done) / length).clamp(0.0, 1.0) } else { 0.0 };
            (x + share * dx, y + share * dy)
        };
        let (first, last) = ((done / (on + off)).floor() as i64, ((done + length) / (on + off)).floor() as i64);
        for period in first..=last {
            let start = (period as f64 * (on + off)).max(done);
            let end = (period as f64 * (on + off) + on).min(done + length);
            if start < end {
                pieces.push((at(start), at(end)));
            }
        }
        done += length;
    }
    pieces
}

impl Panel<'_> {
    fn draw(&self, canvas: &mut Canvas, (left, top): (i32, i32)) {
        let bottom = top + PANEL_HEIGHT;
        canvas.text(self.title, (left, top - 12), Align::Left, Size::Normal, INK);
        let y_at = |height: f64| f64::from(bottom) - height * f64::from(PANEL_HEIGHT);
        for (height, label) in &self.vertical.ticks {
            let y = y_at(*height).round() as i32;
            canvas.fill((left, y), (PANEL_WIDTH, 1), FAINT);
            canvas.text(label, (left - 8, y + Size::Normal.digit() / 2), Align::Right, Size::Normal, MUTED);
        }
        let (ticks, decimals) = value_ticks(self.largest_x);
        let full_scale = if self.largest_x > 0.0 { self.largest_x * ROOM } else { 1.0 };
        let x_of = |x: f64| f64::from(left) + x / full_scale * f64::from(PANEL_WIDTH);
        canvas.fill((left, bottom), (PANEL_WIDTH, 1), INK);
        for tick in ticks.into_iter().filter(|&tick| tick <= full_scale) {
            let x = x_of(tick).round() as i32;
            canvas.fill((x, bottom + 1), (1, 4), INK);
            let baseline = (x, bottom + 10 + Size::Normal.digit());
            canvas.text(&format!("{tick:.decimals$}"), baseline, Align::Center, Size::Normal, MUTED);
        }
        let middle = (left + PANEL_WIDTH / 2, bottom + 44);
        canvas.text(self.horizontal, middle, Align::Center, Size::Normal, INK);

        let y_of = |y: f64| y_at(self.vertical.height(y));
        let (right, top) = (f64::from(left + PANEL_WIDTH), f64::from(top));
        match self.limit {
            Some(Limit::Y(y)) => canvas.line((f64::from(left), y_of(y)), (right, y_of(y)), LINE_WIDTH / 2.0, INK),
            Some(Limit::X(x)) => canvas.line((x_of(x), top), (x_of(x), f64::from(bottom)), LINE_WIDTH / 2.0, INK),
            None => {}
        }
        let at = |point: &Point| (x_of(point.x), y_of(point.y));
        if let Some(point) = &self.marked {
            canvas.line(at(point), at(point), RING, INK);
            canvas.line(at(point), at(point), RING_GAP, WHITE);
        }
        for (style, points) in &self.lines {
            style.path(canvas, &points.iter().map(at).collect::<Vec<_>>());
            for point in points {
                style.dot(canvas, at(point));
                if point.error > 0.0 {
                    style.bar(canvas, x_of(point.x), (y_of(point.y - point.error), y_of(point.y + point.error)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_go_on_around_a_corner() {
        let points = [(0.0, 0.0), (5.0, 0.0), (5.0, 9.0)];
        assert_eq!(dashes(&points, None), [(points[0], points[1]), (points[1], points[2])]);
        let expected = [((0.0, 0.0), (4.0, 0.0)), ((5.0, 1.0), (5.0, 5.0)), ((5.0, 7.0), (5.0, 9.0))];
        assert_eq!(dashes(&points, Some((4.0, 2.0))), expected);
    }
}
