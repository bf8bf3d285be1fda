//! `cache`: saved caches are made, shown, checked and listed.

use std::io::Write;
use std::path::{Path, PathBuf};

use adaptive_kvcache::cache::Retention;
use adaptive_kvcache::checkpoint;
use adaptive_kvcache::report::{megabytes, memory_table, size};
use adaptive_kvcache::saved::{Dialogue, SavedCache, is_saved_cache};
use adaptive_kvcache::tokenizer::{ChatInput, ChatMessage};
use adaptive_kvcache::{Error, Result};
use anyhow::Context;

use super::args::{CacheCommand, CreateArgs};
use super::interrupt::{listen, while_waiting};
use super::kept;
use super::logging::Log;
use super::places::Places;
use super::session::{Session, config, note_budget, opening, per_second, read_text};
use super::{Outcome, STDOUT_FAILED, logging, plain};

pub fn run(command: &CacheCommand) -> anyhow::Result<Outcome> {
    if let CacheCommand::Create(args) = command {
        return create(args);
    }
    logging::start()?;
    match command {
        CacheCommand::Create(args) => create(args),
        CacheCommand::Info { file, model, .. } => info(file, model.as_deref()),
        CacheCommand::Check { files } => check(files),
        CacheCommand::List { folder } => list(folder),
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<Outcome> {
    let config = config(args.cache.config.as_deref(), args.budget.budget())?;
    let places = Places::of(&args.model.model)
        .reads("--config", args.cache.config.as_ref())
        .reads("--messages", args.dialogue.messages.as_ref())
        .reads("--chat-template", args.dialogue.chat_template.as_ref());
    let places = args.text.iter().fold(places, |places, text| places.reads("--text", Some(text)));
    places.writes("--output", Some(&args.output)).logs(args.cache.log_path()).check()?;
    kept::expect_file(&args.output)?;
    let log = Log::start(&args.cache)?;
    let template = args.dialogue.template()?;
    let mut input = opening(&args.dialogue)?;
    let text = args.text.iter().map(|path| read_text(path, "read text")).collect::<Result<Vec<_>>>()?.concat();
    listen()?;
    let session = Session::open(&args.model, args.numbers.kv_dtype()?)?.with_chat_template(template);
    let tokenizer = &session.loaded.tokenizer;
    let is_chat = args.dialogue.messages.is_some() || args.chat;
    let ids = while_waiting(|| -> Result<Vec<u32>> {
        if !is_chat {
            return tokenizer.encode(&text);
        }
        session.announce_chat_format()?;
        if args.chat {
            tokenizer.check_length(&text)?;
            input.messages.push(ChatMessage::new("system", text));
        }
        let chat = tokenizer.chat(&input.context)?;
        let is_answer = input.messages.last().is_some_and(|message| message.role() == "assistant");
        if is_answer { chat.encode_continued(&input.messages) } else { chat.encode_beginning(&input.messages) }
    })?;
    if ids.is_empty() {
        return Err(Error::input("the text is empty").into());
    }
    let retention = if args.cache.use_adakv { session.loaded.retention(&config) } else { Retention::Full };
    let mut cache = session.loaded.model.new_cache(session.kv_dtype, retention)?;
    let (prefill, time) = session.prefill(&ids, &mut cache, None)?;
    log.check()?;
    if args.cache.use_adakv {
        note_budget(&config, cache.bytes().kept);
    }
    let dialogue = is_chat.then(|| Dialogue {
        opening: input.messages.len(),
        input: ChatInput { unread: Vec::new(), ..input },
        unread: None,
    });
    let mut stderr = std::io::stderr().lock();
    // Nobody may be listening; the cache is saved all the same.
    let _ = writeln!(
        stderr,
        "{}\nprefill  {} tokens in {:.0} ms, {:.1} tokens/s",
        memory_table(&prefill.layers),
        ids.len(),
        time.as_secs_f64() * 1e3,
        per_second(ids.len(), time)
    );
    drop(stderr);
    kept::save(&session, &cache, dialogue.as_ref(), &args.output)?;
    Ok(Outcome::Done)
}

/// What is said of a cache's method.
fn method(saved: &SavedCache) -> Result<String> {
    Ok(match saved.config()? {
        None => "full".to_owned(),
        Some(config) => match config.budget() {
            Some(budget) => format!("{}, {budget}", config.method_name()),
            None => config.method_name().to_owned(),
        },
    })
}

fn info(path: &Path, model: Option<&Path>) -> anyhow::Result<Outcome> {
    let saved = SavedCache::open(path)?;
    let text = model.map(|model| -> anyhow::Result<String> {
        let tokenizer = checkpoint::open(super::hub::local_path(model)?)?.tokenizer()?;
        Ok(tokenizer.decode(&saved.ids(), false))
    });
    print_info(&saved, text.transpose()?.as_deref()).context(STDOUT_FAILED)?;
    Ok(Outcome::Done)
}

fn print_info(saved: &SavedCache, text: Option<&str>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut line = |name: &str, value: String| writeln!(out, "{name:<20}{}", plain(&value));
    line("file", saved.path().display().to_string())?;
    line("size", size(saved.file_bytes()))?;
    line("written by", saved.program().to_owned())?;
    let (architecture, layers) = saved.model();
    let heads = saved.layout();
    line("model", format!("{architecture}, {layers} layers of {} KV heads of {}", heads.num_kv_heads, heads.head_dim))?;
    let (weights, vocabulary) = saved.fingerprints();
    line("weights", weights.to_owned())?;
    line("vocabulary", vocabulary.to_owned())?;
    line("tokens", saved.num_tokens().to_string())?;
    line("method", method(saved)?)?;
    line("numbers", saved.kv_dtype().name().to_owned())?;
    let (kept, raw) = saved.kept_and_raw_bytes();
    #[expect(clippy::cast_precision_loss)]
    let share = 100.0 * kept as f64 / raw.max(1) as f64;
    line("keys and values", format!("{:.3} MB kept of {:.3} MB ({share:.1} %)", megabytes(kept), megabytes(raw)))?;
    if let Some(Dialogue { input, .. }) = saved.dialogue()? {
        let count = input.messages.len();
        line("conversation", format!("{count} message{}", if count == 1 { "" } else { "s" }))?;
    }
    text.map_or(Ok(()), |text| writeln!(out, "\n{}", text.trim_end()))?;
    Ok(())
}

fn check(files: &[PathBuf]) -> anyhow::Result<Outcome> {
    let mut failed = None;
    for path in files {
        match SavedCache::open(path).and_then(|saved| saved.check().map(|()| saved)) {
            Ok(saved) => {
                let line = format!("{}: whole, {} tokens", path.display(), saved.num_tokens());
                writeln!(std::io::stdout(), "{}", plain(&line)).context(STDOUT_FAILED)?;
            }
            // All are looked at; the last failure is the command's.
            Err(error) => {
                if let Some(earlier) = failed.replace(error) {
                    super::print_error(&earlier.into());
                }
            }
        }
    }
    failed.map_or(Ok(Outcome::Done), |error| Err(error.into()))
}

fn list(folder: &Path) -> anyhow::Result<Outcome> {
    let failed = |source| Error::io("read", folder, source);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_file() && is_saved_cache(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    let mut out = std::io::stdout().lock();
    let rows: Vec<[String; 5]> = paths
        .iter()
        .map(|path| {
            let name = plain(&path.file_name().unwrap_or_default().to_string_lossy());
            match SavedCache::open(path).and_then(|saved| method(&saved).map(|method| (saved, method))) {
                Ok((saved, method)) => [
                    name,
                    saved.num_tokens().to_string(),
                    format!("{:.3}", megabytes(saved.file_bytes())),
                    saved.kv_dtype().name().to_owned(),
                    method,
                ],
                Err(error) => [name, "-".to_owned(), "-".to_owned(), "-".to_owned(), plain(&error.to_string())],
            }
        })
        .collect();
    if rows.is_empty() {
        super::terminal::note(format_args!("no saved cache is in `{}`", folder.display()));
        return Ok(Outcome::Done);
    }
    let width = rows.iter().map(|row| row[0].chars().count()).max().unwrap_or(0).max("file".len());
    let head = ["file", "tokens", "MB", "numbers", "method"].map(str::to_owned);
    for [name, tokens, megabytes, numbers, method] in std::iter::once(&head).chain(&rows) {
        writeln!(out, "{name:<width$}  {tokens:>8}  {megabytes:>10}  {numbers:<10}  {method}")
            .context(STDOUT_FAILED)?;
    }
    Ok(Outcome::Done)
}
