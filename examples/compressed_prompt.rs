//! Goes on with a text of which the cache keeps a part.
//!
//! ```sh
//! cargo run --release --example compressed_prompt -- MODEL [TEXT_FILE]
//! ```
//!
//! `MODEL` is a GGUF file or a model's folder. Without a text, it takes the beginning of the novel that comes with this
//! project.

use adaptive_kvcache::prelude::*;
use adaptive_kvcache::report::megabytes;
use anyhow::Context;

const NOVEL: &str = include_str!("../tests/data/text/eighty_days_ch1-5.txt");

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("usage: compressed_prompt MODEL [TEXT_FILE]")?;
    let text = match arguments.next() {
        Some(path) => std::fs::read_to_string(&path).with_context(|| format!("failed to read `{path}`"))?,
        None => NOVEL.chars().take(6000).collect(),
    };
    let loaded = load(model, WeightDtype::Auto)?;

    for kept_ratio in [1.0, 0.5, 0.25] {
        let (written, bytes) = go_on(&loaded, &text, kept_ratio)?;
        println!("--- {kept_ratio} of the prompt kept: {:.1} of {:.1} MB", megabytes(bytes.kept), megabytes(bytes.raw));
        println!("{written}\n");
    }
    Ok(())
}

/// Reads a text, keeps a share of its keys and values, and writes 48 tokens more. Returns what was written, and the size
/// of the cache.
///
/// # Errors
/// Of the model, such as a text that its context has no room for.
pub fn go_on(loaded: &Loaded, text: &str, kept_ratio: f64) -> Result<(String, CacheBytes)> {
    // What to keep. `AdaptiveConfig::from_file` reads the same from a file such as `configs/best.json`.
    let method = method_by_name("replay").ok_or_else(|| Error::input("this library has no method `replay`"))?;
    let config = AdaptiveConfig::for_method(method).with_budget(Budget::KeptRatio(kept_ratio))?;

    // An empty cache for one sequence. Reading the prompt fills it, and drops what is not kept layer by layer.
    let mut cache = loaded.cache(KvDtype::F16, &config)?;
    let ids = loaded.tokenizer.encode(text)?;
    let prefill = loaded.model.prefill(&ids, &mut cache, &mut ())?;

    // An iterator of tokens. The model has no state: each token goes through it into the cache.
    let options = GenerationOptions { max_new_tokens: 48, ..GenerationOptions::default() };
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let mut written = String::new();
    for step in Generation::new(model, tokenizer, &mut cache, &ids, prefill.logits, options) {
        written += &step?.text;
    }
    Ok((written, cache.bytes()))
}
