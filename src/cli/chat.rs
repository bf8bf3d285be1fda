//! `chat`: a conversation at the terminal, every turn on top of the compressed cache.

use std::io::{BufRead, ErrorKind, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use adaptive_kvcache::cache::{Bounds, Retention};
use adaptive_kvcache::generate::{Conversation, DraftCounts, FinishReason, GenerationOptions, Turn};
use adaptive_kvcache::json::without_bom;
use adaptive_kvcache::memory::process_memory;
use adaptive_kvcache::model::LlamaConfig;
use adaptive_kvcache::reading::MAX_TEXT;
use adaptive_kvcache::report::megabytes;
use adaptive_kvcache::saved::Dialogue;
use adaptive_kvcache::tokenizer::ChatInput;
use adaptive_kvcache::{Error, files};

use anyhow::Context;
use rustyline::error::ReadlineError;

use super::args::ChatArgs;
use super::generate::mapped_text;
use super::interrupt::{self, interrupted, listen, terminated, while_waiting};
use super::kept::{self, Asked, Start};
use super::logging::Log;
use super::places::Places;
use super::prefixes;
use super::session::{Observer, Session, opening, per_second};
use super::{Outcome, STDOUT_FAILED, print_error, terminal};

const HELP: &str = "\
/help        this list
/stats       what each turn kept, and the size of the cache
/save FILE   write the conversation as JSON, for --messages; as FILE.kv the cache with it, for /load and --cache
/load FILE   go on with the conversation of a saved cache, in the place of this one
/reset       forget the conversation
/exit        end; so does the end of input
A line that ends in \\ goes on in the next. Ctrl-C ends an answer.";

/// What a line at the prompt asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Help,
    Stats,
    Save(&'a str),
    Load(&'a str),
    Reset,
    Exit,
    Unknown(&'a str),
    Empty,
    Question(&'a str),
}

impl<'a> Line<'a> {
    fn parse(text: &'a str) -> Self {
        let text = text.trim();
        let (command, rest) = text.split_once(char::is_whitespace).map_or((text, ""), |(a, b)| (a, b.trim()));
        match (command, rest) {
            ("", _) => Self::Empty,
            ("/help", "") => Self::Help,
            ("/stats", "") => Self::Stats,
            ("/reset", "") => Self::Reset,
            ("/exit" | "/quit", "") => Self::Exit,
            ("/save", file) => Self::Save(file),
            ("/load", file) => Self::Load(file),
            // A path such as /etc/hosts is not meant as a command.
            _ if command.len() > 1
                && command[1..].bytes().all(|b| b.is_ascii_lowercase())
                && command.starts_with('/') =>
            {
                Self::Unknown(command)
            }
            _ => Self::Question(text),
        }
    }
}

pub fn run(args: &ChatArgs) -> anyhow::Result<Outcome> {
    // Messages may be saved to where they came from.
    let kept = Places::of(&args.model.model).reads("--config", args.cache.config.as_ref());
    let kept = kept.reads("--log-file", Some(args.cache.log_path()));
    let kept = kept.reads("--chat-template", args.dialogue.chat_template.as_ref());
    let messages = args.dialogue.messages.as_ref();
    if messages.is_some_and(|path| path == Path::new("-")) {
        return Err(Error::input(
            "`--messages -` would read the messages where the questions come from: standard input",
        )
        .with_hint("give the messages as a file")
        .into());
    }
    Places::of(&args.model.model)
        .reads("--config", args.cache.config.as_ref())
        .reads("--messages", messages)
        .reads("--chat-template", args.dialogue.chat_template.as_ref())
        .reads("--cache", args.start.cache_file.as_ref())
        .writes("--save-cache", args.save.save_cache.as_ref())
        .logs(args.cache.log_path())
        .check()?;
    args.save.save_cache.as_deref().map_or(Ok(()), kept::expect_file)?;
    let asked = Asked::new(&args.cache, args.budget.budget(), &args.numbers);
    let start = Start::open(args.start.cache_file.as_deref(), asked)?;
    if start.is_saved() && (messages.is_some() || args.dialogue.system.is_some()) {
        return Err(Error::input("--cache holds a conversation, and --messages or --system begins another")
            .with_hint("leave one of the two out")
            .into());
    }
    let store = prefixes::open(&args.store)?;
    let log = Log::start(&args.cache)?;
    let opening = opening(&args.dialogue)?;
    let template = args.dialogue.template()?;
    listen()?;
    let session = Session::open(&args.model, start.kv_dtype(&args.numbers)?)?.with_chat_template(template);
    // Before anything is typed.
    session.announce_chat_format()?;
    let prefixes = prefixes::of(&session, store.as_ref(), &start.retention(&session))?;
    let bounds = args.bounds.bounds(usize::MAX);
    let mut conversation = begin(&session, &start, opening, bounds)?.with_prefixes(prefixes.as_ref());
    let LlamaConfig { context_length: context, num_layers: layers, .. } = *session.loaded.model.config();
    let options = GenerationOptions { draft: args.draft.draft.into(), ..args.sampling.options(usize::MAX)? };

    let seed = options.sampling.drawn_seed().map(|seed| format!("seed: {seed}"));

    let mut input = Input::open()?;
    if input.is_terminal() {
        terminal::line(format_args!("{layers} layers, context of {context} tokens. /help lists commands."));
    }
    // One that was loaded may be of another method; it is somebody's file already.
    let (mut is_new, mut is_loaded) = (false, false);
    loop {
        interrupt::clear();
        let answered = (is_new && !is_loaded).then(|| conversation.cache());
        let line = prefixes::while_storing(prefixes.as_ref(), answered, || input.line())?;
        is_new = false;
        let Some(line) = line else { break };
        let done = match Line::parse(&line) {
            Line::Exit => break,
            Line::Save(file) => save(&session, &conversation, file, &kept),
            Line::Load(file) => load(&session, file, bounds).map(|loaded| (conversation, is_loaded) = (loaded, true)),
            Line::Question(text) => {
                is_new = true;
                answer(&mut conversation, text, &options, context)
            }
            Line::Reset => {
                conversation.reset();
                say("The conversation is forgotten.");
                Ok(())
            }
            Line::Stats => {
                say(&stats(&conversation));
                if let Some(seed) = &seed {
                    say(seed);
                }
                Ok(())
            }
            Line::Help => {
                say(HELP);
                Ok(())
            }
            Line::Unknown(command) => {
                say(&format!("unknown command `{command}`\n{HELP}"));
                Ok(())
            }
            Line::Empty => Ok(()),
        };
        match done {
            Ok(()) => {}
            Err(error) if is_fatal(&error) => return Err(error),
            Err(_) if terminated() => {}
            // The person may want to go on: a shorter question, another file name.
            Err(error) => print_error(&error),
        }
        log.check()?;
        if terminated() {
            return Ok(Outcome::Interrupted);
        }
    }
    if let Some(seed) = &seed {
        say(seed);
    }
    if let Some(path) = &args.save.save_cache {
        save_cache(&session, &conversation, path)?;
    }
    Ok(Outcome::Done)
}

/// The conversation that a saved cache holds, or a new one.
fn begin<'s>(
    session: &'s Session,
    start: &Start,
    opening: ChatInput,
    bounds: Bounds,
) -> anyhow::Result<Conversation<'s>> {
    let (model, tokenizer) = (&session.loaded.model, &session.loaded.tokenizer);
    let cache = start.cache(session)?;
    let conversation = match start.dialogue().cloned() {
        Some(Dialogue { input: ChatInput { messages, context, .. }, opening, unread }) => {
            Conversation::resume(model, tokenizer, cache, messages, opening, unread)?.with_chat_context(context)
        }
        None if cache.seen() > 0 => {
            return Err(Error::input("the saved cache holds a text and no conversation")
                .with_hint("save the text with `cache create --chat`, or ask about it with `generate --cache`")
                .into());
        }
        None => {
            let ChatInput { messages, context, .. } = opening;
            let retention = cache.retention().clone();
            Conversation::new(model, tokenizer, session.kv_dtype, retention, messages)?.with_chat_context(context)
        }
    };
    Ok(conversation.with_prefill_options(session.prefill_options).with_bounds(bounds))
}

/// Whether going on makes no sense: nobody reads, or the model fails.
fn is_fatal(error: &anyhow::Error) -> bool {
    !matches!(error.downcast_ref::<Error>(), Some(Error::Input { .. } | Error::Io { .. } | Error::Interrupted))
}

/// Tells something that is not part of the conversation.
fn say(text: &str) {
    // Nobody may be listening; the conversation goes on.
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn answer(
    conversation: &mut Conversation<'_>,
    question: &str,
    options: &GenerationOptions,
    context: usize,
) -> anyhow::Result<()> {
    let mut written = Ok(());
    let mut ends_line = true;
    let mut observer = Observer::new(None);
    let result = conversation.ask(question, options, &mut observer, &mut |text| {
        let mut stdout = std::io::stdout().lock();
        written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        ends_line = if text.is_empty() { ends_line } else { text.ends_with('\n') };
        if written.is_err() || interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    observer.finish();
    let turn = result?.clone();
    if written.is_ok() && !ends_line {
        written = writeln!(std::io::stdout());
    }
    written.context(STDOUT_FAILED)?;
    let number = conversation.turns().len();
    let bytes = conversation.cache().bytes();
    if matches!(conversation.cache().retention(), Retention::Adaptive { .. }) {
        tracing::info!("{}", log_line(number, &turn));
    }
    if conversation.cache().budget().is_some() {
        let held: Vec<String> = conversation.held().into_iter().map(held_text).collect();
        tracing::info!("held of turns 1 to {number}, by a head on average: {}", held.join(", "));
    }
    let note = match turn.finish_reason {
        FinishReason::Length => ", cut off".to_owned(),
        FinishReason::Context => {
            let seen = conversation.cache().seen();
            format!(", cut off: the conversation is full ({seen} of {context} tokens), /reset makes room")
        }
        FinishReason::Interrupted => ", broken off".to_owned(),
        FinishReason::Eos | FinishReason::Stop => String::new(),
    };
    let guesses = match turn.drafts {
        DraftCounts { drafted: 0, .. } => String::new(),
        DraftCounts { drafted, accepted } => format!(", {accepted} of {drafted} guesses came true"),
    };
    say(&format!(
        "[{} + {} tokens{note}{}; {:.1} tokens/s{guesses}; cache {:.2} of {:.2} MB]",
        turn.prompt_tokens,
        turn.answer_tokens,
        if turn.reread { ", the conversation was read again" } else { "" },
        per_second(turn.answer_tokens.saturating_sub(1), turn.decode_time),
        megabytes(bytes.kept),
        megabytes(bytes.raw),
    ));
    Ok(())
}

/// Rows of a turn, if it is known whose they are.
fn held_text(rows: Option<f64>) -> String {
    rows.map_or_else(|| "-".to_owned(), |rows| format!("{rows:.1}"))
}

/// What the log says of a turn.
fn log_line(number: usize, turn: &Turn) -> String {
    let profiled = turn.profiled_tokens;
    format!(
        "turn {number}: {profiled} tokens profiled ({} of the answer before, {} new), {:.1} kept by a head on average",
        profiled.saturating_sub(turn.prompt_tokens),
        turn.prompt_tokens,
        turn.mean_kept
    )
}

/// What each turn kept, and what there is now.
fn stats(conversation: &Conversation<'_>) -> String {
    let mut lines = vec![format!(
        "{:>4} {:>9} {:>9} {:>9} {:>11} {:>8} {:>11}",
        "turn", "prompt", "answer", "profiled", "kept/head", "kept %", "held/head"
    )];
    for (index, (turn, held)) in conversation.turns().iter().zip(conversation.held()).enumerate() {
        let (profiled, kept) = (turn.profiled_tokens, turn.mean_kept);
        #[expect(clippy::cast_precision_loss)]
        let share = 100.0 * kept / profiled.max(1) as f64;
        let Turn { prompt_tokens, answer_tokens, .. } = turn;
        lines.push(format!(
            "{:>4} {prompt_tokens:>9} {answer_tokens:>9} {profiled:>9} {kept:>11.1} {share:>8.1} {:>11}",
            index + 1,
            held_text(held)
        ));
    }
    let cache = conversation.cache();
    let bytes = cache.bytes();
    lines.push(format!(
        "cache: {} tokens seen{}, {:.3} MB kept of {:.3} MB ({:.1} % saved), {:.3} MB allocated{}",
        cache.ids().len(),
        if cache.shifted() > 0 { format!(" ({} positions taken)", cache.seen()) } else { String::new() },
        megabytes(bytes.kept),
        megabytes(bytes.raw),
        100.0 * bytes.saved_ratio(),
        megabytes(bytes.allocated),
        mapped_text(&bytes),
    ));
    lines.push(format!("process: {:.1} MB resident", megabytes(process_memory().unwrap_or_default().resident)));
    lines.join("\n")
}

/// The conversation as `--messages` reads it.
fn input_of(conversation: &Conversation<'_>) -> ChatInput {
    let (messages, context) = (conversation.messages().to_vec(), conversation.chat_context().clone());
    ChatInput { messages, context, ..ChatInput::default() }
}

/// How the names of saved caches end.
const CACHE_ENDING: &str = "kv";

/// * `kept`: what is read, and must stay
fn save(session: &Session, conversation: &Conversation<'_>, file: &str, kept: &Places<'_>) -> anyhow::Result<()> {
    if file.is_empty() {
        return Err(Error::input("no file was named").with_hint("write /save FILE.json, or /save FILE.kv").into());
    }
    kept.expect_no_input("/save", Path::new(file))?;
    if Path::new(file).extension().is_some_and(|ending| ending == CACHE_ENDING) {
        return save_cache(session, conversation, Path::new(file));
    }
    let text =
        serde_json::to_string_pretty(&input_of(conversation)).context("failed to write the conversation as JSON")?;
    files::replace(Path::new(file), (text + "\n").as_bytes())?;
    say(&format!("{} messages are in `{file}`.", conversation.messages().len()));
    Ok(())
}

/// Saves the cache, and the conversation that it holds.
fn save_cache(session: &Session, conversation: &Conversation<'_>, path: &Path) -> anyhow::Result<()> {
    kept::expect_file(path)?;
    let Some((opening, unread)) = conversation.resumable() else {
        return Err(Error::input("the cache does not hold the conversation as it stands, and is not saved")
            .with_hint("ask something first; after an answer that ended at a stop text, ask once more")
            .into());
    };
    let dialogue = Dialogue { input: input_of(conversation), opening, unread };
    kept::save(session, conversation.cache(), Some(&dialogue), path)?;
    Ok(())
}

/// The conversation of a saved cache.
fn load<'s>(session: &'s Session, file: &str, bounds: Bounds) -> anyhow::Result<Conversation<'s>> {
    if file.is_empty() {
        return Err(Error::input("no file was named").with_hint("write /load FILE.kv").into());
    }
    let conversation = begin(session, &Start::saved(Path::new(file))?, ChatInput::default(), bounds)?;
    say(&format!(
        "{} messages, {} tokens are loaded from `{file}`.",
        conversation.messages().len(),
        conversation.cache().seen()
    ));
    Ok(conversation)
}

/// Where questions come from: an editor at a terminal, else lines of standard input.
enum Input {
    Editor(Box<rustyline::DefaultEditor>),
    Lines,
}

impl Input {
    fn open() -> anyhow::Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Lines);
        }
        let editor = rustyline::DefaultEditor::new().context("failed to open the terminal")?;
        Ok(Self::Editor(Box::new(editor)))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Editor(_))
    }

    /// The next line, with those that it goes on in; `None` at the end of input.
    fn line(&mut self) -> anyhow::Result<Option<String>> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { "> " } else { ". " };
            let Some(part) = self.part(prompt)? else { return Ok((!text.is_empty()).then_some(text)) };
            let part = part.trim_end_matches(['\n', '\r']);
            text += part.strip_suffix('\\').unwrap_or(part);
            if !part.ends_with('\\') {
                if let Self::Editor(editor) = self
                    && !text.trim().is_empty()
                {
                    let _ = editor.add_history_entry(&text);
                }
                return Ok(Some(text));
            }
            text.push('\n');
        }
    }

    fn part(&mut self, prompt: &str) -> anyhow::Result<Option<String>> {
        match self {
            Self::Editor(editor) => match while_waiting(|| editor.readline(prompt)) {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(error).context("failed to read from the terminal"),
            },
            Self::Lines => {
                let mut line = String::new();
                let read = while_waiting(|| std::io::stdin().lock().take(MAX_TEXT).read_line(&mut line));
                match read {
                    Ok(0) => Ok(None),
                    Ok(len) if len as u64 == MAX_TEXT => {
                        Err(Error::input(format!("a line of standard input has {MAX_TEXT} bytes or more")).into())
                    }
                    Ok(_) => Ok(Some(without_bom(&line).to_owned())),
                    Err(error) if error.kind() == ErrorKind::InvalidData => {
                        Err(Error::input("standard input is not UTF-8 text").into())
                    }
                    Err(error) => Err(error).context("failed to read standard input"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_questions() {
        for (text, expected) in [
            ("  ", Line::Empty),
            ("/help", Line::Help),
            (" /stats ", Line::Stats),
            ("/save a b.json", Line::Save("a b.json")),
            ("/save", Line::Save("")),
            ("/load c.kv", Line::Load("c.kv")),
            ("/quit", Line::Exit),
            ("/statistics", Line::Unknown("/statistics")),
            ("/etc/hosts is what?", Line::Question("/etc/hosts is what?")),
            ("/ is a slash", Line::Question("/ is a slash")),
            ("What is /reset?", Line::Question("What is /reset?")),
        ] {
            assert_eq!(Line::parse(text), expected, "{text:?}");
        }
    }
}
