//! Measures what a saved cache spares: reading a text, saving what is kept of it, and taking it from the file until there
//! are logits of a one-token prompt, which are compared with those that come without the file. `scripts/compare_saved.sh`
//! sets llama.cpp's saved state beside it.
//!
//! ```sh
//! cargo run --release --example saved_cache -- MODEL TEXT TOKENS CONFIG|full KV_DTYPE FILE IDS
//! ```
//!
//! `FILE` becomes the saved cache; `IDS` the text's tokens that were read, one a line. Prints a line of JSON.

use std::io::Write;
use std::time::Instant;

use adaptive_kvcache::checkpoint::open;
use adaptive_kvcache::prelude::*;
use anyhow::{Context, ensure};

/// Times that the file is taken from the system's cache of files; the median counts.
const LOADS: usize = 15;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, tokens, config, dtype, file, ids] = &arguments[..] else {
        anyhow::bail!("usage: saved_cache MODEL TEXT TOKENS CONFIG|full KV_DTYPE FILE IDS");
    };
    let loaded =
        open(model)?.load(&adaptive_kvcache::backend::BackendKind::default(), WeightDtype::Auto, &mut |_, _| {})?;
    let dtype = KvDtype::ALL.into_iter().find(|known| known.name() == dtype).context("no such KV dtype")?;
    let count: usize = tokens.parse()?;
    let text = std::fs::read_to_string(text).with_context(|| format!("failed to read `{text}`"))?;
    let mut tokens = loaded.tokenizer.encode(&text)?;
    ensure!(tokens.len() > count, "the text has {} tokens", tokens.len());
    tokens.truncate(count + 1);
    let (read, question) = tokens.split_at(count);
    let lines: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    std::fs::write(ids, lines.join("\n"))?;

    let mut cache = match config.as_str() {
        "full" => loaded.full_cache(dtype)?,
        config => loaded.cache(dtype, &AdaptiveConfig::from_file(config)?)?,
    };
    let started = Instant::now();
    loaded.model.prefill(read, &mut cache, &mut ())?;
    let read_ms = milliseconds(started);
    let started = Instant::now();
    loaded.save_cache(&cache, file)?;
    let save_ms = milliseconds(started);
    let expected = loaded.model.prefill(question, &mut cache, &mut ())?.logits;

    let mut times = Vec::new();
    let mut loads = Vec::new();
    for _ in 0..LOADS {
        let started = Instant::now();
        let mut cache = loaded.saved_cache(file)?;
        loads.push(milliseconds(started));
        let logits = loaded.model.prefill(question, &mut cache, &mut ())?.logits;
        times.push(milliseconds(started));
        ensure!(logits == expected, "the saved cache says something else");
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let line = serde_json::json!({
        "tokens": count, "bytes": std::fs::metadata(file)?.len(), "kept_bytes": cache.bytes().kept,
        "read_ms": read_ms, "save_ms": save_ms, "load_ms": median(loads), "first_logits_ms": median(times),
    });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

fn milliseconds(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}
