//! The table and the files of an evaluation, as its rows come.

use adaptive_kvcache::Result;
use adaptive_kvcache::eval::{
    FidelityRow, MEAN_NAME, Observer, Progress, Row, RulerRow, TaskRow, write_csv, write_json,
};

use super::answers;
use super::cells::{BUDGET_WIDTH, budget_text, evicted_cell, text_cell};
use super::tasks::{maps, table as map_table};
use super::writing;
use crate::cli::args::{EvalArgs, FileArgs};
use crate::cli::interrupt::interrupted;
use crate::cli::measure::{KV_WIDTH, Lines, Names, mb_cell, write_rows};

/// Prints rows as they are complete, and writes them to files.
pub struct Table<'a> {
    rows: Vec<Row>,
    /// Where in `rows` those of the measurement under way begin.
    first: usize,
    /// How many rows of `rows` were printed.
    num_printed: usize,
    files: &'a FileArgs,
    names: &'a Names,
    /// Of texts, if there are several.
    texts: Option<Names>,
    /// Whether a configuration goes on evicting while tokens are read.
    evicts: bool,
    lines: Lines,
}

impl<'a> Table<'a> {
    /// * `evicts`: whether a configuration goes on evicting while tokens are read
    pub fn new(args: &'a EvalArgs, names: &'a Names, evicts: bool) -> Result<Self> {
        let texts: Vec<String> = args.measure.text.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        let texts = (texts.len() > 1).then(|| Names::new(&texts));
        let (rows, lines) = (Vec::new(), Lines::new());
        let table = Self { rows, first: 0, num_printed: 0, files: &args.files, names, texts, evicts, lines };
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

    /// Prints the rows that lack windows or samples, since the measurements ended early, and what all tasks and answers
    /// come to.
    pub fn finish(&mut self) {
        self.lines.finish();
        while self.num_printed < self.rows.len() {
            self.print_row(self.num_printed);
        }
        if let Some(table) = writing::table(&self.rows, self.names, self.texts.as_ref()) {
            self.lines.print(&table);
        }
        for map in maps(&self.rows, self.names) {
            self.lines.print(&map_table(&map));
        }
        if let Some(summary) = answers::summary(&self.rows, self.names, self.evicts) {
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
        let (names, evicts) = (self.names, self.evicts);
        let texts = self.texts.as_ref();
        let mut text = String::new();
        if is_new {
            let heading = match row {
                Row::Fidelity(_) => text_cell(texts, "text") + &fidelity_heading("budget", names, evicts),
                Row::Task(_) => task_heading(names),
                Row::Ruler(_) => ruler_heading(names),
                Row::Answer(row) => answers::heading(row),
            };
            let blank = if index > 0 { "\n" } else { "" };
            text = format!("{blank}{heading}\n");
        }
        text += &match row {
            Row::Fidelity(row) => {
                let given = row.text.as_deref().unwrap_or_default();
                text_cell(texts, given) + &fidelity_line(row, &budget_text(row.budget), names, evicts)
            }
            Row::Task(row) => task_line(row, names),
            Row::Ruler(row) => ruler_line(row, names),
            Row::Answer(row) => answers::block(row, names),
        };
        self.lines.print(&text);
        self.num_printed = index + 1;
    }
}

/// The heading of [`fidelity_line`].
///
/// * `setting`: of the column beside the configuration
/// * `evicts`: whether there are columns of what is left when the scored tokens were read
pub fn fidelity_heading(setting: &str, names: &Names, evicts: bool) -> String {
    let width = names.width("config");
    format!(
        "{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8}{:>9}{:>10}{:>10}{:>10}{:>10}{:>9}{:>8}{:>8}{:>9}{:>9}{}",
        "config",
        setting,
        "kv",
        "kept %",
        "KV MB",
        "KL mean",
        "+/-",
        "worst",
        "median",
        "p99",
        "top-1 %",
        "ppl",
        "ppl full",
        "equal",
        if evicts { format!("{:>9}{:>9}", "end %", "evicted") } else { String::new() },
    )
}

/// A row of the table.
pub fn fidelity_line(row: &FidelityRow, setting: &str, names: &Names, evicts: bool) -> String {
    let width = names.width("config");
    let optional =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    let end = || format!("{:>9.1}{}", 100.0 * row.end_kept_ratio, evicted_cell(row.evicted_rows));
    format!(
        "{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8.1}{:>9}{:>10.5}{:>10}{:>10.5}{:>10.5}{:>9.4}{:>8.1}{:>8.3}{:>9.3}{:>9}{}",
        names.of(&row.config),
        setting,
        row.kv_dtype,
        100.0 * row.kept_ratio,
        mb_cell(row.kv_bytes),
        row.kl_mean,
        optional(row.kl_std_error, 5),
        row.kl_worst,
        row.kl_median,
        row.kl_p99,
        100.0 * row.top1_agreement,
        row.perplexity,
        row.perplexity_full,
        row.equal_tokens.map_or("-".to_owned(), |equal| format!("{equal:.1}/{}", row.greedy_tokens)),
        if evicts { end() } else { String::new() },
    )
}

fn task_heading(names: &Names) -> String {
    let width = names.width("config");
    format!(
        "{:<15}{:>8}{:>7}  {:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8}{:>9}{:>8}{:>8}{:>8}",
        "task", "context", "depth", "config", "budget", "kv", "kept %", "KV MB", "right %", "full %", "trials",
    )
}

fn task_line(row: &TaskRow, names: &Names) -> String {
    let width = names.width("config");
    format!(
        "{:<15}{:>8}{:>7}  {:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8.1}{:>9}{:>8.0}{:>8.0}{:>8}",
        row.task,
        row.context,
        row.depth,
        names.of(&row.config),
        budget_text(row.budget),
        row.kv_dtype,
        100.0 * row.kept_ratio,
        mb_cell(row.kv_bytes),
        100.0 * row.accuracy,
        100.0 * row.accuracy_full,
        row.trials,
    )
}

fn ruler_heading(names: &Names) -> String {
    let width = names.width("config");
    format!(
        "{:<15}{:>8}  {:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8}{:>9}{:>8}{:>8}{:>8}{:>8}{:>9}",
        "RULER", "tokens", "config", "budget", "kv", "kept %", "KV MB", "score", "full", "diff", "+/-", "samples",
    )
}

/// Scores in per cent.
fn ruler_line(row: &RulerRow, names: &Names) -> String {
    let width = names.width("config");
    let note = match () {
        () if row.full_fails => "  the full cache fails",
        () if row.task == MEAN_NAME => "  of those that the full cache passes",
        () => "",
    };
    format!(
        "{:<15}{:>8}  {:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8.1}{:>9}{:>8.1}{:>8.1}{:>8.1}{:>8}{:>9}{note}",
        row.task,
        row.context,
        names.of(&row.config),
        budget_text(row.budget),
        row.kv_dtype,
        100.0 * row.kept_ratio,
        mb_cell(row.kv_bytes),
        100.0 * row.score,
        100.0 * row.score_full,
        100.0 * row.difference,
        row.difference_95.map_or("-".to_owned(), |half| format!("{:.1}", 100.0 * half)),
        row.samples,
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
