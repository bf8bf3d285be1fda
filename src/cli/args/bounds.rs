//! Options of what happens at a sequence's bounds.

use adaptive_kvcache::cache::{Bounds, Overflow, PROTECTED};
use clap::{Args, ValueEnum};

/// What happens when a sequence reaches its budget in bytes, or the end of the model's context.
#[derive(Debug, Clone, Copy, Args)]
pub struct BoundsArgs {
    /// The newest tokens that stay in any case when what is held is judged anew, to stay within --kv-budget; of a small budget
    /// fewer
    #[arg(long, value_name = "N", default_value_t = PROTECTED)]
    pub protect: usize,
    /// At the end of the model's context: stop; or shift, which moves what is kept together, to positions without gaps, so that
    /// the text goes on
    #[arg(long, value_enum, default_value_t = OverflowChoice::Stop)]
    pub context_overflow: OverflowChoice,
}

/// Tokens for which a budget leaves room after a prompt, at most: then they are judged together with all that is held.
const AHEAD: usize = 256;

impl BoundsArgs {
    /// The bounds of a sequence.
    ///
    /// * `new_tokens`: that are generated after a prompt, at most
    pub fn bounds(self, new_tokens: usize) -> Bounds {
        let overflow = match self.context_overflow {
            OverflowChoice::Stop => Overflow::Stop,
            OverflowChoice::Shift => Overflow::Shift,
        };
        Bounds { protected: self.protect, ahead: new_tokens.min(AHEAD), overflow, ..Bounds::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OverflowChoice {
    Stop,
    Shift,
}
