//! Forced decoding: how a text goes on is scored with the full and with compressed caches of what comes before.
//!
//! The caches read the same real tokens, so that positions can be compared one by one; nothing that a cache would rather
//! have said is read. Of the full cache one window's log-probabilities are held, `[score_tokens, vocab_size]`, where all
//! variants are known beforehand ([`fidelity`]); all windows' where they are not ([`FullScores`]).

use super::metrics::{mean, percentile, perplexity, standard_error};
use super::{CacheEnd, CacheStart, FidelityRow, Filled, Observer, Progress, Row, Subject, Variant, go_on};
use crate::cache::{AdaptiveKvCache, Retention};
use crate::error::{Error, Result};
use crate::fidelity::{argmax, kl_divergence, log_softmax, same_top1};
use crate::numbers::all_finite;

/// Positions that one number of [`FidelityRow::perplexity_by_position`] stands for.
pub const POSITIONS_PER_BUCKET: usize = 32;

/// Which parts of a text are compressed and scored. Windows follow one another without a gap and do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let Self { prompt_tokens, score_tokens, windows, offset_tokens, .. } = *self;
        let context = subject.model.config().context_length;
        if windows == 0 || prompt_tokens <= prefix(subject).len() || score_tokens < 2 {
            return Err(Error::input(format!(
                "a window of {prompt_tokens} + {score_tokens} tokens has nothing to score"
            ))
            .with_hint("compress at least 2 tokens, and score at least 2"));
        }
        let longest = prompt_tokens.saturating_add(score_tokens.max(self.greedy_tokens));
        if longest > context {
            let reason = format!(
                "{prompt_tokens} tokens and {} more are above the model's context of {context}",
                longest - prompt_tokens
            );
            return Err(Error::input(reason).with_hint("lower --prompt-tokens, --score-tokens or --greedy-tokens"));
        }
        let needed = windows.saturating_mul(self.stride(subject)).saturating_add(offset_tokens);
        if needed > text_tokens {
            let reason = format!(
                "the text has {text_tokens} tokens, and {windows} x ({prompt_tokens} + {score_tokens}) from token \
                 {offset_tokens} on need {needed}"
            );
            return Err(Error::input(reason).with_hint("give a longer --text, or fewer --windows"));
        }
        Ok(())
    }

    /// What is under way in a window, for people.
    fn name(&self, window: usize, what: &str) -> String {
        format!("window {} of {}, {what}", window + 1, self.windows)
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

/// Measures every variant on every window, window by window. A variant's row is handed over after each window, at the
/// variant's index.
///
/// * `text`: ids without BOS, which every window gets if the model's prompts begin with it
///
/// # Errors
/// As [`FidelityPlan::check`]; [`Error::Interrupted`] if the observer says so; whatever the model or the observer fails
/// with.
pub fn fidelity(
    subject: &Subject<'_>,
    text: &[u32],
    plan: &FidelityPlan,
    variants: &[Variant],
    observer: &mut dyn Observer,
) -> Result<()> {
    plan.check(subject, text.len())?;
    let mut scores = vec![Vec::with_capacity(plan.windows); variants.len()];
    for window in 0..plan.windows {
        let name = plan.name(window, "full cache");
        observer.starts(&name);
        let reference = Reference::measure(subject, text, plan, window, observer);
        let reference = reference.map_err(|error| error.in_place(|| name))?;
        for (index, (variant, scores)) in variants.iter().zip(&mut scores).enumerate() {
            let name = plan.name(window, &variant.name());
            observer.starts(&name);
            let measured = reference.score(subject, variant, observer);
            scores.push(measured.map_err(|error| error.in_place(|| name))?);
            let is_complete = window + 1 == plan.windows;
            observer.row(index, Row::Fidelity(row(subject, plan, variant, scores)), is_complete)?;
        }
    }
    Ok(())
}

/// What the full cache says of every window of a plan: measured once, for variants that are only known one after the
/// other. Holds `[windows, score_tokens, vocab_size]` log-probabilities.
#[derive(Debug)]
pub struct FullScores<'a> {
    subject: Subject<'a>,
    plan: FidelityPlan,
    /// `[windows]`
    references: Vec<Reference>,
}

impl<'a> FullScores<'a> {
    /// Lets the full cache read all windows.
    ///
    /// * `text`: as for [`fidelity`]
    ///
    /// # Errors
    /// As [`fidelity`].
    pub fn measure(
        subject: &Subject<'a>,
        text: &[u32],
        plan: &FidelityPlan,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        plan.check(subject, text.len())?;
        let mut references = Vec::with_capacity(plan.windows);
        for window in 0..plan.windows {
            let name = plan.name(window, "full cache");
            progress.starts(&name);
            let reference = Reference::measure(subject, text, plan, window, progress);
            references.push(reference.map_err(|error| error.in_place(|| name))?);
        }
        Ok(Self { subject: *subject, plan: *plan, references })
    }

    /// Measures a variant on all windows: the complete row that [`fidelity`] has for it.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `progress` says so; whatever the model fails with.
    pub fn score(&self, variant: &Variant, progress: &mut dyn Progress) -> Result<FidelityRow> {
        let mut scores = Vec::with_capacity(self.references.len());
        for (window, reference) in self.references.iter().enumerate() {
            let name = self.plan.name(window, &variant.name());
            progress.starts(&name);
            let measured = reference.score(&self.subject, variant, progress);
            scores.push(measured.map_err(|error| error.in_place(|| name))?);
        }
        Ok(row(&self.subject, &self.plan, variant, &scores))
    }
}

/// What the full cache says of a window.
#[derive(Debug)]
struct Reference {
    /// Tokens that are compressed.
    prompt: Vec<u32>,
    /// Tokens of the text behind them.
    scored: Vec<u32>,
    /// `[positions]` rows of `[vocab_size]` log-probabilities.
    logprobs: Vec<Vec<f32>>,
    /// `[positions]`, of the text's own tokens
    text_logprobs: Vec<f64>,
    greedy: Vec<u32>,
    /// `[positions, layers]` attention outputs `[num_heads * head_dim]`; empty if not wanted.
    attended: Vec<Vec<Vec<f32>>>,
}

/// What one window gave for one variant.
#[derive(Debug, Clone)]
struct WindowScores {
    kept_ratio: f64,
    kv_bytes: usize,
    end: CacheEnd,
    /// `[positions]`
    kl: Vec<f64>,
    /// `[positions]`
    text_logprobs: Vec<f64>,
    /// `[positions]`
    full_text_logprobs: Vec<f64>,
    equal_top1: usize,
    equal_tokens: usize,
    /// `[layers]`; empty if not wanted
    attention_error: Vec<f64>,
}

impl Reference {
    fn measure(
        subject: &Subject<'_>,
        text: &[u32],
        plan: &FidelityPlan,
        window: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let prefix = prefix(subject);
        let start = plan.offset_tokens + window * plan.stride(subject);
        let (prompt, scored) = text[start..start + plan.stride(subject)].split_at(plan.prompt_tokens - prefix.len());
        let prompt = [&prefix, prompt].concat();
        let filled = subject.fill(&prompt, subject.full_kv_dtype, &Retention::Full, progress)?;
        let greedy = greedy(subject, filled.clone(), plan.greedy_tokens, progress)?;
        let mut attended = Vec::new();
        if plan.layer_error {
            each_attended(subject, filled.cache.clone(), scored, progress, |_, layers| attended.push(layers))?;
        }
        let (mut all_logprobs, mut text_logprobs) = (Vec::with_capacity(scored.len()), Vec::new());
        each_distribution(subject, filled.cache, scored, progress, |_, next, logprobs| {
            text_logprobs.push(f64::from(logprobs[next as usize]));
            all_logprobs.push(logprobs);
        })?;
        Ok(Self { prompt, scored: scored.to_vec(), logprobs: all_logprobs, text_logprobs, greedy, attended })
    }

    fn score(&self, subject: &Subject<'_>, variant: &Variant, progress: &dyn Progress) -> Result<WindowScores> {
        let Self { prompt, scored, .. } = self;
        let filled = subject.fill(prompt, variant.kv_dtype, &variant.retention, progress)?;
        let greedy = greedy(subject, filled.clone(), self.greedy.len(), progress)?;
        let mut scores = WindowScores {
            kept_ratio: filled.cache.kept_ratio(),
            kv_bytes: filled.cache.bytes().kept,
            end: CacheEnd::default(),
            kl: Vec::with_capacity(self.logprobs.len()),
            text_logprobs: Vec::with_capacity(self.logprobs.len()),
            full_text_logprobs: self.text_logprobs.clone(),
            equal_top1: 0,
            equal_tokens: self.greedy.iter().zip(&greedy).take_while(|(a, b)| a == b).count(),
            attention_error: Vec::new(),
        };
        if !self.attended.is_empty() {
            let mut errors = vec![Vec::new(); filled.cache.num_layers()];
            each_attended(subject, filled.cache.clone(), scored, progress, |position, layers| {
                for ((errors, full), layer) in errors.iter_mut().zip(&self.attended[position]).zip(&layers) {
                    errors.push(relative_error(full, layer));
                }
            })?;
            scores.attention_error = errors.iter().map(|errors| mean(errors)).collect();
        }
        let start = CacheStart::of(&filled.cache);
        let cache = each_distribution(subject, filled.cache, scored, progress, |position, next, logprobs| {
            let full = &self.logprobs[position];
            scores.kl.push(kl_divergence(full, &logprobs));
            scores.equal_top1 += usize::from(same_top1(full, &logprobs));
            scores.text_logprobs.push(f64::from(logprobs[next as usize]));
        })?;
        scores.end = start.end(&cache);
        Ok(scores)
    }
}

/// Reads a text token by token.
///
/// * `use_logprobs`: gets the index, the token that follows in the text, and `[vocab_size]` log-probabilities for it;
///   once for each token but the first, which the prompt has already foretold
///
/// Returns the cache as it is then.
fn each_distribution(
    subject: &Subject<'_>,
    mut cache: AdaptiveKvCache,
    scored: &[u32],
    progress: &dyn Progress,
    mut use_logprobs: impl FnMut(usize, u32, Vec<f32>),
) -> Result<AdaptiveKvCache> {
    let mut logits = Vec::new();
    for (index, pair) in scored.windows(2).enumerate() {
        go_on(progress)?;
        subject.model.decode_batch(&[pair[0]], &mut [&mut cache], &mut logits)?;
        use_logprobs(index, pair[1], log_softmax(&logits));
    }
    Ok(cache)
}

/// Reads a text token by token the slow way, like [`each_distribution`].
///
/// * `use_layers`: gets the index, and each layer's attention output
fn each_attended(
    subject: &Subject<'_>,
    mut cache: AdaptiveKvCache,
    scored: &[u32],
    progress: &dyn Progress,
    mut use_layers: impl FnMut(usize, Vec<Vec<f32>>),
) -> Result<()> {
    for (index, pair) in scored.windows(2).enumerate() {
        go_on(progress)?;
        let mut layers = Vec::with_capacity(cache.num_layers());
        let position = cache.seen();
        subject.model.decode_observed(pair[0], &mut cache, &mut |attended| layers.push(attended.to_vec()))?;
        if let Some(layer) = layers.iter().position(|attended| !all_finite(attended)) {
            return Err(Error::not_a_number(format!("the attention of layer {layer} at position {position}")));
        }
        use_layers(index, layers);
    }
    Ok(())
}

/// What a cache would go on with, whatever ends a text.
fn greedy(
    subject: &Subject<'_>,
    Filled { mut cache, mut logits }: Filled,
    len: usize,
    progress: &dyn Progress,
) -> Result<Vec<u32>> {
    let mut ids = Vec::with_capacity(len);
    while ids.len() < len {
        go_on(progress)?;
        let id = argmax(&logits).and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| Error::shape("logits", "at least one", logits.len()))?;
        ids.push(id);
        if ids.len() < len {
            subject.model.decode_batch(&[id], &mut [&mut cache], &mut logits)?;
        }
    }
    Ok(ids)
}

/// The norm of the difference, as a share of the reference's norm; 0 for equal ones.
fn relative_error(reference: &[f32], other: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut reference.iter().zip(other).map(|(a, b)| f64::from(a - b)));
    if difference == 0.0 { 0.0 } else { difference / norm(&mut reference.iter().map(|&a| f64::from(a))) }
}

#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn row(subject: &Subject<'_>, plan: &FidelityPlan, variant: &Variant, scores: &[WindowScores]) -> FidelityRow {
    let all = |values: fn(&WindowScores) -> &[f64]| scores.iter().flat_map(values).copied().collect::<Vec<f64>>();
    let average = |value: &dyn Fn(&WindowScores) -> f64| mean(&scores.iter().map(value).collect::<Vec<_>>());
    let kl = all(|scores| &scores.kl);
    let kl_by_window: Vec<f64> = scores.iter().map(|scores| mean(&scores.kl)).collect();
    let equal_top1: usize = scores.iter().map(|scores| scores.equal_top1).sum();
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
        WindowScores {
            kept_ratio: 1.0,
            kv_bytes: 1,
            end: CacheEnd::default(),
            kl: Vec::new(),
            full_text_logprobs: text_logprobs.clone(),
            text_logprobs,
            equal_top1: 0,
            equal_tokens: 0,
            attention_error: Vec::new(),
        }
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

    #[test]
    fn errors_are_relative_to_the_reference() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.0, 4.0], &[0.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!((relative_error(&[3.0, 4.0], &[3.0, 3.0]) - 0.2).abs() < 1e-12);
        assert_eq!(relative_error(&[0.0], &[0.0]), 0.0);
    }
}
