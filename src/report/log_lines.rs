//! The lines of the original's log: each head's choice, and each layer's saving. Scripts read them, so they stay as
//! they are.

use super::megabytes;
use crate::cache::LayerSummary;
use crate::config::AdaptiveConfig;

/// The messages of one layer: one for each head, in the order in which the search recovered them (by level, then head),
/// then the layer's block. The time stamp is the log writer's. A method with a budget stands in place of policies.
///
/// A cache that is full by request has no choices, and no lines.
#[must_use]
pub fn log_lines(summary: &LayerSummary, config: &AdaptiveConfig) -> Vec<String> {
    let layer = summary.layer;
    let mut heads: Vec<_> = summary.heads.iter().filter_map(|head| head.level.map(|level| (level, head))).collect();
    if heads.is_empty() {
        return Vec::new();
    }
    heads.sort_by_key(|(level, head)| (*level, head.kv_head));
    let mut lines: Vec<String> = heads
        .into_iter()
        .map(|(level, head)| {
            let policies: Vec<String> = config.level_names(level).iter().map(|name| format!("'{name}'")).collect();
            format!(
                "layer_id:{layer}(heads:{})->[{}]-> kv cache len:{}->{}",
                head.kv_head,
                policies.join(", "),
                summary.prompt_len,
                head.positions.len()
            )
        })
        .collect();
    let bytes = summary.bytes;
    lines.push(format!(
        "layer_id:{layer} cache:\n{:.3} MB -> {:.3}MB\nsaving:\n{:.3}MB ({:.3})%",
        megabytes(bytes.raw),
        megabytes(bytes.kept),
        megabytes(bytes.raw.saturating_sub(bytes.kept)),
        100.0 * bytes.saved_ratio()
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{CacheBytes, HeadSummary};
    use crate::policy::methods::SnapKv;

    #[test]
    fn lines_are_the_originals() {
        let head = |kv_head, level, kept: u32| HeadSummary {
            kv_head,
            level: Some(level),
            recovered: vec![0.0; level + 1],
            positions: (0..kept).collect(),
        };
        // Llama-2-7B, layer 30: 32 heads, 18 tokens, f16; 467 of 576 kept.
        let summary = LayerSummary {
            layer: 30,
            prompt_len: 18,
            heads: vec![head(0, 4, 18), head(1, 2, 16), head(2, 0, 2)],
            bytes: CacheBytes { raw: 576 * 512, kept: 467 * 512, allocated: 467 * 512 },
        };
        assert_eq!(
            log_lines(&summary, &AdaptiveConfig::default()),
            [
                "layer_id:30(heads:2)->['special']-> kv cache len:18->2",
                "layer_id:30(heads:1)->['special', 'punctuation', 'frequency']-> kv cache len:18->16",
                "layer_id:30(heads:0)->['full']-> kv cache len:18->18",
                "layer_id:30 cache:\n0.281 MB -> 0.228MB\nsaving:\n0.053MB (18.924)%",
            ]
        );
    }

    #[test]
    fn a_method_stands_in_place_of_policies() {
        let head = HeadSummary { kv_head: 1, level: Some(0), recovered: Vec::new(), positions: (0..1024).collect() };
        let summary = LayerSummary { layer: 3, prompt_len: 2048, heads: vec![head], bytes: CacheBytes::default() };
        assert_eq!(
            log_lines(&summary, &AdaptiveConfig::for_method(&SnapKv))[0],
            "layer_id:3(heads:1)->['snapkv']-> kv cache len:2048->1024"
        );
    }
}
