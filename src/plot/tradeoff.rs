//! What a smaller cache costs against the memory that it takes: one panel for each measure, one line for each way to
//! compress, through its points by size.

use std::path::Path;

use super::axis::MB;
use super::canvas::{Canvas, check_count};
use super::color::{INK, Rgb, WHITE, level};
use super::panels::{Ticks, frame, sheet};
use crate::error::{Error, Result};

const PANEL: (i32, i32) = (420, 300);
const LINE_WIDTH: f64 = 2.0;
/// Diameter of a measured point.
const DOT: f64 = 9.0;
/// Half the width of an error bar's ends.
const CAP: f64 = 5.0;
/// Diameter of the ring around a marked point, and of the gap within it.
const RING: f64 = 17.0;
const RING_GAP: f64 = 13.0;
/// The most decades of a logarithmic axis; what is smaller lies at its foot.
const MAX_DECADES: i32 = 12;

/// A measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TradeoffPoint {
    pub kv_bytes: f64,
    pub value: f64,
    /// Drawn as a bar of so much above and below; 0 for none.
    pub error: f64,
}

/// One way to compress.
#[derive(Debug, Clone, PartialEq)]
pub struct TradeoffLine {
    /// Lines of the same name get the same colour, in all panels.
    pub name: String,
    /// In any order; drawn from the smallest cache to the largest.
    pub points: Vec<TradeoffPoint>,
}

/// How a panel's vertical axis is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TradeoffScale {
    /// Powers of ten; what is 0 has a line of its own at the foot.
    Log,
    /// From 0 to 1.
    Share,
}

/// What points are held against; drawn as a line across the panel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TradeoffLimit {
    Value(f64),
    KvBytes(f64),
}

/// One measure.
#[derive(Debug, Clone, PartialEq)]
pub struct TradeoffPanel {
    pub title: String,
    pub scale: TradeoffScale,
    pub lines: Vec<TradeoffLine>,
    pub limit: Option<TradeoffLimit>,
    /// A point with a ring around it.
    pub marked: Option<TradeoffPoint>,
}

/// Draws the panels side by side.
///
/// * `title`: what was measured; shortened if it is long
///
/// # Errors
/// [`Error::Shape`] if there is no panel, or one has no points; [`Error::Unsupported`] for more than 20 000 lines or
/// panels; [`Error::Io`] if `path` cannot be written.
pub fn tradeoff(path: &Path, title: &str, panels: &[TradeoffPanel]) -> Result<()> {
    check_count(panels.len(), "panels")?;
    check_count(panels.iter().map(|panel| panel.lines.len()).sum(), "lines")?;
    if panels.is_empty() || panels.iter().any(|panel| panel.points().next().is_none()) {
        return Err(Error::shape("the measurements to draw", "at least one point", 0));
    }
    let mut names: Vec<&str> = Vec::new();
    for line in panels.iter().flat_map(|panel| &panel.lines) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    draw(title, panels, &names)?.save(path)
}

fn draw(title: &str, panels: &[TradeoffPanel], names: &[&str]) -> Result<Canvas> {
    let axes: Vec<Axis> = panels.iter().map(Axis::of).collect();
    let ticks: Vec<Ticks> = axes.iter().map(|axis| axis.ticks.clone()).collect();
    let (mut canvas, corners) = sheet(PANEL, title, &ticks, names, |canvas, index, [start, end]| {
        canvas.line(start, end, LINE_WIDTH, level(index));
        let center = (f64::midpoint(start.0, end.0), start.1);
        canvas.line(center, center, DOT, level(index));
    })?;
    for ((panel, axis), corner) in panels.iter().zip(&axes).zip(corners) {
        let color = |name: &str| level(names.iter().position(|known| *known == name).unwrap_or(0));
        panel.draw(&mut canvas, corner, axis, color);
    }
    Ok(canvas)
}

/// A vertical axis.
struct Axis {
    scale: TradeoffScale,
    /// Exponents of the lowest and the highest power of ten.
    decades: (i32, i32),
    /// There are values that have no logarithm.
    has_zero: bool,
    /// From below.
    ticks: Ticks,
}

impl Axis {
    fn of(panel: &TradeoffPanel) -> Self {
        let scale = panel.scale;
        let (mut decades, mut has_zero) = ((-1, 0), false);
        if scale == TradeoffScale::Log {
            let is_positive = |value: &f64| value.is_finite() && *value > 0.0;
            let limit = match panel.limit {
                Some(TradeoffLimit::Value(limit)) => Some(limit),
                _ => None,
            };
            let positive = || panel.points().map(|point| point.value).chain(limit).filter(is_positive);
            has_zero = panel.points().any(|point| !is_positive(&point.value));
            if positive().next().is_some() {
                // An error bar is part of what the axis has room for.
                let highest = panel.points().map(|point| point.value + point.error).chain(limit).filter(is_positive);
                let high = highest.fold(f64::MIN_POSITIVE, f64::max).log10().ceil() as i32;
                let low = positive().fold(f64::INFINITY, f64::min).log10().floor() as i32;
                decades = (low.min(high - 1).max(high - MAX_DECADES), high);
            }
        }
        let mut axis = Self { scale, decades, has_zero, ticks: Vec::new() };
        axis.ticks = match scale {
            TradeoffScale::Share => {
                (0..=5).map(|step| f64::from(step) / 5.0).map(|value| (value, format!("{value:.1}"))).collect()
            }
            TradeoffScale::Log => {
                let zero = has_zero.then(|| (0.0, "0".to_owned()));
                let powers = (decades.0..=decades.1).map(|power| (axis.height(10_f64.powi(power)), decimal(power)));
                zero.into_iter().chain(powers).collect()
            }
        };
        axis
    }

    /// Where a value lies, from 0 at the foot to 1 at the top.
    fn height(&self, value: f64) -> f64 {
        if self.scale == TradeoffScale::Share {
            return value.clamp(0.0, 1.0);
        }
        if !(value.is_finite() && value > 0.0) {
            return 0.0;
        }
        // One more decade, below the others, for what is 0.
        let low = f64::from(self.decades.0) - f64::from(u8::from(self.has_zero));
        ((value.log10() - low) / (f64::from(self.decades.1) - low)).clamp(0.0, 1.0)
    }
}

/// A power of ten, as people write it.
fn decimal(power: i32) -> String {
    let decimals = (-power).clamp(0, 4) as usize;
    if (-4..=4).contains(&power) { format!("{:.decimals$}", 10_f64.powi(power)) } else { format!("1e{power}") }
}

impl TradeoffPanel {
    fn points(&self) -> impl Iterator<Item = &TradeoffPoint> {
        self.lines.iter().flat_map(|line| &line.points)
    }

    fn draw(&self, canvas: &mut Canvas, (left, top): (i32, i32), axis: &Axis, color: impl Fn(&str) -> Rgb) {
        let limit_bytes = match self.limit {
            Some(TradeoffLimit::KvBytes(limit)) => Some(limit),
            _ => None,
        };
        let largest = self.points().map(|point| point.kv_bytes).chain(limit_bytes).fold(0.0, f64::max) / MB;
        let full_scale = if largest > 0.0 { largest * 1.04 } else { 1.0 }; // dots stay clear of the edge
        let quantity = "kept keys and values, MB (1 MB = 1024 × 1024 bytes)";
        frame(canvas, (left, top), PANEL, &self.title, &axis.ticks, (largest, full_scale), quantity);
        let (width, height) = (f64::from(PANEL.0), f64::from(PANEL.1));
        let bottom = top + PANEL.1;
        let x_of = |bytes: f64| f64::from(left) + bytes / MB / full_scale * width;
        let y_of = |value: f64| f64::from(bottom) - axis.height(value) * height;
        let right = f64::from(left + PANEL.0);
        match self.limit {
            Some(TradeoffLimit::Value(limit)) => {
                canvas.line((f64::from(left), y_of(limit)), (right, y_of(limit)), LINE_WIDTH / 2.0, INK);
            }
            Some(TradeoffLimit::KvBytes(limit)) => {
                canvas.line((x_of(limit), f64::from(top)), (x_of(limit), f64::from(bottom)), LINE_WIDTH / 2.0, INK);
            }
            None => {}
        }
        if let Some(point) = &self.marked {
            let center = (x_of(point.kv_bytes), y_of(point.value));
            canvas.line(center, center, RING, INK);
            canvas.line(center, center, RING_GAP, WHITE);
        }
        for line in &self.lines {
            let color = color(&line.name);
            let mut points = line.points.clone();
            points.sort_by(|a, b| a.kv_bytes.total_cmp(&b.kv_bytes));
            let at = |point: &TradeoffPoint| (x_of(point.kv_bytes), y_of(point.value));
            for pair in points.windows(2) {
                canvas.line(at(&pair[0]), at(&pair[1]), LINE_WIDTH, color);
            }
            for point in &points {
                let (x, y) = at(point);
                canvas.line((x, y), (x, y), DOT, color);
                if point.error > 0.0 {
                    let (high, low) = (y_of(point.value + point.error), y_of(point.value - point.error));
                    canvas.line((x, high), (x, low), LINE_WIDTH / 2.0, color);
                    for y in [high, low] {
                        canvas.line((x - CAP, y), (x + CAP, y), LINE_WIDTH / 2.0, color);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    fn line(name: &str, points: &[(f64, f64, f64)]) -> TradeoffLine {
        let points = points.iter().map(|&(kv_bytes, value, error)| TradeoffPoint { kv_bytes, value, error });
        TradeoffLine { name: name.to_owned(), points: points.collect() }
    }

    fn panel(scale: TradeoffScale, lines: Vec<TradeoffLine>) -> TradeoffPanel {
        TradeoffPanel { title: "a measure".to_owned(), scale, lines, limit: None, marked: None }
    }

    #[test]
    fn every_set_of_measurements_has_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for points in [
            &[(9e6, 0.02, 0.03), (3e6, 0.5, 0.1)][..],
            &[(0.0, 0.0, 0.0)],
            &[(1e6, f64::NAN, f64::NAN), (1e6, 1e-30, 0.0), (f64::NAN, 7.0, 1e9)],
        ] {
            let panels = [TradeoffScale::Log, TradeoffScale::Share]
                .map(|scale| panel(scale, vec![line("one", points), line("two", points)]));
            tradeoff(&path, "model", &panels[..1]).unwrap();
            let (narrow, _) = test_png::size(&path).unwrap();
            tradeoff(&path, &"a long title ".repeat(50), &panels).unwrap();
            let (wide, height) = test_png::size(&path).unwrap();
            assert!(wide > narrow + PANEL.0 as u32 && wide < 1500 && height > 400);
        }
        assert_eq!(test_png::names(folder.path()), ["a.png"]);
    }

    #[test]
    fn nothing_to_draw_is_an_error() {
        for panels in [vec![], vec![panel(TradeoffScale::Log, vec![line("one", &[])])]] {
            assert!(matches!(tradeoff(Path::new("a.png"), "", &panels), Err(Error::Shape { .. })));
        }
    }

    #[test]
    fn limits_and_marks_are_drawn_within_the_axes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let points = [(1e6, 0.03, 0.0), (2e6, 0.01, 0.0)];
        let mut panel = panel(TradeoffScale::Log, vec![line("one", &points)]);
        let mut sizes = Vec::new();
        for limit in [None, Some(TradeoffLimit::Value(1e-4)), Some(TradeoffLimit::KvBytes(7e6))] {
            panel.limit = limit;
            panel.marked = limit.map(|_| panel.lines[0].points[0]);
            let axis = Axis::of(&panel);
            assert_eq!(axis.ticks[0].1, if limit == Some(TradeoffLimit::Value(1e-4)) { "0.0001" } else { "0.01" });
            tradeoff(&path, "model", std::slice::from_ref(&panel)).unwrap();
            sizes.push(std::fs::read(&path).unwrap());
        }
        assert!(sizes[0] != sizes[1] && sizes[1] != sizes[2]);
    }

    #[test]
    fn a_logarithmic_axis_holds_all_values_and_zero_below_them() {
        let points = [(1.0, 0.03, 0.0), (1.0, 2.0, 0.0), (1.0, 0.0, 0.0)];
        let axis = Axis::of(&panel(TradeoffScale::Log, vec![line("one", &points)]));
        let labels: Vec<_> = axis.ticks.iter().map(|(_, label)| label.as_str()).collect();
        assert_eq!(labels, ["0", "0.01", "0.1", "1", "10"]);
        assert!((axis.height(0.1) - 0.5).abs() < 1e-9 && axis.height(0.0) == 0.0 && axis.height(10.0) == 1.0);
        let axis = Axis::of(&panel(TradeoffScale::Log, vec![line("one", &points[..1])]));
        assert_eq!((axis.ticks[0].1.as_str(), axis.height(0.01)), ("0.01", 0.0));
    }
}
