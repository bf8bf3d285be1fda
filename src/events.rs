//! What the library says while it works: `tracing` events of what heads and layers keep, as it is decided.
//!
//! Whoever uses the library hears of it with a subscriber of their own; without one, an event costs nothing. All are of the
//! level INFO.
//!
//! | target | fields |
//! |---|---|
//! | [`HEAD`] | `layer`, `head` (its KV head), `policies` (names, `", "` between them), `seen`, `kept` (tokens) |
//! | [`THREADS`] | `threads` (how many compute), `source` (who said so, as in reports) |
//! | [`LAYER`] | `layer`, `raw_bytes` (of a full cache), `kept_bytes` |
//!
//! Not for: how they are written down, which is the subscriber's.

use tracing::{Level, enabled, info};

use crate::cache::LayerSummary;
use crate::compress::AdaptiveConfig;

/// Target of the event of one head's choice.
pub const HEAD: &str = "adaptive_kvcache::head";
/// Target of the event of one layer's saving, which follows those of its heads.
pub const LAYER: &str = "adaptive_kvcache::layer";

/// Target of the event of how many threads compute.
pub const THREADS: &str = "adaptive_kvcache::threads";

/// Says how many threads compute.
///
/// * `source`: see [`RunReport`](crate::report::RunReport)
pub fn threads_chosen(threads: usize, source: &str) {
    info!(target: THREADS, threads, source);
}

/// Says what a layer keeps: one event for each head, in the order in which the search recovered them (by level, then head),
/// then one for the layer. A method with a budget stands in place of policies.
///
/// A cache that is full by request has no choices, and no events.
pub fn layer_decided(summary: &LayerSummary, config: &AdaptiveConfig) {
    if !enabled!(target: HEAD, Level::INFO) && !enabled!(target: LAYER, Level::INFO) {
        return;
    }
    let layer = summary.layer;
    let mut heads: Vec<_> = summary.heads.iter().filter_map(|head| head.level.map(|level| (level, head))).collect();
    heads.sort_by_key(|(level, head)| (*level, head.kv_head));
    for &(level, head) in &heads {
        let policies = config.level_names(level).join(", ");
        info!(target: HEAD, layer, head = head.kv_head, policies, seen = summary.prompt_len, kept = head.positions.len());
    }
    if !heads.is_empty() {
        info!(target: LAYER, layer, raw_bytes = summary.bytes.raw, kept_bytes = summary.bytes.kept);
    }
}
