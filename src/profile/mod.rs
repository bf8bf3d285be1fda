//! Profiling: which policies each KV head needs, decided once for each prompt, from its own attention (paper,
//! algorithm 1).
//!
//! [`stats`] says what has to be collected while the prompt is processed: vectors of the prompt's length for each head,
//! never a map. [`search`] tries the unions of policies in order and takes the first that recovers the head. [`budgeted`]
//! keeps what a method with a budget finds worth most, for which [`queries`] sums up queries; [`pool`] shares one budget
//! out over all layers. [`eviction`] goes on while tokens are generated.
//!
//! Not for: computing attention (see [`crate::attention`]) or storing what is kept (see [`crate::cache`]).

pub mod budgeted;
pub mod eviction;
pub mod pool;
pub mod queries;
pub mod search;
pub mod stats;

pub use budgeted::{Budgeted, LayerFacts, LayerPlace, LayerReplay};
pub use eviction::{Eviction, HeldRows};
pub use pool::Pool;
pub use queries::QueryStats;
pub use search::{HeadChoice, Profiler, Segment};
pub use stats::{HeadStats, LayerStats, StatsRequest};
