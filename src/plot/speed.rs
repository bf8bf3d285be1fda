//! Speed and KV memory against the prompt's length, one panel for each quantity, one line for each way to run.

use std::path::Path;

use super::axis::{MB, counted, value_ticks};
use super::canvas::{Canvas, check_count};
use super::color::{Rgb, level};
use super::panels::{Ticks, frame, sheet};
use crate::error::{Error, Result};

const PANEL: (i32, i32) = (380, 280);
const LINE_WIDTH: f64 = 2.0;
/// Diameter of a measured point.
const DOT: f64 = 7.0;

/// Dashes and the gaps between them, in pixels, by which numbers of threads are told apart; after these they repeat.
const DASHES: [Option<(f64, f64)>; 4] = [None, Some((8.0, 6.0)), Some((1.0, 6.0)), Some((16.0, 6.0))];

/// One way to run a model, and what was measured of it. Points are `(prompt length, value)`, in any order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SpeedLine {
    /// Which cache, such as `full, f16`: lines of the same name get the same colour.
    pub name: String,
    /// Lines of other numbers of threads are dashed otherwise.
    pub threads: usize,
    /// Decoded tokens a second.
    pub decode: Vec<(usize, f64)>,
    /// Bytes of kept keys and values, which do not depend on threads.
    pub kv_bytes: Vec<(usize, f64)>,
    /// Prompt tokens a second.
    pub prefill: Vec<(usize, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Style {
    color: Rgb,
    dash: Option<(f64, f64)>,
}

/// One quantity.
struct Panel {
    title: &'static str,
    /// Points by ascending prompt length.
    lines: Vec<(Style, Vec<(usize, f64)>)>,
}

/// Draws panels for decoding speed, KV memory and prefill speed, each if some line has points for it.
///
/// * `title`: what was measured; shortened if it is long
///
/// # Errors
/// [`Error::Shape`] if no line has points; [`Error::Unsupported`] for more than 20 000 lines; [`Error::Io`] if `path`
/// cannot be written.
pub fn speed(path: &Path, title: &str, lines: &[SpeedLine]) -> Result<()> {
    check_count(lines.len(), "lines")?;
    let styles = styles(lines);
    let panel = |title, points: fn(&SpeedLine) -> &[(usize, f64)], scale: f64| {
        let drawn = lines.iter().zip(&styles).filter(|(line, _)| !points(line).is_empty());
        let lines = drawn.map(|(line, &style)| {
            let mut points: Vec<_> = points(line).iter().map(|&(length, value)| (length, value * scale)).collect();
            points.sort_by_key(|&(length, _)| length);
            (style, points)
        });
        Panel { title, lines: lines.collect() }
    };
    let mut panels = vec![
        panel("decoding, tokens/s", |line| &line.decode, 1.0),
        panel("KV cache in MB (1 MB = 1024 × 1024 bytes)", |line| &line.kv_bytes, 1.0 / MB),
        panel("prefill, tokens/s", |line| &line.prefill, 1.0),
    ];
    // Memory is the same on any number of threads: one line of each colour stands for all.
    let mut colors: Vec<Rgb> = Vec::new();
    panels[1].lines.retain_mut(|(style, _)| {
        let is_first = !colors.contains(&style.color);
        colors.push(style.color);
        style.dash = None;
        is_first
    });
    panels.retain(|panel| !panel.lines.is_empty());
    if panels.is_empty() {
        return Err(Error::shape("the measurements to draw", "at least one point", 0));
    }
    draw(title, lines, &styles, &panels)?.save(path)
}

/// A colour for each name, dashes for each number of threads.
fn styles(lines: &[SpeedLine]) -> Vec<Style> {
    let mut names: Vec<&str> = Vec::new();
    let mut threads: Vec<usize> = Vec::new();
    lines
        .iter()
        .map(|line| Style {
            color: level(index_of(&mut names, &line.name.as_str())),
            dash: DASHES[index_of(&mut threads, &line.threads) % DASHES.len()],
        })
        .collect()
}

/// Where a value is in a list that it is added to if missing.
fn index_of<T: Copy + PartialEq>(list: &mut Vec<T>, value: &T) -> usize {
    list.iter().position(|known| known == value).unwrap_or_else(|| {
        list.push(*value);
        list.len() - 1
    })
}

fn draw(title: &str, lines: &[SpeedLine], styles: &[Style], panels: &[Panel]) -> Result<Canvas> {
    let ticks: Vec<Ticks> = panels.iter().map(|panel| panel.axis().0).collect();
    let same_threads = lines.iter().all(|line| line.threads == lines[0].threads);
    let threads = |line: &SpeedLine, is_told: bool| {
        if is_told { format!(", {}", counted(line.threads, "thread")) } else { String::new() }
    };
    let names: Vec<String> = lines.iter().map(|line| line.name.clone() + &threads(line, !same_threads)).collect();
    let title = format!("{title}{}", threads(&lines[0], same_threads));
    let (mut canvas, corners) = sheet(PANEL, &title, &ticks, &names, |canvas, index, [start, end]| {
        styles[index].path(canvas, &[start, end]);
        styles[index].dot(canvas, (f64::midpoint(start.0, end.0), start.1));
    })?;
    // The same axis below all panels.
    let longest = panels.iter().flat_map(Panel::points).map(|&(length, _)| length).max().unwrap_or(1);
    for (panel, corner) in panels.iter().zip(corners) {
        panel.draw(&mut canvas, corner, longest);
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

impl Panel {
    fn points(&self) -> impl Iterator<Item = &(usize, f64)> {
        self.lines.iter().flat_map(|(_, points)| points)
    }

    fn largest(&self) -> f64 {
        self.points().map(|&(_, value)| value).fold(0.0, f64::max)
    }

    /// The marks of the vertical axis, and the value at its end.
    fn axis(&self) -> (Ticks, f64) {
        let (ticks, decimals) = value_ticks(self.largest());
        let full_scale = ticks.last().copied().unwrap_or(1.0);
        (ticks.into_iter().map(|tick| (tick / full_scale, format!("{tick:.decimals$}"))).collect(), full_scale)
    }

    /// * `longest`: prompt that the horizontal axis has room for
    fn draw(&self, canvas: &mut Canvas, (left, top): (i32, i32), longest: usize) {
        let (ticks, highest) = self.axis();
        let full_scale = longest.max(1) as f64 * 1.03; // dots stay clear of the edge
        frame(canvas, (left, top), PANEL, self.title, &ticks, (longest as f64, full_scale), "prompt, tokens");
        let (width, height) = (f64::from(PANEL.0), f64::from(PANEL.1));
        let x_of = |length: f64| f64::from(left) + length / full_scale * width;
        let y_of = |value: f64| f64::from(top + PANEL.1) - value / highest * height;
        for (style, points) in &self.lines {
            let points: Vec<_> = points.iter().map(|&(length, value)| (x_of(length as f64), y_of(value))).collect();
            style.path(canvas, &points);
            for point in points {
                style.dot(canvas, point);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_png;
    use super::*;

    fn line(name: &str, threads: usize, points: &[(usize, f64)]) -> SpeedLine {
        SpeedLine { name: name.to_owned(), threads, decode: points.to_vec(), ..SpeedLine::default() }
    }

    #[test]
    fn every_set_of_measurements_has_a_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("speed.png");
        let points = [(7680, 12.0), (32, 61.5), (2048, f64::NAN)];
        for num_lines in [1, 2, 40] {
            let mut lines: Vec<_> =
                (0..num_lines).map(|index| line(&format!("setting {}", index / 2), index % 2 + 1, &points)).collect();
            speed(&path, "model", &lines).unwrap();
            let (narrow, _) = test_png::size(&path).unwrap();
            lines[0].kv_bytes = vec![(32, 1e6)];
            lines[0].prefill = vec![(512, 900.0), (2048, 0.0)];
            speed(&path, &"a long title ".repeat(50), &lines).unwrap();
            let (wide, height) = test_png::size(&path).unwrap();
            assert!(wide > 2 * narrow && wide < 1500 && height > 400, "{num_lines}: {wide} x {height}");
        }
        assert_eq!(test_png::names(folder.path()), ["speed.png"]);
    }

    #[test]
    fn nothing_to_draw_is_an_error() {
        assert!(matches!(speed(Path::new("a.png"), "", &[]), Err(Error::Shape { .. })));
        assert!(matches!(speed(Path::new("a.png"), "", &[line("full", 1, &[])]), Err(Error::Shape { .. })));
    }

    #[test]
    fn names_have_colours_and_threads_have_dashes() {
        let lines = [line("a", 1, &[]), line("a", 2, &[]), line("b", 1, &[]), line("b", 2, &[])];
        let styles = styles(&lines);
        assert_eq!((styles[0].color, styles[2].color), (styles[1].color, styles[3].color));
        assert_eq!((styles[0].dash, styles[1].dash), (styles[2].dash, styles[3].dash));
        assert!(styles[0].color != styles[2].color && styles[0].dash != styles[1].dash);
    }

    #[test]
    fn dashes_go_on_around_a_corner() {
        let points = [(0.0, 0.0), (5.0, 0.0), (5.0, 9.0)];
        assert_eq!(dashes(&points, None), [(points[0], points[1]), (points[1], points[2])]);
        let expected = [((0.0, 0.0), (4.0, 0.0)), ((5.0, 1.0), (5.0, 5.0)), ((5.0, 7.0), (5.0, 9.0))];
        assert_eq!(dashes(&points, Some((4.0, 2.0))), expected);
    }
}
