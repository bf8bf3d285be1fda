//! Messages of a conversation, what else its template may be told, and reading both from a file in the form of `OpenAI`'s
//! chat completions.
//!
//! What a message becomes in a prompt is `chat.rs`'s business.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json::{shown, strict_json};
use crate::side_files::read_bounded;

/// What a message can say instead of a `content`: calls of tools, and what the model thought.
const INSTEAD_OF_CONTENT: [&str; 7] =
    ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tool_plan", "tool_responses"];

/// Variables of a template that `chat_template_kwargs` may not set, since the conversation and the program do.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Top-level keys that say nothing of what is asked, so that leaving them unread changes nothing.
#[rustfmt::skip]
const HARMLESS: [&str; 10] = [
    "model", "custom_id", "id", "user", "metadata", "store", "stream", "stream_options", "service_tier",
    "safety_identifier",
];

/// One turn of a conversation: an object with `role` and, mostly, `content`. A template sees all of its keys, in order, as
/// they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ChatMessage {
    keys: Map<String, Value>,
}

impl ChatMessage {
    /// Makes a message of text. A special token's spelling in it is plain text.
    ///
    /// * `role`: who speaks, `"system"`, `"user"`, `"assistant"` or `"tool"` in most templates
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let keys = [("role", role.into()), ("content", content.into())];
        Self { keys: keys.into_iter().map(|(key, text)| (key.to_owned(), Value::String(text))).collect() }
    }

    /// Takes a message as JSON has it: `role` is a string; `content` is a string, null, or a list of parts such as
    /// `{"type": "text", "text"}`, and may be missing where there are `tool_calls` or reasoning.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not of this form; [`Error::Unsupported`] for parts that are not text.
    pub fn from_object(keys: Map<String, Value>) -> Result<Self> {
        check_role(&keys).and_then(|()| check_content(&keys)).map_err(|problem| match problem {
            Problem::Form(reason) => Error::input(format!("a message is not of its form: {reason}")),
            Problem::Part(kind) => unreadable(&kind, "a message"),
        })?;
        Ok(Self { keys })
    }

    /// Who speaks.
    #[must_use]
    pub fn role(&self) -> &str {
        self.keys.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said, in words: the content, or its text parts joined; empty without one.
    #[must_use]
    pub fn text(&self) -> String {
        match self.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text")?.as_str()).collect(),
            _ => String::new(),
        }
    }

    /// A key's value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key)
    }

    /// All keys, in order.
    #[must_use]
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// Sets a key to a value, at the end if it is new.
    pub(super) fn set(&mut self, key: &str, value: Value) {
        self.keys.insert(key.to_owned(), value);
    }

    /// The content, if it is a string.
    pub(super) fn content_mut(&mut self) -> Option<&mut String> {
        match self.keys.get_mut("content") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The parts of the content, if it has any.
    pub(super) fn parts_mut(&mut self) -> Option<&mut Vec<Value>> {
        self.keys.get_mut("content").and_then(Value::as_array_mut)
    }
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ChatContext {
    /// Descriptions of the tools that the model may call, as JSON schemas; none for a conversation without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Texts that the answer is to be based on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub documents: Option<Vec<Value>>,
    /// Further variables of the template, such as `enable_thinking`.
    #[serde(rename = "chat_template_kwargs", skip_serializing_if = "Map::is_empty")]
    pub template_kwargs: Map<String, Value>,
}

/// A conversation as a file has it. Serialises as one that reads back as itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ChatInput {
    /// The turns so far.
    pub messages: Vec<ChatMessage>,
    /// What else the template is told.
    #[serde(flatten)]
    pub context: ChatContext,
    /// Top-level keys that were not read and are not known to be harmless, such as `temperature`.
    #[serde(skip)]
    pub unread: Vec<String>,
}

/// Reads a conversation from a JSON file; see [`ChatInput::from_value`] for its form.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read; [`Error::BadFile`] if it is not JSON or gives a key twice; and as
/// [`ChatInput::from_value`].
pub fn messages_from_json(path: impl AsRef<Path>) -> Result<ChatInput> {
    let path = path.as_ref();
    ChatInput::from_json(&read_bounded(path)?, path)
}

impl ChatInput {
    /// Reads a conversation from JSON text.
    ///
    /// * `path`: where it comes from, for messages
    ///
    /// # Errors
    /// As [`messages_from_json`].
    pub fn from_json(bytes: &[u8], path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::str::from_utf8(bytes).map_err(|_| Error::bad_file(path, "it is not UTF-8"))?;
        let value =
            strict_json(text).map_err(|error| Error::bad_file(path, format!("it is not valid JSON: {error}")))?;
        Self::from_value(value, path)
    }

    /// Takes a conversation: a list of messages, or an object with such a list as `messages` and, as it may be, `tools`,
    /// `documents` and `chat_template_kwargs`. Messages keep their keys, see [`ChatMessage::from_object`]. Roles are the
    /// template's business.
    ///
    /// * `path`: where it comes from, for messages
    ///
    /// # Errors
    /// [`Error::BadFile`], with the message's index, if it is not of this form or holds no message;
    /// [`Error::Unsupported`] for parts that are not text.
    pub fn from_value(value: Value, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bad = |reason: String| Error::bad_file(path, reason);
        let mut input = Self::default();
        let list = match value {
            Value::Object(mut object) => {
                let list = object.shift_remove("messages");
                let list =
                    list.ok_or_else(|| bad("expected a list of messages, or an object with `messages`".into()))?;
                input.context = ChatContext::take(&mut object, path)?;
                let is_read = |(key, value): &(String, Value)| value.is_null() || HARMLESS.contains(&key.as_str());
                input.unread = object.into_iter().filter(|pair| !is_read(pair)).map(|(key, _)| key).collect();
                list
            }
            other => other,
        };
        let Value::Array(list) = list else {
            return Err(bad(format!("expected a list of messages, got {}", shown(&list))));
        };
        if list.is_empty() {
            return Err(bad("its list of messages is empty".to_owned()));
        }
        for (index, message) in list.into_iter().enumerate() {
            let Value::Object(keys) = message else {
                let got = shown(&message);
                return Err(bad(format!("message {index}: expected an object with `role` and `content`, got {got}")));
            };
            check_role(&keys).and_then(|()| check_content(&keys)).map_err(|problem| match problem {
                Problem::Form(reason) => bad(format!("message {index}: {reason}")),
                Problem::Part(kind) => unreadable(&kind, &format!("message {index} of `{}`", path.display())),
            })?;
            input.messages.push(ChatMessage { keys });
        }
        Ok(input)
    }
}

impl ChatContext {
    /// Takes the keys that are the template's out of an object.
    fn take(object: &mut Map<String, Value>, path: &Path) -> Result<Self> {
        let wrong = |key: &str, expected: &str, got: &Value| {
            Error::bad_file(path, format!("expected {expected} for `{key}`, got {}", shown(got)))
        };
        let mut list = |key: &str, of: &str| match object.shift_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => match list.iter().find(|item| !item.is_object()) {
                Some(other) => Err(wrong(key, &format!("a list of {of}"), other)),
                None => Ok(Some(list)),
            },
            Some(other) => Err(wrong(key, &format!("a list of {of}"), &other)),
        };
        let (tools, documents) = (list("tools", "objects, JSON schemas,")?, list("documents", "objects")?);
        let template_kwargs = match object.shift_remove("chat_template_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(other) => return Err(wrong("chat_template_kwargs", "an object of template variables", &other)),
        };
        if let Some(key) = RESERVED.into_iter().find(|key| template_kwargs.contains_key(*key)) {
            let reason = format!("`chat_template_kwargs` sets `{key}`, which is not its to set");
            return Err(Error::bad_file(path, reason));
        }
        Ok(Self { tools, documents, template_kwargs })
    }
}

/// What is wrong with a message.
enum Problem {
    /// What was expected, and what there is.
    Form(String),
    /// A part of this type is not text.
    Part(String),
}

fn check_role(keys: &Map<String, Value>) -> Result<(), Problem> {
    match keys.get("role") {
        Some(Value::String(_)) => Ok(()),
        other => Err(Problem::Form(format!("expected a string for `role`, got {}", got(other)))),
    }
}

fn check_content(keys: &Map<String, Value>) -> Result<(), Problem> {
    match keys.get("content") {
        Some(Value::String(_) | Value::Null) => Ok(()),
        Some(Value::Array(parts)) => parts.iter().enumerate().try_for_each(|(number, part)| check_part(number, part)),
        None if INSTEAD_OF_CONTENT.into_iter().any(|key| keys.get(key).is_some_and(|value| !value.is_null())) => Ok(()),
        other => {
            Err(Problem::Form(format!("expected a string, null or a list of parts for `content`, got {}", got(other))))
        }
    }
}

/// A part of a content: text, or a thought, which templates of reasoning models print as such.
fn check_part(number: usize, part: &Value) -> Result<(), Problem> {
    let kind = part.get("type").and_then(Value::as_str);
    let text = |key: &str| part.get(key).is_some_and(Value::is_string);
    match kind {
        Some("text") if text("text") => Ok(()),
        Some("thinking") if text("thinking") => Ok(()),
        Some(other) if !matches!(other, "text" | "thinking") => Err(Problem::Part(other.to_owned())),
        _ => Err(Problem::Form(format!(
            "expected `{{\"type\": \"text\", \"text\": ...}}` for part {number} of its content"
        ))),
    }
}

fn unreadable(kind: &str, of: &str) -> Error {
    Error::unsupported(format!("the part `{kind}` of {of}")).with_hint("only text can be read")
}

fn got(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), shown)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<ChatInput> {
        ChatInput::from_json(text.as_bytes(), "m.json")
    }

    #[test]
    fn both_forms_and_parts_are_read() {
        let list = r#"[{"role": "system", "content": "S", "name": "x"},
                       {"role": "oracle", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#;
        let input = read(list).unwrap();
        let [system, oracle] = &input.messages[..] else { panic!("{input:?}") };
        assert_eq!((system.role(), system.text()), ("system", "S".to_owned()));
        assert_eq!((oracle.role(), oracle.text()), ("oracle", "ab".to_owned()));
        assert_eq!(serde_json::to_value(system).unwrap(), json!({"role": "system", "content": "S", "name": "x"}));
        assert_eq!(ChatMessage::new("user", "x"), read(r#"[{"role": "user", "content": "x"}]"#).unwrap().messages[0]);

        let object =
            format!("\u{feff}{{\"model\": 1, \"messages\": {list}, \"tools\": null, \"n\": 2, \"stop\": null}}");
        let object = read(&object).unwrap();
        assert_eq!((&object.messages, &object.context), (&input.messages, &ChatContext::default()));
        assert_eq!(object.unread, ["n"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_index() {
        let good = r#"{"role": "user", "content": "x"}"#;
        let content = "expected a string, null or a list of parts for `content`, got";
        for (text, reason) in [
            ("[]".to_owned(), "its list of messages is empty".to_owned()),
            ("{}".into(), "expected a list of messages, or an object with `messages`".into()),
            ("7".into(), "expected a list of messages, got `7`".into()),
            (r#"{"messages": "x"}"#.into(), "expected a list of messages, got `\"x\"`".into()),
            (format!("[{good}, 3]"), "message 1: expected an object with `role` and `content`, got `3`".into()),
            (
                format!("[{good}, {{\"content\": \"x\"}}]"),
                "message 1: expected a string for `role`, got nothing".into(),
            ),
            (r#"[{"role": "user", "contents": "x"}]"#.into(), format!("message 0: {content} nothing")),
            (r#"[{"role": "user", "tool_calls": null}]"#.into(), format!("message 0: {content} nothing")),
            (r#"[{"role": "user", "content": 5}]"#.into(), format!("message 0: {content} `5`")),
            (
                r#"[{"role": "user", "content": [{"type": "text"}]}]"#.into(),
                "message 0: expected `{\"type\": \"text\", \"text\": ...}` for part 0 of its content".into(),
            ),
            (
                format!("{{\"messages\": [{good}], \"tools\": {{}}}}"),
                "expected a list of objects, JSON schemas, for `tools`, got an object".into(),
            ),
            (
                format!("{{\"messages\": [{good}], \"documents\": [\"x\"]}}"),
                "expected a list of objects for `documents`, got `\"x\"`".into(),
            ),
            (
                format!("{{\"messages\": [{good}], \"chat_template_kwargs\": {{\"messages\": []}}}}"),
                "`chat_template_kwargs` sets `messages`, which is not its to set".into(),
            ),
        ] {
            match read(&text) {
                Err(Error::BadFile { path, reason: got, .. }) => {
                    assert_eq!((path.as_path(), got), (Path::new("m.json"), reason), "{text}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
        let image = read(r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#).unwrap_err();
        assert_eq!(image.to_string(), "the part `image_url` of message 0 of `m.json` is not supported");
        let twice = read(r#"[{"role": "user", "content": "x", "tool_calls": [{"id": 1, "id": 1}]}]"#).unwrap_err();
        assert!(twice.to_string().contains("the key `id` is given twice"), "{twice}");
    }

    #[test]
    fn a_message_is_made_of_an_object() {
        let object = |value: Value| value.as_object().unwrap().clone();
        let call = object(json!({"role": "assistant", "tool_calls": [{}], "x": 1}));
        let message = ChatMessage::from_object(call.clone()).unwrap();
        assert_eq!((message.keys(), message.get("x"), message.text()), (&call, Some(&json!(1)), String::new()));
        for bad in [json!({"content": "x"}), json!({"role": "user"}), json!({"role": "user", "content": {}})] {
            assert!(matches!(ChatMessage::from_object(object(bad)), Err(Error::Input { .. })));
        }
        let audio = json!({"role": "user", "content": [{"type": "input_audio"}]});
        let error = ChatMessage::from_object(object(audio)).unwrap_err();
        assert_eq!(error.to_string(), "the part `input_audio` of a message is not supported");
    }
}
