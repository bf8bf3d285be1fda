//! Answers to prompts, one below the other, and what they come to together.

use adaptive_kvcache::eval::{AnswerRow, Row, mean};
use adaptive_kvcache::report::megabytes;

use super::cells::{BUDGET_WIDTH, budget_text, evicted_cell};
use crate::cli::measure::{KV_WIDTH, Names};
use crate::cli::plain;

/// What stands above the answers to a prompt.
pub fn heading(row: &AnswerRow) -> String {
    format!("prompt {}, {} tokens: {}", row.prompt_idx + 1, row.prompt_tokens, plain(&row.prompt))
}

/// What a cache kept, and below it how it answers.
pub fn block(row: &AnswerRow, names: &Names) -> String {
    let budget = row.budget.map_or_else(String::new, |budget| format!(", {}", budget_text(Some(budget))));
    let same = if row.equal_tokens == row.full_tokens && row.answer_tokens == row.full_tokens {
        format!("all {} tokens equal", row.full_tokens)
    } else {
        format!("{} of {} tokens equal before the first difference", row.equal_tokens, row.full_tokens)
    };
    let evicted =
        row.evicted_rows.map_or_else(String::new, |rows| format!(", {rows:.1} rows a head evicted while answering"));
    let mut text = format!(
        "  {}{budget}, {}: {:.1} % kept, {:.1} % saved, {:.3} MB saved{evicted}, {same}",
        names.of(&row.config),
        row.kv_dtype,
        100.0 * row.kept_ratio,
        100.0 * row.saved_ratio,
        megabytes(row.saved_bytes),
    );
    let answer = row.answer.trim();
    for line in if answer.is_empty() { "(no text)" } else { answer }.lines() {
        text += "\n    ";
        text += plain(line).trim_end();
    }
    text
}

/// The answers of each setting, in the order in which settings were given.
pub fn by_setting(rows: &[Row]) -> Vec<Vec<&AnswerRow>> {
    let mut groups: Vec<Vec<&AnswerRow>> = Vec::new();
    for row in rows {
        let Row::Answer(row) = row else { continue };
        let setting = |row: &AnswerRow| (row.config.clone(), row.budget, row.kv_dtype);
        match groups.iter_mut().find(|group| setting(group[0]) == setting(row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
}

/// A table of the means over all prompts; `None` without answers.
///
/// * `evicts`: whether there is a column of what was evicted while answering
#[expect(clippy::cast_precision_loss)]
pub fn summary(rows: &[Row], names: &Names, evicts: bool) -> Option<String> {
    let groups = by_setting(rows);
    let width = names.width("config");
    if groups.is_empty() {
        return None;
    }
    let heading = format!(
        "\n{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8}{:>8}{:>8}{:>9}{:>9}{:>12}{}",
        "config",
        "budget",
        "kv",
        "prompts",
        "tokens",
        "kept %",
        "saved %",
        "saved MB",
        "equal",
        if evicts { format!("{:>9}", "evicted") } else { String::new() },
    );
    let line = |group: Vec<&AnswerRow>| {
        let average = |value: fn(&AnswerRow) -> f64| mean(&group.iter().map(|row| value(row)).collect::<Vec<_>>());
        let rows = group[0].evicted_rows.map(|_| average(|row| row.evicted_rows.unwrap_or(0.0)));
        let (equal, full) = (average(|row| row.equal_tokens as f64), average(|row| row.full_tokens as f64));
        format!(
            "{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>8}{:>8.1}{:>8.2}{:>9.2}{:>9.3}{:>12}{}",
            names.of(&group[0].config),
            budget_text(group[0].budget),
            group[0].kv_dtype,
            group.len(),
            average(|row| row.prompt_tokens as f64),
            100.0 * average(|row| row.kept_ratio),
            100.0 * average(|row| row.saved_ratio),
            average(|row| megabytes(row.saved_bytes)),
            format!("{equal:.1}/{full:.1}"),
            if evicts { evicted_cell(rows) } else { String::new() },
        )
    };
    Some(std::iter::once(heading).chain(groups.into_iter().map(line)).collect::<Vec<_>>().join("\n"))
}
