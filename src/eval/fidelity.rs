//! Forced decoding: how a text goes on is scored with the full and with compressed caches of what comes before.
//!
//! The caches read the same real tokens, so that positions can be compared one by one; nothing that a cache would rather
//! have said is read. Where all variants are known beforehand ([`fidelity`]), one window's prompt is read once for all of
//! them, and of the full cache that window's log-probabilities are held, `[score_tokens, vocab_size]`; all windows' where they
//! are not ([`FullScores`]).

use super::forks::{decode_all, fill_all, most_probable};
use super::metrics::{mean, percentile, perplexity, standard_error};
use super::{CacheEnd, CacheStart, FidelityRow, Filled, Observer, Progress, Row, Subject, Variant, go_on};
use crate::cache::AdaptiveKvCache;
use crate::error::{Error, Result};
use crate::fidelity::{kl_divergence, log_softmax, same_top1};
use crate::numbers::all_finite;

/// Positions that one number of [`FidelityRow::perplexity_by_position`] stands for.
pub const POSITIONS_PER_BUCKET: usize = 32;

/// What rows call all texts together.
pub const ALL_TEXTS: &str = "all texts";

/// Which parts of each text are compressed and scored. Windows follow one another without a gap and do not overlap.
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
            let text = text.map_or_else(|| "the text".to_owned(), |name| format!("the text `{name}`"));
            let reason = format!(
                "{text} has {text_tokens} tokens, and {windows} x ({prompt_tokens} + {score_tokens}) from token \
                 {offset_tokens} on need {needed}"
            );
            return Err(Error::input(reason).with_hint("give a longer --text, or fewer --windows"));
        }
        Ok(())
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

/// What the full cache says of a window.
#[derive(Debug, Default)]
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
    /// Bytes that it keeps of the prompt.
    kv_bytes: usize,
    end: CacheEnd,
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
    /// Reads a window's prompt into the full cache and those of all variants, and scores what follows.
    ///
    /// * `place`: the window, for people
    ///
    /// Returns the scores of all variants, too.
    fn measure(
        subject: &Subject<'_>,
        (text, plan, window): (&[u32], &FidelityPlan, usize),
        variants: &[Variant],
        place: &str,
        progress: &mut dyn Progress,
    ) -> Result<(Self, Vec<WindowScores>)> {
        let prefix = prefix(subject);
        let start = plan.offset_tokens + window * plan.stride(subject);
        let (prompt, scored) = text[start..start + plan.stride(subject)].split_at(plan.prompt_tokens - prefix.len());
        let mut reference = Self { prompt: [&prefix, prompt].concat(), scored: scored.to_vec(), ..Self::default() };
        let mut scores: Vec<Option<WindowScores>> = vec![None; variants.len()];
        let full_name = format!("{place}, full cache");
        progress.starts(&full_name);
        let prompt = reference.prompt.clone();
        let progress: &dyn Progress = progress;
        let filled = fill_all(subject, &prompt, variants, progress, |which, mut filled| {
            let which: Vec<usize> = if let [None, others @ ..] = &which[..] {
                let measured = reference.add_full(subject, filled.remove(0), plan, progress);
                measured.map_err(|error| error.in_place(|| full_name.clone()))?;
                others.iter().copied().flatten().collect()
            } else {
                which.into_iter().flatten().collect()
            };
            let names: Vec<String> =
                which.iter().map(|&index| format!("{place}, {}", variants[index].name())).collect();
            for (index, window_scores) in which.into_iter().zip(reference.score(subject, filled, &names, progress)?) {
                scores[index] = Some(window_scores);
            }
            Ok(())
        });
        filled.map_err(|error| error.in_place(|| full_name.clone()))?;
        // What was not measured is the full cache itself.
        let scores = scores.into_iter().map(|scores| scores.unwrap_or_else(|| reference.own_scores())).collect();
        Ok((reference, scores))
    }

    /// Scores what follows with the full cache.
    fn add_full(
        &mut self,
        subject: &Subject<'_>,
        filled: Filled,
        plan: &FidelityPlan,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Self { scored, logprobs, text_logprobs, attended, .. } = self;
        self.greedy = greedy_all(subject, vec![filled.clone()], &[], plan.greedy_tokens, progress)?.remove(0);
        if plan.layer_error {
            each_attended(subject, filled.cache.clone(), scored, progress, |_, layers| attended.push(layers))?;
        }
        self.kv_bytes = filled.cache.bytes().kept;
        let start = CacheStart::of(&filled.cache);
        let caches = each_distribution(subject, vec![filled.cache], scored, &[], progress, |_, _, next, all| {
            text_logprobs.push(f64::from(all[next as usize]));
            logprobs.push(all);
        })?;
        self.end = start.end(&caches[0]);
        Ok(())
    }

    /// The full cache's scores, held against itself.
    fn own_scores(&self) -> WindowScores {
        let positions = self.logprobs.len();
        WindowScores {
            kept_ratio: 1.0,
            kv_bytes: self.kv_bytes,
            end: self.end,
            kl: vec![0.0; positions],
            text_logprobs: self.text_logprobs.clone(),
            full_text_logprobs: self.text_logprobs.clone(),
            equal_top1: positions,
            equal_tokens: self.greedy.len(),
            attention_error: vec![0.0; self.attended.first().map_or(0, Vec::len)],
        }
    }

    /// Scores what follows with some caches, which read it together.
    ///
    /// * `names`: of the caches, for people
    fn score(
        &self,
        subject: &Subject<'_>,
        filled: Vec<Filled>,
        names: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<WindowScores>> {
        let (mut all_scores, mut starts, mut caches) = (Vec::new(), Vec::new(), Vec::new());
        let greedy = greedy_all(subject, filled.clone(), names, self.greedy.len(), progress)?;
        for ((filled, greedy), name) in filled.into_iter().zip(greedy).zip(names) {
            let scores = self.before_reading(subject, &filled, &greedy, progress);
            all_scores.push(scores.map_err(|error| error.in_place(|| name.clone()))?);
            starts.push(CacheStart::of(&filled.cache));
            caches.push(filled.cache);
        }
        let caches =
            each_distribution(subject, caches, &self.scored, names, progress, |position, index, next, logprobs| {
                let (scores, full) = (&mut all_scores[index], &self.logprobs[position]);
                scores.kl.push(kl_divergence(full, &logprobs));
                scores.equal_top1 += usize::from(same_top1(full, &logprobs));
                scores.text_logprobs.push(f64::from(logprobs[next as usize]));
            })?;
        for ((scores, start), cache) in all_scores.iter_mut().zip(starts).zip(&caches) {
            scores.end = start.end(cache);
        }
        Ok(all_scores)
    }

    /// What a cache says before the text goes on.
    ///
    /// * `greedy`: what it would go on with
    fn before_reading(
        &self,
        subject: &Subject<'_>,
        filled: &Filled,
        greedy: &[u32],
        progress: &dyn Progress,
    ) -> Result<WindowScores> {
        let mut scores = WindowScores {
            kept_ratio: filled.cache.kept_ratio(),
            kv_bytes: filled.cache.bytes().kept,
            end: CacheEnd::default(),
            kl: Vec::with_capacity(self.logprobs.len()),
            text_logprobs: Vec::with_capacity(self.logprobs.len()),
            full_text_logprobs: self.text_logprobs.clone(),
            equal_top1: 0,
            equal_tokens: self.greedy.iter().zip(greedy).take_while(|(a, b)| a == b).count(),
            attention_error: Vec::new(),
        };
        if !self.attended.is_empty() {
            let mut errors = vec![Vec::new(); filled.cache.num_layers()];
            each_attended(subject, filled.cache.clone(), &self.scored, progress, |position, layers| {
                for ((errors, full), layer) in errors.iter_mut().zip(&self.attended[position]).zip(&layers) {
                    errors.push(relative_error(full, layer));
                }
            })?;
            scores.attention_error = errors.iter().map(|errors| mean(errors)).collect();
        }
        Ok(scores)
    }
}

/// Lets caches read a text token by token, all of them the same one at a time.
///
/// * `names`: of the caches, for people; none if there is one that the caller names
/// * `use_logprobs`: gets the index, the cache's, the token that follows in the text, and `[vocab_size]` log-probabilities
///   for it; once for each token but the first, which the prompt has already foretold
///
/// Returns the caches as they are then.
fn each_distribution(
    subject: &Subject<'_>,
    mut caches: Vec<AdaptiveKvCache>,
    scored: &[u32],
    names: &[String],
    progress: &dyn Progress,
    mut use_logprobs: impl FnMut(usize, usize, u32, Vec<f32>),
) -> Result<Vec<AdaptiveKvCache>> {
    let vocab_size = subject.model.config().vocab_size;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut logits = Vec::new();
    for (position, pair) in scored.windows(2).enumerate() {
        go_on(progress)?;
        decode_all(subject, &vec![pair[0]; caches.len()], caches.iter_mut().collect(), &names, &mut logits)?;
        for (index, logits) in logits.chunks_exact(vocab_size).enumerate() {
            use_logprobs(position, index, pair[1], log_softmax(logits));
        }
    }
    Ok(caches)
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

/// What caches would go on with, whatever ends a text.
///
/// * `names`: as for [`each_distribution`]
fn greedy_all(
    subject: &Subject<'_>,
    filled: Vec<Filled>,
    names: &[String],
    len: usize,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    let vocab_size = subject.model.config().vocab_size;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut texts = vec![Vec::with_capacity(len); filled.len()];
    let mut logits: Vec<f32> = filled.iter().flat_map(|filled| &filled.logits).copied().collect();
    let mut caches: Vec<AdaptiveKvCache> = filled.into_iter().map(|filled| filled.cache).collect();
    for step in 0..len {
        go_on(progress)?;
        let ids: Vec<u32> = logits.chunks_exact(vocab_size).map(most_probable).collect::<Result<_>>()?;
        for (text, &id) in texts.iter_mut().zip(&ids) {
            text.push(id);
        }
        if step + 1 < len {
            decode_all(subject, &ids, caches.iter_mut().collect(), &names, &mut logits)?;
        }
    }
    Ok(texts)
}

/// The norm of the difference, as a share of the reference's norm; 0 for equal ones.
fn relative_error(reference: &[f32], other: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut reference.iter().zip(other).map(|(a, b)| f64::from(a - b)));
    if difference == 0.0 { 0.0 } else { difference / norm(&mut reference.iter().map(|&a| f64::from(a))) }
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
