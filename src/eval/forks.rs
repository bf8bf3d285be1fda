//! One prompt in many caches: read once, kept in as many ways as there are variants, and gone on with by all of them at a
//! time, so that the weights are read once for all.
//!
//! What a cache holds and says does not depend on the others.

use super::{Filled, Progress, Subject, Variant, Watch, go_on};
use crate::cache::{AdaptiveKvCache, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::fidelity::argmax;
use crate::numbers::check_logits;

/// Bytes that caches of one prompt may come to, were they all full: so many are there at a time, at least one.
const MOST_BYTES: usize = 4 << 30;

/// Which cache: `None` for the full one that all are compared with, or the index of a variant.
pub(super) type Which = Option<usize>;

/// Reads a prompt, and hands over the full cache and that of every variant, as many at a time as there is memory for. A
/// variant that is the [full one](Variant::is_full) is not handed over a second time.
///
/// * `use_filled`: gets which caches, the full one first, and the caches
pub(super) fn fill_all(
    subject: &Subject<'_>,
    ids: &[u32],
    variants: &[Variant],
    progress: &dyn Progress,
    mut use_filled: impl FnMut(Vec<Which>, Vec<Filled>) -> Result<()>,
) -> Result<()> {
    let others = variants.iter().enumerate().filter(|(_, variant)| !variant.is_full(subject.full_kv_dtype));
    let which: Vec<Which> = std::iter::once(None).chain(others.map(|(index, _)| Some(index))).collect();
    for which in which.chunks(most_at_a_time(subject, ids.len())) {
        let caches = which.iter().map(|which| {
            let full = (subject.full_kv_dtype, &Retention::Full);
            let (dtype, retention) = which.map_or(full, |index| (variants[index].kv_dtype, &variants[index].retention));
            subject.model.new_cache(dtype, retention.clone())
        });
        let mut caches = caches.collect::<Result<Vec<AdaptiveKvCache>>>()?;
        let logits =
            subject.model.prefill_forks(ids, &mut caches, subject.prefill_options, &mut Watch(progress))?.logits;
        let filled = caches.into_iter().map(|cache| Filled { cache, logits: logits.clone() });
        use_filled(which.to_vec(), filled.collect())?;
    }
    Ok(())
}

/// How many caches of a prompt are there at a time.
fn most_at_a_time(subject: &Subject<'_>, prompt_len: usize) -> usize {
    let config = subject.model.config();
    let token_bytes = KvDtype::F16.token_bytes(config.heads.head_dim);
    let bytes = prompt_len * config.num_layers * config.heads.num_kv_heads * token_bytes;
    (MOST_BYTES / bytes.max(1)).max(1)
}

/// Gives caches one token each.
///
/// * `ids`: `[caches]`
/// * `names`: `[caches]` for people; or none if the caller names the only one
/// * `logits`: overwritten with `[caches, vocab_size]`
pub(super) fn decode_all(
    subject: &Subject<'_>,
    ids: &[u32],
    mut caches: Vec<&mut AdaptiveKvCache>,
    names: &[&str],
    logits: &mut Vec<f32>,
) -> Result<()> {
    subject.model.decode_unchecked(ids, &mut caches, logits)?;
    let rows = logits.chunks_exact(subject.model.config().vocab_size);
    for (index, (logits, cache)) in rows.zip(&caches).enumerate() {
        check_logits(logits, cache.seen()).map_err(|error| match names.get(index) {
            Some(name) => error.in_place(|| (*name).to_owned()),
            None => error,
        })?;
    }
    Ok(())
}

/// The most probable token.
pub(super) fn most_probable(logits: &[f32]) -> Result<u32> {
    let id = argmax(logits).and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Error::shape("logits", "at least one", logits.len()))
}

/// A question to many caches at a time.
pub(super) struct Asked<'a> {
    /// At least one token.
    pub question: &'a [u32],
    /// Of an answer, at most.
    pub max_tokens: usize,
    /// Whether an answer needs no further tokens, whatever they would be.
    pub is_enough: &'a dyn Fn(&str) -> bool,
}

impl Asked<'_> {
    /// Lets every cache read the question and answer it, greedily.
    ///
    /// * `names`: of the caches, for people
    pub(super) fn answers(
        &self,
        subject: &Subject<'_>,
        filled: Vec<Filled>,
        names: &[&str],
        progress: &dyn Progress,
    ) -> Result<Vec<String>> {
        let tokenizer = subject.tokenizer;
        let mut caches: Vec<AdaptiveKvCache> = filled.into_iter().map(|filled| filled.cache).collect();
        let mut logits = Vec::new();
        for &id in self.question {
            go_on(progress)?;
            decode_all(subject, &vec![id; caches.len()], caches.iter_mut().collect(), names, &mut logits)?;
        }
        let mut texts = vec![String::new(); caches.len()];
        let mut decoders: Vec<_> = caches.iter().map(|_| tokenizer.stream(false)).collect();
        // Those that are still answering, in the order of the logits.
        let mut active: Vec<usize> = (0..caches.len()).collect();
        for step in 0..self.max_tokens {
            go_on(progress)?;
            let (mut going_on, mut ids) = (Vec::with_capacity(active.len()), Vec::with_capacity(active.len()));
            for (&index, logits) in active.iter().zip(logits.chunks_exact(subject.model.config().vocab_size)) {
                let id = most_probable(logits)?;
                if tokenizer.eos_ids().contains(&id) {
                    continue;
                }
                texts[index] += &decoders[index].push(id);
                if !(self.is_enough)(&texts[index]) && step + 1 < self.max_tokens {
                    going_on.push(index);
                    ids.push(id);
                }
            }
            active = going_on;
            if active.is_empty() {
                break;
            }
            let of_active = caches.iter_mut().enumerate().filter(|(index, _)| active.contains(index));
            let names: Vec<&str> = active.iter().filter_map(|&index| names.get(index).copied()).collect();
            decode_all(subject, &ids, of_active.map(|(_, cache)| cache).collect(), &names, &mut logits)?;
        }
        for (text, decoder) in texts.iter_mut().zip(decoders) {
            *text += &decoder.finish();
        }
        Ok(texts)
    }
}
