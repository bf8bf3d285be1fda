//! How attention heads share keys and values.

use crate::error::{Error, Result};

/// The heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadLayout {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Numbers in one key, value or query.
    pub head_dim: usize,
}

impl HeadLayout {
    /// Query heads that share a KV head; 0 if there is none.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_heads.checked_div(self.num_kv_heads).unwrap_or(0)
    }

    /// Checks that there are heads, that each query head has a KV head, and that their rows have numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] if not.
    pub fn check(&self) -> Result<()> {
        let Self { num_heads, num_kv_heads, head_dim } = *self;
        if num_heads > 0 && head_dim > 0 && num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads) {
            return Ok(());
        }
        Err(Error::shape("an attention layer", "query heads that KV heads divide, of one number or more", self))
    }

    /// Numbers in all queries of one token.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Numbers in all keys (or all values) of one token.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// What scores are multiplied by: `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn scale(&self) -> f32 {
        #[expect(clippy::cast_precision_loss)]
        let head_dim = self.head_dim as f32;
        head_dim.sqrt().recip()
    }
}
