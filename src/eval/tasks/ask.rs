//! Reading a text into a cache, and asking.
//!
//! A text's cache is filled by one prefill that ends before the question, as if it were kept for later. The question is
//! then read token by token, and stays in the cache whole: so what is measured is what the text's compression cost, and
//! nothing that a profile of a question of twenty tokens would add. A conversation goes through [`Conversation`], as in
//! `chat`, with all that its further profiles cost.

use std::ops::ControlFlow;

use super::super::{Filled, Watch};
use super::{Observer, Subject, go_on};
use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::generate::{Conversation, Draft, Generation, GenerationOptions};
use crate::tokenizer::{ChatFormat, ChatMessage};

/// Tokens of an answer, at most.
const ANSWER_TOKENS: usize = 24;

/// Stands for whatever is asked.
const ANY_QUESTION: &str = "What was it?";

/// What is asked, and how the answer is known.
#[derive(Debug)]
pub(super) struct Question {
    /// Which of the depths it is about.
    pub depth_idx: usize,
    pub text: String,
    /// What a right answer holds, in upper or lower case.
    pub answer: String,
}

/// A text and the questions about it.
#[derive(Debug)]
pub(super) enum Trial {
    Text {
        text: String,
        questions: Vec<Question>,
    },
    /// Turns of a user, to be answered one after the other.
    Conversation {
        turns: Vec<String>,
        question: Question,
    },
}

/// How the questions of a text were answered.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    /// Index of the depth, and whether the answer was right.
    pub right: Vec<(usize, bool)>,
    /// Right before the first question.
    pub kept_ratio: f64,
    /// Right before the first question.
    pub kv_bytes: usize,
}

impl Outcome {
    /// Of a cache that holds the text, before anything was asked.
    fn of(cache: &AdaptiveKvCache) -> Self {
        Self { right: Vec::new(), kept_ratio: cache.kept_ratio(), kv_bytes: cache.bytes().kept }
    }

    fn note(&mut self, question: &Question, answer: &str) {
        let is_right = answer.to_lowercase().contains(&question.answer.to_lowercase());
        self.right.push((question.depth_idx, is_right));
    }
}

/// Whether messages can be put into a form that the model knows.
pub(super) fn can_chat(subject: &Subject<'_>) -> bool {
    subject.tokenizer.chat_format() != ChatFormat::None
}

/// Tokens of a text in the form in which it is compressed.
pub(super) fn prompt_len(subject: &Subject<'_>, text: &str) -> Result<usize> {
    Ok(split(subject, text, ANY_QUESTION)?.0.len())
}

/// A prompt in two parts: the text, which does not depend on what is asked, and the question up to where the answer
/// begins. Both are in one message of the user, or plain text if the model knows no messages.
fn split(subject: &Subject<'_>, text: &str, question: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let encode = |text: String, raw_end: &str| {
        if can_chat(subject) {
            subject.tokenizer.encode_chat(&[ChatMessage::new("user", text)])
        } else {
            subject.tokenizer.encode(&(text + raw_end))
        }
    };
    let alone = encode(text.to_owned(), "")?;
    let mut whole = encode(format!("{text}\n\n{question}"), "\nAnswer:")?;
    let shared = alone.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    let asked = whole.split_off(shared);
    if whole.is_empty() || asked.is_empty() {
        return Err(Error::shape("a prompt's text and question", "tokens of both", (whole.len(), asked.len())));
    }
    Ok((whole, asked))
}

impl Trial {
    /// Lets a cache read the text, and asks.
    pub(super) fn answer(
        &self,
        subject: &Subject<'_>,
        kv_dtype: KvDtype,
        retention: &Retention,
        observer: &dyn Observer,
    ) -> Result<Outcome> {
        match self {
            Self::Text { text, questions } => {
                let mut asked = Vec::with_capacity(questions.len());
                let mut compressed = Vec::new();
                for question in questions {
                    let (text, question) = split(subject, text, &question.text)?;
                    compressed = text;
                    asked.push(question);
                }
                let filled = subject.fill(&compressed, kv_dtype, retention, observer)?;
                let mut outcome = Outcome::of(&filled.cache);
                for (question, ids) in questions.iter().zip(asked) {
                    outcome.note(question, &ask(subject, filled.clone(), &ids, observer)?);
                }
                Ok(outcome)
            }
            Self::Conversation { turns, question } => {
                let Subject { model, tokenizer, prefill_options, .. } = *subject;
                let mut conversation = Conversation::new(model, tokenizer, kv_dtype, retention.clone(), Vec::new())?
                    .with_prefill_options(prefill_options);
                for turn in turns {
                    say(&mut conversation, turn, observer)?;
                }
                let mut outcome = Outcome::of(conversation.cache());
                outcome.note(question, &say(&mut conversation, &question.text, observer)?);
                Ok(outcome)
            }
        }
    }
}

fn options() -> GenerationOptions {
    GenerationOptions { max_new_tokens: ANSWER_TOKENS, draft: Draft::Off, ..GenerationOptions::default() }
}

/// Reads a question token by token, and answers it.
fn ask(
    subject: &Subject<'_>,
    Filled { mut cache, mut logits }: Filled,
    question: &[u32],
    observer: &dyn Observer,
) -> Result<String> {
    for &id in question {
        go_on(observer)?;
        subject.model.decode_batch(&[id], &mut [&mut cache], &mut logits)?;
    }
    let mut answer = String::new();
    for step in Generation::new(subject.model, subject.tokenizer, &mut cache, question, logits, options()) {
        go_on(observer)?;
        answer += &step?.text;
    }
    Ok(answer)
}

/// One turn of a conversation; its answer.
fn say(conversation: &mut Conversation<'_>, text: &str, observer: &dyn Observer) -> Result<String> {
    let mut answer = String::new();
    conversation.ask(text, &options(), &mut Watch(observer), &mut |text| {
        answer += text;
        if observer.is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    go_on(observer)?;
    Ok(answer)
}
