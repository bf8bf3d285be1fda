//! `generate --prompts`: many prompts, several at a time.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use adaptive_kvcache::Error;
use adaptive_kvcache::cache::CacheBytes;
use adaptive_kvcache::generate::{
    Batch, BatchLimits, BatchPrompt, BatchSummary, DraftCounts, FinishReason, GenerationOptions,
};
use adaptive_kvcache::memory::process_memory;
use adaptive_kvcache::report::{BatchReport, BatchTextReport, DraftReport, megabytes, size};
use anyhow::Context;

use super::args::{DEFAULT_NEW_TOKENS, GenerateArgs, PromptArgs, drawn_seed};
use super::encode::wraps_prompt;
use super::generate::places;
use super::interrupt::{interrupted, listen, while_writing};
use super::kept::{Asked, Start};
use super::logging::Log;
use super::prefixes;
use super::prompts::{Prompt, Prompts};
use super::session::{Observer, Session, opening, per_second};
use super::{Outcome, STDOUT_FAILED};

/// * `path`: the file of prompts
pub fn run(args: &GenerateArgs, path: &Path) -> anyhow::Result<Outcome> {
    if args.save_image {
        return Err(Error::input("pictures are drawn of one prompt, not of a file of --prompts")
            .with_hint("leave --save-image out, or give one prompt with --prompt")
            .into());
    }
    if args.save.save_cache.is_some() {
        return Err(Error::input("--save-cache saves the cache of one prompt, not of a file of --prompts")
            .with_hint("give one prompt with --prompt, or use `cache create`")
            .into());
    }
    places(args).check()?;
    let asked = Asked::new(&args.cache, args.kept_ratio.budget(), &args.run.numbers);
    let start = Start::open(args.start.cache_file.as_deref(), asked)?;
    let config = start.config.clone();
    let store = prefixes::open(&args.store)?;
    let prompts = Prompts::read(path)?;
    let template = args.run.prompt.dialogue.template()?;
    let log = Log::start(&args.cache)?;
    listen()?;
    let draft = args.draft.draft.into();
    let mut options = GenerationOptions { draft, ..args.run.sampling.options(DEFAULT_NEW_TOKENS)? };
    // Lines may be drawn though the command line says that the best token is taken.
    if prompts.draw() && args.run.sampling.seed.is_none() && !options.sampling.is_random() {
        options.sampling.seed = drawn_seed()?;
    }
    let seed = (prompts.draw() || options.sampling.is_random()).then_some(options.sampling.seed);
    let session = Session::open(&args.run.model, start.kv_dtype(&args.run.numbers)?)?.with_chat_template(template);
    let cache = start.cache(&session)?.with_bounds(args.bounds.bounds(options.max_new_tokens));
    let PromptArgs { dialogue, go_on, .. } = &args.run.prompt;
    let chat = wraps_prompt(&session, &args.run.prompt, &start);
    let prompts = prompts.encode(&session, &start, &opening(dialogue)?.messages, chat, *go_on)?;
    let lines: Vec<_> = prompts.iter().map(|prompt| (prompt.line, prompt.custom_id.clone())).collect();
    let count = prompts.len();
    let to_batch = |(index, Prompt { name, ids, keys, .. }): (usize, Prompt)| {
        let options = keys.over(&options, index as u64);
        BatchPrompt { name, ids, options }
    };
    let prompts = prompts.into_iter().enumerate().map(to_batch).collect();
    let obstacle = options.draft.obstacle(&session.loaded.model, cache.retention());
    let found = [const { AtomicUsize::new(0) }; 2];
    let count_found = |tokens, of| {
        found[0].fetch_add(tokens, Ordering::Relaxed);
        found[1].fetch_add(of, Ordering::Relaxed);
    };
    let prefixes = prefixes::counting(&session, store.as_ref(), cache.retention(), count_found)?;
    let limits = BatchLimits { sequences: args.batch.batch, kv_bytes: args.batch.kv_budget };
    let (model, tokenizer) = (&session.loaded.model, &session.loaded.tokenizer);
    let mut batch = Batch::new(model, tokenizer, cache, prompts, &options, limits)?
        .with_prefill_options(session.prefill_options)
        .with_prefixes(prefixes.as_ref());

    let mut output = InOrder { next: 0, ended: BTreeMap::new(), written: Ok(()) };
    let mut texts: Vec<BatchTextReport> = Vec::with_capacity(count);
    let stop = std::cell::Cell::new(false);
    let summary = batch.run(
        |_| Observer::new(None),
        || if interrupted() || stop.get() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
        |text| {
            let (line, custom_id) = lines[text.index].clone();
            let text = BatchTextReport { custom_id, ..BatchTextReport::new(text, line) };
            output.write(&text);
            texts.push(text);
            stop.set(output.written.is_err());
        },
    );
    // What ended before a failure is written all the same.
    output.flush();
    let summary = summary?;
    log.check()?;
    if let Some(prefixes) = &prefixes {
        let [tokens, of] = found.each_ref().map(|count| count.load(Ordering::Relaxed));
        prefixes::tell_found(prefixes.store().folder(), "prompts", tokens, of);
    }
    texts.sort_by_key(|text| text.index);
    if !args.quiet {
        // Nobody may be listening any more: the report is still written.
        let _ = print(&summary, &texts, args.batch.kv_budget, seed);
    }
    let ended = texts.iter().filter(|text| text.finish_reason != FinishReason::Interrupted).count();
    if let Some(path) = &args.report {
        let report = BatchReport {
            run: session.report(&args.run.model.model, start.is_adaptive.then_some(config), options),
            batch: args.batch.batch,
            kv_budget_bytes: args.batch.kv_budget,
            most_sequences: summary.most_sequences,
            most_kv_bytes: summary.most_kv_bytes,
            prefill_ms: summary.prefill_time.as_secs_f64() * 1e3,
            decode_ms: summary.decode_time.as_secs_f64() * 1e3,
            prefill_tokens_per_s: per_second(summary.prompt_tokens, summary.prefill_time),
            decode_tokens_per_s: per_second(summary.decoded_tokens, summary.decode_time),
            peak_rss_bytes: process_memory().unwrap_or_default().peak,
            draft: DraftReport::new(obstacle, summary.drafts),
            texts,
        };
        while_writing(path, || report.write(path))?;
    }
    output.written.context(STDOUT_FAILED)?;
    Ok(if ended < count { Outcome::Interrupted } else { Outcome::Done })
}

/// Writes texts in their prompts' order, each as soon as all before it are written.
struct InOrder {
    next: usize,
    ended: BTreeMap<usize, String>,
    written: std::io::Result<()>,
}

impl InOrder {
    fn write(&mut self, text: &BatchTextReport) {
        self.ended.insert(text.index, text.to_line());
        while let Some(line) = self.ended.remove(&self.next) {
            self.line(&line);
            self.next += 1;
        }
    }

    /// Writes what waits for texts that will not come.
    fn flush(&mut self) {
        for (_, line) in std::mem::take(&mut self.ended) {
            self.line(&line);
        }
    }

    fn line(&mut self, line: &str) {
        if self.written.is_ok() {
            let mut stdout = std::io::stdout().lock();
            self.written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        }
    }
}

/// * `seed`: present if it mattered
fn print(
    summary: &BatchSummary,
    texts: &[BatchTextReport],
    budget: Option<usize>,
    seed: Option<u64>,
) -> std::io::Result<()> {
    let mut stderr = std::io::stderr().lock();
    let kv = texts.iter().map(|text| CacheBytes {
        raw: text.kv.raw_bytes,
        kept: text.kv.kept_bytes,
        allocated: text.kv.allocated_bytes,
        mapped: text.kv.mapped_bytes,
    });
    let kv: CacheBytes = kv.sum();
    let cut = texts.iter().filter(|text| text.finish_reason == FinishReason::Context).count();
    let cut = if cut > 0 { format!(", {cut} cut where the model's context ends") } else { String::new() };
    writeln!(stderr, "\n{} texts, at most {} at a time{cut}", texts.len(), summary.most_sequences)?;
    writeln!(
        stderr,
        "prefill  {} tokens in {:.0} ms, {:.1} tokens/s",
        summary.prompt_tokens,
        summary.prefill_time.as_secs_f64() * 1e3,
        per_second(summary.prompt_tokens, summary.prefill_time)
    )?;
    writeln!(
        stderr,
        "decode   {} tokens in {:.0} ms, {:.1} tokens/s together",
        summary.decoded_tokens,
        summary.decode_time.as_secs_f64() * 1e3,
        per_second(summary.decoded_tokens, summary.decode_time)
    )?;
    if summary.drafts.drafted > 0 {
        let DraftCounts { drafted, accepted } = summary.drafts;
        writeln!(stderr, "guesses  {accepted} of {drafted} tokens came true")?;
    }
    if let Some(seed) = seed {
        writeln!(stderr, "seed     {seed}")?;
    }
    let of_budget = budget.map_or_else(String::new, |budget| format!(", of {} allowed", size(budget)));
    // The texts of one time grow beside one another; the prompts' sizes are of all times together.
    writeln!(stderr, "KV cache {} at most at a time{of_budget}", size(summary.most_kv_bytes))?;
    writeln!(
        stderr,
        "prompts  {:.3} MB kept of {:.3} MB ({:.1} % saved), all {} added up",
        megabytes(kv.kept),
        megabytes(kv.raw),
        100.0 * kv.saved_ratio(),
        texts.len(),
    )?;
    writeln!(stderr, "process  {:.1} MB at most", megabytes(process_memory().unwrap_or_default().peak))
}
