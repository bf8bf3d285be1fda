//! A prompt in the parts in which it is read, and how much of it there is room for.

use crate::error::{Error, Result};
use crate::eval::Subject;
use crate::tokenizer::{ChatContext, ChatFormat, ChatMessage};

/// What is read, asked and expected. Read one behind the other the parts are RULER's prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// What is read, and compressed, before the question is known.
    pub context: String,
    pub question: String,
    /// What the answer begins with, given.
    pub answer_prefix: String,
    /// What a right answer holds, all of it, in upper or lower case.
    pub answers: Vec<String>,
}

/// A prompt's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PromptIds {
    /// With what the chat template puts before it.
    pub context: Vec<u32>,
    /// Question and the answer's beginning, with what the template puts between them.
    pub question: Vec<u32>,
}

impl PromptIds {
    pub(super) fn len(&self) -> usize {
        self.context.len() + self.question.len()
    }
}

impl Prompt {
    /// The share of the expected answers that a text holds, in 0..=1.
    #[expect(clippy::cast_precision_loss)]
    pub(super) fn score(&self, text: &str) -> f64 {
        let text = text.to_lowercase();
        let found = self.answers.iter().filter(|answer| text.contains(&answer.to_lowercase())).count();
        found as f64 / self.answers.len().max(1) as f64
    }

    /// Cuts the prompt as kvpress does: context and question are one message of the user, and the answer's beginning is
    /// the assistant's; without a chat template a line break stands between question and answer. A template that knows
    /// thinking is told to leave it out.
    pub(super) fn encode(&self, subject: &Subject<'_>) -> Result<PromptIds> {
        let Self { context, question, answer_prefix, .. } = self;
        let tokenizer = subject.tokenizer;
        let (alone, mut whole) = if tokenizer.chat_format() == ChatFormat::None {
            (tokenizer.encode(context)?, tokenizer.encode(&format!("{context}{question}\n{answer_prefix}"))?)
        } else {
            let mut told = ChatContext::default();
            told.template_kwargs.insert("enable_thinking".to_owned(), false.into());
            let chat = tokenizer.chat(&told)?;
            let user = |text: String| chat.encode(&[ChatMessage::new("user", text)]);
            let mut whole = user(format!("{context}{question}"))?;
            whole.extend(tokenizer.encode_plain(answer_prefix)?);
            (user(context.clone())?, whole)
        };
        let shared = alone.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        let question = whole.split_off(shared);
        if whole.is_empty() || question.is_empty() {
            return Err(Error::shape(
                "a prompt's context and question",
                "tokens of both",
                (whole.len(), question.len()),
            ));
        }
        Ok(PromptIds { context: whole, question })
    }
}

/// The largest number of a range that fits, if numbers below one that fits do so, too; `None` if the first does not.
pub(super) fn largest_fitting(
    (first, last): (usize, usize),
    mut fits: impl FnMut(usize) -> Result<bool>,
) -> Result<Option<usize>> {
    if first > last || !fits(first)? {
        return Ok(None);
    }
    // What fits, and what is not known to.
    let (mut lower, mut upper) = (first, last.saturating_add(1));
    let mut next = first.saturating_mul(2);
    while next < upper {
        if fits(next)? {
            (lower, next) = (next, next.saturating_mul(2));
        } else {
            upper = next;
        }
    }
    while upper - lower > 1 {
        let middle = lower + (upper - lower) / 2;
        if fits(middle)? {
            lower = middle;
        } else {
            upper = middle;
        }
    }
    Ok(Some(lower))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_share_of_the_answers_that_are_there() {
        let answers = ["ABC", "12", "x y"].map(str::to_owned).to_vec();
        let prompt = Prompt { context: String::new(), question: String::new(), answer_prefix: String::new(), answers };
        for (text, found) in [("", 0.0), ("abc", 1.0), ("It's 112, Abc.", 2.0), ("X Y 12 abc abc", 3.0), ("x  y", 0.0)]
        {
            assert!((prompt.score(text) - found / 3.0).abs() < 1e-12, "{text}");
        }
    }

    #[test]
    fn the_largest_number_that_fits_is_found() {
        for limit in 0..40 {
            for (first, last) in [(1, 30), (3, 3), (7, 100), (5, 4)] {
                let mut asked = 0;
                let found = largest_fitting((first, last), |number| {
                    asked += 1;
                    assert!((first..=last).contains(&number));
                    Ok(number <= limit)
                });
                let expected = (first..=last).rev().find(|&number| number <= limit);
                assert_eq!(found.unwrap(), expected, "{first}..={last}, {limit}");
                assert!(asked <= 14, "{asked}");
            }
        }
    }
}
