//! One window of a text: what the full cache says of it, and how far others are from that.
//!
//! Not for: which windows there are, and what is told of them all (see [`super`]).

use super::FidelityPlan;
use super::writing::Written;
use crate::cache::AdaptiveKvCache;
use crate::error::{Error, Result};
use crate::eval::forks::{decode_all, fill_all, most_probable};
use crate::eval::metrics::mean;
use crate::eval::{CacheEnd, CacheStart, Filled, Progress, Subject, Variant, go_on};
use crate::fidelity::{kl_divergence, log_softmax, same_top1};
use crate::numbers::all_finite;

/// What the full cache says of a window.
#[derive(Debug, Default)]
pub(super) struct Reference {
    /// Tokens that are compressed.
    pub prompt: Vec<u32>,
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
    /// The cache with the prompt, if it is to write.
    filled: Option<Filled>,
    written: Written,
}

/// What one window gave for one variant.
#[derive(Debug, Clone, Default)]
pub(super) struct WindowScores {
    pub kept_ratio: f64,
    pub kv_bytes: usize,
    pub end: CacheEnd,
    /// `[positions]`
    pub kl: Vec<f64>,
    /// `[positions]`
    pub text_logprobs: Vec<f64>,
    /// `[positions]`
    pub full_text_logprobs: Vec<f64>,
    pub equal_top1: usize,
    pub equal_tokens: usize,
    /// `[layers]`; empty if not wanted
    pub attention_error: Vec<f64>,
    pub written: Written,
}

impl Reference {
    /// Reads a window's prompt into the full cache and those of all variants, and scores what follows.
    ///
    /// * `place`: the window, for people
    ///
    /// Returns the scores of all variants, too.
    pub fn measure(
        subject: &Subject<'_>,
        (text, plan, window): (&[u32], &FidelityPlan, usize),
        variants: &[Variant],
        place: &str,
        progress: &mut dyn Progress,
    ) -> Result<(Self, Vec<WindowScores>)> {
        let (prompt, scored) = plan.window(subject, text, window);
        let mut reference = Self { prompt, scored, ..Self::default() };
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
            let written = reference.write(subject, plan, &filled, &names, progress)?;
            let all_scores = reference.score(subject, filled, &names, progress)?;
            for ((index, window_scores), written) in which.into_iter().zip(all_scores).zip(written) {
                scores[index] = Some(WindowScores { written, ..window_scores });
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
        self.filled = (plan.writing.tokens > 0).then(|| filled.clone());
        let start = CacheStart::of(&filled.cache);
        let caches = each_distribution(subject, vec![filled.cache], scored, &[], progress, |_, _, next, all| {
            text_logprobs.push(f64::from(all[next as usize]));
            logprobs.push(all);
        })?;
        self.end = start.end(&caches[0]);
        Ok(())
    }

    /// Writes a text that the full cache and others read, if one is to be written.
    ///
    /// * `names`: of the others, for people
    ///
    /// Returns what it gave for each of the others.
    fn write(
        &mut self,
        subject: &Subject<'_>,
        plan: &FidelityPlan,
        others: &[Filled],
        names: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<Written>> {
        let Some(full) = &self.filled else { return Ok(vec![Written::default(); others.len()]) };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut all = plan.writing.write(subject, full, others, &names, progress)?;
        self.written = all.remove(0);
        Ok(all)
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
            written: self.written.clone(),
        }
    }

    /// Scores what follows with some caches, which read it together.
    ///
    /// * `names`: of the caches, for people
    pub fn score(
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
            written: Written::default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_reference() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.0, 4.0], &[0.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!((relative_error(&[3.0, 4.0], &[3.0, 3.0]) - 0.2).abs() < 1e-12);
        assert_eq!(relative_error(&[0.0], &[0.0]), 0.0);
    }
}
