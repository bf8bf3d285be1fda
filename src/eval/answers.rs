//! Prompts that every cache answers: what each keeps of a prompt, and how its answer goes, side by side.
//!
//! A prompt is read and answered as `generate` does it, greedily: nothing is forced, so that an answer goes its own way
//! from the first token that differs.

use super::{AnswerRow, CacheEnd, CacheStart, Filled, Observer, Progress, Row, Subject, Variant, go_on};
use crate::cache::{CacheBytes, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::generate::{Draft, FinishReason, Generation, GenerationOptions};

/// A prompt, in the form in which the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerPrompt {
    /// Where it comes from, for messages.
    pub name: String,
    /// What it asks, for rows.
    pub text: String,
    /// BOS and chat markers included; not empty.
    pub ids: Vec<u32>,
}

/// Which prompts, and how far they are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerPlan {
    pub prompts: Vec<AnswerPrompt>,
    /// The most tokens of an answer, at least 1.
    pub answer_tokens: usize,
}

impl AnswerPlan {
    /// Finds out whether a model can do it.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt, no tokens to answer with, or a prompt and answer above the model's context.
    pub fn check(&self, subject: &Subject<'_>) -> Result<()> {
        let context = subject.model.config().context_length;
        if self.answer_tokens == 0 {
            return Err(Error::input("answers of `0` tokens").with_hint("ask for at least one"));
        }
        for AnswerPrompt { name, ids, .. } in &self.prompts {
            if ids.is_empty() {
                return Err(Error::input(format!("{name} is empty")).with_hint("give at least one token"));
            }
            if ids.len().saturating_add(self.answer_tokens) > context {
                let reason = format!(
                    "{name} has {} tokens, which with {} of an answer are above the model's context of {context}",
                    ids.len(),
                    self.answer_tokens
                );
                return Err(Error::input(reason).with_hint("shorten the prompt, or lower --answer-tokens"));
            }
        }
        Ok(())
    }
}

/// Lets the full cache and every variant answer each prompt; for each prompt every variant has a row.
///
/// # Errors
/// As [`AnswerPlan::check`]; [`Error::Interrupted`] if the observer says so; whatever the model or the observer fails
/// with.
pub fn answers(
    subject: &Subject<'_>,
    plan: &AnswerPlan,
    variants: &[Variant],
    observer: &mut dyn Observer,
) -> Result<()> {
    plan.check(subject)?;
    let mut num_rows = 0;
    for (index, prompt) in plan.prompts.iter().enumerate() {
        let name = |what: &str| format!("prompt {} of {}, {what}", index + 1, plan.prompts.len());
        let full_name = name("full cache");
        observer.starts(&full_name);
        let answer = |kv_dtype, retention: &Retention, progress: &dyn Progress| {
            Answer::of(subject, &prompt.ids, plan.answer_tokens, (kv_dtype, retention), progress)
        };
        let full = answer(subject.full_kv_dtype, &Retention::Full, observer);
        let full = full.map_err(|error| error.in_place(|| full_name))?;
        for variant in variants {
            let name = name(&variant.name());
            observer.starts(&name);
            let answer = answer(variant.kv_dtype, &variant.retention, observer);
            let answer = answer.map_err(|error| error.in_place(|| name))?;
            let equal_tokens = full.ids.iter().zip(&answer.ids).take_while(|(a, b)| a == b).count();
            let row = AnswerRow {
                prompt_idx: index,
                prompt: prompt.text.clone(),
                prompt_tokens: prompt.ids.len(),
                config: variant.config.clone(),
                kv_dtype: variant.kv_dtype.name(),
                budget: variant.budget,
                kept_ratio: answer.kept_ratio,
                saved_ratio: answer.bytes.saved_ratio(),
                raw_bytes: answer.bytes.raw,
                kv_bytes: answer.bytes.kept,
                saved_bytes: answer.bytes.raw.saturating_sub(answer.bytes.kept),
                end_kv_bytes: answer.end.kv_bytes,
                evicted_rows: variant.retention.eviction().map(|_| answer.end.evicted_rows),
                equal_tokens,
                full_tokens: full.ids.len(),
                answer_tokens: answer.ids.len(),
                finish_reason: answer.finish_reason,
                answer: answer.text,
            };
            observer.row(num_rows, Row::Answer(row), true)?;
            num_rows += 1;
        }
    }
    Ok(())
}

/// How a cache went on with a prompt.
struct Answer {
    /// Right after the prompt.
    kept_ratio: f64,
    /// Right after the prompt.
    bytes: CacheBytes,
    end: CacheEnd,
    ids: Vec<u32>,
    text: String,
    finish_reason: FinishReason,
}

impl Answer {
    fn of(
        subject: &Subject<'_>,
        prompt: &[u32],
        max_new_tokens: usize,
        (kv_dtype, retention): (KvDtype, &Retention),
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Filled { mut cache, logits } = subject.fill(prompt, kv_dtype, retention, progress)?;
        let (kept_ratio, bytes, start) = (cache.kept_ratio(), cache.bytes(), CacheStart::of(&cache));
        let options = GenerationOptions { max_new_tokens, draft: Draft::Off, ..GenerationOptions::default() };
        let mut generation = Generation::new(subject.model, subject.tokenizer, &mut cache, prompt, logits, options);
        let mut text = String::new();
        for step in generation.by_ref() {
            text += &step?.text;
            go_on(progress)?;
        }
        let (ids, finish_reason) = (generation.ids().to_vec(), generation.finish_reason());
        drop(generation); // it may hold guesses in the cache
        Ok(Self { kept_ratio, bytes, end: start.end(&cache), ids, text, finish_reason })
    }
}
