//! The table and the files of an evaluation, as its rows come.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use adaptive_kvcache::Result;
use adaptive_kvcache::config::Budget;
use adaptive_kvcache::eval::{FidelityRow, Observer, Row, TaskRow, write_csv, write_json};
use adaptive_kvcache::report::megabytes;
use indicatif::ProgressBar;

use crate::cli::args::EvalArgs;
use crate::cli::bench::TICK;
use crate::cli::interrupt::interrupted;
use crate::cli::plain;

/// A budget in a table: the share, or the size.
pub fn budget_text(budget: Option<Budget>) -> String {
    match budget {
        None => "-".to_owned(),
        Some(Budget::KeptRatio(ratio)) => format!("{}%", (ratio * 1e4).round() / 100.0),
        Some(Budget::Bytes(bytes)) => format!("{:.1}MB", megabytes(bytes)),
    }
}

/// Prints rows as they are complete, and writes them to files.
pub struct Table {
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
    pub fn new(args: &EvalArgs) -> Result<Self> {
        let spinner = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        spinner.enable_steady_tick(TICK);
        let widths = args.configs.iter().map(|name| plain(name).chars().count());
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

    /// The rows so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Another measurement begins, whose rows count from 0.
    pub fn start_kind(&mut self) {
        self.first = self.rows.len();
    }

    /// Prints the rows that lack windows, since the measurements ended early.
    pub fn finish(&mut self) {
        self.spinner.finish_and_clear();
        while self.num_printed < self.rows.len() {
            self.print_row(self.num_printed);
        }
    }

    /// How printing went.
    pub fn into_printed(self) -> std::io::Result<()> {
        self.printed
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
