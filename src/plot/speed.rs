//! Speed and KV memory against the prompt's length, one panel for each quantity, one line for each way to run.

use std::path::Path;

use super::axis::{Axis, MB, counted};
use super::canvas::check_count;
use super::color::{Rgb, level};
use super::panels::{Panel, Point, Style, draw};
use crate::error::{Error, Result};

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
    let longest = lines.iter().flat_map(|line| [&line.decode, &line.kv_bytes, &line.prefill]).flatten();
    // The same axis below all panels.
    let longest = longest.map(|&(length, _)| length).max().unwrap_or(1) as f64;
    let panel = |title, points: fn(&SpeedLine) -> &[(usize, f64)], scale: f64| {
        let drawn = lines.iter().zip(&styles).filter(|(line, _)| !points(line).is_empty());
        let lines: Vec<_> = drawn
            .map(|(line, &style)| {
                let point = |&(length, value): &(usize, f64)| Point { x: length as f64, y: value * scale, error: 0.0 };
                let mut points: Vec<_> = points(line).iter().map(point).collect();
                points.sort_by(|a, b| a.x.total_cmp(&b.x));
                (style, points)
            })
            .collect();
        let largest = lines.iter().flat_map(|(_, points)| points).map(|point| point.y).fold(0.0, f64::max);
        let vertical = Axis::linear(largest);
        Panel { title, vertical, horizontal: "prompt, tokens", largest_x: longest, lines, limit: None, marked: None }
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
    let same_threads = lines.iter().all(|line| line.threads == lines[0].threads);
    let threads = |line: &SpeedLine| format!(", {}", counted(line.threads, "thread"));
    // In the title what is the same for all lines, else in the legend.
    let of_title = if same_threads { threads(&lines[0]) } else { String::new() };
    let entry = |line: &SpeedLine| line.name.clone() + &if same_threads { String::new() } else { threads(line) };
    let legend: Vec<_> = lines.iter().map(entry).zip(styles).collect();
    let title = format!("{title}{of_title}");
    draw(&title, &legend, &panels)?.save(path)
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
}
