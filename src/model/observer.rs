//! Who watches a prompt while it is processed.

use std::ops::ControlFlow;

use crate::attention::map::MapAccumulator;
use crate::cache::LayerSummary;
use crate::error::Result;

/// Watches a prefill: progress, choices, attention maps; can stop it.
///
/// Every method does nothing by default.
pub trait PrefillObserver {
    /// Called after each chunk of each layer; `done` goes up to `total` (prompt rows times layers). Breaking ends the
    /// prefill with [`Error::Interrupted`](crate::Error::Interrupted).
    fn progress(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The largest side, in cells, of the attention maps to collect; `None` for no maps.
    fn map_side(&self) -> Option<usize> {
        None
    }

    /// Called when a layer is stored, with its maps (one for each query head) if there are any.
    ///
    /// # Errors
    /// Whatever the observer's own work fails with; it ends the prefill.
    fn layer_done(&mut self, _summary: &LayerSummary, _maps: Option<&MapAccumulator>) -> Result<()> {
        Ok(())
    }
}

/// Watches nothing.
impl PrefillObserver for () {}
