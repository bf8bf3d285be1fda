//! Books that go back to the first tokens.

use super::{HeadPlan, Ledger, Plan, as_position};
use crate::error::{Error, Result};

impl Ledger {
    /// What becomes of the rows when all tokens go but the first `len`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless every head holds every token for good; [`Error::Shape`] if there are not as many.
    pub(in crate::cache) fn plan_first(&self, len: usize) -> Result<Plan> {
        if len > self.seen {
            return Err(Error::shape("the first tokens of a layer", len, self.seen));
        }
        let holds_all = self.lens().iter().all(|&rows| rows == self.seen);
        if !holds_all || self.window.is_some() || self.is_watched() {
            return Err(Error::unsupported("going back to the first tokens where heads do not hold all of them"));
        }
        let end = as_position(len)?;
        let head = HeadPlan { stay: (0..len).collect(), prompt: Vec::new() };
        let heads = vec![head; self.layout.num_kv_heads];
        Ok(Plan { heads, decided: end..end, summaries: Vec::new(), seen: len })
    }
}
