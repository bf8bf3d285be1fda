//! Reads a text that is longer than the model's context through caches with a budget in bytes, in turns: some tokens are read
//! as a prompt, the next are written one by one, as an answer would be, and scored. What is kept moves together whenever
//! positions run out.
//!
//! ```sh
//! cargo run --release --example long_text -- MODEL TEXT TOKENS KV_DTYPE BUDGET CONFIG...
//! ```
//!
//! Every so many turns, a full cache reads the last tokens that the context has room for, and its probabilities of the same
//! tokens are what others are compared with. Prints Markdown.

use std::io::Write;
use std::time::{Duration, Instant};

use adaptive_kvcache::cache::{AdaptiveKvCache, Bounds, Overflow};
use adaptive_kvcache::compress::{Budget, parse_size};
use adaptive_kvcache::fidelity::log_softmax;
use adaptive_kvcache::model::PrefillOptions;
use adaptive_kvcache::prelude::*;
use anyhow::{Context, ensure};

/// Tokens of a turn that are read, and that are written.
const READ: usize = 448;
const WRITTEN: usize = 64;

/// Turns from one comparison with a full cache to the next.
const COMPARED_EVERY: usize = 8;

/// A cache under test, and what came of it.
struct Subject {
    name: String,
    cache: AdaptiveKvCache,
    most_allocated: usize,
    /// Of each turn: mean negative log-likelihood, time of the written tokens, and the divergence from the full cache.
    turns: Vec<(f64, Duration, Option<f64>)>,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, tokens, dtype, budget, configs @ ..] = &arguments[..] else {
        anyhow::bail!("usage: long_text MODEL TEXT TOKENS KV_DTYPE BUDGET CONFIG...");
    };
    let loaded = load(model, WeightDtype::Auto)?;
    let dtype = KvDtype::ALL.into_iter().find(|known| known.name() == dtype).context("no such KV dtype")?;
    let budget = parse_size(budget).map_err(anyhow::Error::msg)?;
    let text = std::fs::read_to_string(text).with_context(|| format!("failed to read `{text}`"))?;
    let mut ids = loaded.tokenizer.encode(&text)?;
    let count: usize = tokens.parse()?;
    ensure!(ids.len() >= count, "the text has {} tokens", ids.len());
    ids.truncate(count);
    let bounds = Bounds { ahead: 256, overflow: Overflow::Shift, ..Bounds::default() };
    let subject = |path: &String| -> anyhow::Result<Subject> {
        let config = AdaptiveConfig::from_file(path)?.with_budget(Budget::Bytes(budget))?;
        let cache = loaded.cache(dtype, &config)?.with_bounds(bounds);
        Ok(Subject { name: path.clone(), cache, most_allocated: 0, turns: Vec::new() })
    };
    let mut subjects = configs.iter().map(subject).collect::<anyhow::Result<Vec<_>>>()?;
    let context = loaded.model.config().context_length;
    let mut full_loss = Vec::new();
    for (turn, tokens) in ids.chunks_exact(READ + WRITTEN).enumerate() {
        let (read, written) = tokens.split_at(READ);
        let compares = turn % COMPARED_EVERY == COMPARED_EVERY - 1;
        let full = compares.then(|| -> anyhow::Result<Vec<Vec<f32>>> {
            let end = turn * (READ + WRITTEN) + READ;
            let mut cache = loaded.full_cache(dtype)?;
            let last = &ids[end.saturating_sub(context - WRITTEN)..end];
            let logits = loaded.model.prefill(last, &mut cache, &mut ())?.logits;
            score(&loaded, &mut cache, &logits, written, &mut |_| {})
        });
        let full = full.transpose()?;
        full_loss.extend(full.as_ref().map(|rows| loss(rows, written)));
        for subject in &mut subjects {
            let Subject { cache, most_allocated, .. } = subject;
            loaded.model.make_positions(cache, READ)?;
            let logits = loaded.model.prefill(read, cache, &mut ())?.logits;
            let started = Instant::now();
            let rows = score(&loaded, cache, &logits, written, &mut |allocated| {
                *most_allocated = (*most_allocated).max(allocated);
            })?;
            let time = started.elapsed();
            let divergence = full.as_ref().map(|full| divergence(full, &rows));
            subject.turns.push((loss(&rows, written), time, divergence));
        }
        eprintln!("{} of {} tokens", (turn + 1) * (READ + WRITTEN), ids.len());
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "| cache | perplexity | where compared (full cache) | KL | at most, MB | tokens/s, 9th thousand | last |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for Subject { name, most_allocated, turns, .. } in &subjects {
        #[expect(clippy::cast_precision_loss)]
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len().max(1) as f64;
        let losses: Vec<f64> = turns.iter().map(|turn| turn.0).collect();
        let compared: Vec<&(f64, Duration, Option<f64>)> = turns.iter().filter(|turn| turn.2.is_some()).collect();
        let [there, kl]: [Vec<f64>; 2] =
            [compared.iter().map(|turn| turn.0).collect(), compared.iter().filter_map(|turn| turn.2).collect()];
        // A thousand tokens are two turns.
        #[expect(clippy::cast_precision_loss)]
        let speed = |turns: &[(f64, Duration, Option<f64>)]| {
            let time: f64 = turns.iter().map(|turn| turn.1.as_secs_f64()).sum();
            (turns.len() * WRITTEN) as f64 / time
        };
        let ninth = 8000 / (READ + WRITTEN);
        let (first, last) = (turns.get(ninth..ninth + 2).unwrap_or(turns), &turns[turns.len().saturating_sub(2)..]);
        #[expect(clippy::cast_precision_loss)]
        let megabytes = *most_allocated as f64 / (1024.0 * 1024.0);
        writeln!(
            out,
            "| `{name}` | {:.3} | {:.3} ({:.3}) | {:.4} | {megabytes:.2} | {:.1} | {:.1} |",
            mean(&losses).exp(),
            mean(&there).exp(),
            mean(&full_loss).exp(),
            mean(&kl),
            speed(first),
            speed(last),
        )?;
    }
    Ok(())
}

/// Writes the tokens; the log-probabilities that each was drawn from.
///
/// * `logits`: of the first
/// * `watch`: gets what is allocated for the cache after each
fn score(
    loaded: &adaptive_kvcache::checkpoint::Loaded,
    cache: &mut AdaptiveKvCache,
    logits: &[f32],
    written: &[u32],
    watch: &mut dyn FnMut(usize),
) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut rows = vec![log_softmax(logits)];
    watch(cache.bytes().allocated);
    for (index, &id) in written.iter().enumerate() {
        loaded.model.make_room(cache, 1, PrefillOptions::default(), &mut ())?;
        let logits = loaded.model.decode(id, cache)?;
        watch(cache.bytes().allocated);
        if index + 1 < written.len() {
            rows.push(log_softmax(&logits));
        }
    }
    Ok(rows)
}

/// The mean negative log-likelihood of the tokens.
#[expect(clippy::cast_precision_loss)]
fn loss(rows: &[Vec<f32>], written: &[u32]) -> f64 {
    let sum: f64 = rows.iter().zip(written).map(|(row, &id)| -f64::from(row[id as usize])).sum();
    sum / written.len() as f64
}

/// The mean Kullback-Leibler divergence from the full cache, in nats.
#[expect(clippy::cast_precision_loss)]
fn divergence(full: &[Vec<f32>], rows: &[Vec<f32>]) -> f64 {
    let of_row = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
        p.iter().zip(q).map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum()
    };
    full.iter().zip(rows).map(of_row).sum::<f64>() / full.len() as f64
}
