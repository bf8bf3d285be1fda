//! Files of prompts, one a line: plain text, a JSON string, or an object with `prompt` or `messages`.

use std::path::{Path, PathBuf};

use adaptive_kvcache::tokenizer::{ChatInput, ChatMessage};
use adaptive_kvcache::{Error, Result, json};
use serde_json::Value;

use super::session::{Session, read_text};

/// The lines of a file that are not blank.
pub struct Prompts {
    path: PathBuf,
    /// With their numbers, from 1.
    lines: Vec<(usize, String)>,
}

/// One prompt of a file.
pub struct Prompt {
    /// The line's number, from 1.
    pub line: usize,
    /// File and line, for messages.
    pub name: String,
    /// What it asks: the text, or the last of its messages.
    pub text: String,
    pub ids: Vec<u32>,
}

impl Prompts {
    /// Reads a file; what its lines hold is looked at later.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let lines: Vec<(usize, String)> = lines.map(|(index, line)| (index + 1, line.to_owned())).collect();
        if lines.is_empty() {
            return Err(Error::bad_file(path, "it has no prompts").with_hint("write one prompt a line"));
        }
        Ok(Self { path: path.to_owned(), lines })
    }

    /// The prompt of every line.
    ///
    /// * `opening`: what every conversation begins with
    /// * `chat`: plain text is a user's message, too
    /// * `go_on`: conversations end with an answer that is to be gone on with
    pub fn encode(&self, session: &Session, opening: &[ChatMessage], chat: bool, go_on: bool) -> Result<Vec<Prompt>> {
        let tokenizer = &session.loaded.tokenizer;
        let mut announced = false;
        let mut encode_chat = |input: &ChatInput| {
            if !announced {
                session.announce_chat_format()?;
                announced = true;
            }
            let (chat, messages) = (tokenizer.chat(&input.context)?, [opening, &input.messages].concat());
            if go_on { chat.encode_continued(&messages) } else { chat.encode(&messages) }
        };
        let encode = |&(line, ref content): &(usize, String)| {
            let place = PathBuf::from(format!("{}:{line}", self.path.display()));
            let (text, ids) = match parse(&place, content)? {
                Asked::Messages(input) => {
                    let ids = encode_chat(&input)?;
                    (input.messages.last().map(ChatMessage::text).unwrap_or_default(), ids)
                }
                Asked::Text(text) if chat || go_on => {
                    let messages = vec![ChatMessage::new("user", text.clone())];
                    (text, encode_chat(&ChatInput { messages, ..ChatInput::default() })?)
                }
                Asked::Text(text) => {
                    let ids = tokenizer.encode(&text)?;
                    (text, ids)
                }
            };
            Ok(Prompt { line, name: format!("prompt `{}`", place.display()), text, ids })
        };
        self.lines.iter().map(encode).collect()
    }
}

/// What a line asks for.
enum Asked {
    Text(String),
    Messages(ChatInput),
}

/// * `place`: file and line, for messages
fn parse(place: &Path, line: &str) -> Result<Asked> {
    let bad = |reason: String| {
        Error::bad_file(place, reason)
            .with_hint("expected text, a JSON string, or an object with `prompt` or `messages`")
    };
    if !line.trim_start().starts_with('{') {
        let text = serde_json::from_str::<String>(line.trim()).unwrap_or_else(|_| line.to_owned());
        return Ok(Asked::Text(text));
    }
    let value = json::parse(line.as_bytes()).map_err(bad)?;
    match (value.get("prompt"), value.get("messages")) {
        (Some(Value::String(text)), None) => Ok(Asked::Text(text.clone())),
        (None, Some(_)) => ChatInput::from_value(value, place).map(Asked::Messages),
        _ => Err(bad("it has not one of `prompt`, a text, and `messages`".to_owned())),
    }
}
