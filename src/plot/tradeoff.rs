//! What a smaller cache costs against the memory that it takes: one panel for each measure, one line for each way to
//! compress, through its points by size.

use std::path::Path;

use super::axis::{Axis, MB};
use super::canvas::check_count;
use super::color::level;
use super::panels::{Limit, Panel, Point, Style, draw};
use crate::error::{Error, Result};

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
    let styles: Vec<_> = (0..names.len()).map(|index| Style { color: level(index), dash: None }).collect();
    let panels: Vec<_> = panels.iter().map(|panel| panel.drawn(&names, &styles)).collect();
    let legend: Vec<_> = names.into_iter().map(str::to_owned).zip(styles).collect();
    draw(title, &legend, &panels)?.save(path)
}

impl TradeoffPoint {
    fn drawn(&self) -> Point {
        Point { x: self.kv_bytes / MB, y: self.value, error: self.error }
    }
}

impl TradeoffPanel {
    fn points(&self) -> impl Iterator<Item = &TradeoffPoint> + Clone {
        self.lines.iter().flat_map(|line| &line.points)
    }

    fn axis(&self) -> Axis {
        let limit = match self.limit {
            Some(TradeoffLimit::Value(limit)) => Some(limit),
            _ => None,
        };
        match self.scale {
            TradeoffScale::Share => Axis::linear(1.0),
            // An error bar is part of what the axis has room for.
            TradeoffScale::Log => Axis::logarithmic(
                self.points().map(|point| point.value).chain(limit),
                self.points().map(|point| point.value + point.error).chain(limit),
            ),
        }
    }

    /// * `names`, `styles`: of lines
    fn drawn(&self, names: &[&str], styles: &[Style]) -> Panel<'_> {
        let limit = self.limit.map(|limit| match limit {
            TradeoffLimit::Value(value) => Limit::Y(value),
            TradeoffLimit::KvBytes(bytes) => Limit::X(bytes / MB),
        });
        let limit_x = limit.and_then(|limit| if let Limit::X(x) = limit { Some(x) } else { None });
        let largest_x = self.points().map(|point| point.kv_bytes / MB).chain(limit_x).fold(0.0, f64::max);
        let drawn = |line: &TradeoffLine| {
            let mut points: Vec<_> = line.points.iter().map(TradeoffPoint::drawn).collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            (styles[names.iter().position(|name| *name == line.name).unwrap_or(0)], points)
        };
        Panel {
            title: &self.title,
            vertical: self.axis(),
            horizontal: "kept keys and values, MB (1 MB = 1024 × 1024 bytes)",
            largest_x,
            lines: self.lines.iter().map(drawn).collect(),
            limit,
            marked: self.marked.as_ref().map(TradeoffPoint::drawn),
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
            assert!(wide > narrow + super::super::panels::PANEL_WIDTH as u32 && wide < 1500 && height > 400);
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
            let axis = panel.axis();
            assert_eq!(axis.ticks[0].1, if limit == Some(TradeoffLimit::Value(1e-4)) { "0.0001" } else { "0.01" });
            tradeoff(&path, "model", std::slice::from_ref(&panel)).unwrap();
            sizes.push(std::fs::read(&path).unwrap());
        }
        assert!(sizes[0] != sizes[1] && sizes[1] != sizes[2]);
    }

    #[test]
    fn a_logarithmic_axis_holds_all_values_and_zero_below_them() {
        let points = [(1.0, 0.03, 0.0), (1.0, 2.0, 0.0), (1.0, 0.0, 0.0)];
        let axis = panel(TradeoffScale::Log, vec![line("one", &points)]).axis();
        let labels: Vec<_> = axis.ticks.iter().map(|(_, label)| label.as_str()).collect();
        assert_eq!(labels, ["0", "0.01", "0.1", "1", "10"]);
        assert!((axis.height(0.1) - 0.5).abs() < 1e-9 && axis.height(0.0) == 0.0 && axis.height(10.0) == 1.0);
        let axis = panel(TradeoffScale::Log, vec![line("one", &points[..1])]).axis();
        assert_eq!((axis.ticks[0].1.as_str(), axis.height(0.01)), ("0.01", 0.0));
    }
}
