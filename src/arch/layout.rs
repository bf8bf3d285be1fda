//! How attention heads share keys and values.

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
    /// Query heads that share a KV head.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
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
