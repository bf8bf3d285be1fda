//! `inspect`: what a model file holds, and what its KV cache needs at each context.

use std::collections::BTreeMap;
use std::io::Write;

use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::checkpoint::{GgufFile, llama};
use adaptive_kvcache::model::LlamaConfig;
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::tokenizer::Tokenizer;

use anyhow::Context;

use super::args::InspectArgs;
use super::{Outcome, STDOUT_FAILED, plain};

/// Contexts to show, and the model's own.
const CONTEXTS: [usize; 7] = [512, 1024, 2048, 4096, 8192, 32_768, 131_072];

pub fn run(args: &InspectArgs) -> anyhow::Result<Outcome> {
    let file = GgufFile::open(&args.model)?;
    let config = llama::config(&file)?;
    let vocab = llama::vocab(&file)?;
    let (model, pre) = (vocab.model.clone(), vocab.pre.clone());
    let tokenizer = Tokenizer::from_gguf(vocab)?;

    print(&file, &config, (model, pre), &tokenizer).context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

/// Prints what `run` has read.
fn print(
    file: &GgufFile,
    config: &LlamaConfig,
    (model, pre): (String, Option<String>),
    tokenizer: &Tokenizer,
) -> anyhow::Result<()> {
    let parameters: usize = file.tensors().values().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    let mut formats: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for tensor in file.tensors().values() {
        let format = formats.entry(format!("{:?}", tensor.dtype)).or_default();
        *format = (format.0 + 1, format.1 + tensor.range.len());
    }

    let mut out = std::io::stdout().lock();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<20}{}", plain(&value));
    line("file", file.path().display().to_string())?;
    if let Some(name) = file.string("general.name")? {
        line("name", name)?;
    }
    line("architecture", "llama".to_owned())?;
    #[expect(clippy::cast_precision_loss)]
    line("parameters", format!("{parameters} ({:.1} M)", parameters as f64 / 1e6))?;
    line("layers", config.num_layers.to_string())?;
    line("hidden size", config.hidden_size.to_string())?;
    line("MLP size", config.intermediate_size.to_string())?;
    let heads = config.heads;
    line("query heads", heads.num_heads.to_string())?;
    line("KV heads", format!("{} ({} query heads each)", heads.num_kv_heads, heads.group_size()))?;
    line("head dimension", heads.head_dim.to_string())?;
    line("context", config.context_length.to_string())?;
    let rope = &config.rope;
    let scaling = match (rope.frequency_divisors.is_empty(), rope.position_divisor) {
        (false, _) => "by frequency (llama3)".to_owned(),
        (true, 1.0) => "none".to_owned(),
        (true, divisor) => format!("linear, {divisor}"),
    };
    line("rope", format!("base {}, {} numbers, scaling {scaling}", rope.theta, rope.dim))?;
    let tied = !file.tensors().contains_key("output.weight");
    line("output layer", if tied { "tied to the embedding" } else { "its own" }.to_owned())?;
    line(
        "tokenizer",
        format!("{model}{}, {} tokens", pre.map(|pre| format!(" ({pre})")).unwrap_or_default(), tokenizer.vocab_size()),
    )?;
    line("special tokens", tokenizer.special_ids().len().to_string())?;
    line("chat template", if tokenizer.has_chat_template() { "yes" } else { "no" }.to_owned())?;
    line("weights", format!("{:.1} MB", megabytes(file.tensor_bytes())))?;
    for (format, (tensors, bytes)) in formats {
        line(&format!("  {format}"), format!("{tensors} tensors, {:.1} MB", megabytes(bytes)))?;
    }

    let per_token = |dtype: KvDtype| 2 * config.num_layers * heads.kv_width() * dtype.bytes();
    writeln!(out, "\nKV cache, full:     {:>10} {:>10}", "f16", "f32")?;
    writeln!(out, "{:<20}{:>10} {:>10} bytes", "  a token", per_token(KvDtype::F16), per_token(KvDtype::F32))?;
    let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|&context| context < config.context_length).collect();
    contexts.push(config.context_length);
    for context in contexts {
        let megabytes = |dtype| megabytes(context * per_token(dtype));
        writeln!(
            out,
            "{:<20}{:>10.1} {:>10.1} MB",
            format!("  {context} tokens"),
            megabytes(KvDtype::F16),
            megabytes(KvDtype::F32)
        )?;
    }
    Ok(())
}
