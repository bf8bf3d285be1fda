//! Messages of a conversation, and reading them from a file in the form of `OpenAI`'s chat completions.
//!
//! What a message becomes in a prompt is `chat.rs`'s business.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::read_json;
use super::settings::shown;
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `"system"`, `"user"` or `"assistant"` in most templates.
    pub role: String,
    /// What is said. Never interpreted: a special token's spelling in it is plain text.
    pub content: String,
}

impl ChatMessage {
    /// Makes a message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Reads messages from a JSON file: a list of `{"role", "content"}`, or an object with such a list as `messages`. A
/// content is a string or a list of parts `{"type": "text", "text"}`, which are joined. Roles are the template's
/// business; other keys are ignored.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read; [`Error::BadFile`], with the message's index, if it is not of this form or
/// holds no message; [`Error::Unsupported`] for parts that are not text.
pub fn messages_from_json(path: impl AsRef<Path>) -> Result<Vec<ChatMessage>> {
    let path = path.as_ref();
    messages_from_value(&read_json(path)?, path)
}

/// Reads messages from a JSON value, of the form that [`messages_from_json`] says.
///
/// * `path`: where the value comes from, for messages
///
/// # Errors
/// As [`messages_from_json`].
pub fn messages_from_value(file: &Value, path: impl AsRef<Path>) -> Result<Vec<ChatMessage>> {
    let path = path.as_ref();
    let bad = |reason: String| Error::bad_file(path, reason);
    let list = match file {
        Value::Object(object) => object.get("messages").unwrap_or(&Value::Null),
        other => other,
    };
    let Value::Array(list) = list else {
        return Err(bad(match file {
            Value::Object(object) if !object.contains_key("messages") => {
                "expected a list of messages, or an object with `messages`".into()
            }
            _ => format!("expected a list of messages, got {}", shown(list)),
        }));
    };
    if list.is_empty() {
        return Err(bad("its list of messages is empty".into()));
    }
    let message = |(index, message): (usize, &Value)| {
        let text = |key: &str, expected: &str| match message.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            other => Err(bad(format!("message {index}: expected {expected} for `{key}`, got {}", got(other)))),
        };
        if !message.is_object() {
            return Err(bad(format!(
                "message {index}: expected an object with `role` and `content`, got {}",
                shown(message)
            )));
        }
        let role = text("role", "a string")?;
        let content = match message.get("content") {
            Some(Value::Array(parts)) => joined(parts, index, path)?,
            _ => text("content", "a string or a list of parts")?,
        };
        Ok(ChatMessage { role, content })
    };
    list.iter().enumerate().map(message).collect()
}

/// The text of a content's parts.
fn joined(parts: &[Value], index: usize, path: &Path) -> Result<String> {
    let mut content = String::new();
    for (number, part) in parts.iter().enumerate() {
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(text)) => content.push_str(text),
            (Some(other), _) if other != "text" => {
                let what = format!("the part `{other}` of message {index} of `{}`", path.display());
                return Err(Error::unsupported(what).with_hint("only text can be read"));
            }
            _ => {
                let reason = format!(
                    "message {index}: expected `{{\"type\": \"text\", \"text\": ...}}` for part {number} of its content"
                );
                return Err(Error::bad_file(path, reason));
            }
        }
    }
    Ok(content)
}

fn got(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<ChatMessage>> {
        messages_from_value(&serde_json::from_str(text).unwrap(), "m.json")
    }

    #[test]
    fn both_forms_and_parts_are_read() {
        let expected = [ChatMessage::new("system", "S"), ChatMessage::new("oracle", "ab")];
        let list = r#"[{"role": "system", "content": "S", "name": "x"},
                       {"role": "oracle", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#;
        assert_eq!(read(list).unwrap(), expected);
        assert_eq!(read(&format!("{{\"model\": 1, \"messages\": {list}}}")).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_index() {
        let good = r#"{"role": "user", "content": "x"}"#;
        for (text, reason) in [
            ("[]".into(), "its list of messages is empty".into()),
            ("{}".into(), "expected a list of messages, or an object with `messages`".into()),
            ("7".into(), "expected a list of messages, got `7`".into()),
            (r#"{"messages": "x"}"#.into(), "expected a list of messages, got `\"x\"`".into()),
            (format!("[{good}, 3]"), "message 1: expected an object with `role` and `content`, got `3`".to_owned()),
            (
                format!("[{good}, {{\"content\": \"x\"}}]"),
                "message 1: expected a string for `role`, got nothing".into(),
            ),
            (
                r#"[{"role": "user", "content": null}]"#.into(),
                "message 0: expected a string or a list of parts for `content`, got `null`".into(),
            ),
            (
                r#"[{"role": "user", "content": [{"type": "text"}]}]"#.into(),
                "message 0: expected `{\"type\": \"text\", \"text\": ...}` for part 0 of its content".into(),
            ),
        ] as [(String, String); 8]
        {
            match read(&text) {
                Err(Error::BadFile { path, reason: got, .. }) => {
                    assert_eq!((path.as_path(), got), (Path::new("m.json"), reason), "{text}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
        let image = read(r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#).unwrap_err();
        assert_eq!(image.to_string(), "the part `image_url` of message 0 of `m.json` is not supported");
    }
}
