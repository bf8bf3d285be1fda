//! What a sequence does when it reaches a bound: of its budget in bytes, or of the model's context.

/// The newest tokens that stay when what is held is judged anew, unless it is said otherwise.
pub const PROTECTED: usize = 128;

/// What happens when a sequence reaches the length that the model was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// It ends there.
    #[default]
    Stop,
    /// What is kept moves together, so that there are positions for what comes: the first tokens stay where they are
    /// ([`Bounds::pinned`]), the keys of all others are turned to positions that follow one another without gaps, in their order,
    /// the newest of all heads side by side. A head that then still holds more rows than half of the context has lets the
    /// lowest go: by their scores where there are any, else the oldest.
    Shift,
}

/// How a sequence stays within its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The first tokens, which stay in any case: attention sinks, a system prompt; of a small budget, as many as it has room for
    /// beside the newest. By default 4, as `StreamingLLM` keeps.
    pub pinned: usize,
    /// The newest tokens that stay in any case when what is held is judged anew, of a small budget half as many rows as a head
    /// has of it on average; by default [`PROTECTED`].
    pub protected: usize,
    /// Tokens for which room is left after a prompt, within the budget, before what is held is judged anew; of a small budget
    /// an eighth. By default none: what was read may fill the budget.
    pub ahead: usize,
    /// What happens at the end of the context.
    pub overflow: Overflow,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { pinned: 4, protected: PROTECTED, ahead: 0, overflow: Overflow::Stop }
    }
}
