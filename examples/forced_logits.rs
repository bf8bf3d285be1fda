//! Writes what a model says of the next token along a text: the logits after each of some tokens behind a prompt, all read
//! from the text, with the full cache.
//!
//! ```sh
//! cargo run --release --example forced_logits -- MODEL TEXT PROMPT_TOKENS SCORE_TOKENS exact|fast LOGITS IDS
//! ```
//!
//! `LOGITS` becomes `[SCORE_TOKENS, vocab_size]` f32, little-endian; `IDS` the text's tokens that were read, one a line. Two
//! such files show what a way of computing costs (`scripts/compare_compute.sh`).

use std::io::Write;

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::checkpoint::open;
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::prelude::*;
use anyhow::{Context, bail, ensure};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, prompt_tokens, score_tokens, compute, logits, ids] = &arguments[..] else {
        bail!("usage: forced_logits MODEL TEXT PROMPT_TOKENS SCORE_TOKENS exact|fast LOGITS IDS");
    };
    let compute = match compute.as_str() {
        "exact" => Compute::Exact,
        "fast" => Compute::Fast,
        other => bail!("expected exact or fast, got `{other}`"),
    };
    let (prompt_tokens, score_tokens): (usize, usize) = (prompt_tokens.parse()?, score_tokens.parse()?);
    let loaded = open(model)?.load(&BackendKind::Kernels(compute), WeightDtype::Auto, &mut |_, _| {})?;
    let text = std::fs::read_to_string(text).with_context(|| format!("failed to read `{text}`"))?;
    let mut tokens = loaded.tokenizer.encode(&text)?;
    ensure!(tokens.len() >= prompt_tokens + score_tokens, "the text has {} tokens", tokens.len());
    tokens.truncate(prompt_tokens + score_tokens);

    let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full)?;
    loaded.model.prefill(&tokens[..prompt_tokens], &mut cache, &mut ())?;
    let mut out = std::io::BufWriter::new(std::fs::File::create(logits)?);
    for &id in &tokens[prompt_tokens..] {
        for logit in loaded.model.decode(id, &mut cache)? {
            out.write_all(&logit.to_le_bytes())?;
        }
    }
    out.flush()?;
    let lines: Vec<String> = tokens.iter().map(u32::to_string).collect();
    std::fs::write(ids, lines.join("\n") + "\n")?;
    Ok(())
}
