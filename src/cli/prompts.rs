//! Files of prompts, one a line: plain text, a JSON string, or an object with `prompt` or `messages`.

use std::path::{Path, PathBuf};

use adaptive_kvcache::reading::{self, MAX_TEXT};
use adaptive_kvcache::tokenizer::{ChatMessage, messages_from_value};
use adaptive_kvcache::{Error, Result};
use serde_json::Value;

use super::session::Session;

/// Most prompts of a file: what is kept of each takes some hundred bytes.
const MAX_PROMPTS: usize = 1 << 20;

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
        let text = reading::text(path, "read prompts", MAX_TEXT)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let lines = lines.map(|(index, line)| (index + 1, line.to_owned()));
        let lines: Vec<(usize, String)> = lines.take(MAX_PROMPTS + 1).collect();
        if lines.len() > MAX_PROMPTS {
            return Err(Error::bad_file(path, format!("it has more than {MAX_PROMPTS} prompts")).with_hint("split it"));
        }
        if lines.is_empty() {
            return Err(Error::bad_file(path, "it has no prompts").with_hint("write one prompt a line"));
        }
        Ok(Self { path: path.to_owned(), lines })
    }

    /// The prompt of every line.
    ///
    /// * `opening`: what every conversation begins with
    /// * `chat`: plain text is a user's message, too
    pub fn encode(&self, session: &Session, opening: &[ChatMessage], chat: bool) -> Result<Vec<Prompt>> {
        let tokenizer = &session.loaded.tokenizer;
        let mut announced = false;
        let mut encode_chat = |messages: &[ChatMessage]| {
            if !announced {
                session.announce_chat_format()?;
                announced = true;
            }
            tokenizer.encode_chat(messages)
        };
        let encode = |&(line, ref content): &(usize, String)| {
            let place = PathBuf::from(format!("{}:{line}", self.path.display()));
            let (text, ids) = match parse(&place, content)? {
                Asked::Messages(messages) => {
                    let ids = encode_chat(&[opening, &messages].concat())?;
                    (messages.last().map(|message| message.content.clone()).unwrap_or_default(), ids)
                }
                Asked::Text(text) if chat => {
                    tokenizer.check_length(&text)?;
                    let ids = encode_chat(&[opening, &[ChatMessage::new("user", text.clone())]].concat())?;
                    (text, ids)
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
    Messages(Vec<ChatMessage>),
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
    let value: Value = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
    match (value.get("prompt"), value.get("messages")) {
        (Some(Value::String(text)), None) => Ok(Asked::Text(text.clone())),
        (None, Some(_)) => messages_from_value(&value, place).map(Asked::Messages),
        _ => Err(bad("it has not one of `prompt`, a text, and `messages`".to_owned())),
    }
}
