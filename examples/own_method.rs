//! A method of one's own, in a program that uses the library: what it keeps is set against methods that are built in.
//!
//! ```sh
//! cargo run --release --example own_method -- MODEL
//! ```
//!
//! `MODEL` is a GGUF file or a model's folder. Each method reads the same 1,024 tokens of the novel that comes with this
//! project, and keeps a quarter. Printed is how far the 64 tokens behind them are predicted otherwise than with the full
//! cache: the mean KL divergence, in nats.

use adaptive_kvcache::compress::budget::methods::{ALWAYS, AttentionRows};
use adaptive_kvcache::eval::mean;
use adaptive_kvcache::fidelity::{kl_divergence, log_softmax};
use adaptive_kvcache::prelude::*;
use anyhow::Context;
use serde::{Deserialize, Serialize};

const NOVEL: &str = include_str!("../tests/data/text/eighty_days_ch1-5.txt");

/// Keeps what the last 64 rows attend to, each position's share times the length of its value: a position that receives
/// much attention adds little to the output if its value is short (the idea of Guo et al., arXiv 2406.12335).
///
/// Its fields are its settings, and keys of a configuration that names it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValueWeighted {
    /// How many leading positions are always kept.
    pub sink_tokens: usize,
}

impl Default for ValueWeighted {
    fn default() -> Self {
        Self { sink_tokens: 4 }
    }
}

impl Method for ValueWeighted {
    fn name(&self) -> &'static str {
        "value_weighted"
    }

    fn summary(&self) -> &'static str {
        "what the last rows attend to, by the length of the values"
    }

    /// What is collected for [`scores`](Method::scores) while the prompt is read.
    fn needs(&self) -> Needs {
        Needs { attention: AttentionRows::Last(64), keys_and_values: true, ..Needs::default() }
    }

    /// The facts are those of one KV head; so are the scores.
    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let norm = |value: &[f32]| value.iter().map(|number| number * number).sum::<f32>().sqrt();
        let values = facts.values.chunks_exact(facts.head_dim);
        let mut scores: Vec<f32> =
            facts.attention.iter().zip(values).map(|(attention, value)| attention * norm(value)).collect();
        scores[..facts.num_sinks(self.sink_tokens)].fill(ALWAYS);
        scores
    }
}

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).context("usage: own_method MODEL")?;
    let loaded = load(model, WeightDtype::Auto)?;
    let ids = loaded.tokenizer.encode(NOVEL)?;
    let (prompt, following) = ids[..1024 + 64].split_at(1024);

    let full = predictions(&loaded, loaded.full_cache(KvDtype::F16)?, prompt, following)?;
    // What configurations may name. A method need not have a name there: `AdaptiveConfig::for_method` takes it as it is.
    let own = ValueWeighted::default();
    let methods = [METHODS, &[&own]].concat();
    for name in ["streaming_llm", "tova", "snapkv", "value_weighted"] {
        let config = format!(r#"{{"method": "{name}", "kept_ratio": 0.25}}"#);
        let config = AdaptiveConfig::parse_with(&config, None, &methods)?;
        let compressed = predictions(&loaded, loaded.cache(KvDtype::F16, &config)?, prompt, following)?;
        let divergences: Vec<f64> =
            full.iter().zip(&compressed).map(|(full, other)| kl_divergence(full, other)).collect();
        println!("{:<16} {:.4}", name, mean(&divergences));
    }
    Ok(())
}

/// Log-probabilities of the next token, one row behind each token that follows a prompt.
///
/// # Errors
/// Of the model, such as a text that its context has no room for.
pub fn predictions(
    loaded: &Loaded,
    mut cache: AdaptiveKvCache,
    prompt: &[u32],
    following: &[u32],
) -> Result<Vec<Vec<f32>>> {
    loaded.model.prefill(prompt, &mut cache, &mut ())?;
    following.iter().map(|&id| Ok(log_softmax(&loaded.model.decode(id, &mut cache)?))).collect()
}
