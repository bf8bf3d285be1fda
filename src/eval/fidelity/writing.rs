//! How caches hold out while a long text is written behind a window's prompt: the full cache writes it, and all read it.
//!
//! Tokens are drawn by a seeded sampler, at temperature 1 if nothing else is said: then the divergences of all tokens add up,
//! on average over texts, to that of the two caches' whole texts. The most probable tokens alone soon go round in a loop,
//! which every cache foretells. Tokens that would end the text are left out.
//!
//! All is drawn from one seed, so that every batch of caches reads the same text and no distribution has to be held.

use rayon::prelude::*;

use super::WindowScores;
use crate::cache::AdaptiveKvCache;
use crate::error::Result;
use crate::eval::forks::decode_all;
use crate::eval::metrics::mean;
use crate::eval::{Filled, Progress, Subject, WritingRow, go_on};
use crate::fidelity::{kl_divergence, log_softmax, same_top1};
use crate::generate::{Sampler, SamplingOptions};

/// Tokens that one [`WritingRow`] is about.
pub const TOKENS_PER_ROW: usize = 100;

/// A text that is written behind each window's prompt.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WritingPlan {
    /// Tokens of it; 0 for none.
    pub tokens: usize,
    /// How they are drawn.
    pub sampling: SamplingOptions,
}

/// What a written text gave for one cache.
#[derive(Debug, Clone, Default)]
pub(super) struct Written {
    /// `[tokens]` of the distribution behind each token.
    kl: Vec<f64>,
    /// `[tokens]`
    same_top1: Vec<bool>,
    /// `[rows]` kept share and bytes at the end of each row's tokens.
    kept: Vec<(f64, usize)>,
}

impl Written {
    /// * `full`, `own`: `[vocab_size]` log-probabilities
    fn add(&mut self, full: &[f32], own: &[f32]) {
        self.kl.push(kl_divergence(full, own));
        self.same_top1.push(same_top1(full, own));
    }

    fn end_row(&mut self, cache: &AdaptiveKvCache) {
        self.kept.push((cache.kept_ratio(), cache.bytes().kept));
    }
}

impl WritingPlan {
    /// Lets the full cache write, and all caches read what it writes.
    ///
    /// * `full`: holds the prompt
    /// * `names`: of the others, for people
    ///
    /// Returns what the text gave for the full cache, and then for each of the others.
    pub(super) fn write(
        &self,
        subject: &Subject<'_>,
        full: &Filled,
        others: &[Filled],
        names: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<Written>> {
        let vocab_size = subject.model.config().vocab_size;
        let names: Vec<&str> = std::iter::once("full cache").chain(names.iter().copied()).collect();
        let filled = || std::iter::once(full).chain(others);
        let mut caches: Vec<AdaptiveKvCache> = filled().map(|filled| filled.cache.clone()).collect();
        let mut all = vec![Written::default(); caches.len()];
        let mut sampler = Sampler::new(self.sampling, &[]);
        let mut logits = full.logits.clone();
        for token in 1..=self.tokens {
            go_on(progress)?;
            let id = draw(subject, &mut sampler, &logits[..vocab_size])?;
            decode_all(subject, &vec![id; caches.len()], caches.iter_mut().collect(), &names, &mut logits)?;
            let of_full = log_softmax(&logits[..vocab_size]);
            let rows = all.par_iter_mut().zip(logits.par_chunks_exact(vocab_size));
            rows.for_each(|(written, logits)| written.add(&of_full, &log_softmax(logits)));
            if token.is_multiple_of(TOKENS_PER_ROW) || token == self.tokens {
                all.iter_mut().zip(&caches).for_each(|(written, cache)| written.end_row(cache));
            }
        }
        Ok(all)
    }
}

/// Draws the next token, of those that do not end a text.
///
/// * `logits`: `[vocab_size]` of the full cache
fn draw(subject: &Subject<'_>, sampler: &mut Sampler, logits: &[f32]) -> Result<u32> {
    let mut logits = logits.to_vec();
    for &id in subject.tokenizer.eos_ids() {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    sampler.sample(&logits)
}

/// Mean KL divergence and top-1 agreement of all tokens of all windows; `None` if nothing was written.
pub(super) fn over_all(scores: &[WindowScores]) -> Option<(f64, f64)> {
    let last = scores.iter().map(|scores| scores.written.kl.len()).max().filter(|&tokens| tokens > 0)?;
    Some(over(scores, 0..last))
}

/// A row for each [`TOKENS_PER_ROW`] tokens, over all windows; the last may be about fewer.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) fn rows(scores: &[WindowScores]) -> Vec<WritingRow> {
    let tokens = scores.first().map_or(0, |scores| scores.written.kl.len());
    let starts = (0..tokens).step_by(TOKENS_PER_ROW).enumerate();
    let row = |(row, start): (usize, usize)| {
        let end = (start + TOKENS_PER_ROW).min(tokens);
        let (kl_mean, top1_agreement) = over(scores, start..end);
        let average = |value: fn(&(f64, usize)) -> f64| {
            mean(&scores.iter().map(|scores| value(&scores.written.kept[row])).collect::<Vec<_>>())
        };
        WritingRow {
            tokens: end,
            kl_mean,
            top1_agreement,
            kept_ratio: average(|kept| kept.0),
            kv_bytes: average(|kept| kept.1 as f64).round() as usize,
        }
    };
    starts.map(row).collect()
}

/// Mean KL divergence and top-1 agreement of some tokens of all windows.
fn over(scores: &[WindowScores], tokens: std::ops::Range<usize>) -> (f64, f64) {
    let kl: Vec<f64> = scores.iter().flat_map(|scores| &scores.written.kl[tokens.clone()]).copied().collect();
    let same = scores.iter().flat_map(|scores| &scores.written.same_top1[tokens.clone()]);
    (mean(&kl), mean(&same.map(|&same| f64::from(u8::from(same))).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(first: usize) -> WindowScores {
        let number = |token: usize| f64::from(u8::try_from((first + token) / TOKENS_PER_ROW).unwrap());
        let written = Written {
            kl: (0..150).map(number).collect(),
            same_top1: (0..150).map(|token| token < 100 || token % 2 == first % 2).collect(),
            kept: vec![(0.5, 10 + first), (0.25, 20)],
        };
        WindowScores { written, ..WindowScores::default() }
    }

    #[test]
    fn each_hundred_tokens_have_a_row_over_all_windows() {
        let scores = [window(0), window(101)];
        let row = |tokens, kl_mean, top1_agreement, kept_ratio, kv_bytes| WritingRow {
            tokens,
            kl_mean,
            top1_agreement,
            kept_ratio,
            kv_bytes,
        };
        // The second window's divergence is 1 up to its token 99, and 2 from there on.
        let expected = [row(100, 0.505, 1.0, 0.5, 61), row(150, 1.5, 0.5, 0.25, 20)];
        let rows = rows(&scores);
        assert_eq!(rows.len(), 2);
        for (row, expected) in rows.iter().zip(expected) {
            assert!((row.kl_mean - expected.kl_mean).abs() < 1e-12, "{row:?}");
            assert_eq!(WritingRow { kl_mean: expected.kl_mean, ..row.clone() }, expected);
        }
        let (kl, top1) = over_all(&scores).unwrap();
        assert!((kl - (101.0 + 150.0) / 300.0).abs() < 1e-12 && (top1 - 250.0 / 300.0).abs() < 1e-12, "{kl}, {top1}");
        assert!(over_all(&[WindowScores::default()]).is_none() && super::rows(&[WindowScores::default()]).is_empty());
    }
}
