//! Writes what a model says of the next token along a text: the logits after each of some tokens behind a prompt, all read
//! from the text, with the full cache; and compares two such files. `scripts/compare_compute.sh` shows with it what a way
//! of computing costs.
//!
//! ```sh
//! cargo run --release --example forced_logits -- MODEL TEXT PROMPT_TOKENS SCORE_TOKENS exact|fast LOGITS IDS
//! cargo run --release --example forced_logits -- compare SCORE_TOKENS LOGITS OTHER...
//! ```
//!
//! `LOGITS` becomes `[SCORE_TOKENS, vocab_size]` f32, little-endian; `IDS` the text's tokens that were read, one a line.

use std::fs::File;
use std::io::{BufWriter, Write};

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::checkpoint::open;
use adaptive_kvcache::fidelity::{kl_divergence, log_softmax, same_top1};
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::prelude::*;
use anyhow::{Context, bail, ensure};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [command, rows, reference, others @ ..] if command == "compare" => compare(rows.parse()?, reference, others),
        [model, text, prompt_tokens, score_tokens, compute, logits, ids] => {
            let compute = match compute.as_str() {
                "exact" => Compute::Exact,
                "fast" => Compute::Fast,
                other => bail!("expected exact or fast, got `{other}`"),
            };
            let text = std::fs::read_to_string(text).with_context(|| format!("failed to read `{text}`"))?;
            write(model, &text, prompt_tokens.parse()?, score_tokens.parse()?, compute, logits, ids)
        }
        _ => bail!("usage: forced_logits MODEL TEXT PROMPT_TOKENS SCORE_TOKENS exact|fast LOGITS IDS"),
    }
}

fn write(
    model: &str,
    text: &str,
    prompt_tokens: usize,
    score_tokens: usize,
    compute: Compute,
    logits: &str,
    ids: &str,
) -> anyhow::Result<()> {
    let loaded = open(model)?.load(&BackendKind::Kernels(compute), WeightDtype::Auto, &mut |_, _| {})?;
    let mut tokens = loaded.tokenizer.encode(text)?;
    ensure!(tokens.len() >= prompt_tokens + score_tokens, "the text has {} tokens", tokens.len());
    tokens.truncate(prompt_tokens + score_tokens);

    let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full)?;
    loaded.model.prefill(&tokens[..prompt_tokens], &mut cache, &mut ())?;
    let mut out = BufWriter::new(File::create(logits)?);
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

/// Reads `[rows, vocab_size]` logits, as log-probabilities.
fn read(path: &str, rows: usize) -> anyhow::Result<Vec<Vec<f32>>> {
    let bytes = std::fs::read(path).with_context(|| format!("failed to read `{path}`"))?;
    let logits: Vec<f32> = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    ensure!(rows > 0 && !logits.is_empty() && logits.len().is_multiple_of(rows), "`{path}` has no {rows} rows");
    Ok(logits.chunks(logits.len() / rows).map(log_softmax).collect())
}

/// Divergence of others from a reference.
fn compare(rows: usize, reference: &str, others: &[String]) -> anyhow::Result<()> {
    let expected = read(reference, rows)?;
    println!("{:12} {:>10} {:>10} {:>10} {:>10} {:>12}", "", "KL mean", "error", "median", "largest", "same token");
    for other in others {
        let got = read(other, rows)?;
        let pairs = || expected.iter().zip(&got);
        let mut kl: Vec<f64> = pairs().map(|(expected, got)| kl_divergence(expected, got)).collect();
        let count = f64::from(u32::try_from(rows)?);
        let mean = kl.iter().sum::<f64>() / count;
        let error = (kl.iter().map(|kl| (kl - mean).powi(2)).sum::<f64>() / count / count).sqrt();
        kl.sort_by(f64::total_cmp);
        let same = pairs().filter(|(expected, got)| same_top1(expected, got)).count();
        let (median, largest) = (kl[rows / 2], kl[rows - 1]);
        println!("{other:12} {mean:10.6} {error:10.6} {median:10.6} {largest:10.6} {same:6} of {rows}");
    }
    Ok(())
}
