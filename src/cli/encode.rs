//! The prompt of a run as token ids, behind what its cache holds.

use std::path::{Path, PathBuf};

use adaptive_kvcache::json::without_bom;
use adaptive_kvcache::tokenizer::{ChatInput, ChatMessage};
use adaptive_kvcache::{Error, Result};

use super::args::{DEFAULT_PROMPT, PromptArgs, Wrap};
use super::interrupt::while_waiting;
use super::kept::Start;
use super::session::{Session, opening, read_text};
use super::terminal::note;

/// A prompt, ready to be read.
pub struct Encoded {
    pub ids: Vec<u32>,
    /// The messages that it is, if it is in the chat template.
    pub messages: Option<ChatInput>,
}

/// Token ids of the prompt, behind what the cache holds.
pub fn encode(session: &Session, args: &PromptArgs, start: &Start) -> Result<Encoded> {
    while_waiting(|| encode_now(session, args, start))
}

fn encode_now(session: &Session, args: &PromptArgs, start: &Start) -> Result<Encoded> {
    let tokenizer = &session.loaded.tokenizer;
    let has_messages = args.dialogue.messages.is_some();
    let is_stdin = |path: &Option<PathBuf>| path.as_deref() == Some(Path::new("-"));
    if is_stdin(&args.dialogue.messages) && is_stdin(&args.prompt_file) {
        return Err(Error::input("both --messages and --prompt-file are `-`, but there is one standard input"));
    }
    let mut input = opening(&args.dialogue)?;
    let encoded = if wraps_prompt(session, args, start) {
        announce_wrapping(session, args, start)?;
        // The default prompt is no turn of anybody's conversation.
        if !has_messages || args.prompt.is_some() || args.prompt_file.is_some() {
            let text = prompt_text(args)?;
            tokenizer.check_length(&text)?;
            input.messages.push(ChatMessage::new("user", text));
        }
        let ids = if args.go_on {
            tokenizer.chat(&input.context)?.encode_continued(&input.messages)?
        } else {
            start.encode_messages(session, &input.messages, &input.context)?
        };
        Encoded { ids, messages: Some(input) }
    } else {
        Encoded { ids: start.encode_text(session, &prompt_text(args)?)?, messages: None }
    };
    if encoded.ids.is_empty() {
        return Err(Error::input("the prompt is empty").with_hint("give some text with --prompt or --prompt-file"));
    }
    Ok(encoded)
}

/// Whether a prompt is given in the chat template, be it alone, behind messages, or in a saved conversation.
pub fn wraps_prompt(session: &Session, args: &PromptArgs, start: &Start) -> bool {
    let wrap = if args.chat == Wrap::Auto && start.is_saved() { Wrap::Never } else { args.chat };
    args.dialogue.messages.is_some()
        || args.dialogue.asks_for_chat()
        || args.go_on
        || start.dialogue().is_some()
        || session.wraps(wrap)
}

/// Says in which format a prompt is wrapped, if nobody has asked for it by name: a raw prompt is what those who measure
/// may have meant.
fn announce_wrapping(session: &Session, args: &PromptArgs, start: &Start) -> Result<()> {
    let is_asked_for = args.dialogue.messages.is_some() || args.dialogue.asks_for_chat();
    if args.chat == Wrap::Auto && !is_asked_for && !start.is_saved() {
        note("the prompt is wrapped in the model's chat template; CHAT=0 or --chat 0 gives it as it is");
    }
    session.announce_chat_format()
}

fn prompt_text(args: &PromptArgs) -> Result<String> {
    match &args.prompt_file {
        None => Ok(without_bom(args.prompt.as_deref().unwrap_or(DEFAULT_PROMPT)).to_owned()),
        Some(path) => read_text(path, "read prompt"),
    }
}
