//! What a run says about itself: the table of the layers, the JSON report.
//!
//! Everything here turns results into text; nothing is computed or printed. Pictures are [`crate::plot`]'s.

mod json;
mod table;

pub(crate) use json::write_json;
pub use json::{
    BatchReport, BatchTextReport, KvReport, LayerReport, MemoryReport, ModelReport, Report, Timings, head_policies,
};
pub use table::memory_table;

/// Bytes in a MB, as in the original.
pub const MB: f64 = 1024.0 * 1024.0;

/// Bytes as MB.
#[must_use]
#[expect(clippy::cast_precision_loss)]
pub fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / MB
}

/// Whether a size would be `0.0 MB`, or nearly so, and is better given in bytes: below 0.1 MB.
#[must_use]
pub fn is_small(bytes: usize) -> bool {
    megabytes(bytes) < 0.1
}

/// A size as messages give it: `64.0 MB`, or bytes if it [is small](is_small).
#[must_use]
pub fn size(bytes: usize) -> String {
    match bytes {
        1 => "1 byte".to_owned(),
        _ if is_small(bytes) => format!("{bytes} bytes"),
        _ => format!("{:.1} MB", megabytes(bytes)),
    }
}

/// A size as tables name a setting: `64MB`, `1.25MB`, or `10240B` if it [is small](is_small).
#[must_use]
pub fn short_size(bytes: usize) -> String {
    if is_small(bytes) {
        return format!("{bytes}B");
    }
    let digits = if megabytes(bytes) < 10.0 { 3 } else { 1 };
    let text = format!("{:.digits$}", megabytes(bytes));
    format!("{}MB", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sizes_are_given_in_bytes() {
        let mb = |mb: f64| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let bytes = (mb * MB) as usize;
            bytes
        };
        for (bytes, long, short) in [
            (0, "0 bytes", "0B"),
            (1, "1 byte", "1B"),
            (10_240, "10240 bytes", "10240B"),
            (104_857, "104857 bytes", "104857B"),
            (104_858, "0.1 MB", "0.1MB"),
            (mb(1.25), "1.2 MB", "1.25MB"),
            (mb(9.9999), "10.0 MB", "10MB"),
            (mb(64.0), "64.0 MB", "64MB"),
            (mb(1536.5), "1536.5 MB", "1536.5MB"),
        ] {
            assert_eq!((size(bytes).as_str(), short_size(bytes).as_str()), (long, short));
        }
    }
}
