//! What each KV head keeps: configurations, and the decision, once for each prompt, from the head's own attention.
//!
//! [`stats`] says what has to be collected while a prompt is processed: vectors of the prompt's length for each head, never
//! a map. There are two kinds of methods, and a [`config`] is of one of them: [`fastgen`] searches for the smallest union
//! of policies that recovers a head (paper, algorithm 1); [`budget`] keeps the best of what a method scores. [`eviction`]
//! goes on while tokens are generated. All of it sees numbers of one head or layer, never a tensor, a file or a backend.
//!
//! A new policy is one file in [`fastgen::policies`] and a line there, a new method one in [`budget::methods`].
//!
//! Not for: computing attention (see [`crate::attention`]) or storing what is kept (see [`crate::cache`]).

pub mod budget;
pub mod config;
pub mod eviction;
pub mod fastgen;
mod section;
pub mod segment;
pub mod stats;
mod values;

pub use budget::allocation::Allocation;
pub use budget::candidates::{Candidates, Safe};
pub use budget::methods::{METHODS, Method, MethodFacts, Needs, method_by_name};
pub use budget::pool::Pool;
pub use budget::profile::{HeadCost, HeadPrior, HeadProfile};
pub use budget::queries::QueryStats;
pub use budget::select::{HeadRows, LayerFacts, LayerPlace, LayerRepeat, LayerReplay};
pub use budget::{Budget, BudgetOver, BudgetScale, BudgetedMethod};
pub use config::{AdaptiveConfig, Compression, DecodeMode};
pub use eviction::{Eviction, HeldRows};
pub use fastgen::policies::{POLICIES, Policy};
pub use fastgen::{Criterion, FASTGEN, FastGen, GroupReduction, ProfileRows, SearchOrder, TokenIds};
pub use section::Section;
pub use segment::{HeadChoice, Segment};
pub use stats::{HeadStats, LayerStats, StatsRequest};
pub use values::parse_size;

/// How many of `len` positions a ratio stands for: `floor(ratio * len + 1e-9)`, so that 0.3 of 10 is 3.
#[must_use]
pub fn ratio_count(ratio: f64, len: usize) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let count = (ratio * len as f64 + 1e-9).floor().max(0.0) as usize;
    count.min(len)
}
