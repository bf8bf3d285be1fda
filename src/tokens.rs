//! What the policies may know of a token: whether it is special, and whether it is punctuation; and words that ask for a
//! repetition, as tokens.
//!
//! Not for: turning text into tokens (see [`crate::tokenizer`]).

use std::collections::HashSet;

/// The classes that one token belongs to; a token can be in both, or in none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenClass {
    /// The id is one of the special (control) tokens.
    pub special: bool,
    /// The token consists of punctuation only.
    pub punctuation: bool,
}

/// Tells the class of a token from its id.
#[derive(Debug, Clone, Default)]
pub struct TokenClassifier {
    special: HashSet<u32>,
    punctuation: HashSet<u32>,
}

impl TokenClassifier {
    /// Collects the ids of both classes; the order and repetitions do not matter.
    #[must_use]
    pub fn new(special: impl IntoIterator<Item = u32>, punctuation: impl IntoIterator<Item = u32>) -> Self {
        Self { special: special.into_iter().collect(), punctuation: punctuation.into_iter().collect() }
    }

    /// The class of one token id; ids outside the vocabulary are in no class.
    #[must_use]
    pub fn classify(&self, id: u32) -> TokenClass {
        TokenClass { special: self.special.contains(&id), punctuation: self.punctuation.contains(&id) }
    }

    /// The classes of a sequence: one for each id, in order.
    #[must_use]
    pub fn classify_all(&self, ids: &[u32]) -> Vec<TokenClass> {
        ids.iter().map(|&id| self.classify(id)).collect()
    }
}

/// Words that ask a model to repeat what it has read, as tokens of its vocabulary.
///
/// Not for: when they are said (see [`Repetition`](crate::compress::budget::methods::Repetition)).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RepeatWords {
    /// Ask for a repetition from the beginning.
    pub from_start: Vec<u32>,
    /// Ask for one of what follows some tokens, which are to be said next.
    pub from_words: Vec<u32>,
    /// End what is asked, and begin the answer.
    pub turn: Vec<u32>,
}
