//! Words that ask for a repetition, as the authors of `KVzip` say them (Kim et al., arXiv 2505.23416).
//!
//! Not for: what follows from the answer (see [`crate::compress`]).

use std::sync::Arc;

use super::{ChatContext, ChatFormat, Place, Tokenizer};
use crate::compress::AdaptiveConfig;
use crate::error::Result;
use crate::tokens::RepeatWords;

/// Asks for all of a text.
const FROM_START: &str = "\n\nRepeat the previous context exactly.";

/// Asks for a part, whose last words before are said next.
const FROM_WORDS: &str = "\n\nRepeat the part of the previous context exactly, starting with";

/// What ends a question to a model that knows no messages.
const PLAIN_TURN: &str = "\n";

impl Tokenizer {
    /// Words that ask for a repetition, with the turn from the user to the assistant as the chat template has it (without
    /// thinking, where it can be chosen), or the end of a line if there is none.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), [`chat`](Self::chat) and [`Chat::encode_answer_start`](super::Chat::encode_answer_start).
    pub fn repeat_words(&self) -> Result<RepeatWords> {
        let encode = |text: &str| {
            let mut ids = Vec::new();
            self.encode_text(text, Place::AfterText, &mut ids).map(|()| ids)
        };
        let turn = if self.chat_format() == ChatFormat::None {
            encode(PLAIN_TURN)?
        } else {
            let mut context = ChatContext::default();
            context.template_kwargs.insert("enable_thinking".to_owned(), false.into());
            self.chat(&context)?.encode_answer_start()?
        };
        Ok(RepeatWords { from_start: encode(FROM_START)?, from_words: encode(FROM_WORDS)?, turn })
    }

    /// The [words](Self::repeat_words) for a cache under a configuration, or why there are none; `None` if its method says
    /// none.
    #[must_use]
    pub fn words_for(&self, config: &AdaptiveConfig) -> Option<Arc<Result<RepeatWords, String>>> {
        let repetition = config.budgeted().and_then(|method| method.needs().repetition);
        let words = || self.repeat_words().map_err(|error| error.to_string());
        repetition.filter(|repetition| repetition.instruction).map(|_| Arc::new(words()))
    }
}
