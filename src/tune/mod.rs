//! Finding the configuration that a limit allows: of several configurations and KV dtypes, each of which has one setting
//! that says how much is kept, the smallest cache within a divergence, or the most exact one within a size.
//!
//! A setting is found by bisection, on the assumption that more is kept, and diverges less, the higher it is. Sizes do so;
//! divergences nearly do. So what is chosen is always the best of what was measured, and never something in between.
//!
//! Not for: measuring ([`crate::eval`] does), and not for showing.

mod goal;
mod knob;
mod search;

use std::path::Path;

pub use goal::{Figures, Goal, Judge, Limit};
pub use knob::Knob;

use serde::Serialize;

use crate::cache::KvDtype;
use crate::compress::{AdaptiveConfig, HeadProfile};
use crate::error::Result;
use crate::eval::{FidelityRow, write_csv};
use search::bisect;

/// A configuration whose setting is searched.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// As the user named it.
    pub name: String,
    /// Whatever it says of its [`Knob`] is replaced.
    pub config: AdaptiveConfig,
    pub kv_dtype: KvDtype,
}

/// One configuration that was measured.
#[derive(Debug, Clone)]
pub struct Point {
    /// With the setting that was tried.
    pub config: AdaptiveConfig,
    /// Whether the limit holds.
    pub within_limit: bool,
    pub row: FidelityRow,
}

impl Point {
    /// The recovery threshold, if that was searched.
    #[must_use]
    pub fn recovery_threshold(&self) -> Option<f64> {
        self.config.fastgen().filter(|_| Knob::of(&self.config).is_some()).map(|search| search.recovery_threshold)
    }
}

/// Measures, and is told what came of it.
pub trait Bench {
    /// Measures a configuration on all windows.
    ///
    /// * `config`: the candidate's, with the setting to be tried
    ///
    /// # Errors
    /// Whatever it fails with ends the search.
    fn measure(&mut self, candidate: &Candidate, config: &AdaptiveConfig) -> Result<FidelityRow>;

    /// Called with each point, right after it was measured.
    ///
    /// # Errors
    /// Whatever it fails with ends the search.
    fn point(&mut self, point: Point) -> Result<()>;
}

/// Searches every candidate's setting, one after the other; of those that come to nothing beside what was found before
/// them, no further than it takes to know.
///
/// # Errors
/// Whatever `bench` fails with.
pub fn search(candidates: &[Candidate], goal: Goal, bench: &mut dyn Bench) -> Result<()> {
    let mut best: Option<Figures> = None;
    for candidate in candidates {
        let knob = Knob::of(&candidate.config);
        let last = knob.map_or(0, Knob::last_step);
        bisect(last, goal.limit.wanted(), &mut |step| {
            let config = knob.map_or_else(|| candidate.config.clone(), |knob| knob.turned(&candidate.config, step));
            let row = bench.measure(candidate, &config)?;
            let figures = goal.figures(&row);
            let within_limit = goal.allows(&figures);
            bench.point(Point { config, within_limit, row })?;
            if within_limit {
                best = best.filter(|&best| !goal.prefers(figures, best)).or(Some(figures));
                return Ok(Some(true));
            }
            // What lies within the limit is expected to be worse than this in what it is chosen by.
            Ok(best.is_none_or(|best| goal.prefers(figures, best)).then_some(false))
        })?;
    }
    Ok(())
}

/// Index of the best point within the limit; `None` if there is none.
#[must_use]
pub fn best(points: &[Point], goal: Goal) -> Option<usize> {
    goal.best(&figures(points, goal))
}

/// Index of the point that is nearest to the limit, within it or not; `None` for no points.
#[must_use]
pub fn closest(points: &[Point], goal: Goal) -> Option<usize> {
    goal.closest(&figures(points, goal))
}

fn figures(points: &[Point], goal: Goal) -> Vec<Figures> {
    points.iter().map(|point| goal.figures(&point.row)).collect()
}

/// What was chosen.
#[derive(Debug, Serialize)]
struct Chosen<'a> {
    /// The candidate's name.
    config: &'a str,
    /// The KV cache's numbers, which a configuration does not hold.
    kv_dtype: &'static str,
    /// The configuration file that was written.
    file: &'a Path,
    /// What stands in it.
    settings: &'a AdaptiveConfig,
}

/// A point in a file: what `eval` writes of it, and what the search knows.
#[derive(Debug, Serialize)]
struct PointRow<'a> {
    #[serde(flatten)]
    row: &'a FidelityRow,
    recovery_threshold: Option<f64>,
    within_limit: bool,
    chosen: bool,
}

/// The search so far, for files.
#[derive(Debug, Serialize)]
pub struct Curve<'a> {
    #[serde(flatten)]
    goal: Goal,
    chosen: Option<Chosen<'a>>,
    points: Vec<PointRow<'a>>,
}

impl<'a> Curve<'a> {
    /// * `chosen`: the index of the point whose configuration was written, and the file
    #[must_use]
    pub fn new(goal: Goal, points: &'a [Point], chosen: Option<(usize, &'a Path)>) -> Self {
        let rows = points.iter().enumerate().map(|(index, point)| PointRow {
            row: &point.row,
            recovery_threshold: point.recovery_threshold(),
            within_limit: point.within_limit,
            chosen: chosen.is_some_and(|(chosen, _)| chosen == index),
        });
        let chosen = chosen.and_then(|(index, file)| points.get(index).map(|point| (point, file)));
        let chosen = chosen.map(|(point, file)| Chosen {
            config: &point.row.config,
            kv_dtype: point.row.kv_dtype,
            file,
            settings: &point.config,
        });
        Self { goal, chosen, points: rows.collect() }
    }

    /// Writes the limit, what was chosen and all points as a JSON object, in the place of what the file held.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the file cannot be written; it is then as it was.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        write(path, self)
    }

    /// Writes the points as comma-separated values, as [`write_csv`] does.
    ///
    /// # Errors
    /// As [`Curve::write_json`].
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        write_csv(path, &self.points)
    }
}

/// Writes a configuration as a file that reads back as itself, in the place of what the file held.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if the file cannot be written; it is then as it was.
pub fn write_config(path: &Path, config: &AdaptiveConfig) -> Result<()> {
    write(path, config)
}

/// Writes a profile of a model's heads, in the place of what the file held.
///
/// # Errors
/// As [`write_config`].
pub fn write_profile(path: &Path, profile: &HeadProfile) -> Result<()> {
    write(path, profile)
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    crate::report::write_json(value, path)
}

#[cfg(test)]
mod tests;
