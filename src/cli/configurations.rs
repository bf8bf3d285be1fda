//! Configurations by the names that the command line has for them.

use adaptive_kvcache::compress::AdaptiveConfig;
use adaptive_kvcache::{Error, Result};

/// The setting that is no configuration.
pub const FULL: &str = "full";

/// The configurations that are built in, by name.
const BUILT_IN: [(&str, &str); 2] =
    [("fastgen", include_str!("../../configs/fastgen.json")), ("replay", include_str!("../../configs/best.json"))];

/// A configuration that is built in, or a file's; `None` for the full cache.
pub fn configuration(name: &str) -> Result<Option<AdaptiveConfig>> {
    if name == FULL {
        return Ok(None);
    }
    if let Some((_, json)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return AdaptiveConfig::parse(json, None).map(Some);
    }
    AdaptiveConfig::from_file(name).map(Some).map_err(|error| match error {
        Error::Io { .. } => {
            let known: Vec<_> = BUILT_IN.iter().map(|(known, _)| format!("`{known}`")).collect();
            let known = known.join(", ");
            error.with_hint(format!("a configuration is `{FULL}`, {known}, or the path of a JSON file"))
        }
        other => other,
    })
}

/// Whether the name is no file's.
pub fn is_built_in(name: &str) -> bool {
    name == FULL || BUILT_IN.iter().any(|(known, _)| *known == name)
}
