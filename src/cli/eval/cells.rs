//! What stands in a cell of more than one of `eval`'s tables.

use adaptive_kvcache::eval::{ALL_TEXTS, GivenBudget};

use crate::cli::measure::Names;

/// Width of a column of budgets.
pub const BUDGET_WIDTH: usize = 12;

/// A budget in a table: the share, or the size; and whose positions compete for it, if that was given.
pub fn budget_text(given: Option<GivenBudget>) -> String {
    let Some(GivenBudget { budget, budget_over }) = given else { return "-".to_owned() };
    budget_over.map_or_else(|| budget.to_string(), |over| format!("{budget} {}", over.name()))
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
