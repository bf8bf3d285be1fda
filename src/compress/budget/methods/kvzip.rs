//! `kvzip` and `kvzip_plus`: what the model looks at when it repeats the prompt (Kim et al., arXiv 2505.23416; its
//! refinement, arXiv 2601.07891).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, Method, MethodFacts, Needs, Repetition};
use crate::compress::budget::allocation::Allocation;
use crate::compress::values;

/// Keeps the first `sink_tokens` positions, and of all other positions of all layers and heads together those that get the
/// largest weight from any row of any query head of their group when the model is asked to repeat the prompt, and reads it
/// once more.
///
/// It costs a second pass over the prompt, and the full cache of all layers until that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvZip {
    /// How many leading positions of the sequence are always kept; default 4. Every row of the repetition sees them.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
    /// Tokens that are repeated at a time, at least 1; default 2,048, as its authors have it.
    #[serde(deserialize_with = "values::positive")]
    pub repeat_chunk: usize,
    /// Whether the model is asked to repeat, in words and by the turn of its chat template; default true. Without, the
    /// tokens simply come once more.
    #[serde(deserialize_with = "values::flag")]
    pub instruction: bool,
}

impl KvZip {
    /// As its authors run it.
    pub const DEFAULT: Self = Self { sink_tokens: 4, repeat_chunk: 2048, instruction: true };

    fn repetition(self, relative: bool) -> Needs {
        let Self { sink_tokens, repeat_chunk, instruction } = self;
        let repetition = Repetition { instruction, chunk_tokens: repeat_chunk, sink_tokens, relative };
        Needs { repetition: Some(repetition), ..Needs::default() }
    }

    /// The largest of some numbers of each position, over the query heads.
    fn largest(self, facts: &MethodFacts<'_>, number: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let mut scores = vec![0.0_f32; facts.len];
        for head in 0..facts.repeat.largest_weights.len() {
            for (index, score) in scores.iter_mut().enumerate() {
                *score = score.max(number(head, index));
            }
        }
        scores[..facts.num_sinks(self.sink_tokens)].fill(ALWAYS);
        scores
    }
}

impl Default for KvZip {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for KvZip {
    fn name(&self) -> &'static str {
        "kvzip"
    }

    fn summary(&self) -> &'static str {
        "what the model attends to when it repeats the prompt in a second pass; one budget for all layers"
    }

    fn needs(&self) -> Needs {
        self.repetition(false)
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pooled
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        self.largest(facts, |head, index| facts.repeat.largest_weights[head][index])
    }
}

/// As [`KvZip`], with each weight times the length of the value behind the query head's part of the output projection, over
/// the length of what the asking row's attention reads: what the key adds to the row, relative to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KvZipPlus(pub KvZip);

impl Method for KvZipPlus {
    fn name(&self) -> &'static str {
        "kvzip_plus"
    }

    fn summary(&self) -> &'static str {
        "the same, with weights times what the values add, relative to the asking row"
    }

    fn needs(&self) -> Needs {
        self.0.repetition(true)
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pooled
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let repeat = facts.repeat;
        self.0.largest(facts, |head, index| {
            repeat.largest_weights[head][index] * repeat.squared_outputs[head][index].sqrt()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::super::{MethodFacts, RepeatFacts};
    use super::*;

    #[test]
    fn scores_are_the_largest_over_the_group_and_sinks_come_first() {
        let weights = [vec![0.5, 0.25, 0.0, 1.0], vec![0.125, 0.5, 0.25, 0.5]];
        let outputs = [vec![4.0, 1.0, 9.0, 0.25], vec![64.0, 4.0, 16.0, 4.0]];
        let repeat = RepeatFacts { largest_weights: &weights, squared_outputs: &outputs };
        let facts = MethodFacts { repeat, ..facts(4, 1) };
        let settings = |sink_tokens| KvZip { sink_tokens, ..KvZip::DEFAULT };
        assert_eq!(settings(0).scores(&facts), [0.5, 0.5, 0.25, 1.0]);
        assert_eq!(KvZipPlus(settings(0)).scores(&facts), [1.0, 1.0, 1.0, 1.0]);
        assert_eq!(settings(1).scores(&facts), [ALWAYS, 0.5, 0.25, 1.0]);
        let later = MethodFacts { first_position: 3, ..facts };
        assert_eq!(settings(4).scores(&later), [ALWAYS, 0.5, 0.25, 1.0]);
        assert_eq!(settings(3).scores(&later)[0], 0.5);
    }
}
