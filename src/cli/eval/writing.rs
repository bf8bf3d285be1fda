//! How caches hold out while a long text is written, for each hundred tokens.

use adaptive_kvcache::eval::{FidelityRow, Row, WritingRow};

use super::cells::{BUDGET_WIDTH, budget_text, text_cell};
use crate::cli::measure::{KV_WIDTH, Names, mb_cell};

/// A table below all others; `None` if nothing was written.
///
/// * `texts`: their names, if there are several
pub fn table(rows: &[Row], names: &Names, texts: Option<&Names>) -> Option<String> {
    let written = rows.iter().filter_map(|row| match row {
        Row::Fidelity(row) if !row.writing.is_empty() => Some(row),
        _ => None,
    });
    let lines: Vec<String> = written.map(|row| lines(row, names, texts)).collect();
    if lines.is_empty() {
        return None;
    }
    let width = names.width("config");
    let heading = format!(
        "\n{}{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{:>11}{:>10}{:>9}{:>8}{:>9}",
        text_cell(texts, "text"),
        "config",
        "budget",
        "kv",
        "written",
        "KL mean",
        "top-1 %",
        "kept %",
        "KV MB",
    );
    Some(heading + "\n" + &lines.join("\n"))
}

/// A line for each hundred tokens, and one for all.
fn lines(row: &FidelityRow, names: &Names, texts: Option<&Names>) -> String {
    let width = names.width("config");
    let line = |tokens: String, kl_mean: f64, top1_agreement: f64, end: &WritingRow| {
        format!(
            "{}{:<width$}  {:>BUDGET_WIDTH$}  {:<KV_WIDTH$}{tokens:>11}{kl_mean:>10.5}{:>9.1}{:>8.1}{:>9}",
            text_cell(texts, row.text.as_deref().unwrap_or_default()),
            names.of(&row.config),
            budget_text(row.budget),
            row.kv_dtype,
            100.0 * top1_agreement,
            100.0 * end.kept_ratio,
            mb_cell(end.kv_bytes),
        )
    };
    let mut first = 1;
    let hundreds = row.writing.iter().map(|part| {
        let tokens = format!("{first}-{}", part.tokens);
        first = part.tokens + 1;
        line(tokens, part.kl_mean, part.top1_agreement, part)
    });
    let mut lines: Vec<String> = hundreds.collect();
    if let (Some(kl_mean), Some(top1_agreement), Some(end)) =
        (row.writing_kl_mean, row.writing_top1_agreement, row.writing.last())
    {
        lines.push(line("all".to_owned(), kl_mean, top1_agreement, end));
    }
    lines.join("\n")
}
