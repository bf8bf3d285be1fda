//! What the commands share that measure caches on text: the text, the model, configurations by name, the files, and a
//! table that is printed line by line below a spinner.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::config::AdaptiveConfig;
use adaptive_kvcache::eval::{FidelityPlan, Subject};
use adaptive_kvcache::tokenizer::Tokenizer;
use adaptive_kvcache::{Error, Result};
use indicatif::ProgressBar;

use super::args::{CacheDtype, FileArgs, MeasureArgs, ModelArgs};
use super::bench::{FULL, TEXT, TICK, distinct};
use super::generate::check_report_path;
use super::plain;
use super::session::Session;

/// The configurations that are built in, by name.
const BUILT_IN: [(&str, &str); 2] =
    [("fastgen", include_str!("../../configs/fastgen.json")), ("replay", include_str!("../../configs/best.json"))];

/// A configuration that is built in, or a file's; `None` for the full cache.
pub fn configuration(name: &str) -> Result<Option<AdaptiveConfig>> {
    if name == FULL {
        return Ok(None);
    }
    if let Some((_, json)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return AdaptiveConfig::parse(json, None).map(Some);
    }
    AdaptiveConfig::from_file(name).map(Some).map_err(|error| match error {
        Error::Io { .. } => {
            let known: Vec<_> = BUILT_IN.iter().map(|(known, _)| format!("`{known}`")).collect();
            let known = known.join(", ");
            error.with_hint(format!("a configuration is `{FULL}`, {known}, or the path of a JSON file"))
        }
        other => other,
    })
}

impl FileArgs {
    /// Finds out early whether the files can be written.
    pub fn check(&self) -> Result<()> {
        self.json.iter().chain(&self.csv).chain(&self.plot).try_for_each(|path| check_report_path(path))
    }

    /// Whether somebody wants the rows who reads no table.
    pub fn has_rows(&self) -> bool {
        self.json.is_some() || self.csv.is_some()
    }
}

impl MeasureArgs {
    /// The text that is measured on.
    pub fn text(&self) -> Result<Cow<'static, str>> {
        match &self.text {
            Some(path) => {
                std::fs::read_to_string(path).map(Cow::Owned).map_err(|source| Error::io("read text", path, source))
            }
            None => Ok(Cow::Borrowed(TEXT)),
        }
    }

    /// Loads the model, and checks that its cache can be in these numbers.
    pub fn open(&self, kv_dtypes: &[KvDtype]) -> anyhow::Result<Session> {
        let session = Session::open(&ModelArgs {
            model: self.model.clone(),
            context: self.context,
            dtype: self.dtype,
            kv_dtype: self.full_kv_dtype,
            device: self.device.clone(),
            threads: self.threads,
            prefill_chunk: self.prefill_chunk,
        })?;
        for dtype in kv_dtypes {
            session.check_kv_dtype(*dtype)?;
        }
        Ok(session)
    }

    /// The windows.
    pub fn plan(&self) -> FidelityPlan {
        FidelityPlan {
            prompt_tokens: self.prompt_tokens,
            score_tokens: self.score_tokens,
            windows: self.windows,
            offset_tokens: self.offset_tokens,
            greedy_tokens: 0,
            layer_error: false,
        }
    }
}

impl Session {
    /// The model, as measurements take it.
    pub fn subject(&self) -> Subject<'_> {
        Subject {
            model: &self.loaded.model,
            tokenizer: &self.loaded.tokenizer,
            prefill_options: self.prefill_options,
            full_kv_dtype: self.kv_dtype,
        }
    }
}

/// Each of the dtypes once.
pub fn kv_dtypes(names: &[CacheDtype]) -> Vec<KvDtype> {
    distinct(&names.iter().map(|&dtype| dtype.into()).collect::<Vec<_>>())
}

/// Ids of a text; the library puts BOS before each window.
pub fn ids_without_bos(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text)?;
    if tokenizer.adds_bos() && ids.first().copied() == tokenizer.bos_id() {
        ids.remove(0);
    }
    Ok(ids)
}

/// The width of a column of configurations.
pub fn config_width(names: &[String]) -> usize {
    names.iter().map(|name| plain(name).chars().count()).max().unwrap_or(0).max("config".len())
}

/// Lines on standard output, and on standard error, if that is a terminal, what is being measured.
pub struct Lines {
    spinner: ProgressBar,
    /// How printing went: measuring goes on for the files if nobody reads the table.
    printed: std::io::Result<()>,
}

impl Lines {
    pub fn new() -> Self {
        let spinner = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        spinner.enable_steady_tick(TICK);
        Self { spinner, printed: Ok(()) }
    }

    /// Says what is being measured.
    pub fn set_message(&self, what: &str) {
        self.spinner.set_message(plain(what));
    }

    pub fn print(&mut self, line: &str) {
        let print = || {
            let mut out = std::io::stdout().lock();
            writeln!(out, "{line}")?;
            out.flush()
        };
        if self.printed.is_ok() {
            self.printed = self.spinner.suspend(print);
        }
    }

    /// Nothing more is measured.
    pub fn finish(&self) {
        self.spinner.finish_and_clear();
    }

    /// Whether nobody reads the lines any more.
    pub fn failed(&self) -> bool {
        self.printed.is_err()
    }

    /// How printing went.
    pub fn into_printed(self) -> std::io::Result<()> {
        self.printed
    }
}
