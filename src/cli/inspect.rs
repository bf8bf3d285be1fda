//! `inspect`: what a model file holds, and what its KV cache needs at each context.

use std::collections::BTreeMap;
use std::io::Write;

use adaptive_kvcache::Result;
use adaptive_kvcache::cache::{KvDtype, NOTE_BYTES};
use adaptive_kvcache::checkpoint::{self, Checkpoint};
use adaptive_kvcache::compress::BudgetScale;
use adaptive_kvcache::model::{LlamaConfig, SlidingWindow};
use adaptive_kvcache::report::{is_small, megabytes, size};
use adaptive_kvcache::tokenizer::{ChatFormat, Tokenizer};

use anyhow::Context;

use super::args::InspectArgs;
use super::terminal::note;
use super::{Outcome, STDOUT_FAILED, plain};

/// Contexts to show, and the model's own.
const CONTEXTS: [usize; 7] = [512, 1024, 2048, 4096, 8192, 32_768, 131_072];

pub fn run(args: &InspectArgs) -> anyhow::Result<Outcome> {
    let mut checkpoint = checkpoint::open(super::hub::local_path(&args.model)?)?;
    if let Some(tokens) = args.context.context {
        checkpoint.set_context(tokens)?;
    }
    // The tokenizer's files lie beside a folder's weights: without them, everything else can still be shown.
    let tokenizer = match checkpoint.tokenizer() {
        Err(error) if checkpoint.gguf().is_some() => return Err(error.into()),
        other => other,
    };

    let of_tokenizer = tokenizer.as_ref().map(Tokenizer::notes).unwrap_or_default();
    checkpoint.notes().iter().chain(of_tokenizer).for_each(note);
    print(&checkpoint, &tokenizer, args.kv_budget).context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

/// Prints what `run` has read.
fn print(checkpoint: &Checkpoint, tokenizer: &Result<Tokenizer>, budget: Option<usize>) -> anyhow::Result<()> {
    let config = checkpoint.config();
    let mut parameters = 0;
    let mut formats: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (_, tensor) in checkpoint.tensors().iter() {
        parameters += tensor.shape.iter().product::<usize>();
        let format = formats.entry(tensor.dtype.to_string()).or_default();
        *format = (format.0 + 1, format.1 + tensor.len());
    }

    let mut out = std::io::stdout().lock();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<20}{}", plain(&value));
    line("file", checkpoint.path().display().to_string())?;
    line("format", checkpoint.format().name().to_owned())?;
    if let Some(name) = checkpoint.gguf().map(|file| file.string("general.name")).transpose()?.flatten() {
        line("name", name)?;
    }
    line("architecture", config.architecture.to_string())?;
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
    if let Some(SlidingWindow { size, layers }) = &config.sliding_window {
        let windowed = layers.iter().filter(|&&is_windowed| is_windowed).count();
        let of_layers =
            if windowed < layers.len() { format!(", in {windowed} of {} layers", layers.len()) } else { String::new() };
        line("sliding window", format!("{size}{of_layers}"))?;
    }
    let rope = &config.rope;
    let scaling = match (rope.scaling, rope.dynamic) {
        ("llama3", _) => "by frequency (llama3)".to_owned(),
        ("linear", _) => format!("linear, {}", rope.position_divisor),
        (name, Some(dynamic)) => format!("{name}, {}, beyond {} tokens", dynamic.factor, dynamic.original_context),
        (name, None) => name.to_owned(),
    };
    line("rope", format!("base {}, {} numbers, scaling {scaling}", rope.theta, rope.dim))?;
    line("output layer", if checkpoint.is_tied() { "tied to the embedding" } else { "its own" }.to_owned())?;
    if let Err(error) = tokenizer {
        line("tokenizer", format!("none that is usable: {error}"))?;
    }
    if let Ok(tokenizer) = tokenizer {
        let text = |key: &str| -> Result<Option<String>> {
            Ok(checkpoint.gguf().map(|file| file.string(key)).transpose()?.flatten())
        };
        let pre = text("tokenizer.ggml.pre")?.map(|pre| format!(" ({pre})")).unwrap_or_default();
        let model = text("tokenizer.ggml.model")?.map(|model| format!("{model}{pre}, ")).unwrap_or_default();
        line("tokenizer", format!("{model}{} tokens", tokenizer.vocab_size()))?;
        line("special tokens", tokenizer.special_ids().len().to_string())?;
        let format = match tokenizer.chat_format() {
            ChatFormat::Own => "yes".to_owned(),
            ChatFormat::BuiltIn(name) => format!("no; the format `{name}` fits its tokens"),
            ChatFormat::None => "no".to_owned(),
        };
        line("chat template", format)?;
    }
    line("weights", size(checkpoint.tensors().bytes()))?;
    for (format, (tensors, bytes)) in formats {
        line(&format!("  {format}"), format!("{tensors} tensors, {}", size(bytes)))?;
    }

    // Quantised formats store whole blocks only.
    let dtypes: Vec<KvDtype> = [KvDtype::F16, KvDtype::F32, KvDtype::Q8_0, KvDtype::Q8_0Q4_0, KvDtype::Q4_0]
        .into_iter()
        .filter(|dtype| dtype.check(heads.head_dim).is_ok())
        .collect();
    let of_layer = |dtype: KvDtype| heads.num_kv_heads * dtype.token_bytes(heads.head_dim);
    let per_token = |dtype: KvDtype| config.num_layers * of_layer(dtype);
    writeln!(out)?;
    let mut row = |name: &str, cell: &dyn Fn(KvDtype) -> String, unit: &str| {
        let cells: Vec<String> = dtypes.iter().map(|&dtype| format!("{:>10}", cell(dtype))).collect();
        writeln!(out, "{name:<20}{}{unit}", cells.join(" "))
    };
    row("KV cache, full:", &|dtype| dtype.name().to_owned(), "")?;
    row("  a token", &|dtype| per_token(dtype).to_string(), " bytes")?;
    let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|&context| context < config.context_length).collect();
    contexts.push(config.context_length);
    for context in contexts {
        let name = format!("  {context} tokens");
        let bytes = |dtype: KvDtype| config.held_tokens(context).saturating_mul(of_layer(dtype));
        if dtypes.iter().any(|&dtype| is_small(bytes(dtype))) {
            row(&name, &|dtype| bytes(dtype).to_string(), " bytes")?;
        } else {
            row(&name, &|dtype| format!("{:.1}", megabytes(bytes(dtype))), " MB")?;
        }
    }
    budget.map_or(Ok(()), |budget| print_fit(&mut out, config, &dtypes, budget))
}

/// Prints what fits into a budget.
fn print_fit(out: &mut impl Write, config: &LlamaConfig, dtypes: &[KvDtype], budget: usize) -> anyhow::Result<()> {
    let heads = config.heads;
    // Of a layer with a window, a head never holds more than that; it is counted as if it held all.
    let rows_of_a_head = |dtype: KvDtype| {
        let (num_layers, num_kv_heads) = (config.num_layers, heads.num_kv_heads);
        let row_bytes = dtype.token_bytes(heads.head_dim) + NOTE_BYTES;
        let scale = BudgetScale { num_layers, num_kv_heads, row_bytes, head_bytes: dtype.head_bytes(heads.head_dim) };
        scale.rows(budget) / (num_layers * num_kv_heads).max(1)
    };
    writeln!(out)?;
    let mut row = |name: &str, cell: &dyn Fn(KvDtype) -> usize, unit: &str| {
        let cells: Vec<String> = dtypes.iter().map(|&dtype| format!("{:>10}", cell(dtype))).collect();
        writeln!(out, "{name:<20}{}{unit}", cells.join(" "))
    };
    let title = format!("{} for all:", size(budget));
    row(&title, &|dtype| rows_of_a_head(dtype), " tokens kept by a head on average")?;
    let context = config.context_length;
    for (name, kept) in [("all kept", 1), ("1/2 kept", 2), ("1/4 kept", 4), ("1/8 kept", 8)] {
        row(&format!("  {name}"), &|dtype| (rows_of_a_head(dtype) * kept).min(context), " tokens of a prompt at most")?;
        let sequences = |dtype| rows_of_a_head(dtype) * kept / context.max(1);
        row("", &sequences, &format!(" sequences of {context} tokens"))?;
    }
    let layer = |tokens: usize| size(2 * tokens * heads.kv_width() * size_of::<f32>());
    let tokens = [1024, context].map(|tokens| format!("{} while {tokens} tokens are read", layer(tokens)));
    writeln!(out, "on top, the keys and values of the layer that is being read: {}", tokens.join(", "))?;
    Ok(())
}
