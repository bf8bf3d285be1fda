//! Drawing a token from logits: repeat penalty, top-k, top-p, min-p, temperature, in this order (llama.cpp's).

use std::cmp::Ordering;
use std::collections::HashSet;

use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::fidelity::argmax;
use crate::numbers::is_distribution;

/// How tokens are drawn. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SamplingOptions {
    /// Scores are divided by it; 0 takes the most probable token always. At least 0.
    pub temperature: f32,
    /// Only the `k` most probable tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Only the most probable tokens that together hold this probability; 1 for all. In 0..=1.
    pub top_p: f32,
    /// Only tokens at least this share as probable as the most probable; 0 for all. In 0..=1.
    pub min_p: f32,
    /// Scores of tokens among the last [`repeat_last_n`](Self::repeat_last_n) are divided by it if positive, else
    /// multiplied (Keskar et al., arXiv 1909.05858); 1 for none. Above 0.
    pub repeat_penalty: f32,
    /// How many of the latest tokens, prompt included, the penalty looks at.
    pub repeat_last_n: usize,
    /// Seed of the random numbers: the same seed draws the same tokens.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, repeat_last_n: 64, seed: 0 }
    }
}

impl SamplingOptions {
    /// Whether tokens are drawn at random, so that the seed matters.
    #[must_use]
    pub fn is_random(&self) -> bool {
        self.temperature > 0.0
    }

    /// The seed, if it matters.
    #[must_use]
    pub fn drawn_seed(&self) -> Option<u64> {
        self.is_random().then_some(self.seed)
    }

    /// The same with a seed of its own, made of this seed and `index`: for texts that are drawn side by side and must
    /// not repeat one another. Index 0 keeps the seed; others are below 2^53, so that every JSON reader holds them.
    #[must_use]
    pub fn stream(self, index: u64) -> Self {
        let seed = if index == 0 { self.seed } else { mixed(mixed(self.seed).wrapping_add(index)) >> 11 };
        Self { seed, ..self }
    }
}

/// Spreads every bit over the whole word: the finaliser of `SplitMix64` (Steele et al., OOPSLA 2014), whose increment keeps
/// 0 from staying 0.
fn mixed(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Draws tokens, one after the other.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: StdRng,
    seen: Vec<u32>,
}

impl Sampler {
    /// A sampler whose repeat penalty knows the prompt.
    #[must_use]
    pub fn new(options: SamplingOptions, prompt: &[u32]) -> Self {
        Self { options, random: StdRng::seed_from_u64(options.seed), seen: prompt.to_vec() }
    }

    /// A sampler that goes on with another's random numbers, unless the seed is another: for one text after the other.
    ///
    /// * `text`: what its repeat penalty is to know
    #[must_use]
    pub fn after(before: Option<Self>, options: SamplingOptions, text: &[u32]) -> Self {
        match before.filter(|before| before.options.seed == options.seed) {
            Some(before) => Self { options, random: before.random, seen: text.to_vec() },
            None => Self::new(options, text),
        }
    }

    /// The text so far, prompt included.
    #[must_use]
    pub fn text(&self) -> &[u32] {
        &self.seen
    }

    /// Draws the next token.
    ///
    /// * `logits`: `[vocab_size]`
    ///
    /// # Errors
    /// [`Error::NotANumber`] if the logits make no distribution: one is NaN, or the largest is not finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let refused = || Error::not_a_number("the scores that a token is to be drawn from");
        let id = self.draw(logits).filter(|_| is_distribution(logits)).ok_or_else(refused)?;
        self.seen.push(id);
        Ok(id)
    }

    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let SamplingOptions { temperature, top_k, top_p, min_p, .. } = self.options;
        let penalised = self.penalise(logits);
        if temperature <= 0.0 {
            return argmax(&penalised).and_then(|best| u32::try_from(best).ok());
        }
        let mut candidates: Vec<(u32, f32)> = (0u32..).zip(penalised).filter(|(_, logit)| logit.is_finite()).collect();
        let best = candidates.iter().map(|(_, logit)| *logit).max_by(f32::total_cmp)?;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            keep_nucleus(&mut candidates, best, top_p);
        }
        candidates.retain(|(_, logit)| (logit - best).exp() >= min_p);
        let weights = candidates.iter().map(|(_, logit)| ((logit - best) / temperature).exp());
        let index = WeightedIndex::new(weights).ok()?.sample(&mut self.random);
        Some(candidates[index].0)
    }

    fn penalise(&self, logits: &[f32]) -> Vec<f32> {
        let SamplingOptions { repeat_penalty, repeat_last_n, .. } = self.options;
        let mut logits = logits.to_vec();
        if repeat_penalty != 1.0 {
            let recent: HashSet<u32> = self.seen.iter().rev().take(repeat_last_n).copied().collect();
            for id in recent {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = if *logit > 0.0 { *logit / repeat_penalty } else { *logit * repeat_penalty };
                }
            }
        }
        logits
    }
}

/// The order of tokens by their scores, the likeliest first; of equal ones, that with the smaller id.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as what sorts calls it")]
fn likelier((a_id, a): &(u32, f32), (b_id, b): &(u32, f32)) -> Ordering {
    b.total_cmp(a).then(a_id.cmp(b_id))
}

/// How many of the likeliest tokens are put in order first: most often they are enough.
const FIRST_SORTED: usize = 64;

/// Keeps the fewest likeliest tokens that hold a share of the probability, in order, without sorting the others.
///
/// * `best`: the largest score
fn keep_nucleus(candidates: &mut Vec<(u32, f32)>, best: f32, top_p: f32) {
    let total: f32 = candidates.iter().map(|(_, logit)| (logit - best).exp()).sum();
    let (mut sorted, mut held) = (0, 0.0);
    while sorted < candidates.len() {
        let count = sorted.max(FIRST_SORTED).min(candidates.len() - sorted);
        if count < candidates.len() - sorted {
            candidates[sorted..].select_nth_unstable_by(count - 1, likelier);
        }
        candidates[sorted..sorted + count].sort_unstable_by(likelier);
        for index in sorted..sorted + count {
            held += (candidates[index].1 - best).exp() / total;
            if held >= top_p {
                candidates.truncate(index + 1);
                return;
            }
        }
        sorted += count;
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    /// The same tokens as with all of them sorted, whatever the scores: flat, steep, or many of them equal.
    #[test]
    fn a_nucleus_is_that_of_a_whole_sort() {
        let mut random = StdRng::seed_from_u64(7);
        for case in 0..200 {
            let (len, spread) = (1 + case * 7, [0.01, 1.0, 20.0][case % 3]);
            let score = |_| (random.random::<f32>() * 50.0).floor() / 50.0 * spread;
            let logits: Vec<f32> = (0..len).map(score).collect();
            let all: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            let mut sorted = all.clone();
            sorted.sort_by(likelier);
            let total: f32 = all.iter().map(|(_, logit)| (logit - best).exp()).sum();
            for top_p in [0.0, 0.3, 0.9, 0.999] {
                let (mut held, mut expected) = (0.0, sorted.clone());
                let enough = sorted.iter().position(|(_, logit)| {
                    held += (logit - best).exp() / total;
                    held >= top_p
                });
                expected.truncate(enough.map_or(len, |index| index + 1));
                let mut nucleus = all.clone();
                keep_nucleus(&mut nucleus, best, top_p);
                assert_eq!(nucleus, expected, "{len} tokens, spread {spread}, {top_p}");
            }
        }
    }

    fn draws(options: SamplingOptions, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options, &[]);
        (0..count).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    fn hot(options: SamplingOptions) -> SamplingOptions {
        SamplingOptions { temperature: 1.0, ..options }
    }

    #[test]
    fn greedy_takes_the_largest_and_nan_is_an_error() {
        assert_eq!(draws(SamplingOptions::default(), &[0.0, 2.0, 1.0], 3), [1, 1, 1]);
        assert!(Sampler::new(SamplingOptions::default(), &[]).sample(&[f32::NAN]).is_err());
        assert!(Sampler::new(hot(SamplingOptions::default()), &[]).sample(&[f32::NAN]).is_err());
        assert!(Sampler::new(SamplingOptions::default(), &[]).sample(&[]).is_err());
    }

    #[test]
    fn what_is_no_distribution_is_refused_however_it_is_drawn() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let narrow = SamplingOptions { top_k: 1, min_p: 0.5, ..SamplingOptions::default() };
        for options in [SamplingOptions::default(), hot(SamplingOptions::default()), hot(narrow)] {
            for logits in [[0.0, 5.0, nan], [-nan, 5.0, 0.0], [inf, 0.0, 0.0], [-inf; 3]] {
                let refused = Sampler::new(options, &[]).sample(&logits);
                assert!(matches!(refused, Err(Error::NotANumber { .. })), "{logits:?}: {refused:?}");
            }
            assert_eq!(Sampler::new(options, &[]).sample(&[-inf, 0.0, -inf]).unwrap(), 1);
        }
    }

    #[test]
    fn streams_are_apart_and_the_first_is_the_seed() {
        let seeds = |seed: u64| {
            (0..1000).map(move |index| SamplingOptions { seed, ..SamplingOptions::default() }.stream(index).seed)
        };
        assert_eq!(seeds(7).next(), Some(7));
        let mut all: Vec<u64> = [0, 1, 2, u64::MAX].into_iter().flat_map(seeds).collect();
        assert!(all.iter().filter(|&&seed| seed != u64::MAX).all(|&seed| seed < 1 << 53));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 4000);
    }

    #[test]
    fn a_sampler_goes_on_unless_the_seed_is_another() {
        let options = hot(SamplingOptions { seed: 3, ..SamplingOptions::default() });
        let whole = draws(options, &[0.0; 50], 20);
        let mut first = Sampler::new(options, &[]);
        let mut ids: Vec<u32> = (0..10).map(|_| first.sample(&[0.0; 50]).unwrap()).collect();
        let mut second = Sampler::after(Some(first), options, &[1, 2]);
        ids.extend((0..10).map(|_| second.sample(&[0.0; 50]).unwrap()));
        assert_eq!(ids, whole);
        let mut anew = Sampler::after(Some(second), SamplingOptions { seed: 4, ..options }, &[]);
        assert_eq!(anew.sample(&[0.0; 50]).unwrap(), draws(SamplingOptions { seed: 4, ..options }, &[0.0; 50], 1)[0]);
    }

    #[test]
    fn a_seed_decides_the_draws_and_frequencies_follow_the_probabilities() {
        let logits = [0.0, 3f32.ln()]; // 1/4, 3/4
        let options = hot(SamplingOptions { seed: 7, ..SamplingOptions::default() });
        let first = draws(options, &logits, 4000);
        assert_eq!(first, draws(options, &logits, 4000));
        let ones = first.iter().filter(|&&id| id == 1).count();
        assert!((2850..3150).contains(&ones), "{ones}"); // 3000 expected, standard deviation 27
    }

    #[test]
    fn filters_cut_the_tail() {
        let logits = [0.0, 1.0, 2.0, 3.0]; // 0.03, 0.09, 0.24, 0.64
        for (options, allowed) in [
            (SamplingOptions { top_k: 2, ..SamplingOptions::default() }, vec![2, 3]),
            (SamplingOptions { top_p: 0.6, ..SamplingOptions::default() }, vec![3]),
            (SamplingOptions { top_p: 0.7, ..SamplingOptions::default() }, vec![2, 3]),
            (SamplingOptions { min_p: 0.1, ..SamplingOptions::default() }, vec![1, 2, 3]),
        ] {
            let mut drawn = draws(hot(options), &logits, 500);
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn, allowed, "{options:?}");
        }
    }

    #[test]
    fn the_penalty_looks_at_the_latest_tokens_only() {
        let options = SamplingOptions { repeat_penalty: 2.0, repeat_last_n: 1, ..SamplingOptions::default() };
        // 1 wins, then loses to 2 (3 / 2 < 2), then wins again when 2 is the latest.
        assert_eq!(draws(options, &[0.0, 3.0, 2.0], 4), [1, 2, 1, 2]);
    }
}
