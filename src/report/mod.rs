//! What a run says about itself: the table of the layers, the JSON report.
//!
//! Everything here turns results into text; nothing is computed or printed. Pictures are [`crate::plot`]'s.

mod json;
mod table;

pub use crate::sizes::{MB, is_small, megabytes, short_size, size};
pub(crate) use json::write_json;
pub use json::{
    BatchReport, BatchTextReport, DraftReport, KvReport, LayerReport, MemoryReport, ModelReport, Report, RunReport,
    Timings, head_policies,
};
pub use table::memory_table;
