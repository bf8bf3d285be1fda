//! What several tokens of a sequence in one pass over the weights cost, as multiples of one token's time:
//! `cargo bench --bench runs -- MODEL.gguf [TOKENS OF PROMPT] [ROUNDS]`. The constants of guesses from the text are found
//! with it (`src/generate/draft.rs`).
#![allow(clippy::cast_precision_loss, reason = "times of small numbers of tokens")]

use std::time::Instant;

use adaptive_kvcache::Result;
use adaptive_kvcache::cache::{KvDtype, Retention};
use adaptive_kvcache::checkpoint::{WeightDtype, load};

const NOVEL: &str = include_str!("../tests/data/text/eighty_days_ch1-5.txt");

/// Tokens in a pass.
const COUNTS: [usize; 9] = [1, 2, 3, 4, 5, 6, 8, 12, 16];

fn main() -> Result<()> {
    // Cargo adds options of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(path) = args.first() else {
        println!("no model was named: cargo bench --bench runs -- MODEL.gguf [TOKENS OF PROMPT] [ROUNDS]");
        return Ok(());
    };
    let number = |index: usize, default| args.get(index).and_then(|arg| arg.parse().ok()).unwrap_or(default);
    let (prompt_len, rounds): (usize, usize) = (number(1, 512), number(2, 15).max(1));
    let loaded = load(path, WeightDtype::Auto)?;
    let model = &loaded.model;
    let ids = loaded.tokenizer.encode(NOVEL)?;
    let ids = &ids[..ids.len().min(prompt_len + COUNTS[COUNTS.len() - 1])];
    let (prompt, next) = ids.split_at(prompt_len.min(ids.len().saturating_sub(COUNTS[COUNTS.len() - 1])));
    let mut cache = model.new_cache(KvDtype::F16, Retention::Full)?;
    model.prefill(prompt, &mut cache, &mut ())?;
    let (mut times, mut logits) = ([const { Vec::new() }; COUNTS.len()], Vec::new());
    // They take turns: what else the machine does slows all of them.
    for _ in 0..rounds {
        for (times, count) in times.iter_mut().zip(COUNTS) {
            let started = Instant::now();
            if count == 1 {
                model.decode_batch(&next[..1], &mut [&mut cache], &mut logits)?;
            } else {
                model.decode_run(&next[..count], &mut cache, &mut logits)?;
            }
            times.push(started.elapsed().as_secs_f64() * 1e3);
            model.take_back(count, &mut cache)?;
        }
    }
    let medians = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    println!("after {} tokens, {} threads", prompt.len(), rayon::current_num_threads());
    println!("{:>6} {:>10} {:>8} {:>14}", "tokens", "ms", "passes", "each one more");
    for (count, time) in COUNTS.into_iter().zip(medians) {
        let passes = time / medians[0];
        let each = if count == 1 { 0.0 } else { (passes - 1.0) / (count - 1) as f64 };
        println!("{count:>6} {time:>10.2} {passes:>8.2} {each:>14.3}");
    }
    Ok(())
}
