//! Budgets of configurations that take one.

use serde::Serialize;

use crate::config::AdaptiveConfig;
use crate::error::Result;

/// How much a configuration may keep of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// A share of all keys and values, in 0..=1.
    KeptRatio(f64),
    /// Bytes of all layers together.
    Bytes(usize),
}

/// A configuration under a budget; `None` if it takes none: FastGen's search keeps what recovers a head, however much
/// that is.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if the budget makes no sense for the configuration.
pub fn with_budget(_config: &AdaptiveConfig, _budget: Budget) -> Result<Option<AdaptiveConfig>> {
    Ok(None)
}
