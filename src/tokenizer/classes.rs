//! Which tokens are special and which are punctuation: what a configuration says, and where it leaves it open, the
//! vocabulary.
//!
//! Not for: what follows from a token's class (see [`crate::compress`]).

use super::Tokenizer;
use std::borrow::Cow;

use crate::compress::{AdaptiveConfig, FastGen, TokenIds};
use crate::tokens::TokenClassifier;

impl Tokenizer {
    /// What tells the class of each token under a configuration: the ids that it lists; where it says `"auto"`, this
    /// tokenizer's [control tokens](Self::special_ids), and the tokens that consist of characters of its
    /// `punctuation_list` [only](Self::punctuation_ids).
    #[must_use]
    pub fn classifier(&self, config: &AdaptiveConfig) -> TokenClassifier {
        // Methods with a budget list none.
        let search = config.fastgen().map_or_else(|| Cow::Owned(FastGen::default()), Cow::Borrowed);
        let special = match &search.special_token_ids {
            TokenIds::Auto => self.special_ids().to_vec(),
            TokenIds::List(ids) => ids.clone(),
        };
        let punctuation = match &search.punctuation_token_ids {
            TokenIds::Auto => self.punctuation_ids(&search.punctuation_list),
            TokenIds::List(ids) => ids.clone(),
        };
        TokenClassifier::new(special, punctuation)
    }
}
