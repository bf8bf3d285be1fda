//! `generate`: text from a prompt, and what the cache kept of it.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::{CacheBytes, LayerSummary};
use adaptive_kvcache::compress::Budget;
use adaptive_kvcache::fidelity::top_logprobs;
use adaptive_kvcache::files::check_folder;
use adaptive_kvcache::generate::{DraftCounts, FinishReason, Generation, GenerationOptions};
use adaptive_kvcache::memory::process_memory;
use adaptive_kvcache::report::{DraftReport, LayerReport, MemoryReport, Report, Timings, megabytes, memory_table};

use anyhow::Context;

use super::args::{DEFAULT_NEW_TOKENS, GenerateArgs, Wrap};
use super::encode::{Encoded, encode, wraps_prompt};
use super::interrupt::{interrupted, listen, while_writing};
use super::kept::{self, Answer, Asked, Start};
use super::logging::Log;
use super::pictures::{Pictures, is_picture};
use super::places::Places;
use super::prefixes;
use super::session::{Session, note_budget, per_second};
use super::terminal::note;
use super::{Outcome, STDOUT_FAILED};

/// Most probable next tokens in the report.
const REPORTED_LOGPROBS: usize = 10;

pub fn run(args: &GenerateArgs) -> anyhow::Result<Outcome> {
    // Everything that can be refused early is, before a model is loaded.
    let budget = args.batch.kv_budget.map(Budget::Bytes).or_else(|| args.kept_ratio.budget());
    expect_no_picture(args)?;
    places(args).check()?;
    let start = Start::open(args.start.cache_file.as_deref(), Asked::new(&args.cache, budget, &args.run.numbers))?;
    expect_possible(args, &start)?;
    let config = start.config.clone();
    let store = prefixes::open(&args.store)?;
    let log = Log::start(&args.cache)?;
    if args.save_image {
        check_folder(&args.image_dir)?;
    }
    let template = args.run.prompt.template()?;
    listen()?;
    let draft = args.draft.draft.into();
    let options = GenerationOptions { draft, ..args.run.sampling.options(DEFAULT_NEW_TOKENS)? };

    let session = Session::open(&args.run.model, start.kv_dtype(&args.run.numbers)?)?.with_chat_template(template);
    let model = &session.loaded.model;
    let cache = start.cache(&session)?.with_bounds(args.bounds.bounds(options.max_new_tokens));
    let Encoded { ids, messages } = encode(&session, &args.run.prompt, &start)?;
    let pictures =
        if args.save_image { Some(Pictures::new(&args.image_dir, config.clone(), model.config())?) } else { None };
    let prefixes = prefixes::of(&session, store.as_ref(), cache.retention())?;
    // Pictures are drawn of a text from its beginning.
    let looked_up = prefixes.as_ref().filter(|_| !args.save_image);
    let (mut cache, known) = prefixes::begin(looked_up, cache, &ids);
    let (prefill, prefill_time) = session.prefill(&ids[known..], &mut cache, pictures.as_ref())?;
    log.check()?;
    if let Some(pictures) = &pictures {
        pictures.finish(&prefill.layers)?;
    }
    let kept = cache.bytes();
    if start.is_adaptive && !start.is_saved() && known == 0 {
        note_budget(&config, kept.kept);
    }
    // Once rows go while tokens are generated, what the prompt has left can't be had any more.
    let evicts = cache.retention().eviction().is_some();
    prefixes::keep(prefixes.as_ref(), &cache, evicts);
    let prefill_memory = process_memory().unwrap_or_default();
    let device_memory = session.device_memory();
    let logprobs = top_logprobs(&prefill.logits, REPORTED_LOGPROBS);

    let read = cache.ids().to_vec();
    let mut generation =
        Generation::new(model, &session.loaded.tokenizer, &mut cache, &read, prefill.logits, options.clone());
    let Written { text, time: decode_time, result: written } = write_text(&mut generation)?;
    let generated = generation.ids().to_vec();
    let finish_reason = generation.finish_reason();
    let drafts = generation.drafts();
    drop(generation);
    let drafts = DraftReport::new(options.draft.obstacle(model, cache.retention()), drafts);
    if let Some(path) = &args.save.save_cache {
        let goes_on = args.run.prompt.go_on;
        let answer = Answer { goes_on, ids: &generated, text: &text, finish_reason };
        kept::save(&session, &cache, messages.map(|new| start.answered(&session, new, answer)).as_ref(), path)?;
    }

    // The first token comes from the prefill's own scores.
    let decoded = generated.len().saturating_sub(1);
    let timings = timings(&session, prefill.profile_time, (ids.len() - known, prefill_time), (decoded, decode_time));
    let memory = MemoryReport {
        peak_rss_bytes: process_memory().unwrap_or_default().peak,
        prefill_rss_bytes: prefill_memory.resident,
        prefill_device_bytes: device_memory.map(|memory| memory.used),
        device_total_bytes: device_memory.map(|memory| memory.total),
    };
    let is_raw = !start.is_saved() && !wraps_prompt(&session, &args.run.prompt, &start);
    if text.is_empty() && finish_reason == FinishReason::Eos && is_raw && session.wraps(Wrap::Auto) {
        note("the model ended the text at once; it has a chat template, which --chat wraps the prompt in");
    }
    if !args.quiet {
        let ending = Ending { generated: generated.len(), finish_reason, context: model.config().context_length };
        let seed = options.sampling.drawn_seed();
        let figures = Figures {
            kept,
            timings,
            memory,
            prompt_len: ids.len() - known,
            decoded,
            drafts: drafts.counts,
            ending,
            seed,
        };
        // Nobody may be listening any more: the report is still written.
        let _ = figures.print(&prefill.layers);
    }
    if let Some(path) = &args.report {
        let heads = prefill.layers.iter().map(|layer| LayerReport::new(layer, &config, args.report_positions));
        let report = Report {
            layers: heads.collect(),
            run: session.report(&args.run.model.model, start.is_adaptive.then_some(config), options),
            prefill_chunk: session.prefill_options.chunk.get(),
            prompt_tokens: ids,
            next_token_logprobs: logprobs,
            generated_tokens: generated,
            text,
            finish_reason,
            draft: drafts,
            kv: kept.into(),
            timings,
            memory,
        };
        while_writing(path, || report.write(path))?;
    }
    prefixes::keep(prefixes.as_ref(), &cache, !evicts);
    written.context(STDOUT_FAILED)?;
    Ok(if finish_reason == FinishReason::Interrupted { Outcome::Interrupted } else { Outcome::Done })
}

/// A text that was generated, and whether all of it could be written.
struct Written {
    text: String,
    time: Duration,
    result: std::io::Result<()>,
}

/// Writes the text as it is generated, until it ends, the run is interrupted, or nobody reads it.
///
/// # Errors
/// What generation fails with, once all that came before is written.
fn write_text(generation: &mut Generation<'_>) -> anyhow::Result<Written> {
    let started = Instant::now();
    let mut text = String::new();
    let mut stdout = std::io::stdout().lock();
    let mut result = Ok(());
    // One that has ended is not broken off by a signal that comes later: what it holds back is still to come.
    while generation.finish_reason() != FinishReason::Interrupted || !interrupted() {
        let Some(step) = generation.next() else { break };
        let step = match step {
            Ok(step) => step,
            Err(Error::Interrupted) => break,
            Err(error) => {
                let rest = generation.held_back();
                text += &rest;
                let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
                let _ = write!(stdout, "{rest}{end}").and_then(|()| stdout.flush());
                return Err(error.into());
            }
        };
        text += &step.text;
        result = stdout.write_all(step.text.as_bytes()).and_then(|()| stdout.flush());
        if result.is_err() {
            break;
        }
    }
    let time = started.elapsed();
    if generation.finish_reason() == FinishReason::Interrupted {
        let rest = generation.held_back();
        text += &rest;
        result = result.and_then(|()| stdout.write_all(rest.as_bytes()));
    }
    if result.is_ok() && !text.is_empty() && !text.ends_with('\n') {
        result = writeln!(stdout);
    }
    Ok(Written { text, time, result })
}

/// Refuses what a saved cache leaves no way to do.
fn expect_possible(args: &GenerateArgs, start: &Start) -> Result<(), Error> {
    if start.is_saved() && args.save_image {
        return Err(Error::input("pictures are drawn of a text from its beginning, and --cache goes on with one")
            .with_hint("leave --save-image out"));
    }
    if start.is_saved() && args.run.prompt.go_on {
        return Err(Error::input("--continue goes on with the last answer of --messages, and --cache with a cache")
            .with_hint("leave one of the two out"));
    }
    args.save.save_cache.as_deref().map_or(Ok(()), kept::expect_file)
}

/// Refuses files that a picture of this run would replace.
fn expect_no_picture(args: &GenerateArgs) -> Result<(), Error> {
    let named = [("--log-file", Some(args.cache.log_path())), ("--report", args.report.as_deref())];
    let is_replaced =
        |path: Option<&Path>| args.save_image && path.is_some_and(|path| is_picture(&args.image_dir, path));
    let Some((option, Some(path))) = named.into_iter().find(|(_, path)| is_replaced(*path)) else { return Ok(()) };
    let reason = format!("{option} names a picture of --image-dir, `{}`", path.display());
    Err(Error::input(reason).with_hint("give each a file of its own"))
}

/// What is read and written, with one prompt or with many.
pub fn places(args: &GenerateArgs) -> Places<'_> {
    Places::of(&args.run.model.model)
        .reads("--config", args.cache.config.as_ref())
        .reads("--prompt-file", args.run.prompt.prompt_file.as_ref())
        .reads("--prompts", args.batch.prompts.as_ref())
        .reads("--messages", args.run.prompt.dialogue.messages.as_ref())
        .reads("--chat-template", args.run.prompt.dialogue.chat_template.as_ref())
        .reads("--cache", args.start.cache_file.as_ref())
        .writes("--report", args.report.as_ref())
        .writes("--save-cache", args.save.save_cache.as_ref())
        .logs(args.cache.log_path())
}

/// * `prefill`, `decode`: tokens, and the time that they took
fn timings(session: &Session, profile: Duration, prefill: (usize, Duration), decode: (usize, Duration)) -> Timings {
    Timings {
        load_ms: milliseconds(session.load_time),
        prefill_ms: milliseconds(prefill.1),
        profile_ms: milliseconds(profile),
        decode_ms: milliseconds(decode.1),
        prefill_tokens_per_s: per_second(prefill.0, prefill.1),
        decode_tokens_per_s: per_second(decode.0, decode.1),
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What is shown at the end of a run.
struct Figures {
    kept: CacheBytes,
    timings: Timings,
    memory: MemoryReport,
    prompt_len: usize,
    /// Tokens that decoding steps gave.
    decoded: usize,
    drafts: DraftCounts,
    ending: Ending,
    /// Present if it mattered.
    seed: Option<u64>,
}

/// What lies in a saved cache's file, if anything does.
pub fn mapped_text(bytes: &CacheBytes) -> String {
    if bytes.mapped == 0 { String::new() } else { format!(", {:.3} MB in the saved file", megabytes(bytes.mapped)) }
}

/// How long a text became, and why no longer.
struct Ending {
    generated: usize,
    finish_reason: FinishReason,
    /// Of the model.
    context: usize,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generated, finish_reason, context } = self;
        write!(f, "{generated} token{}, ", if *generated == 1 { "" } else { "s" })?;
        match finish_reason {
            FinishReason::Eos => f.write_str("ended by the model"),
            FinishReason::Length => f.write_str("cut at --max-new-tokens"),
            FinishReason::Context => write!(f, "cut where the model's context of {context} tokens ends"),
            FinishReason::Stop => f.write_str("ended at a stop text"),
            FinishReason::Interrupted => f.write_str("broken off"),
        }
    }
}

impl Figures {
    fn print(&self, layers: &[LayerSummary]) -> std::io::Result<()> {
        let Self { kept, timings, memory, prompt_len, decoded, drafts, ending, seed } = self;
        let mut stderr = std::io::stderr().lock();
        write!(stderr, "\n{}\n", memory_table(layers))?;
        writeln!(
            stderr,
            "prefill  {prompt_len} tokens in {:.0} ms, {:.1} tokens/s",
            timings.prefill_ms, timings.prefill_tokens_per_s
        )?;
        writeln!(
            stderr,
            "decode   {decoded} tokens in {:.0} ms, {:.1} tokens/s",
            timings.decode_ms, timings.decode_tokens_per_s
        )?;
        if drafts.drafted > 0 {
            let DraftCounts { drafted, accepted } = drafts;
            writeln!(stderr, "guesses  {accepted} of {drafted} tokens came true")?;
        }
        writeln!(stderr, "text     {ending}")?;
        if let Some(seed) = seed {
            writeln!(stderr, "seed     {seed}")?;
        }
        writeln!(
            stderr,
            "KV cache {:.3} MB kept of {:.3} MB ({:.1} % saved), {:.3} MB allocated{}",
            megabytes(kept.kept),
            megabytes(kept.raw),
            100.0 * kept.saved_ratio(),
            megabytes(kept.allocated),
            mapped_text(kept),
        )?;
        writeln!(
            stderr,
            "process  {:.1} MB resident after prefill, {:.1} MB at most",
            megabytes(memory.prefill_rss_bytes),
            megabytes(memory.peak_rss_bytes)
        )?;
        if let (Some(used), Some(total)) = (memory.prefill_device_bytes, memory.device_total_bytes) {
            let (used, total) = (megabytes(used), megabytes(total));
            writeln!(stderr, "device   {used:.1} MB taken after prefill, by all processes, of {total:.1} MB")?;
        }
        Ok(())
    }
}
