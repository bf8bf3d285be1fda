//! `bench`: speed and memory of a model, as a table while it is measured, as JSON and as a picture.

use std::path::{Path, PathBuf};

use adaptive_kvcache::bench::{self, Observer, Plan, Row, Setting, Subject, Work, write_rows};
use adaptive_kvcache::cache::Retention;
use adaptive_kvcache::clock::SystemClock;
use adaptive_kvcache::compress::{AdaptiveConfig, Budget};
use adaptive_kvcache::plot::{SpeedLine, speed};
use adaptive_kvcache::reading::{self, MAX_TEXT};
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::tokenizer::Tokenizer;
use adaptive_kvcache::{Error, Result};
use anyhow::Context;

use super::args::BenchArgs;
use super::configurations::configuration;
use super::interrupt::{interrupted, listen, while_waiting, while_writing};
use super::measure::{self, KV_WIDTH, Lines, Names, TEXT, distinct, mb_cell};
use super::places::Places;
use super::session::Session;
use super::{Outcome, STDOUT_FAILED, plain, threads};

/// What is measured if the user names no length.
const CONTEXTS: [u32; 2] = [32, 2048];
const PREFILL: [u32; 1] = [512];

pub fn run(args: &BenchArgs) -> anyhow::Result<Outcome> {
    let mut configs = args.settings.iter().map(|name| configuration(name)).collect::<Result<Vec<_>>>()?;
    if let Some(budget) = args.budget.budget() {
        set_budget(&mut configs, budget)?;
    }
    let places = Places::of(&args.model.model).reads("--prompt-file", args.prompt_file.as_ref());
    let places = measure::files_of(&args.settings).fold(places, |places, file| places.reads("--settings", Some(file)));
    places.writes("--json", args.json.as_ref()).writes("--plot", args.plot.as_ref()).check()?;
    let text = match &args.prompt_file {
        Some(path) => &reading::beginning(path, "read prompt", MAX_TEXT)?,
        None => TEXT,
    };
    listen()?;
    let kv_dtypes = distinct(&args.kv_dtype);
    let session = Session::open(&args.model, kv_dtypes[0])?;
    for dtype in &kv_dtypes {
        session.check_kv_dtype(*dtype)?;
    }
    let settings = args.settings.iter().zip(configs).map(|(name, config)| Setting {
        name: name.clone(),
        retention: config.map_or(Retention::Full, |config| session.loaded.retention(&config)),
    });
    let lengths = |given: &[u32], default: &[u32]| -> Vec<usize> {
        let is_default = args.contexts.is_empty() && args.prefill.is_empty();
        distinct(&if is_default { default } else { given }.iter().map(|&length| length as usize).collect::<Vec<_>>())
    };
    let threads: Vec<usize> = args.threads.iter().map(|&threads| threads::bounded(usize::from(threads))).collect();
    let plan = Plan {
        threads: if threads.is_empty() { vec![session.threads.number] } else { distinct(&threads) },
        settings: settings.collect(),
        kv_dtypes,
        past: args.past as usize,
        contexts: lengths(&args.contexts, &CONTEXTS),
        prefill: lengths(&args.prefill, &PREFILL),
        new_tokens: args.new_tokens as usize,
        runs: args.runs as usize,
        warmup: args.warmup as usize,
    };
    let model = &session.loaded.model;
    plan.check(model.config().context_length)?;
    let prompt = first_tokens(&session.loaded.tokenizer, text, plan.tokens())?;

    let subject = Subject {
        model,
        prompt: &prompt,
        decode_bytes: session.loaded.decode_bytes,
        prefill_options: session.prefill_options,
    };
    let mut output = Table::new(args.json.clone(), &args.settings)?;
    let measured = bench::run(subject, &plan, &SystemClock::start(), &mut output);
    output.lines.finish();
    // A reader of the table that went away hides no failure, and keeps no picture from being drawn.
    measured?;
    output.write(true)?;
    if let Some(path) = &args.plot {
        while_writing(path, || draw(path, &args.model.model, &output.rows, &output.names))?;
    }
    output.lines.into_printed().context(STDOUT_FAILED)?;
    Ok(if interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

/// Sets the budget of those settings that have one.
///
/// # Errors
/// As [`AdaptiveConfig::with_budget`], if none has.
fn set_budget(configs: &mut [Option<AdaptiveConfig>], budget: Budget) -> Result<()> {
    let mut has_effect = false;
    for config in configs.iter_mut().flatten().filter(|config| config.budgeted().is_some()) {
        *config = config.clone().with_budget(budget)?;
        has_effect = true;
    }
    if has_effect { Ok(()) } else { AdaptiveConfig::default().with_budget(budget).map(|_| ()) }
}

/// The first `len` tokens of a text, which is repeated if it has not so many.
fn first_tokens(tokenizer: &Tokenizer, text: &str, len: usize) -> Result<Vec<u32>> {
    let mut text = tokenizer.beginning(text, len).to_owned();
    loop {
        let mut ids = while_waiting(|| tokenizer.encode_beginning(&text, len))?;
        if ids.len() >= len {
            ids.truncate(len);
            return Ok(ids);
        }
        if ids.is_empty() {
            return Err(Error::input("the prompt is empty").with_hint("give a file with some text as --prompt-file"));
        }
        // Where repetitions meet, tokens may merge: one more makes up for it.
        text = text.repeat(len.div_ceil(ids.len()) + 1);
    }
}

/// Prints rows as they come, and writes them to a file.
struct Table {
    rows: Vec<Row>,
    json: Option<PathBuf>,
    names: Names,
    lines: Lines,
}

impl Table {
    fn new(json: Option<PathBuf>, settings: &[String]) -> Result<Self> {
        let table = Self { rows: Vec::new(), json, names: Names::new(settings), lines: Lines::new() };
        table.write(false)?;
        Ok(table)
    }

    fn write(&self, is_complete: bool) -> Result<()> {
        measure::write_rows(self.json.as_ref(), is_complete, |path| write_rows(path, &self.rows))
    }
}

impl Observer for Table {
    fn starts(&mut self, what: &str) {
        self.lines.set_message(what);
    }

    fn read_rate(&mut self, threads: usize, gb_per_s: f64) {
        let blank = if self.rows.is_empty() { "" } else { "\n" };
        let plural = if threads == 1 { "" } else { "s" };
        self.lines
            .print(&format!("{blank}{threads} thread{plural}: a plain loop reads {gb_per_s:.1} GB/s from memory"));
        self.lines.print(&format!(
            "{:<8}{:>8}  {:<width$}  {:<KV_WIDTH$}{:>10}{:>11}{:>10}{:>10}{:>8}{:>9}{:>9}{:>9}{:>8}",
            "work",
            "context",
            "setting",
            "kv",
            "tokens/s",
            "median ms",
            "min ms",
            "max ms",
            "kept %",
            "KV MB",
            "peak MB",
            "GB/s",
            "of loop",
            width = self.names.width("setting"),
        ));
    }

    fn row(&mut self, row: Row) -> Result<()> {
        let reading = row.reading.map_or_else(String::new, |reading| {
            format!("{:>9.1}{:>7.0}%", reading.read_gb_per_s, 100.0 * reading.bandwidth_share)
        });
        self.lines.print(&format!(
            "{:<8}{:>8}  {:<width$}  {:<KV_WIDTH$}{:>10.1}{:>11.2}{:>10.2}{:>10.2}{:>8.1}{:>9}{:>9.1}{reading}",
            row.work.name(),
            row.context,
            self.names.of(&row.setting),
            row.kv_dtype,
            row.tokens_per_s,
            row.times.median_ms,
            row.times.min_ms,
            row.times.max_ms,
            100.0 * row.kept_ratio,
            mb_cell(row.kv_bytes),
            megabytes(row.peak_rss_bytes),
            width = self.names.width("setting"),
        ));
        self.rows.push(row);
        self.write(false)
    }

    fn is_over(&self) -> bool {
        interrupted() || (self.json.is_none() && self.lines.failed())
    }
}

/// Draws the rows, if there are any.
fn draw(path: &Path, model: &Path, rows: &[Row], names: &Names) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<SpeedLine> = Vec::new();
    for row in rows {
        let name = format!("{}, {}", names.of(&row.setting), row.kv_dtype);
        let index = lines.iter().position(|line| line.name == name && line.threads == row.threads);
        let index = index.unwrap_or_else(|| {
            lines.push(SpeedLine { name, threads: row.threads, ..SpeedLine::default() });
            lines.len() - 1
        });
        let line = &mut lines[index];
        let speeds = match row.work {
            Work::Prefill => &mut line.prefill,
            Work::Decode => &mut line.decode,
        };
        speeds.push((row.context, row.tokens_per_s));
        #[expect(clippy::cast_precision_loss)]
        line.kv_bytes.push((row.context, row.kv_bytes as f64));
    }
    let model = model.file_name().unwrap_or(model.as_os_str());
    speed(path, &plain(&model.to_string_lossy()), &lines)
}
