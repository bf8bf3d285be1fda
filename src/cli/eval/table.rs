//! The table and the files of an evaluation, as its rows come.

use adaptive_kvcache::Result;
use adaptive_kvcache::config::Budget;
use adaptive_kvcache::eval::{FidelityRow, Observer, Progress, Row, TaskRow, write_csv, write_json};
use adaptive_kvcache::report::megabytes;

use super::answers;
use crate::cli::args::{EvalArgs, FileArgs};
use crate::cli::interrupt::interrupted;
use crate::cli::measure::{Lines, config_width, write_rows};
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
pub struct Table<'a> {
    rows: Vec<Row>,
    /// Where in `rows` those of the measurement under way begin.
    first: usize,
    /// How many rows of `rows` were printed.
    num_printed: usize,
    files: &'a FileArgs,
    /// The width of the column of configurations.
    config_width: usize,
    lines: Lines,
}

impl<'a> Table<'a> {
    pub fn new(args: &'a EvalArgs) -> Result<Self> {
        let table = Self {
            rows: Vec::new(),
            first: 0,
            num_printed: 0,
            files: &args.files,
            config_width: config_width(&args.configs),
            lines: Lines::new(),
        };
        table.write(false)?;
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

    /// Prints the rows that lack windows, since the measurements ended early, and what all answers come to.
    pub fn finish(&mut self) {
        self.lines.finish();
        while self.num_printed < self.rows.len() {
            self.print_row(self.num_printed);
        }
        if let Some(summary) = answers::summary(&self.rows, self.config_width) {
            self.lines.print(&summary);
        }
    }

    /// How printing went.
    pub fn into_printed(self) -> std::io::Result<()> {
        self.lines.into_printed()
    }

    /// Writes the files, as [`write_rows`] does.
    pub fn write(&self, is_complete: bool) -> Result<()> {
        write_rows(self.files.json.as_ref(), is_complete, |path| write_json(path, &self.rows))?;
        write_rows(self.files.csv.as_ref(), is_complete, |path| write_csv(path, &self.rows))
    }

    /// Prints the next row, below a heading if it is the first of its kind, or of its prompt.
    fn print_row(&mut self, index: usize) {
        let row = &self.rows[index];
        let last = index.checked_sub(1).map(|last| &self.rows[last]);
        let is_new = last.is_none_or(|last| match (last, row) {
            (Row::Answer(last), Row::Answer(row)) => last.prompt_idx != row.prompt_idx,
            _ => std::mem::discriminant(last) != std::mem::discriminant(row),
        });
        let width = self.config_width;
        let mut text = String::new();
        if is_new {
            let heading = match row {
                Row::Fidelity(_) => fidelity_heading("budget", width),
                Row::Task(_) => task_heading(width),
                Row::Answer(row) => answers::heading(row),
            };
            let blank = if index > 0 { "\n" } else { "" };
            text = format!("{blank}{heading}\n");
        }
        text += &match row {
            Row::Fidelity(row) => fidelity_line(row, &budget_text(row.budget), width),
            Row::Task(row) => task_line(row, width),
            Row::Answer(row) => answers::block(row),
        };
        self.lines.print(&text);
        self.num_printed = index + 1;
    }
}

/// The heading of [`fidelity_line`].
///
/// * `setting`: of the column beside the configuration
/// * `width`: of the column of configurations
pub fn fidelity_heading(setting: &str, width: usize) -> String {
    format!(
        "{:<width$}  {:>7}  {:<5}{:>8}{:>9}{:>10}{:>10}{:>10}{:>9}{:>8}{:>8}{:>9}{:>9}",
        "config",
        setting,
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

/// A row of the table.
pub fn fidelity_line(row: &FidelityRow, setting: &str, width: usize) -> String {
    let optional =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    format!(
        "{:<width$}  {:>7}  {:<5}{:>8.1}{:>9.2}{:>10.5}{:>10}{:>10.5}{:>9.4}{:>8.1}{:>8.3}{:>9.3}{:>9}",
        plain(&row.config),
        setting,
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

impl Progress for Table<'_> {
    fn starts(&mut self, what: &str) {
        self.lines.set_message(what);
    }

    fn is_over(&self) -> bool {
        interrupted() || (!self.files.has_rows() && self.lines.failed())
    }
}

impl Observer for Table<'_> {
    fn row(&mut self, index: usize, row: Row, is_complete: bool) -> Result<()> {
        let index = self.first + index;
        match self.rows.get_mut(index) {
            Some(known) => *known = row,
            None => self.rows.push(row),
        }
        if is_complete {
            self.print_row(index);
        }
        self.write(false)
    }
}
