//! Going back to the first tokens of a full cache.

use super::layer::{CacheLayer, Rows};
use super::{AdaptiveKvCache, Retention};
use crate::error::{Error, Result};

impl AdaptiveKvCache {
    /// Forgets all tokens but the first, as if the others had never come. What is left is what a prompt of these tokens
    /// leaves.
    ///
    /// * `len`: tokens that stay, at most those that were given
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless every head holds every token for good, at its own position: of a full cache without a
    /// sliding window whose rows have not [moved](super::Overflow::Shift);
    /// [`Error::Shape`] if there are not as many tokens. Nothing has changed then. As [`Rows::carry_out`]; the cache is of no
    /// use then.
    pub fn keep_first(&mut self, len: usize) -> Result<()> {
        if self.shifted() > 0 {
            return Err(Error::unsupported("going back to the first tokens of a cache whose rows have moved"));
        }
        if !matches!(self.retention, Retention::Full) {
            return Err(Error::unsupported("going back to the first tokens of a compressed cache"));
        }
        if len < self.seen() {
            self.layers.expect_first(len)?;
            self.layers.keep_first(len)?;
            self.ids.truncate(len);
        }
        if len == self.seen() { Ok(()) } else { Err(Error::shape("the first tokens of a cache", len, self.seen())) }
    }
}

impl<R: Rows> CacheLayer<R> {
    /// Checks that [`keep_first`](Self::keep_first) is possible.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is not.
    pub(super) fn expect_first(&self, len: usize) -> Result<()> {
        self.ledger().plan_first(len).map(drop)
    }

    /// Forgets all tokens but the first `len`.
    ///
    /// # Errors
    /// As [`expect_first`](Self::expect_first) and [`Rows::carry_out`].
    pub(super) fn keep_first(&mut self, len: usize) -> Result<()> {
        let (ledger, rows) = self.parts_mut();
        let plan = ledger.plan_first(len)?;
        rows.carry_out(ledger, &plan, None)?;
        ledger.settle(plan);
        Ok(())
    }
}
