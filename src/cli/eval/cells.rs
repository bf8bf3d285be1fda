//! What stands in a cell of more than one of `eval`'s tables.

use adaptive_kvcache::compress::Budget;
use adaptive_kvcache::eval::ALL_TEXTS;
use adaptive_kvcache::report::short_size;

use crate::cli::measure::Names;

/// A budget in a table: the share, or the size.
pub fn budget_text(budget: Option<Budget>) -> String {
    match budget {
        None => "-".to_owned(),
        Some(Budget::KeptRatio(ratio)) => format!("{}%", (ratio * 1e4).round() / 100.0),
        Some(Budget::Bytes(bytes)) => short_size(bytes),
    }
}

/// Rows that a head evicted, in a column; those of configurations that keep all new tokens are not told.
pub fn evicted_cell(rows: Option<f64>) -> String {
    format!("{:>9}", rows.map_or("-".to_owned(), |rows| format!("{rows:.1}")))
}

/// The text that a row is about, in a column before the others; nothing where there is but one.
///
/// * `texts`: their names, if there are several
/// * `given`: as the user wrote it, or what stands above the column
pub fn text_cell(texts: Option<&Names>, given: &str) -> String {
    texts.map_or_else(String::new, |texts| format!("{:<width$}  ", texts.of(given), width = texts.width(ALL_TEXTS)))
}
