//! Forced decoding: how a text goes on is scored with the full and with compressed caches of what comes before.
//!
//! The caches read the same real tokens, so that positions can be compared one by one; nothing that a cache would rather
//! have said is read. Where all variants are known beforehand ([`fidelity`]), one window's prompt is read once for all of
//! them, and of the full cache that window's log-probabilities are held, `[score_tokens, vocab_size]`; all windows' where they
//! are not ([`FullScores`]).

mod heads;
mod window;
mod writing;

use super::metrics::{mean, percentile, perplexity, standard_error};
use super::{FidelityRow, Observer, Progress, Row, Subject, Variant};
use crate::error::{Error, Result};
pub use heads::{PROFILE_RATIO, head_profile};
use window::{Reference, WindowScores};
pub use writing::{TOKENS_PER_ROW, WritingPlan};

/// Positions that one number of [`FidelityRow::perplexity_by_position`] stands for.
pub const POSITIONS_PER_BUCKET: usize = 32;

/// What rows call all texts together.
pub const ALL_TEXTS: &str = "all texts";

/// Which parts of each text are compressed and scored. Windows follow one another without a gap and do not overlap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FidelityPlan {
    /// Tokens of a window that are compressed, at least 1; BOS is one of them if the model's prompts begin with it.
    pub prompt_tokens: usize,
    /// Tokens behind them that are scored, at least 2: the first comes from the exact prompt and is left out.
    pub score_tokens: usize,
    /// At least 1.
    pub windows: usize,
    /// Tokens of the text before the first window.
    pub offset_tokens: usize,
    /// Tokens of greedy text behind the prompt that are compared; 0 for none.
    pub greedy_tokens: usize,
    /// Also measure the error of each layer's attention, by way of the slow path.
    pub layer_error: bool,
    /// A long text behind the prompt that the full cache writes and all caches read.
    pub writing: WritingPlan,
}

impl FidelityPlan {
    /// Finds out whether a model and a text can do it.
    ///
    /// * `text_tokens`: length of the text, without BOS
    ///
    /// # Errors
    /// [`Error::Input`] for a count that makes no sense, a window longer than the model's context, or a text that is too
    /// short.
    pub fn check(&self, subject: &Subject<'_>, text_tokens: usize) -> Result<()> {
        self.check_named(subject, text_tokens, None)
    }

    /// * `text`: its name, if it needs one
    fn check_named(&self, subject: &Subject<'_>, text_tokens: usize, text: Option<&str>) -> Result<()> {
        let Self { prompt_tokens, score_tokens, windows, offset_tokens, .. } = *self;
        let context = subject.model.config().context_length;
        if windows == 0 || prompt_tokens <= prefix(subject).len() || score_tokens < 2 {
            return Err(Error::input(format!(
                "a window of {prompt_tokens} + {score_tokens} tokens has nothing to score"
            ))
            .with_hint("compress at least 2 tokens, and score at least 2"));
        }
        let most_read = score_tokens.max(self.greedy_tokens).max(self.writing.tokens);
        let longest = prompt_tokens.saturating_add(most_read);
        if longest > context {
            let reason = format!(
                "{prompt_tokens} tokens and {} more are above the model's context of {context}",
                longest - prompt_tokens
            );
            let hint = "lower --prompt-tokens, --score-tokens, --greedy-tokens or --writing-tokens";
            return Err(Error::input(reason).with_hint(hint));
        }
        let needed = windows.saturating_mul(self.stride(subject)).saturating_add(offset_tokens);
        if needed > text_tokens {
            let text = text.map_or_else(|| "the text".to_owned(), |name| format!("the text `{name}`"));
            let reason = format!(
                "{text} has {text_tokens} tokens, and {windows} x ({prompt_tokens} + {score_tokens}) from token \
                 {offset_tokens} on need {needed}"
            );
            return Err(Error::input(reason).with_hint("give a longer --text, or fewer --windows"));
        }
        Ok(())
    }

    /// The tokens of a window that are compressed, and those behind them.
    fn window(&self, subject: &Subject<'_>, text: &[u32], window: usize) -> (Vec<u32>, Vec<u32>) {
        let (prefix, stride) = (prefix(subject), self.stride(subject));
        let start = self.offset_tokens + window * stride;
        let (prompt, scored) = text[start..start + stride].split_at(self.prompt_tokens - prefix.len());
        ([&prefix, prompt].concat(), scored.to_vec())
    }

    /// Tokens of the text that a window takes.
    fn stride(&self, subject: &Subject<'_>) -> usize {
        (self.prompt_tokens - prefix(subject).len()).saturating_add(self.score_tokens)
    }
}

/// What every prompt begins with.
fn prefix(subject: &Subject<'_>) -> Vec<u32> {
    subject.tokenizer.bos_id().filter(|_| subject.tokenizer.adds_bos()).into_iter().collect()
}

/// A text that is measured on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FidelityText {
    /// What rows call it; `None` for one that needs no name.
    pub name: Option<String>,
    /// Without BOS, which every window gets if the model's prompts begin with it.
    pub ids: Vec<u32>,
}

impl FidelityText {
    /// [`FidelityPlan::check`], for each of several texts.
    ///
    /// # Errors
    /// As there; the text's name is among what is said where there are several.
    pub fn check_all(texts: &[Self], plan: &FidelityPlan, subject: &Subject<'_>) -> Result<()> {
        texts.iter().try_for_each(|text| {
            let name = text.name.as_deref().filter(|_| texts.len() > 1);
            plan.check_named(subject, text.ids.len(), name)
        })
    }
}

/// What is under way, for people.
fn place(texts: &[FidelityText], text: usize, plan: &FidelityPlan, window: usize) -> String {
    let text = if texts.len() > 1 { format!("text {} of {}, ", text + 1, texts.len()) } else { String::new() };
    format!("{text}window {} of {}", window + 1, plan.windows)
}

/// Measures every variant on every window of every text. Each window's prompt is read once for all variants, as far as
/// there is memory for so many caches, and they read what follows together.
///
/// A variant's row on a text is handed over after each window, those on the second text behind those on the first. Behind
/// them, if there are several texts, come the variants' rows over all of them.
///
/// * `texts`: at least one
///
/// # Errors
/// As [`FidelityPlan::check`]; [`Error::Interrupted`] if the observer says so; whatever the model or the observer fails
/// with.
pub fn fidelity(
    subject: &Subject<'_>,
    texts: &[FidelityText],
    plan: &FidelityPlan,
    variants: &[Variant],
    observer: &mut dyn Observer,
) -> Result<()> {
    FidelityText::check_all(texts, plan, subject)?;
    let mut over_all = vec![Vec::new(); variants.len()];
    for (text_idx, text) in texts.iter().enumerate() {
        let mut scores = vec![Vec::new(); variants.len()];
        for window in 0..plan.windows {
            let place = place(texts, text_idx, plan, window);
            let measured = Reference::measure(subject, (&text.ids, plan, window), variants, &place, observer)?;
            let is_complete = window + 1 == plan.windows;
            for (index, (variant, window_scores)) in variants.iter().zip(measured.1).enumerate() {
                scores[index].push(window_scores);
                let row = row(subject, plan, (variant, text.name.as_deref()), &scores[index]);
                observer.row(text_idx * variants.len() + index, Row::Fidelity(row), is_complete)?;
            }
        }
        for (all, scores) in over_all.iter_mut().zip(scores) {
            all.extend(scores);
        }
    }
    if texts.len() > 1 {
        for (index, (variant, scores)) in variants.iter().zip(&over_all).enumerate() {
            let row = row(subject, plan, (variant, Some(ALL_TEXTS)), scores);
            observer.row(texts.len() * variants.len() + index, Row::Fidelity(row), true)?;
        }
    }
    Ok(())
}

/// What the full cache says of every window of a plan: measured once, for variants that are only known one after the
/// other. Holds `[texts * windows, score_tokens, vocab_size]` log-probabilities.
#[derive(Debug)]
pub struct FullScores<'a> {
    subject: Subject<'a>,
    plan: FidelityPlan,
    /// `[texts * windows]`, with what is under way there
    references: Vec<(String, Reference)>,
}

impl<'a> FullScores<'a> {
    /// Lets the full cache read all windows.
    ///
    /// # Errors
    /// As [`fidelity`].
    pub fn measure(
        subject: &Subject<'a>,
        texts: &[FidelityText],
        plan: &FidelityPlan,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        FidelityText::check_all(texts, plan, subject)?;
        let mut references = Vec::with_capacity(texts.len() * plan.windows);
        for (text_idx, text) in texts.iter().enumerate() {
            for window in 0..plan.windows {
                let place = place(texts, text_idx, plan, window);
                let reference = Reference::measure(subject, (&text.ids, plan, window), &[], &place, progress)?.0;
                references.push((place, reference));
            }
        }
        Ok(Self { subject: *subject, plan: *plan, references })
    }

    /// Measures a variant on all windows: the complete row that [`fidelity`] has for it, over all texts.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `progress` says so; whatever the model fails with.
    pub fn score(&self, variant: &Variant, progress: &mut dyn Progress) -> Result<FidelityRow> {
        let mut scores = Vec::with_capacity(self.references.len());
        for (place, reference) in &self.references {
            let name = format!("{place}, {}", variant.name());
            progress.starts(&name);
            let (subject, prompt) = (&self.subject, &reference.prompt);
            let filled = subject.fill(prompt, variant.kv_dtype, &variant.retention, progress);
            let filled = filled.map_err(|error| error.in_place(|| name.clone()))?;
            scores.extend(reference.score(subject, vec![filled], &[name], progress)?);
        }
        Ok(row(&self.subject, &self.plan, (variant, None), &scores))
    }
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn row(
    subject: &Subject<'_>,
    plan: &FidelityPlan,
    (variant, text): (&Variant, Option<&str>),
    scores: &[WindowScores],
) -> FidelityRow {
    let all = |values: fn(&WindowScores) -> &[f64]| scores.iter().flat_map(values).copied().collect::<Vec<f64>>();
    let average = |value: &dyn Fn(&WindowScores) -> f64| mean(&scores.iter().map(value).collect::<Vec<_>>());
    let kl = all(|scores| &scores.kl);
    let kl_by_window: Vec<f64> = scores.iter().map(|scores| mean(&scores.kl)).collect();
    let equal_top1: usize = scores.iter().map(|scores| scores.equal_top1).sum();
    let written = writing::over_all(scores);
    FidelityRow {
        config: variant.config.clone(),
        kept_ratio: average(&|scores| scores.kept_ratio),
        kv_bytes: average(&|scores| scores.kv_bytes as f64).round() as usize,
        end_kept_ratio: average(&|scores| scores.end.kept_ratio),
        end_kv_bytes: average(&|scores| scores.end.kv_bytes as f64).round() as usize,
        evicted_rows: variant.retention.eviction().map(|_| average(&|scores| scores.end.evicted_rows)),
        kl_mean: mean(&kl),
        kl_median: percentile(&kl, 0.5),
        kl_p99: percentile(&kl, 0.99),
        top1_agreement: equal_top1 as f64 / kl.len() as f64,
        perplexity: perplexity(&all(|scores| &scores.text_logprobs)),
        perplexity_full: perplexity(&all(|scores| &scores.full_text_logprobs)),
        kv_dtype: variant.kv_dtype.name(),
        full_kv_dtype: subject.full_kv_dtype.name(),
        budget: variant.budget,
        windows: scores.len(),
        prompt_tokens: plan.prompt_tokens,
        kl_std_error: standard_error(&kl_by_window),
        kl_worst: kl_by_window.iter().copied().fold(0.0, f64::max),
        text: text.map(str::to_owned),
        kl_by_window,
        kept_ratio_by_window: scores.iter().map(|scores| scores.kept_ratio).collect(),
        kv_bytes_by_window: scores.iter().map(|scores| scores.kv_bytes).collect(),
        perplexity_by_position: by_position(scores, |scores| &scores.text_logprobs),
        perplexity_full_by_position: by_position(scores, |scores| &scores.full_text_logprobs),
        equal_tokens: (plan.greedy_tokens > 0).then(|| average(&|scores| scores.equal_tokens as f64)),
        greedy_tokens: plan.greedy_tokens,
        attention_error_by_layer: plan.layer_error.then(|| {
            let num_layers = scores.first().map_or(0, |scores| scores.attention_error.len());
            (0..num_layers).map(|layer| average(&|scores| scores.attention_error[layer])).collect()
        }),
        writing_kl_mean: written.map(|(kl_mean, _)| kl_mean),
        writing_top1_agreement: written.map(|(_, top1_agreement)| top1_agreement),
        writing: writing::rows(scores),
    }
}

/// Perplexities of buckets of positions, over all windows.
fn by_position(scores: &[WindowScores], logprobs: fn(&WindowScores) -> &[f64]) -> Vec<f64> {
    let positions = scores.first().map_or(0, |scores| logprobs(scores).len());
    let starts = (0..positions).step_by(POSITIONS_PER_BUCKET);
    starts
        .map(|start| {
            let end = (start + POSITIONS_PER_BUCKET).min(positions);
            let bucket: Vec<f64> = scores.iter().flat_map(|scores| &logprobs(scores)[start..end]).copied().collect();
            perplexity(&bucket)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(text_logprobs: Vec<f64>) -> WindowScores {
        WindowScores { full_text_logprobs: text_logprobs.clone(), text_logprobs, ..WindowScores::default() }
    }

    #[test]
    fn buckets_of_positions_go_over_all_windows() {
        let half = 0.5f64.ln();
        let mut first = vec![half; POSITIONS_PER_BUCKET];
        first.push(0.0);
        let mut second = vec![0.0; POSITIONS_PER_BUCKET];
        second.push(2.0 * half);
        let perplexities = by_position(&[window(first), window(second)], |scores| &scores.text_logprobs);
        assert_eq!(perplexities.len(), 2);
        assert!((perplexities[0] - 2f64.sqrt()).abs() < 1e-12 && (perplexities[1] - 2.0).abs() < 1e-12);
        assert!(by_position(&[], |scores| &scores.kl).is_empty());
    }
}
