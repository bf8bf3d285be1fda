//! Policies: each names the prompt positions that one KV head keeps (paper, section 3.4).
//!
//! A policy is a pure function on the host over one KV head's facts; it never sees a tensor, a layer or a file. A new
//! policy is one new file here and one line in [`POLICIES`]: the configuration, `--help`, the search and the contract
//! tests take it from the registry.
//!
//! Not for: deciding which policies a head needs (see [`super::search`]).

mod frequency;
mod full;
mod locality;
mod punctuation;
mod special;

use super::FastGen;
use crate::tokens::TokenClass;

pub use frequency::Frequency;
pub use full::Full;
pub use locality::Locality;
pub use punctuation::Punctuation;
pub use special::Special;

/// Every policy that a configuration can name, in the default search order (paper, eq. 2).
pub static POLICIES: &[&dyn Policy] = &[&Special, &Punctuation, &Frequency, &Locality, &Full];

/// What a policy may know of the rows of one KV head: after a prompt, after a segment of a longer sequence, or after a
/// decoding step, when some rows are gone.
#[derive(Debug, Clone, Copy)]
pub struct HeadFacts<'a> {
    /// Position of the first token of the segment: 0 for a prompt.
    pub first_position: usize,
    /// Tokens of the segment, those included that the head holds no more: what ratios are of.
    pub segment_len: usize,
    /// `[n]` position of each row, in any order; all of the segment after a prompt.
    pub positions: &'a [u32],
    /// `[n]` class of the token of each row.
    pub classes: &'a [TokenClass],
    /// `[n]` attention that each row received: column sums of the attention maps over all query rows and over the
    /// query heads of this KV head. Empty unless some policy of the search [needs them](Policy::needs_column_sums).
    pub column_sums: &'a [f32],
}

/// One rule for what a KV head keeps.
pub trait Policy: Sync + std::fmt::Debug {
    /// The name in configurations and logs.
    fn name(&self) -> &'static str;

    /// What it keeps and which setting it reads, in one line for `--help`.
    fn summary(&self) -> &'static str;

    /// Sets `keep[i]` for every row `i` that this policy keeps, and leaves the others as they are.
    ///
    /// * `keep`: `[n]`, as long as `facts.positions`
    fn mark(&self, facts: &HeadFacts<'_>, settings: &FastGen, keep: &mut [bool]);

    /// Whether [`mark`](Self::mark) reads `facts.column_sums`.
    fn needs_column_sums(&self) -> bool {
        false
    }

    /// The width, in positions, of the sliding window that this policy means at each query row of a prompt of
    /// `prompt_len` tokens; `None` for a policy whose keep-set is the same for every row.
    fn window(&self, _prompt_len: usize, _settings: &FastGen) -> Option<usize> {
        None
    }

    /// Whether this policy keeps everything, and so ends the search.
    fn keeps_all(&self) -> bool {
        false
    }
}

/// Finds a policy by its name in configurations.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static dyn Policy> {
    POLICIES.iter().copied().find(|policy| policy.name() == name)
}
