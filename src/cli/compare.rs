//! `compare`: the A/B of one prompt, full cache against adaptive cache.

use std::io::Write;
use std::time::{Duration, Instant};

use adaptive_kvcache::cache::{AdaptiveKvCache, CacheBytes};
use adaptive_kvcache::fidelity::{Agreement, log_softmax};
use adaptive_kvcache::generate::{Draft, Generation, GenerationOptions};
use adaptive_kvcache::memory::{process_memory, release_unused};
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::{Error, Result};

use anyhow::Context;

use super::args::{CompareArgs, DEFAULT_NEW_TOKENS};
use super::encode::encode;
use super::interrupt::{interrupted, listen};
use super::kept::{Asked, Start};
use super::session::{Session, note_budget, per_second};
use super::{Outcome, STDOUT_FAILED};

/// Prompt tokens of the run that warms up.
const WARM_UP_TOKENS: usize = 64;

/// What the two runs are called.
const FULL: &str = "full cache";
const ADAPTIVE: &str = "adaptive cache";

/// What one of the two runs gave.
struct Run {
    ids: Vec<u32>,
    text: String,
    kept: CacheBytes,
    /// Bytes by which the process's own memory (mapped weights apart) grew from before the prompt to after it.
    growth: usize,
    prefill_time: Duration,
    decode_time: Duration,
    /// `[positions]` log-probabilities from which each token was drawn.
    logprobs: Vec<Vec<f32>>,
}

pub fn run(args: &CompareArgs) -> anyhow::Result<Outcome> {
    let asked = Asked {
        config: args.config.as_deref(),
        use_adakv: true,
        budget: args.budget.budget(),
        numbers: &args.run.numbers,
    };
    let start = Start::open(args.start.cache_file.as_deref(), asked)?;
    let config = start.config.clone();
    let template = args.run.prompt.template()?;
    listen()?;
    let session = Session::open(&args.run.model, start.kv_dtype(&args.run.numbers)?)?.with_chat_template(template);
    let kv_dtype = session.kv_dtype;
    let full_kv_dtype = args.full_kv_dtype.unwrap_or(kv_dtype);
    session.check_kv_dtype(full_kv_dtype)?;
    let saved = start.cache(&session)?;
    let ids = encode(&session, &args.run.prompt, &start)?.ids;
    // The full cache reads all of it anew.
    let prompt = [saved.ids(), &ids].concat();
    // What a cache costs is what decoding costs.
    let options = GenerationOptions { draft: Draft::Off, ..args.run.sampling.options(DEFAULT_NEW_TOKENS)? };

    // Neither run should pay for what only a first one does: reading weights from disk, starting threads.
    let warm_up = &prompt[..prompt.len().min(WARM_UP_TOKENS)];
    let in_full = |error: Error| error.in_place(|| FULL.to_owned());
    let few = GenerationOptions { max_new_tokens: 2, ..options.clone() };
    let full_cache = || session.loaded.full_cache(full_kv_dtype);
    answer(&session, warm_up, full_cache()?, &few).map_err(in_full)?;
    let (full, _) = answer(&session, &prompt, full_cache()?, &options).map_err(in_full)?;
    let adaptive = answer(&session, &ids, saved, &options);
    let (adaptive, mut fork) = adaptive.map_err(|error| error.in_place(|| ADAPTIVE.to_owned()))?;
    if !start.is_saved() {
        note_budget(&config, adaptive.kept.kept);
    }
    // The adaptive cache reads the full run's text: what would it have said at each position?
    let mut forced = adaptive.logprobs[..1.min(adaptive.logprobs.len())].to_vec();
    for &id in full.ids.iter().take(full.ids.len().saturating_sub(1)) {
        if interrupted() {
            return Err(Error::Interrupted.into());
        }
        let model = &session.loaded.model;
        let room = model.make_room(&mut fork, 1, session.prefill_options, &mut ());
        let logits = room.and_then(|()| model.decode(id, &mut fork));
        forced.push(log_softmax(&logits.map_err(|error| error.in_place(|| ADAPTIVE.to_owned()))?));
    }
    // The first distribution comes from the prompt's exact attention and is the same in both runs.
    let skip = |rows: &[Vec<f32>]| rows.get(1..).unwrap_or_default().to_vec();
    let agreement = Agreement::measure(&full.ids, &adaptive.ids, &skip(&full.logprobs), &skip(&forced));
    print([prompt.len(), ids.len()], &full, &adaptive, agreement, options.sampling.drawn_seed())
        .context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

/// Answers the prompt; also returns the cache as it was right after the prompt.
///
/// * `cache`: what the prompt comes behind
fn answer(
    session: &Session,
    prompt: &[u32],
    mut cache: AdaptiveKvCache,
    options: &GenerationOptions,
) -> Result<(Run, AdaptiveKvCache)> {
    release_unused();
    let own_memory = || process_memory().unwrap_or_default().anonymous;
    let before = own_memory();
    let (prefill, prefill_time) = session.prefill(prompt, &mut cache, None)?;
    let kept = cache.bytes();
    let growth = own_memory().saturating_sub(before);
    let fork = cache.clone();
    let (model, tokenizer) = (&session.loaded.model, &session.loaded.tokenizer);
    let read = cache.ids().to_vec();
    let mut generation = Generation::new(model, tokenizer, &mut cache, &read, prefill.logits, options.clone());
    let mut decode_time = Duration::ZERO;
    let (mut text, mut logprobs) = (String::new(), Vec::new());
    loop {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let started = Instant::now();
        let Some(step) = generation.next() else { break };
        decode_time += started.elapsed();
        let step = step?;
        text += &step.text;
        if step.id.is_some() {
            logprobs.push(log_softmax(generation.logits()));
        }
    }
    let ids = generation.ids().to_vec();
    Ok((Run { ids, text, kept, growth, prefill_time, decode_time, logprobs }, fork))
}

/// * `prompt_lens`: tokens that each of the two has read
/// * `seed`: present if it mattered
fn print(
    prompt_lens: [usize; 2],
    full: &Run,
    adaptive: &Run,
    agreement: Agreement,
    seed: Option<u64>,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for (name, run) in [(FULL, full), (ADAPTIVE, adaptive)] {
        writeln!(out, "--- {name} ---\n{}\n", run.text.trim_end())?;
    }
    writeln!(out, "{:<26}{:>12}{:>12}{:>12}", "", "full", "adaptive", "ratio")?;
    let mut line = |name: &str, full: f64, adaptive: f64, digits: usize| {
        let ratio = if full == 0.0 { "-".to_owned() } else { format!("{:.3}", adaptive / full) };
        writeln!(out, "{name:<26}{full:>12.digits$}{adaptive:>12.digits$}{ratio:>12}")
    };
    line("KV cache kept, MB", megabytes(full.kept.kept), megabytes(adaptive.kept.kept), 3)?;
    line("KV cache allocated, MB", megabytes(full.kept.allocated), megabytes(adaptive.kept.allocated), 3)?;
    line("process grew by, MB", megabytes(full.growth), megabytes(adaptive.growth), 3)?;
    let prefill = |run: &Run, tokens| per_second(tokens, run.prefill_time);
    let [full_len, adaptive_len] = prompt_lens;
    line("prefill, tokens/s", prefill(full, full_len), prefill(adaptive, adaptive_len), 1)?;
    // The first token comes from the prefill's own scores.
    let decode = |run: &Run| per_second(run.ids.len().saturating_sub(1), run.decode_time);
    line("decode, tokens/s", decode(full), decode(adaptive), 1)?;
    let Agreement { equal_tokens, reference_tokens, kl_mean, top1_agreement, positions } = agreement;
    #[expect(clippy::cast_precision_loss)]
    let share = 100.0 * equal_tokens as f64 / reference_tokens.max(1) as f64;
    writeln!(out, "\nequal tokens before the first difference: {equal_tokens} of {reference_tokens} ({share:.1} %)")?;
    writeln!(
        out,
        "on the full run's text, {positions} positions: mean KL {kl_mean:.5} nats, top-1 agreement {:.1} %",
        100.0 * top1_agreement
    )?;
    seed.map_or(Ok(()), |seed| writeln!(out, "seed {seed}"))
}
