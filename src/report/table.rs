//! The table that the original published: layer, raw MB, compressed MB, saved percent.

use std::fmt::Write as _;

use super::megabytes;
use crate::cache::{CacheBytes, LayerSummary};

/// One line for each layer, then the average. Each line ends in a line feed.
#[must_use]
pub fn memory_table(layers: &[LayerSummary]) -> String {
    let mut table = String::from("layer    raw MB   compressed MB   saved %\n");
    let mut line = |name: &str, raw: f64, kept: f64, saved: f64| {
        // Writing to a string cannot fail.
        let _ = writeln!(table, "{name:>5}  {raw:>8.3}  {kept:>14.3}  {saved:>8.3}");
    };
    for layer in layers {
        let bytes = layer.bytes;
        let saved = 100.0 * bytes.saved_ratio();
        line(&layer.layer.to_string(), megabytes(bytes.raw), megabytes(bytes.kept), saved);
    }
    if !layers.is_empty() {
        #[expect(clippy::cast_precision_loss)]
        let count = layers.len() as f64;
        let total: CacheBytes = layers.iter().map(|layer| layer.bytes).sum();
        let mean_saved = layers.iter().map(|layer| layer.bytes.saved_ratio()).sum::<f64>() / count;
        line("mean", megabytes(total.raw) / count, megabytes(total.kept) / count, 100.0 * mean_saved);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_over_layers() {
        let layer = |layer, raw, kept| LayerSummary {
            layer,
            prompt_len: 4,
            heads: Vec::new(),
            bytes: CacheBytes { raw, kept, allocated: kept, mapped: 0 },
        };
        let mb = 1024 * 1024;
        let expected = "layer    raw MB   compressed MB   saved %\n\
                        \x20   0     4.000           3.000    25.000\n\
                        \x20   1     4.000           1.000    75.000\n\
                        \x20mean     4.000           2.000    50.000\n";
        assert_eq!(memory_table(&[layer(0, 4 * mb, 3 * mb), layer(1, 4 * mb, mb)]), expected);
    }
}
