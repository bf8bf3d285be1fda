//! What the commands share that measure caches on text: the text, the model, names of configurations, the files, and a
//! table that is printed line by line below a spinner.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::eval::{FidelityPlan, FidelityText, Subject, WritingPlan};
use adaptive_kvcache::reading::{self, MAX_TEXT};
use adaptive_kvcache::report::{is_small, megabytes};
use adaptive_kvcache::tokenizer::Tokenizer;
use adaptive_kvcache::{Result, files};
use indicatif::ProgressBar;

use super::args::{FileArgs, MeasureArgs};
use super::configurations::is_built_in;
use super::interrupt::{while_waiting, while_writing};
use super::places::Places;
use super::plain;
use super::session::Session;

/// The prompts' text if the user gives none: in the public domain, some 9,700 tokens.
pub const TEXT: &str = include_str!("../../tests/data/text/eighty_days_ch1-5.txt");

/// Width of a column of a cache's numbers, of which keys' and values' can differ: `q8_0/q4_0`.
pub const KV_WIDTH: usize = 10;

/// How often the line that says what is being measured is drawn anew.
pub const TICK: Duration = Duration::from_millis(200);

/// The values without those that were there before, in order.
pub fn distinct<T: Copy + PartialEq>(values: &[T]) -> Vec<T> {
    let mut distinct = Vec::new();
    for value in values {
        if !distinct.contains(value) {
            distinct.push(*value);
        }
    }
    distinct
}

/// Those of the configurations that are files.
pub fn files_of(names: &[String]) -> impl Iterator<Item = &String> {
    names.iter().filter(|name| !is_built_in(name))
}

impl FileArgs {
    /// Adds the files to what is written.
    pub fn add_to<'a>(&'a self, places: Places<'a>) -> Places<'a> {
        places
            .writes("--json", self.json.as_ref())
            .writes("--csv", self.csv.as_ref())
            .writes("--plot", self.plot.as_ref())
    }

    /// Whether somebody wants the rows who reads no table.
    pub fn has_rows(&self) -> bool {
        self.json.is_some() || self.csv.is_some()
    }
}

/// Writes rows to a file that holds them all each time. What cannot be replaced gets them once, when they are complete.
pub fn write_rows(path: Option<&PathBuf>, are_complete: bool, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    match path {
        Some(path) if are_complete || !files::is_stream(path) => while_writing(path, || write(path)),
        _ => Ok(()),
    }
}

/// A text that is measured on.
pub struct Text {
    /// As the user wrote its path; `None` for the one that is built in.
    pub name: Option<String>,
    pub content: Cow<'static, str>,
}

impl Text {
    /// Its tokens, as many as a plan needs.
    pub fn measured(&self, tokenizer: &Tokenizer, plan: &FidelityPlan) -> Result<FidelityText> {
        Ok(FidelityText { name: self.name.clone(), ids: ids_without_bos(tokenizer, &self.content, plan)? })
    }
}

impl MeasureArgs {
    /// What is read and written.
    pub fn places<'a>(&'a self, configs: &'a [String]) -> Places<'a> {
        let places = Places::of(&self.model.model);
        let places = self.text.iter().fold(places, |places, text| places.reads("--text", Some(text)));
        files_of(configs).fold(places, |places, config| places.reads("--configs", Some(config)))
    }

    /// The texts that are measured on, at least one, each with the name that the user gave.
    pub fn texts(&self) -> Result<Vec<Text>> {
        if self.text.is_empty() {
            return Ok(vec![Text { name: None, content: Cow::Borrowed(TEXT) }]);
        }
        let read = |path: &PathBuf| {
            let content = reading::beginning(path, "read text", MAX_TEXT)?;
            Ok(Text { name: Some(path.to_string_lossy().into_owned()), content: Cow::Owned(content) })
        };
        self.text.iter().map(read).collect()
    }

    /// Loads the model, and checks that its cache can be in these numbers.
    pub fn open(&self, kv_dtypes: &[KvDtype]) -> anyhow::Result<Session> {
        let session = Session::open(&self.model, self.full_kv_dtype)?;
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
            writing: WritingPlan::default(),
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

/// Ids of a text, of a very long one at least as many as a plan needs; the library puts BOS before each window.
fn ids_without_bos(tokenizer: &Tokenizer, text: &str, plan: &FidelityPlan) -> Result<Vec<u32>> {
    let window = plan.prompt_tokens.saturating_add(plan.score_tokens);
    let needed = plan.windows.saturating_mul(window).saturating_add(plan.offset_tokens);
    let mut ids = while_waiting(|| tokenizer.encode_beginning(text, needed.saturating_add(1)))?;
    if tokenizer.adds_bos() && ids.first().copied() == tokenizer.bos_id() {
        ids.remove(0);
    }
    Ok(ids)
}

/// What tables and pictures call configurations: a file's name without folder and extension, with as much of its path as
/// tells it from the others. JSON and CSV have what the user wrote.
pub struct Names(Vec<(String, String)>);

impl Names {
    /// * `given`: as the user wrote them
    pub fn new(given: &[String]) -> Self {
        let forms: Vec<Vec<String>> = given.iter().map(|name| forms(name)).collect();
        // How much of each is shown: more, as long as two different ones look the same.
        let mut shown = vec![0; given.len()];
        let form = |index: usize, shown: &[usize]| &forms[index][shown[index]];
        loop {
            let is_ambiguous = |index: usize| {
                (0..given.len()).any(|other| given[other] != given[index] && form(other, &shown) == form(index, &shown))
            };
            let grown: Vec<usize> = (0..given.len())
                .filter(|&index| shown[index] + 1 < forms[index].len() && is_ambiguous(index))
                .collect();
            if grown.is_empty() {
                break;
            }
            for index in grown {
                shown[index] += 1;
            }
        }
        let name = |index: usize| (given[index].clone(), plain(form(index, &shown)));
        Self((0..given.len()).map(name).collect())
    }

    /// The name of a configuration.
    ///
    /// * `given`: as the user wrote it
    pub fn of<'a>(&'a self, given: &'a str) -> &'a str {
        self.0.iter().find(|(known, _)| known == given).map_or(given, |(_, name)| name)
    }

    /// The width of a column of them.
    ///
    /// * `heading`: what stands above it
    pub fn width(&self, heading: &str) -> usize {
        self.0.iter().map(|(_, name)| name.chars().count()).max().unwrap_or(0).max(heading.len())
    }
}

/// From the shortest to the whole: a file's name without extension and with it, then with one folder more each.
fn forms(given: &str) -> Vec<String> {
    let path = Path::new(given);
    let (false, Some(stem), Some(name)) = (is_built_in(given), path.file_stem(), path.file_name()) else {
        return vec![given.to_owned()];
    };
    let mut forms = vec![stem.to_string_lossy().into_owned(), name.to_string_lossy().into_owned()];
    let mut form = PathBuf::from(name);
    for folder in path.ancestors().skip(1).filter_map(Path::file_name) {
        form = Path::new(folder).join(form);
        forms.push(form.to_string_lossy().into_owned());
    }
    forms.push(given.to_owned());
    forms
}

/// A size in a column of MB: with two digits, or with those that a small one needs.
pub fn mb_cell(bytes: usize) -> String {
    let digits = if is_small(bytes) && bytes > 0 { 4 } else { 2 };
    format!("{:.digits$}", megabytes(bytes))
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
        // It needs a thread, of which there may be no more.
        if !spinner.is_hidden() && std::thread::Builder::new().spawn(|| ()).is_ok() {
            spinner.enable_steady_tick(TICK);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_called_by_as_little_of_their_path_as_tells_them_apart() {
        let names = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|&name| name.to_owned()).collect();
            let names = Names::new(&given);
            given.iter().map(|name| names.of(name).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&["full", "configs/fastgen_evict.json", "/a/b/h2o.json"]), ["full", "fastgen_evict", "h2o"]);
        assert_eq!(names(&["a/c.json", "b/c.json", "a/c.json"]), ["a/c.json", "b/c.json", "a/c.json"]);
        assert_eq!(names(&["c.json", "c.txt", "d"]), ["c.json", "c.txt", "d"]);
        assert_eq!(names(&["fastgen", "configs/fastgen.json"]), ["fastgen", "fastgen.json"]);
        assert_eq!(names(&["full", "x/full"]), ["full", "x/full"]);
        assert_eq!(names(&["c.json", "./c.json"]), ["c.json", "./c.json"]);
        assert_eq!(names(&["../c.json", "new\nline.json"]), ["c", "new\\nline"]);
    }
}
