//! `tune`: the configuration that a limit allows, as a file; what was tried as a table, as JSON, as CSV and as a picture.

mod profile;

use std::path::{Path, PathBuf};

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::{AdaptiveConfig, Budget, DecodeMode, FASTGEN};
use adaptive_kvcache::eval::{FidelityRow, FidelityText, FullScores, GivenBudget, Progress, Row, Variant};
use adaptive_kvcache::plot::{TradeoffLimit, TradeoffPanel, TradeoffPoint};
use adaptive_kvcache::report::size;
use adaptive_kvcache::tune::{self, Bench, Candidate, Curve, Goal, Judge, Limit, Point};
use adaptive_kvcache::{Error, Result};
use anyhow::Context;

use super::args::{FileArgs, TuneArgs};
use super::configurations::configuration;
use super::eval::{draw, fidelity_heading, fidelity_line, panels};
use super::interrupt::{interrupted, listen, while_writing};
use super::measure::{Lines, Names, distinct, write_rows};
use super::session::Session;
use super::{Outcome, STDOUT_FAILED, plain};

/// The file that is written if the user names none.
const OUTPUT: &str = "tuned.json";

/// The candidate with a budget if the user names none.
const REPLAY: &str = "replay";

/// A configuration that keeps everything, as a file holds it.
const KEEP_ALL: &str = r#"{"policies": ["full"]}"#;

pub fn run(args: &TuneArgs) -> anyhow::Result<Outcome> {
    if let Some(path) = &args.goal.profile {
        return profile::run(args, path);
    }
    let limit = args.goal.limit().context("no limit")?;
    let goal = Goal { limit, judge: if args.worst { Judge::Worst } else { Judge::Mean } };
    let dtypes = match limit {
        _ if !args.kv_dtype.is_empty() => distinct(&args.kv_dtype),
        // Fewer bits a number would only add to what is lost.
        Limit::MaxKept(_) => vec![KvDtype::F16],
        Limit::MaxKl(_) | Limit::MaxBytes(_) => vec![KvDtype::F16, KvDtype::Q8_0],
    };
    let configs =
        if args.configs.is_empty() { [REPLAY, FASTGEN].map(str::to_owned).to_vec() } else { args.configs.clone() };
    let candidates = candidates(&configs, &dtypes)?;
    let output = output(args.output.as_deref())?;
    args.files.add_to(args.measure.places(&configs).writes("--output", Some(&output))).check()?;
    let texts = args.measure.texts()?;
    listen()?;
    let session = args.measure.open(&dtypes)?;
    let subject = session.subject();
    let plan = args.measure.plan();
    let texts = texts.iter().map(|text| text.measured(&session.loaded.tokenizer, &plan));
    let texts = texts.collect::<Result<Vec<FidelityText>>>()?;
    FidelityText::check_all(&texts, &plan, &subject)?;

    let names = Names::new(&configs);
    let evicts = candidates.iter().any(|candidate| candidate.config.decode == DecodeMode::Evict);
    let mut progress = Shown { lines: Lines::new(), files: &args.files };
    write_files(&args.files, &Curve::new(goal, &[], None), false)?;
    let mut points = Vec::new();
    let searched = FullScores::measure(&subject, &texts, &plan, &mut progress).and_then(|full| {
        let (points, progress) = (&mut points, &mut progress);
        let mut bench = Measured { session: &session, full, goal, points, progress, names: &names, evicts };
        tune::search(&candidates, goal, &mut bench)
    });
    progress.lines.finish();
    match searched {
        Ok(()) | Err(Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    // What is best so far may be far from the best.
    let best = if interrupted() { None } else { tune::best(&points, goal) };
    if let Some(path) = &args.files.plot {
        while_writing(path, || draw(path, &args.measure.model.model, &pictured(&points, goal, best, &names)))?;
    }
    if interrupted() {
        write_files(&args.files, &Curve::new(goal, &points, None), true)?;
        return Ok(Outcome::Interrupted);
    }
    let index = best.ok_or_else(|| nothing(&points, goal, &names))?;
    while_writing(&output, || tune::write_config(&output, &points[index].config))?;
    write_files(&args.files, &Curve::new(goal, &points, Some((index, &output))), true)?;
    progress.lines.print(&chosen(&points[index], goal, &output, &names));
    progress.lines.into_printed().context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

/// Every configuration in every KV dtype.
fn candidates(names: &[String], kv_dtypes: &[KvDtype]) -> Result<Vec<Candidate>> {
    let mut candidates = Vec::with_capacity(names.len() * kv_dtypes.len());
    for name in names {
        let config = configuration(name)?.map_or_else(|| AdaptiveConfig::parse(KEEP_ALL, None), Ok)?;
        candidates.extend(kv_dtypes.iter().map(|&kv_dtype| Candidate {
            name: name.clone(),
            config: config.clone(),
            kv_dtype,
        }));
    }
    Ok(candidates)
}

/// Where the configuration goes. A file that the user names is replaced, as with other options; one that the user did not
/// think of is not.
fn output(named: Option<&Path>) -> Result<PathBuf> {
    let path = named.unwrap_or(Path::new(OUTPUT));
    if named.is_none() && path.symlink_metadata().is_ok() {
        let reason = format!("there is a file `{OUTPUT}` already");
        return Err(Error::input(reason).with_hint("name a file, or this one to replace it, with --output"));
    }
    Ok(path.to_owned())
}

fn write_files(files: &FileArgs, curve: &Curve<'_>, is_complete: bool) -> Result<()> {
    write_rows(files.json.as_ref(), is_complete, |path| curve.write_json(path))?;
    write_rows(files.csv.as_ref(), is_complete, |path| curve.write_csv(path))
}

/// The curve, the limit where it is a size or a divergence, and what was chosen.
#[expect(clippy::cast_precision_loss)]
fn pictured(points: &[Point], goal: Goal, best: Option<usize>, names: &Names) -> Vec<TradeoffPanel> {
    let rows: Vec<Row> = points.iter().map(|point| Row::Fidelity(point.row.clone())).collect();
    let mut panels = panels(&rows, names);
    for panel in &mut panels {
        panel.limit = match goal.limit {
            Limit::MaxKl(kl) => Some(TradeoffLimit::Value(kl)),
            Limit::MaxBytes(bytes) => Some(TradeoffLimit::KvBytes(bytes as f64)),
            // Shares of different numbers are different sizes.
            Limit::MaxKept(_) => None,
        };
        let row = best.map(|index| &points[index].row);
        panel.marked = row.map(|row| TradeoffPoint { kv_bytes: row.kv_bytes as f64, value: row.kl_mean, error: 0.0 });
    }
    panels
}

/// The setting of a point, in a table: a share, or the recovery threshold T.
fn setting(point: &Point) -> String {
    match (point.row.budget.map(|given| given.budget), point.recovery_threshold()) {
        (Some(Budget::KeptRatio(ratio)), _) => format!("{}%", (ratio * 1e4).round() / 100.0),
        (_, Some(threshold)) => format!("T={threshold}"),
        _ => "-".to_owned(),
    }
}

/// Figures of a point as it is judged, for people.
fn described(point: &Point, goal: Goal, names: &Names) -> String {
    let setting = match (point.row.budget.map(|given| given.budget), point.recovery_threshold()) {
        (Some(Budget::KeptRatio(ratio)), _) => format!(", kept_ratio {ratio}"),
        (_, Some(threshold)) => format!(", recovery_threshold {threshold}"),
        _ => String::new(),
    };
    let figures = goal.figures(&point.row);
    let of = if goal.judge == Judge::Worst { " in the worst window" } else { "" };
    format!(
        "{}{setting}, {}: {:.1} % kept, {}, KL {:.5}{of}",
        names.of(&point.row.config),
        point.row.kv_dtype,
        100.0 * figures.kept_ratio,
        size(figures.kv_bytes),
        figures.kl,
    )
}

/// What is said at the end.
fn chosen(point: &Point, goal: Goal, output: &Path, names: &Names) -> String {
    let file = plain(&output.display().to_string());
    let kv_dtype = point.row.kv_dtype;
    format!("\nchosen: {} -> {file}\nuse it with: --config {file} --kv-dtype {kv_dtype}", described(point, goal, names))
}

/// No point is within the limit.
fn nothing(points: &[Point], goal: Goal, names: &Names) -> Error {
    let (limit, option) = match goal.limit {
        Limit::MaxKl(kl) => (format!("a KL divergence of {kl}"), "--max-kl"),
        Limit::MaxBytes(bytes) => (size(bytes), "--max-bytes"),
        Limit::MaxKept(ratio) => (format!("a kept share of {ratio}"), "--max-kept"),
    };
    let closest = tune::closest(points, goal).map(|index| described(&points[index], goal, names));
    let closest = closest.map_or_else(String::new, |closest| format!("; the closest is {closest}"));
    Error::input(format!("nothing that was tried is within {limit}{closest}"))
        .with_hint(format!("raise {option}, or try other --configs or --kv-dtype"))
}

/// Shows what is being measured.
struct Shown<'a> {
    lines: Lines,
    files: &'a FileArgs,
}

impl Progress for Shown<'_> {
    fn starts(&mut self, what: &str) {
        self.lines.set_message(what);
    }

    fn is_over(&self) -> bool {
        // Whether or not anybody reads the table, there is a file to be written.
        interrupted()
    }
}

/// Measures on the windows, and prints and writes each point.
struct Measured<'a, 'm> {
    session: &'m Session,
    full: FullScores<'m>,
    goal: Goal,
    points: &'a mut Vec<Point>,
    progress: &'a mut Shown<'m>,
    names: &'a Names,
    /// Whether a candidate goes on evicting while tokens are read.
    evicts: bool,
}

impl Bench for Measured<'_, '_> {
    fn measure(&mut self, candidate: &Candidate, config: &AdaptiveConfig) -> Result<FidelityRow> {
        let variant = Variant {
            config: candidate.name.clone(),
            budget: config.budget().map(GivenBudget::from),
            kv_dtype: candidate.kv_dtype,
            retention: self.session.loaded.retention(config),
        };
        self.full.score(&variant, self.progress)
    }

    fn point(&mut self, point: Point) -> Result<()> {
        if self.points.is_empty() {
            self.progress.lines.print(&format!(
                "{}{:>8}",
                fidelity_heading("setting", self.names, self.evicts),
                "within"
            ));
        }
        let within = if point.within_limit { "yes" } else { "no" };
        let line = format!("{}{within:>8}", fidelity_line(&point.row, &setting(&point), self.names, self.evicts));
        self.progress.lines.print(&line);
        self.points.push(point);
        write_files(self.progress.files, &Curve::new(self.goal, self.points, None), false)
    }
}
