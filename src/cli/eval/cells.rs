//! What stands in a cell of more than one of `eval`'s tables.

use adaptive_kvcache::compress::Budget;
use adaptive_kvcache::report::short_size;

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
