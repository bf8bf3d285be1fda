//! What one line of a file of prompts asks for: a text or messages, and how its answer is to be generated.
//!
//! The keys are those of a request to an API in `OpenAI`'s form
//! (<https://platform.openai.com/docs/api-reference/chat/create>). Each is obeyed, or the line is refused.

use std::path::Path;

use adaptive_kvcache::generate::GenerationOptions;
use adaptive_kvcache::json::strict_json;
use adaptive_kvcache::tokenizer::ChatInput;
use adaptive_kvcache::{Error, Result};
use serde_json::{Map, Value};

/// Some editors put it in front of a text; files that were joined have it in the middle, too.
const BOM: char = '\u{feff}';

/// Characters of a value that a message shows.
const SHOWN_CHARS: usize = 60;

const FORMS: &str = "expected text, a JSON string, a list of messages, or an object with `prompt` or `messages`; text \
                     that begins with `{` or `[` can be written as a JSON string";

const KEYS: &str = "beside `prompt` or `messages` a line may have `max_tokens`, `stop`, `temperature`, `top_p` and \
                    `seed`, `custom_id`, which its answer gets, and `model`, which is ignored";

/// Where requests of a batch in `OpenAI`'s form go.
const ENDPOINTS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];

/// What is handed over with a conversation.
const OF_MESSAGES: [&str; 4] = ["messages", "tools", "documents", "chat_template_kwargs"];

/// A line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub asked: Asked,
    pub keys: Keys,
    /// What the caller knows it by.
    pub custom_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    Text(String),
    Messages(ChatInput),
}

/// How the answer is generated, as far as the line says so.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Keys {
    pub max_tokens: Option<usize>,
    pub stop: Option<Vec<String>>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub seed: Option<u64>,
}

impl Keys {
    /// The options of this line; `None` if they are those of all.
    ///
    /// * `all`: what the command line says
    /// * `index`: of the prompt, whose stream of random numbers is its own unless the line has a seed
    pub fn over(&self, all: &GenerationOptions, index: u64) -> Option<GenerationOptions> {
        if *self == Self::default() {
            return None;
        }
        let mut options = all.clone();
        options.sampling = options.sampling.stream(index);
        let sampling = &mut options.sampling;
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_p = self.top_p.unwrap_or(sampling.top_p);
        sampling.seed = self.seed.unwrap_or(sampling.seed);
        options.max_new_tokens = self.max_tokens.unwrap_or(options.max_new_tokens);
        if let Some(stop) = &self.stop {
            options.stop.clone_from(stop);
        }
        Some(options)
    }

    /// One of the keys that are given, if any is.
    pub fn first(&self) -> Option<&'static str> {
        [
            ("max_tokens", self.max_tokens.is_some()),
            ("stop", self.stop.is_some()),
            ("temperature", self.temperature.is_some()),
            ("top_p", self.top_p.is_some()),
            ("seed", self.seed.is_some()),
        ]
        .into_iter()
        .find_map(|(key, is_given)| is_given.then_some(key))
    }
}

impl Line {
    /// Reads a line; `None` if it is blank.
    ///
    /// Text is a prompt as it stands, numbers and the words `true`, `false` and `null` too. What begins with `{`, or as a
    /// list of objects does, must be JSON; any other text in brackets is a list only if it is JSON.
    ///
    /// * `place`: file and line, for messages
    ///
    /// # Errors
    /// [`Error::BadFile`] with the place and the key, if there is one; as [`ChatInput::from_value`].
    pub fn parse(line: &str, place: &Path) -> Result<Option<Self>> {
        let line = line.strip_prefix(BOM).unwrap_or(line);
        let trimmed = line.trim();
        let bad = |error: serde_json::Error| Error::bad_file(place, without_line(&error)).with_hint(FORMS);
        let text = match trimmed.chars().next() {
            None => return Ok(None),
            Some('{') => match strict_json(trimmed).map_err(bad)? {
                Value::Object(object) => return Self::from_object(&object, place).map(Some),
                other => other.to_string(),
            },
            Some('[') => {
                let holds_objects = trimmed[1..].trim_start().starts_with('{');
                match strict_json(trimmed) {
                    Ok(list) => return Self::from_list(list, place).map(Some),
                    Err(error) if holds_objects => return Err(bad(error)),
                    Err(_) => line.to_owned(),
                }
            }
            Some('"') => serde_json::from_str(trimmed).unwrap_or_else(|_| line.to_owned()),
            Some(_) => line.to_owned(),
        };
        Ok(Some(Self { asked: Asked::Text(text), keys: Keys::default(), custom_id: None }))
    }

    fn from_list(list: Value, place: &Path) -> Result<Self> {
        let messages = ChatInput::from_value(list, place).map_err(|error| match error {
            Error::BadFile { hint: None, .. } => error.with_hint(FORMS),
            other => other,
        })?;
        Ok(Self { asked: Asked::Messages(messages), keys: Keys::default(), custom_id: None })
    }

    /// A request, or one as it stands in a batch file, inside of its `body`.
    fn from_object(object: &Map<String, Value>, place: &Path) -> Result<Self> {
        let bad = |key: &str, expected: &str, value: &Value| {
            Error::bad_file(place, format!("`{key}`: expected {expected}, got {}", shown(value)))
        };
        let custom_id = match object.get("custom_id") {
            None | Some(Value::Null) => None,
            Some(Value::String(id)) => Some(id.clone()),
            Some(other) => return Err(bad("custom_id", "a string", other)),
        };
        let Some(body) = object.get("body") else { return Self::from_request(object, custom_id, place) };
        for (key, value) in object {
            match (key.as_str(), value) {
                ("body" | "custom_id", _) => {}
                ("method", Value::String(method)) if method == "POST" => {}
                ("method", _) => return Err(bad(key, "\"POST\"", value)),
                ("url", Value::String(url)) if ENDPOINTS.contains(&url.as_str()) => {}
                ("url", _) => {
                    let expected = ENDPOINTS.map(|url| format!("`{url}`")).join(" or ");
                    return Err(bad(key, &expected, value));
                }
                _ => {
                    let reason = format!("the key `{}` beside `body` is not known", cut(key));
                    return Err(Error::bad_file(place, reason)
                        .with_hint("beside `body` there may be `custom_id`, `method` and `url`"));
                }
            }
        }
        match body {
            Value::Object(body) if body.contains_key("custom_id") && custom_id.is_some() => {
                Err(Error::bad_file(place, "`custom_id` is given twice, beside `body` and in it"))
            }
            Value::Object(body) => Self::from_request(body, custom_id, place),
            other => Err(bad("body", "an object", other)),
        }
    }

    fn from_request(request: &Map<String, Value>, custom_id: Option<String>, place: &Path) -> Result<Self> {
        let has_messages = request.contains_key("messages");
        let asked = match (request.get("prompt"), has_messages) {
            (Some(Value::String(text)), false) => Asked::Text(text.clone()),
            (None, true) => {
                let of_messages = request.iter().filter(|(key, _)| OF_MESSAGES.contains(&key.as_str()));
                let conversation = of_messages.map(|(key, value)| (key.clone(), value.clone())).collect();
                Asked::Messages(ChatInput::from_value(Value::Object(conversation), place)?)
            }
            (Some(other), false) => {
                let reason = format!("`prompt`: expected a text, got {}", shown(other));
                return Err(Error::bad_file(place, reason).with_hint(FORMS));
            }
            (Some(_), true) => {
                let reason = "it has both `prompt` and `messages`";
                return Err(Error::bad_file(place, reason).with_hint("make the prompt the last message"));
            }
            (None, false) => {
                return Err(Error::bad_file(place, "it has neither `prompt` nor `messages`").with_hint(FORMS));
            }
        };
        let mut line = Self { asked, keys: Keys::default(), custom_id };
        for (key, value) in request {
            if key != "prompt" && !(has_messages && OF_MESSAGES.contains(&key.as_str())) {
                line.set(key, value).map_err(|reason| Error::bad_file(place, reason).with_hint(KEYS))?;
            }
        }
        Ok(line)
    }

    /// Obeys a key; `null` stands for no key, as in the API.
    fn set(&mut self, key: &str, value: &Value) -> std::result::Result<(), String> {
        let expected = |what: &str| format!("`{key}`: expected {what}, got {}", shown(value));
        let known = matches!(
            key,
            "max_tokens" | "max_completion_tokens" | "stop" | "temperature" | "top_p" | "seed" | "n" | "custom_id"
        );
        if key == "model" || (known && value.is_null()) {
            return Ok(());
        }
        let keys = &mut self.keys;
        match key {
            "max_tokens" | "max_completion_tokens" => {
                if keys.max_tokens.is_some() {
                    return Err("`max_tokens` and `max_completion_tokens` are both given".to_owned());
                }
                let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
                keys.max_tokens = Some(count.ok_or_else(|| expected("a whole number of at least 0"))?);
            }
            "stop" => {
                let texts = match value {
                    Value::Array(texts) => texts.iter().collect(),
                    text => vec![text],
                };
                let texts: Option<Vec<_>> =
                    texts.into_iter().map(|text| text.as_str().filter(|text| !text.is_empty())).collect();
                let texts = texts.ok_or_else(|| expected("a text or a list of texts, none of them empty"))?;
                keys.stop = Some(texts.into_iter().map(str::to_owned).collect());
            }
            "temperature" => {
                keys.temperature =
                    Some(number(value, |number| number >= 0.0).ok_or_else(|| expected("a number of at least 0"))?);
            }
            "top_p" => {
                let in_range = |number| (0.0..=1.0).contains(&number);
                keys.top_p = Some(number(value, in_range).ok_or_else(|| expected("a number in 0..=1"))?);
            }
            "seed" => keys.seed = Some(value.as_u64().ok_or_else(|| expected("a whole number of at least 0"))?),
            "n" if value.as_u64() == Some(1) => {}
            "n" => return Err(expected("1, since every line has one answer")),
            "custom_id" => self.custom_id = Some(value.as_str().ok_or_else(|| expected("a string"))?.to_owned()),
            "tools" | "documents" | "chat_template_kwargs" => {
                return Err(format!("the key `{key}` belongs to `messages`, and there are none"));
            }
            _ => return Err(format!("the key `{}` cannot be obeyed", cut(key))),
        }
        Ok(())
    }
}

/// A number that f32 can hold.
fn number(value: &Value, accept: impl Fn(f32) -> bool) -> Option<f32> {
    #[expect(clippy::cast_possible_truncation)]
    let number = value.as_f64()? as f32;
    Some(number).filter(|&number| number.is_finite() && accept(number))
}

/// What is wrong with JSON on one line: the place names the line, and the message counts from 1 again.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

fn shown(value: &Value) -> String {
    format!("`{}`", cut(&value.to_string()))
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use adaptive_kvcache::tokenizer::ChatMessage;

    use super::*;

    /// A conversation of these messages.
    fn asked(messages: Vec<ChatMessage>) -> Asked {
        Asked::Messages(ChatInput { messages, ..ChatInput::default() })
    }

    fn parse(line: &str) -> Result<Option<Line>> {
        Line::parse(line, Path::new("p.txt:3"))
    }

    fn text(line: &str) -> String {
        match parse(line).unwrap().unwrap().asked {
            Asked::Text(text) => text,
            Asked::Messages(messages) => panic!("{line}: {messages:?}"),
        }
    }

    fn refuses(line: &str) -> String {
        let error = parse(line).expect_err(line);
        let message = error.to_string();
        assert!(message.contains("`p.txt:3`") && !error.is_usage(), "{message}");
        message
    }

    #[test]
    fn text_stays_as_it_is() {
        for line in [
            "The capital of France is",
            "  indented  ",
            "42",
            "-1e5",
            "null",
            "true",
            "\"Quoted\" he said",
            "[INST] Hello [/INST]",
            "[1, 2",
            "['a', 'b']",
            "[",
            "\\[x\\]",
        ] {
            assert_eq!(text(line), line);
            assert_eq!(text(&format!("\u{feff}{line}")), line);
        }
        assert_eq!(text(r#" "a\tb" "#), "a\tb");
        assert_eq!(text("\u{feff}\"a\""), "a");
        assert_eq!(text(r#"{"prompt": "p"}"#), "p");
        for blank in ["", " \t", "\u{feff}", "\u{feff} "] {
            assert_eq!(parse(blank).unwrap(), None, "{blank:?}");
        }
    }

    #[test]
    fn a_list_of_messages_is_a_conversation_and_no_other_list_is_a_prompt() {
        let messages = asked(vec![ChatMessage::new("user", "Hi"), ChatMessage::new("assistant", "Ho")]);
        let list = r#"[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]"#;
        for line in [list.to_owned(), format!("\u{feff} {list}"), format!(r#"{{"model": 7, "messages": {list}}}"#)] {
            assert_eq!(parse(&line).unwrap().unwrap().asked, messages, "{line}");
        }
        for line in ["[]", "[1, 2]", r#"["a"]"#, "[null]", r#"[{"role": "user"}]"#, "[{]", r#"[ {"a": 1"#] {
            refuses(line);
        }
        assert!(refuses(r#"[{"role": "user", "role": "user", "content": ""}]"#).contains("`role` is given twice"));
    }

    #[test]
    fn keys_are_obeyed() {
        let line = r#"{"custom_id": "a-1", "prompt": "p", "max_tokens": 3, "stop": ["x", "y"], "temperature": 0.5,
                       "top_p": 1, "seed": 18446744073709551615, "n": 1, "model": "any"}"#;
        let line = parse(&line.replace('\n', " ")).unwrap().unwrap();
        let keys = Keys {
            max_tokens: Some(3),
            stop: Some(vec!["x".to_owned(), "y".to_owned()]),
            temperature: Some(0.5),
            top_p: Some(1.0),
            seed: Some(u64::MAX),
        };
        assert_eq!(line, Line { asked: Asked::Text("p".to_owned()), keys, custom_id: Some("a-1".to_owned()) });
        let keys = |more: &str| parse(&format!(r#"{{"prompt": "p", {more}}}"#)).unwrap().unwrap().keys;
        assert_eq!(keys(r#""max_completion_tokens": 0"#).max_tokens, Some(0));
        assert_eq!(keys(r#""stop": "x""#).stop, Some(vec!["x".to_owned()]));
        assert_eq!(keys(r#""stop": []"#).stop, Some(vec![]));
        let nothing =
            r#""max_tokens": null, "stop": null, "temperature": null, "top_p": null, "seed": null, "n": null"#;
        assert_eq!(keys(nothing), Keys::default());
        assert_eq!(keys(nothing).first(), None);
        assert_eq!(keys(r#""seed": 1"#).first(), Some("seed"));
    }

    #[test]
    fn a_request_of_a_batch_is_taken_out_of_its_envelope() {
        let line = r#"{"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m",
                       "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}}"#;
        let line = parse(&line.replace('\n', " ")).unwrap().unwrap();
        assert_eq!((line.custom_id.as_deref(), line.keys.max_tokens), (Some("r"), Some(5)));
        assert_eq!(line.asked, asked(vec![ChatMessage::new("user", "Hi")]));
        for (line, part) in [
            (r#"{"body": {"prompt": "p"}, "method": "GET"}"#, "`method`"),
            (r#"{"body": {"input": "p"}, "url": "/v1/embeddings"}"#, "`url`"),
            (r#"{"body": {"prompt": "p"}, "prompt": "q"}"#, "`prompt` beside `body`"),
            (r#"{"body": "p"}"#, "`body`"),
            (r#"{"body": {"prompt": "p", "custom_id": "a"}, "custom_id": "b"}"#, "`custom_id` is given twice"),
            (r#"{"body": {"prompt": "p", "logprobs": 5}}"#, "`logprobs`"),
        ] {
            let message = refuses(line);
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused_by_name() {
        for (more, part) in [
            (r#""top_k": 5"#, "the key `top_k` cannot be obeyed"),
            (r#""stream": true"#, "the key `stream` cannot be obeyed"),
            (r#""max_token": null"#, "`max_token`"),
            (r#""tools": []"#, "`tools` belongs to `messages`"),
            (r#""n": 2"#, "`n`: expected 1"),
            (r#""max_tokens": -1"#, "`max_tokens`: expected a whole number of at least 0, got `-1`"),
            (r#""max_tokens": 1.5"#, "`max_tokens`"),
            (r#""max_tokens": 5, "max_completion_tokens": 5"#, "both given"),
            (r#""max_tokens": 5, "max_tokens": 5"#, "`max_tokens` is given twice at column"),
            (r#""stop": 3"#, "`stop`"),
            (r#""stop": ["a", 3]"#, "`stop`"),
            (r#""stop": """#, "`stop`"),
            (r#""temperature": "hot""#, "`temperature`"),
            (r#""temperature": -0.5"#, "`temperature`"),
            (r#""temperature": 1e300"#, "`temperature`"),
            (r#""top_p": 1.01"#, "`top_p`: expected a number in 0..=1, got `1.01`"),
            (r#""seed": -1"#, "`seed`"),
            (r#""seed": 0.5"#, "`seed`"),
            (r#""custom_id": 7"#, "`custom_id`: expected a string, got `7`"),
            (r#""messages": []"#, "both `prompt` and `messages`"),
        ] {
            let message = refuses(&format!(r#"{{"prompt": "p", {more}}}"#));
            assert!(message.contains(part), "{more}: {message}");
        }
        for line in [r#"{"prompt": 3}"#, r#"{"prompt": ["a"]}"#, "{}", r#"{"prompt""#, "{not JSON}", r#"{"n": 1}"#] {
            refuses(line);
        }
    }

    #[test]
    fn a_lines_keys_come_before_the_options_of_all() {
        let all = GenerationOptions { max_new_tokens: 9, stop: vec!["s".to_owned()], ..GenerationOptions::default() };
        assert_eq!(Keys::default().over(&all, 3), None);
        let keys = Keys { temperature: Some(0.5), stop: Some(Vec::new()), ..Keys::default() };
        let options = keys.over(&all, 3).unwrap();
        assert_eq!((options.max_new_tokens, options.stop.len(), options.sampling.temperature), (9, 0, 0.5));
        assert_eq!(options.sampling.seed, all.sampling.stream(3).seed);
        let keys = Keys { seed: Some(7), max_tokens: Some(1), ..Keys::default() };
        let options = keys.over(&all, 3).unwrap();
        assert_eq!((options.max_new_tokens, options.sampling.seed, options.stop.len()), (1, 7, 1));
    }
}
