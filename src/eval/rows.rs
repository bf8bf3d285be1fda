//! What is handed over: rows, and the files of them.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::compress::{Budget, BudgetOver};
use crate::error::{Error, Result};
use crate::generate::FinishReason;

/// What a configuration that takes a budget was given.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GivenBudget {
    #[serde(flatten)]
    pub budget: Budget,
    /// Whose positions compete for it; `None` if that was left to the configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_over: Option<BudgetOver>,
}

/// A budget alone.
impl From<Budget> for GivenBudget {
    fn from(budget: Budget) -> Self {
        Self { budget, budget_over: None }
    }
}

/// One measured case.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Row {
    Fidelity(FidelityRow),
    Task(TaskRow),
    Ruler(RulerRow),
    Answer(AnswerRow),
}

/// How far a compressed cache moves the distributions of the next tokens. KL divergences are in nats, full against
/// compressed. A position is a token of the text that was scored; the first behind each prompt is left out, since its
/// distribution comes from the prompt's exact attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FidelityRow {
    /// `full`, or the configuration as the user named it.
    pub config: String,
    /// Kept share of the prompt's keys and values, in 0..=1; the mean over windows.
    pub kept_ratio: f64,
    /// Bytes of the keys and values that are kept of the prompt; the mean over windows.
    pub kv_bytes: usize,
    pub kl_mean: f64,
    pub kl_median: f64,
    pub kl_p99: f64,
    /// Share of positions at which the most probable token is the full cache's, in 0..=1.
    pub top1_agreement: f64,
    pub perplexity: f64,
    /// With the full cache, on the same positions.
    pub perplexity_full: f64,
    pub kv_dtype: &'static str,
    /// Numbers of the full cache.
    pub full_kv_dtype: &'static str,
    /// What the configuration was given, if it takes a budget.
    pub budget: Option<GivenBudget>,
    /// How many windows went into the row; more may follow while measurements go on.
    pub windows: usize,
    /// Tokens of each window's prompt.
    pub prompt_tokens: usize,
    /// Standard error of `kl_mean`, from the windows' means; `None` for one window.
    pub kl_std_error: Option<f64>,
    /// The mean of each window.
    pub kl_by_window: Vec<f64>,
    /// `kept_ratio` of each window.
    pub kept_ratio_by_window: Vec<f64>,
    /// `kv_bytes` of each window.
    pub kv_bytes_by_window: Vec<usize>,
    /// Of [`POSITIONS_PER_BUCKET`](super::POSITIONS_PER_BUCKET) positions at a time, from the first scored one.
    pub perplexity_by_position: Vec<f64>,
    pub perplexity_full_by_position: Vec<f64>,
    /// Tokens of the two caches' own greedy texts that are equal before the first difference, the first of which always
    /// is; the mean over windows. `None` if no text was generated.
    pub equal_tokens: Option<f64>,
    /// Length of those texts.
    pub greedy_tokens: usize,
    /// Relative error (L2 norms) of each layer's attention output, before the output projection, against the full
    /// cache's; the mean over positions and windows. `None` if it was not asked for.
    pub attention_error_by_layer: Option<Vec<f64>>,
    /// Kept share of all keys and values when the scored tokens were read, in 0..=1; the mean over windows.
    pub end_kept_ratio: f64,
    /// Bytes that are kept then; the mean over windows.
    pub end_kv_bytes: usize,
    /// Rows that a head evicted while the scored tokens were read, of the prompt's and of theirs; the mean over heads and
    /// windows. `None` if new tokens are all kept.
    pub evicted_rows: Option<f64>,
    /// The largest of `kl_by_window`.
    pub kl_worst: f64,
    /// The text's name, or [`ALL_TEXTS`](super::ALL_TEXTS); `None` if it was given none. The windows of all texts are those
    /// of each, one text after the other.
    pub text: Option<String>,
    /// Mean over all tokens of the long text that the full cache wrote behind each prompt, of the divergence behind them;
    /// `None` if none was written.
    pub writing_kl_mean: Option<f64>,
    /// Share of them behind which the most probable token is the full cache's, in 0..=1.
    pub writing_top1_agreement: Option<f64>,
    /// The same for each [`TOKENS_PER_ROW`](super::TOKENS_PER_ROW) tokens; empty if none was written.
    pub writing: Vec<WritingRow>,
}

/// How far a cache's distributions are from the full one's while a long text is written, in some tokens of it; the mean
/// over windows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WritingRow {
    /// Tokens of the text up to the last of these.
    pub tokens: usize,
    /// Of the distributions behind these tokens, in nats.
    pub kl_mean: f64,
    /// Share of these tokens behind which the most probable one is the full cache's, in 0..=1.
    pub top1_agreement: f64,
    /// Kept share of all keys and values behind the last of them, in 0..=1.
    pub kept_ratio: f64,
    /// Bytes that are kept then.
    pub kv_bytes: usize,
}

/// How often a fact of a compressed text is still known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskRow {
    /// The task's name.
    pub task: &'static str,
    /// `full`, or the configuration as the user named it.
    pub config: String,
    /// Tokens of the text, at most.
    pub context: usize,
    /// Where in the text the fact stands, in 0..=1.
    pub depth: f64,
    /// Share of right answers, in 0..=1.
    pub accuracy: f64,
    /// With the full cache, on the same questions.
    pub accuracy_full: f64,
    /// Questions that were asked.
    pub trials: usize,
    pub kv_dtype: &'static str,
    /// What the configuration was given, if it takes a budget.
    pub budget: Option<GivenBudget>,
    /// Kept share of what was seen before the question, in 0..=1; the mean over trials.
    pub kept_ratio: f64,
    /// Bytes that are kept of it; the mean over trials.
    pub kv_bytes: usize,
}

/// How many of the expected answers a compressed text still gives, in one of RULER's tasks or in the mean over those that the
/// full cache passes. A score is the share of the expected answers that an answer holds, in 0..=1, the mean over samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RulerRow {
    /// The task's name, or `mean`.
    pub task: &'static str,
    /// `full`, or the configuration as the user named it.
    pub config: String,
    /// Tokens of prompt and answer together, at most.
    pub context: usize,
    pub score: f64,
    /// With the full cache, on the same samples.
    pub score_full: f64,
    /// `score` less `score_full`.
    pub difference: f64,
    /// Half of the 95 % confidence interval around `difference`, Student's, of the differences on each sample; `None` for
    /// one sample.
    pub difference_95: Option<f64>,
    /// Whether the full cache itself fails the task, so that it says nothing of others:
    /// [`PASS_SCORE`](super::PASS_SCORE).
    pub full_fails: bool,
    /// How many samples went into the row; more may follow while measurements go on.
    pub samples: usize,
    /// Tasks that went into the row: 1, or those of the mean.
    pub num_tasks: usize,
    pub kv_dtype: &'static str,
    /// What the configuration was given, if it takes a budget.
    pub budget: Option<GivenBudget>,
    /// Kept share of the text before the question, in 0..=1; the mean over samples.
    pub kept_ratio: f64,
    /// Bytes that are kept of it; the mean over samples.
    pub kv_bytes: usize,
    pub score_by_sample: Vec<f64>,
    pub score_full_by_sample: Vec<f64>,
    /// What each sample's answer should hold; empty for the mean.
    pub expected: Vec<Vec<String>>,
    /// Each sample's answer, which ends where it holds all that is expected; empty for the mean.
    pub answers: Vec<String>,
    /// The full cache's.
    pub answers_full: Vec<String>,
}

/// How a cache answers a prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerRow {
    /// Of the prompt, from 0.
    pub prompt_idx: usize,
    /// What is asked.
    pub prompt: String,
    /// Tokens of the prompt, BOS and chat markers included.
    pub prompt_tokens: usize,
    /// `full`, or the configuration as the user named it.
    pub config: String,
    pub kv_dtype: &'static str,
    /// What the configuration was given, if it takes a budget.
    pub budget: Option<GivenBudget>,
    /// Kept share of the prompt's keys and values, in 0..=1.
    pub kept_ratio: f64,
    /// 1 less what is kept of a full cache's bytes in the same numbers: what the original's tables call the saving, in
    /// 0..=1.
    pub saved_ratio: f64,
    /// Bytes of a full cache of the prompt, in the same numbers.
    pub raw_bytes: usize,
    /// Bytes that are kept of it.
    pub kv_bytes: usize,
    /// The difference of the two.
    pub saved_bytes: usize,
    /// Tokens of the answer and the full cache's that are equal before the first difference, the first of which always
    /// is.
    pub equal_tokens: usize,
    /// Tokens of the full cache's answer, the one that ends it included.
    pub full_tokens: usize,
    /// Tokens of the answer, the one that ends it included.
    pub answer_tokens: usize,
    pub finish_reason: FinishReason,
    pub answer: String,
    /// Bytes that are kept when the answer is over.
    pub end_kv_bytes: usize,
    /// Rows that a head evicted while answering, of the prompt's and of the answer's; the mean over heads. `None` if new
    /// tokens are all kept.
    pub evicted_rows: Option<f64>,
}

/// Writes rows as one JSON array, in the place of what the file held.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written; it is then as it was.
pub fn write_json(path: &Path, rows: &[impl Serialize]) -> Result<()> {
    crate::report::write_json(rows, path)
}

/// Writes rows, which are JSON objects, as comma-separated values, in the place of what the file held: the keys of the JSON file are columns, a
/// list's values are separated by spaces, and what a row has not is empty.
///
/// # Errors
/// As [`write_json`].
pub fn write_csv(path: &Path, rows: &[impl Serialize]) -> Result<()> {
    let object = |row| {
        serde_json::to_value(row).map(|value| match value {
            Value::Object(object) => object,
            _ => Map::new(),
        })
    };
    let objects: serde_json::Result<Vec<Map<String, Value>>> = rows.iter().map(object).collect();
    let objects = objects.map_err(|error| Error::io("write", path, error.into()))?;
    crate::files::replace(path, csv(&objects).as_bytes())
}

/// Lines end as RFC 4180 says.
fn csv(rows: &[Map<String, Value>]) -> String {
    let mut columns: Vec<&str> = Vec::new();
    for key in rows.iter().flat_map(Map::keys) {
        if !columns.contains(&key.as_str()) {
            columns.push(key);
        }
    }
    let line = |cells: Vec<String>| cells.join(",") + "\r\n";
    let mut text = line(columns.iter().map(|column| quoted(column)).collect());
    for row in rows {
        text += &line(columns.iter().map(|column| quoted(&row.get(*column).map_or_else(String::new, plain))).collect());
    }
    text
}

/// A value as text.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(" "),
        // A budget: its kind, its number, and what competes for it.
        Value::Object(object) => {
            object.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

/// A cell, in quotation marks if it needs them.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn csv_has_the_columns_of_all_rows() {
        let rows = [
            json!({"config": "a,\"b\"", "kl": [0.5, null, 2.0], "budget": {"bytes": 7}}),
            json!({"task": "passkey", "config": "c", "budget": null}),
        ];
        let rows: Vec<_> = rows.iter().map(|row| row.as_object().unwrap().clone()).collect();
        let expected = "config,kl,budget,task\r\n\"a,\"\"b\"\"\",0.5  2.0,bytes=7,\r\nc,,,passkey\r\n";
        assert_eq!(csv(&rows), expected);
    }
}
