//! Files of prompts, one a line.

mod line;

use std::path::{Path, PathBuf};

use adaptive_kvcache::tokenizer::{ChatInput, ChatMessage};
use adaptive_kvcache::{Error, Result};

use super::interrupt::while_waiting;
use super::kept::Start;
use super::session::{Session, read_text};
pub use line::Keys;
use line::{Asked, Line};

/// Most prompts of a file: what is kept of each takes some hundred bytes.
const MAX_PROMPTS: usize = 1 << 20;

/// The lines of a file that are not blank.
pub struct Prompts {
    path: PathBuf,
    /// With their numbers, from 1.
    lines: Vec<(usize, Line)>,
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
    /// How its answer is generated, as far as the line says so.
    pub keys: Keys,
    /// What the caller knows it by.
    pub custom_id: Option<String>,
}

impl Prompts {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::BadFile`] if it has no prompts, and with the line, as [`Line::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, "read prompts")?;
        let mut lines = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            lines.extend(Line::parse(line, &place(path, number))?.map(|line| (number, line)));
            if lines.len() > MAX_PROMPTS {
                return Err(
                    Error::bad_file(path, format!("it has more than {MAX_PROMPTS} prompts")).with_hint("split it")
                );
            }
        }
        if lines.is_empty() {
            return Err(Error::bad_file(path, "it has no prompts").with_hint("write one prompt a line"));
        }
        Ok(Self { path: path.to_owned(), lines })
    }

    /// Whether a line asks for tokens to be drawn at random.
    pub fn draw(&self) -> bool {
        self.lines.iter().any(|(_, line)| line.keys.temperature.is_some_and(|temperature| temperature > 0.0))
    }

    /// Refuses lines that say how their answer is generated, where all are answered alike.
    ///
    /// * `reason`: why; ends the sentence
    pub fn expect_no_keys(&self, reason: &str) -> Result<()> {
        let given = self.lines.iter().find_map(|(line, content)| Some((line, content.keys.first()?)));
        given.map_or(Ok(()), |(line, key)| {
            let error =
                Error::bad_file(place(&self.path, *line), format!("the key `{key}` cannot be obeyed: {reason}"));
            Err(error.with_hint("leave it out"))
        })
    }

    /// The prompt of every line.
    ///
    /// * `start`: what all of them come behind
    /// * `opening`: what every conversation begins with
    /// * `chat`: plain text is a user's message, too
    /// * `go_on`: conversations end with an answer that is to be gone on with
    ///
    /// # Errors
    /// [`Error::BadFile`] with the line, if it and `opening` both give a system message; what the chat template fails
    /// with.
    pub fn encode(
        self,
        session: &Session,
        start: &Start,
        opening: &[ChatMessage],
        chat: bool,
        go_on: bool,
    ) -> Result<Vec<Prompt>> {
        let tokenizer = &session.loaded.tokenizer;
        let mut announced = false;
        let mut encode_chat = |input: &ChatInput| {
            if !announced {
                session.announce_chat_format()?;
                announced = true;
            }
            let messages = [opening, &input.messages].concat();
            if go_on {
                tokenizer.chat(&input.context)?.encode_continued(&messages)
            } else {
                start.encode_messages(session, &messages, &input.context)
            }
        };
        let is_system = |messages: &[ChatMessage]| messages.first().is_some_and(|message| message.role() == "system");
        let Self { path, lines } = self;
        let encode = |(line, Line { asked, keys, custom_id }): (usize, Line)| {
            let place = place(&path, line);
            let (text, ids) = match asked {
                Asked::Messages(input) => {
                    if is_system(opening) && is_system(&input.messages) {
                        let reason = "its messages and --system both give a system message";
                        return Err(Error::bad_file(place, reason).with_hint("leave one of them out"));
                    }
                    let ids = encode_chat(&input)?;
                    (input.messages.last().map(ChatMessage::text).unwrap_or_default(), ids)
                }
                Asked::Text(text) if chat || go_on => {
                    tokenizer.check_length(&text)?;
                    let messages = vec![ChatMessage::new("user", text.clone())];
                    (text, encode_chat(&ChatInput { messages, ..ChatInput::default() })?)
                }
                Asked::Text(text) => {
                    let ids = start.encode_text(session, &text)?;
                    (text, ids)
                }
            };
            Ok(Prompt { line, name: format!("prompt `{}`", place.display()), text, ids, keys, custom_id })
        };
        while_waiting(|| lines.into_iter().map(encode).collect())
    }
}

/// File and line.
fn place(path: &Path, line: usize) -> PathBuf {
    PathBuf::from(format!("{}:{line}", path.display()))
}
