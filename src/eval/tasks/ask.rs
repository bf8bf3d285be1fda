//! Reading a text into a cache, and asking.
//!
//! A text's cache is filled by one prefill that ends before the question, as if it were kept for later. The question is
//! then read token by token, and stays in the cache whole: so what is measured is what the text's compression cost, and
//! nothing that a profile of a question of twenty tokens would add. A conversation goes through [`Conversation`], as in
//! `chat`, with all that its further profiles cost.

use std::ops::ControlFlow;

use super::super::Watch;
use super::super::forks::{Asked, fill_all};
use super::{Observer, Subject, Variant, go_on};
use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::generate::{Conversation, Draft, GenerationOptions};
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
    /// Lets the full cache and every variant read the text, and asks them.
    ///
    /// * `name`: of a cache's part of the work, for people
    pub(super) fn answer(
        &self,
        subject: &Subject<'_>,
        variants: &[Variant],
        name: &dyn Fn(&str) -> String,
        observer: &mut dyn Observer,
    ) -> Result<(Outcome, Vec<Outcome>)> {
        let (mut full, mut outcomes) = (None, vec![None; variants.len()]);
        let full_name = name("full cache");
        observer.starts(&full_name);
        match self {
            Self::Text { text, questions } => {
                let mut asked = Vec::with_capacity(questions.len());
                let mut compressed = Vec::new();
                for question in questions {
                    let (text, question) = split(subject, text, &question.text)?;
                    compressed = text;
                    asked.push(question);
                }
                let observer: &dyn Observer = observer;
                let filled = fill_all(subject, &compressed, variants, observer, |which, filled| {
                    let names =
                        which.iter().map(|index| index.map_or(full_name.clone(), |i| name(&variants[i].config)));
                    let names: Vec<String> = names.collect();
                    let names: Vec<&str> = names.iter().map(String::as_str).collect();
                    let mut measured: Vec<Outcome> = filled.iter().map(|filled| Outcome::of(&filled.cache)).collect();
                    for (question, ids) in questions.iter().zip(&asked) {
                        let asked = Asked { question: ids, max_tokens: ANSWER_TOKENS, is_enough: &|_| false };
                        let answers = asked.answers(subject, filled.clone(), &names, observer)?;
                        for (outcome, answer) in measured.iter_mut().zip(answers) {
                            outcome.note(question, &answer);
                        }
                    }
                    for (index, outcome) in which.into_iter().zip(measured) {
                        *index.map_or(&mut full, |index| &mut outcomes[index]) = Some(outcome);
                    }
                    Ok(())
                });
                filled.map_err(|error| error.in_place(|| full_name.clone()))?;
            }
            Self::Conversation { turns, question } => {
                let talk = |kv_dtype, retention: &Retention, observer: &dyn Observer| {
                    converse(subject, (turns, question), (kv_dtype, retention), observer)
                };
                let known = talk(subject.full_kv_dtype, &Retention::Full, observer);
                full = Some(known.map_err(|error| error.in_place(|| full_name.clone()))?);
                for (variant, outcome) in variants.iter().zip(&mut outcomes) {
                    if !variant.is_full(subject.full_kv_dtype) {
                        let name = name(&variant.config);
                        observer.starts(&name);
                        let talked = talk(variant.kv_dtype, &variant.retention, observer);
                        *outcome = Some(talked.map_err(|error| error.in_place(|| name))?);
                    }
                }
            }
        }
        let full = full.ok_or_else(|| Error::shape("caches that answer", "the full one", "none"))?;
        // What was not measured is the full cache itself.
        let outcomes = outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| full.clone())).collect();
        Ok((full, outcomes))
    }
}

/// Holds a conversation with one cache, and asks.
fn converse(
    subject: &Subject<'_>,
    (turns, question): (&[String], &Question),
    (kv_dtype, retention): (KvDtype, &Retention),
    observer: &dyn Observer,
) -> Result<Outcome> {
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

fn options() -> GenerationOptions {
    GenerationOptions { max_new_tokens: ANSWER_TOKENS, draft: Draft::Off, ..GenerationOptions::default() }
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
