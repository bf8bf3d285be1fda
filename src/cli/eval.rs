//! `eval`: what a smaller cache costs, as a table while it is measured, as JSON, as CSV and as a picture.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::config::{AdaptiveConfig, Budget};
use adaptive_kvcache::eval::{
    self, FidelityPlan, FidelityRow, Observer, Row, Subject, Task, TaskPlan, TaskRow, Variant, mean, write_csv,
    write_json,
};
use adaptive_kvcache::plot::{TradeoffLine, TradeoffPanel, TradeoffPoint, TradeoffScale, tradeoff};
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::tokenizer::Tokenizer;
use adaptive_kvcache::{Error, Result};
use anyhow::Context;
use indicatif::ProgressBar;

use super::args::{EvalArgs, ModelArgs};
use super::bench::{FULL, TEXT, TICK, distinct};
use super::generate::check_report_path;
use super::interrupt::{interrupted, listen};
use super::session::Session;
use super::{Outcome, STDOUT_FAILED, plain};

/// The configuration that is built in, and its name.
const FASTGEN: &str = "fastgen";
const FASTGEN_JSON: &str = include_str!("../../configs/fastgen.json");

/// A configuration under one of the budgets, or under none.
struct Budgeted {
    name: String,
    budget: Option<Budget>,
    /// Absent for the full cache.
    config: Option<AdaptiveConfig>,
}

pub fn run(args: &EvalArgs) -> anyhow::Result<Outcome> {
    let configs = budgeted(args)?;
    let tasks = distinct(&args.tasks.iter().map(|name| Task::by_name(name)).collect::<Result<Vec<_>>>()?);
    if tasks.is_empty() && args.windows == 0 {
        return Err(Error::input("nothing to measure: no windows and no tasks")
            .with_hint("give at least one of --windows, or --tasks")
            .into());
    }
    for path in args.json.iter().chain(&args.csv).chain(&args.plot) {
        check_report_path(path)?;
    }
    let text = match &args.text {
        Some(path) => &std::fs::read_to_string(path).map_err(|source| Error::io("read text", path, source))?,
        None => TEXT,
    };
    listen()?;
    let session = Session::open(&ModelArgs {
        model: args.model.clone(),
        dtype: args.dtype,
        kv_dtype: args.full_kv_dtype,
        device: "auto".to_owned(),
        threads: args.threads,
        prefill_chunk: args.prefill_chunk,
    })?;
    let kv_dtypes: Vec<KvDtype> = distinct(&args.kv_dtype.iter().map(|&dtype| dtype.into()).collect::<Vec<_>>());
    for dtype in &kv_dtypes {
        dtype.check(session.loaded.model.config().heads.head_dim)?;
    }
    let variants = variants(&session, &configs, &kv_dtypes);
    let subject = Subject {
        model: &session.loaded.model,
        tokenizer: &session.loaded.tokenizer,
        prefill_options: session.prefill_options,
        full_kv_dtype: session.kv_dtype,
    };
    let ids = ids_without_bos(&session.loaded.tokenizer, text)?;
    let fidelity = FidelityPlan {
        prompt_tokens: args.prompt_tokens,
        score_tokens: args.score_tokens,
        windows: args.windows,
        offset_tokens: args.offset_tokens,
        greedy_tokens: args.greedy_tokens,
        layer_error: args.layer_error,
    };
    let tasks = TaskPlan {
        tasks,
        contexts: distinct(&args.contexts),
        depths: distinct(&args.depths),
        trials: args.trials,
        seed: args.seed,
    };
    // Both, before hours are spent on the first.
    if args.windows > 0 {
        fidelity.check(&subject, ids.len())?;
    }
    if !tasks.tasks.is_empty() {
        tasks.check(&subject)?;
    }

    let mut table = Table::new(args, &configs)?;
    let measured = measure(&subject, args, (&fidelity, &ids), (&tasks, text), &variants, &mut table);
    table.spinner.finish_and_clear();
    table.print_unfinished();
    match measured {
        Ok(()) | Err(Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some(path) = &args.plot {
        draw(path, &args.model, &table.rows)?;
    }
    table.printed.context(STDOUT_FAILED)?;
    Ok(if interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

fn measure(
    subject: &Subject<'_>,
    args: &EvalArgs,
    (fidelity, ids): (&FidelityPlan, &[u32]),
    (tasks, prose): (&TaskPlan, &str),
    variants: &[Variant],
    table: &mut Table,
) -> Result<()> {
    if args.windows > 0 {
        eval::fidelity(subject, ids, fidelity, variants, table)?;
    }
    table.first = table.rows.len();
    if tasks.tasks.is_empty() { Ok(()) } else { eval::tasks(subject, prose, tasks, variants, table) }
}

/// Every configuration under every budget; those that take none, once.
fn budgeted(args: &EvalArgs) -> Result<Vec<Budgeted>> {
    let ratios = distinct(&args.kept_ratio).into_iter().map(Budget::KeptRatio);
    let budgets: Vec<Budget> = ratios.chain(distinct(&args.kv_budget).into_iter().map(Budget::Bytes)).collect();
    let mut all = Vec::new();
    for name in &args.configs {
        let config = configuration(name)?;
        let once = all.len();
        for &budget in &budgets {
            // FastGen's search takes none: it keeps what recovers a head, however much that is.
            if let Some(config) = config.as_ref().filter(|config| config.method.is_some()) {
                let config = Some(config.clone().with_budget(budget)?);
                all.push(Budgeted { name: name.clone(), budget: Some(budget), config });
            }
        }
        if all.len() == once {
            all.push(Budgeted { name: name.clone(), budget: None, config });
        }
    }
    if !budgets.is_empty() && all.iter().all(|config| config.budget.is_none()) {
        return Err(Error::input("none of the configurations takes a budget")
            .with_hint("leave --kept-ratio and --kv-budget out, or give a configuration that takes one"));
    }
    Ok(all)
}

/// `None` for the full cache.
fn configuration(name: &str) -> Result<Option<AdaptiveConfig>> {
    match name {
        FULL => Ok(None),
        FASTGEN => AdaptiveConfig::parse(FASTGEN_JSON, None).map(Some),
        path => AdaptiveConfig::from_file(path).map(Some).map_err(|error| match error {
            Error::Io { .. } => {
                error.with_hint(format!("a configuration is `{FULL}`, `{FASTGEN}`, or the path of a JSON file"))
            }
            other => other,
        }),
    }
}

fn variants(session: &Session, configs: &[Budgeted], kv_dtypes: &[KvDtype]) -> Vec<Variant> {
    let pairs = kv_dtypes.iter().flat_map(|&kv_dtype| configs.iter().map(move |config| (config, kv_dtype)));
    pairs
        .map(|(Budgeted { name, budget, config }, kv_dtype)| Variant {
            config: name.clone(),
            budget: *budget,
            kv_dtype,
            retention: config.clone().map_or(Retention::Full, |config| session.adaptive(config)),
        })
        .collect()
}

/// Ids of a text; the library puts BOS before each window.
fn ids_without_bos(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text)?;
    if tokenizer.adds_bos() && ids.first().copied() == tokenizer.bos_id() {
        ids.remove(0);
    }
    Ok(ids)
}

/// A budget in a table: the share, or the size.
fn budget_text(budget: Option<Budget>) -> String {
    match budget {
        None => "-".to_owned(),
        Some(Budget::KeptRatio(ratio)) => format!("{}%", (ratio * 1e4).round() / 100.0),
        Some(Budget::Bytes(bytes)) => format!("{:.1}MB", megabytes(bytes)),
    }
}

/// Prints rows as they are complete, and writes them to files.
struct Table {
    rows: Vec<Row>,
    /// Where in `rows` those of the measurement under way begin.
    first: usize,
    /// How many rows of `rows` were printed.
    num_printed: usize,
    json: Option<PathBuf>,
    csv: Option<PathBuf>,
    /// The width of the column of configurations.
    config_width: usize,
    spinner: ProgressBar,
    /// How printing went: measuring goes on for the files if nobody reads the table.
    printed: std::io::Result<()>,
}

impl Table {
    fn new(args: &EvalArgs, configs: &[Budgeted]) -> Result<Self> {
        let spinner = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        spinner.enable_steady_tick(TICK);
        let widths = configs.iter().map(|config| plain(&config.name).chars().count());
        let table = Self {
            rows: Vec::new(),
            first: 0,
            num_printed: 0,
            json: args.json.clone(),
            csv: args.csv.clone(),
            config_width: widths.max().unwrap_or(0).max("config".len()),
            spinner,
            printed: Ok(()),
        };
        table.write()?;
        Ok(table)
    }

    fn write(&self) -> Result<()> {
        if let Some(path) = &self.json {
            write_json(path, &self.rows)?;
        }
        self.csv.as_ref().map_or(Ok(()), |path| write_csv(path, &self.rows))
    }

    fn print(&mut self, line: &str) {
        let print = || {
            let mut out = std::io::stdout().lock();
            writeln!(out, "{line}")?;
            out.flush()
        };
        if self.printed.is_ok() {
            self.printed = self.spinner.suspend(print);
        }
    }

    /// Prints the rows that lack windows, since the measurements ended early.
    fn print_unfinished(&mut self) {
        while self.num_printed < self.rows.len() {
            self.print_row(self.num_printed);
        }
    }

    /// Prints the next row, below a heading if it is the first of its kind.
    fn print_row(&mut self, index: usize) {
        let row = self.rows[index].clone();
        let is_new_kind = index
            .checked_sub(1)
            .is_none_or(|last| std::mem::discriminant(&self.rows[last]) != std::mem::discriminant(&row));
        if is_new_kind {
            if index > 0 {
                self.print("");
            }
            let heading = match &row {
                Row::Fidelity(_) => fidelity_heading(self.config_width),
                Row::Task(_) => task_heading(self.config_width),
            };
            self.print(&heading);
        }
        let line = match &row {
            Row::Fidelity(row) => fidelity_line(row, self.config_width),
            Row::Task(row) => task_line(row, self.config_width),
        };
        self.print(&line);
        self.num_printed = index + 1;
    }
}

fn fidelity_heading(width: usize) -> String {
    format!(
        "{:<width$}  {:>7}  {:<5}{:>8}{:>9}{:>10}{:>10}{:>10}{:>9}{:>8}{:>8}{:>9}{:>9}",
        "config",
        "budget",
        "kv",
        "kept %",
        "KV MB",
        "KL mean",
        "+/-",
        "median",
        "p99",
        "top-1 %",
        "ppl",
        "ppl full",
        "equal",
    )
}

fn fidelity_line(row: &FidelityRow, width: usize) -> String {
    let optional =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    format!(
        "{:<width$}  {:>7}  {:<5}{:>8.1}{:>9.2}{:>10.5}{:>10}{:>10.5}{:>9.4}{:>8.1}{:>8.3}{:>9.3}{:>9}",
        plain(&row.config),
        budget_text(row.budget),
        row.kv_dtype,
        100.0 * row.kept_ratio,
        megabytes(row.kv_bytes),
        row.kl_mean,
        optional(row.kl_std_error, 5),
        row.kl_median,
        row.kl_p99,
        100.0 * row.top1_agreement,
        row.perplexity,
        row.perplexity_full,
        row.equal_tokens.map_or("-".to_owned(), |equal| format!("{equal:.1}/{}", row.greedy_tokens)),
    )
}

fn task_heading(width: usize) -> String {
    format!(
        "{:<15}{:>8}{:>7}  {:<width$}  {:>7}  {:<5}{:>8}{:>9}{:>8}{:>8}{:>8}",
        "task", "context", "depth", "config", "budget", "kv", "kept %", "KV MB", "right %", "full %", "trials",
    )
}

fn task_line(row: &TaskRow, width: usize) -> String {
    format!(
        "{:<15}{:>8}{:>7}  {:<width$}  {:>7}  {:<5}{:>8.1}{:>9.2}{:>8.0}{:>8.0}{:>8}",
        row.task,
        row.context,
        row.depth,
        plain(&row.config),
        budget_text(row.budget),
        row.kv_dtype,
        100.0 * row.kept_ratio,
        megabytes(row.kv_bytes),
        100.0 * row.accuracy,
        100.0 * row.accuracy_full,
        row.trials,
    )
}

impl Observer for Table {
    fn starts(&mut self, what: &str) {
        self.spinner.set_message(plain(what));
    }

    fn row(&mut self, index: usize, row: Row, is_complete: bool) -> Result<()> {
        let index = self.first + index;
        match self.rows.get_mut(index) {
            Some(known) => *known = row,
            None => self.rows.push(row),
        }
        if is_complete {
            self.print_row(index);
        }
        self.write()
    }

    fn is_over(&self) -> bool {
        interrupted() || (self.json.is_none() && self.csv.is_none() && self.printed.is_err())
    }
}

/// Draws the rows, if there are any.
fn draw(path: &Path, model: &Path, rows: &[Row]) -> Result<()> {
    let mut panels: Vec<TradeoffPanel> = Vec::new();
    for row in rows {
        let Row::Fidelity(row) = row else { continue };
        let title = "mean KL divergence from the full cache, nats";
        let (kv_bytes, error) = (as_number(row.kv_bytes), row.kl_std_error.unwrap_or(0.0));
        let point = TradeoffPoint { kv_bytes, value: row.kl_mean, error };
        line(&mut panels, title, TradeoffScale::Log, &row.config, row.kv_dtype).points.push(point);
    }
    for (row, point) in over_depths(rows) {
        let title = format!("{}, share of right answers", row.task);
        line(&mut panels, &title, TradeoffScale::Share, &row.config, row.kv_dtype).points.push(point);
    }
    if panels.is_empty() {
        return Ok(());
    }
    let model = model.file_name().unwrap_or(model.as_os_str());
    tradeoff(path, &plain(&model.to_string_lossy()), &panels)
}

/// One point for each task, text length and variant: the mean over depths; with one of its rows.
fn over_depths(rows: &[Row]) -> Vec<(&TaskRow, TradeoffPoint)> {
    let mut groups: Vec<Vec<&TaskRow>> = Vec::new();
    for row in rows {
        let Row::Task(row) = row else { continue };
        let case = |row: &TaskRow| (row.task, row.config.clone(), row.context, row.kv_dtype, budget_text(row.budget));
        match groups.iter_mut().find(|group| case(group[0]) == case(row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    let average =
        |group: &[&TaskRow], value: fn(&TaskRow) -> f64| mean(&group.iter().map(|row| value(row)).collect::<Vec<_>>());
    let mut points = Vec::with_capacity(groups.len());
    for group in groups {
        let kv_bytes = average(&group, |row| as_number(row.kv_bytes));
        let value = average(&group, |row| row.accuracy);
        points.push((group[0], TradeoffPoint { kv_bytes, value, error: 0.0 }));
    }
    points
}

#[expect(clippy::cast_precision_loss)]
fn as_number(bytes: usize) -> f64 {
    bytes as f64
}

/// The line of a configuration in the panel of a measure; made if missing.
fn line<'a>(
    panels: &'a mut Vec<TradeoffPanel>,
    title: &str,
    scale: TradeoffScale,
    config: &str,
    kv_dtype: &str,
) -> &'a mut TradeoffLine {
    let name = plain(&format!("{config}, {kv_dtype}"));
    let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
        panels.push(TradeoffPanel { title: title.to_owned(), scale, lines: Vec::new() });
        panels.len() - 1
    });
    let lines = &mut panels[index].lines;
    let index = lines.iter().position(|line| line.name == name).unwrap_or_else(|| {
        lines.push(TradeoffLine { name, points: Vec::new() });
        lines.len() - 1
    });
    &mut lines[index]
}
