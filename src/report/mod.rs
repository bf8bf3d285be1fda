//! What a run says about itself: log lines, the table of the layers, the JSON report.
//!
//! Everything here turns results into text; nothing is computed or printed. Pictures are [`crate::plot`]'s.

mod json;
mod log_lines;
mod table;

pub(crate) use json::write_json;
pub use json::{
    BatchReport, BatchTextReport, KvReport, LayerReport, MemoryReport, ModelReport, Report, Timings, head_policies,
};
pub use log_lines::log_lines;
pub use table::memory_table;

/// Bytes in a MB, as in the original.
pub const MB: f64 = 1024.0 * 1024.0;

/// Bytes as MB.
#[must_use]
#[expect(clippy::cast_precision_loss)]
pub fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / MB
}
