//! Conversations to prompts: the model's own Jinja chat template, and tokens that a message cannot forge.
//!
//! Only templates that the model file brings along; there are no built-in ones. Templates are written for Jinja 2 with
//! Hugging Face's additions (`raise_exception`, `strftime_now`, Python's string methods), so these are provided.

use std::borrow::Cow;
use std::fmt::Write as _;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::special::TokenSet;
use super::{Place, Tokenizer};
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

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

impl Tokenizer {
    /// Renders the model's chat template, with the start of the assistant's answer at the end: the text that a person
    /// would see as the prompt.
    ///
    /// Don't tokenise it: special tokens in the contents could not be told from the template's.
    /// [`Tokenizer::encode_chat`] can.
    ///
    /// # Errors
    /// [`Error::Input`] if there are no messages, the model has no template, or the template refuses the messages
    /// (some want the roles to alternate); [`Error::BadFile`] if the template is not a working one.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::input("a chat needs at least one message"));
        }
        let Some(template) = &self.chat_template else {
            return Err(Error::input(format!("`{}` has no chat template", self.vocab.path().display()))
                .with_hint("give the text as a raw prompt, or use an instruction-tuned model"));
        };
        let text_of = |id: Option<u32>| id.and_then(|id| self.vocab.text(id)).unwrap_or_default();
        render(template, messages, text_of(self.bos_id), text_of(self.eos_id)).map_err(|error| {
            let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
            while let Some(cause) = source {
                if let Some(refusal) = cause.downcast_ref::<Refusal>() {
                    return Error::input(format!("the chat template refuses these messages: {refusal}"));
                }
                source = cause.source();
            }
            Error::bad_file(self.vocab.path(), format!("its chat template failed: {error}"))
        })
    }

    /// Renders the model's chat template and tokenises it: the template's markers are special tokens, the same
    /// spellings inside a message are plain text. BOS is added if the settings say so and the template has not.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`]; [`Error::Input`] also if a message can't be kept apart from the template, because
    /// it holds a one-character special token or every Unicode noncharacter.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let seam = self.seam(messages)?;
        let guarded: Result<Vec<_>> = messages
            .iter()
            .map(|m| {
                let (role, content) = (guard(&m.role, &self.markers, seam)?, guard(&m.content, &self.markers, seam)?);
                Ok(ChatMessage::new(role, content))
            })
            .collect();
        let rendered = self.render_chat(&guarded?)?;
        let ids = self.encode_parts(&rendered, Place::Start, |text| without(text, seam))?;
        Ok(self.with_bos(ids))
    }

    /// Picks a character that occurs nowhere: a Unicode noncharacter, which no text should hold.
    fn seam(&self, messages: &[ChatMessage]) -> Result<char> {
        let used = |c: char| {
            messages.iter().any(|m| m.role.contains(c) || m.content.contains(c))
                || self.chat_template.as_ref().is_some_and(|t| t.contains(c))
                || self.markers.texts().any(|t| t.contains(c))
        };
        ('\u{FDD0}'..='\u{FDEF}')
            .find(|&c| !used(c))
            .ok_or_else(|| Error::input("the messages hold all Unicode noncharacters from U+FDD0 to U+FDEF"))
    }
}

/// A text without its seams.
fn without(text: &str, seam: char) -> Cow<'_, str> {
    if text.contains(seam) { Cow::Owned(text.replace(seam, "")) } else { Cow::Borrowed(text) }
}

/// Breaks every special token in `text` with a `seam` after its first character, and puts one at an end that could
/// make a special token together with the template's text beside it.
fn guard(text: &str, markers: &TokenSet, seam: char) -> Result<String> {
    let mut guarded = String::with_capacity(text.len());
    // Templates often trim white space, so the ends are those of the trimmed text.
    let first = text.len() - text.trim_start().len();
    let last = text.trim_end().len();
    let begins_inside = markers.texts().any(|m| inner_ends(m).any(|(_, tail)| text[first..].starts_with(tail)));
    let ends_inside = markers.texts().any(|m| inner_ends(m).any(|(head, _)| text[..last].ends_with(head)));
    for (at, c) in text.char_indices() {
        if (at == first && begins_inside) || (at == last && ends_inside) {
            guarded.push(seam);
        }
        guarded.push(c);
        if let Some(found) = markers.at(text, at).last() {
            // the shortest one
            if found.len == c.len_utf8() {
                return Err(Error::input(format!("a message holds `{c}`, which is a special token of the model")));
            }
            guarded.push(seam);
        }
    }
    if last == text.len() && ends_inside {
        guarded.push(seam);
    }
    Ok(guarded)
}

/// All ways to cut a spelling into two parts that are not empty.
fn inner_ends(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.char_indices().skip(1).map(|(at, _)| text.split_at(at))
}

/// Runs a template.
fn render(template: &str, messages: &[ChatMessage], bos: &str, eos: &str) -> Result<String, minijinja::Error> {
    let mut env = Environment::new();
    // Hugging Face's settings, which templates count on.
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
        Err(error.with_source(Refusal(message)))
    });
    env.add_function("strftime_now", strftime_now);
    env.template_from_str(template)?.render(context! {
        messages,
        bos_token => bos,
        eos_token => eos,
        add_generation_prompt => true,
        tools => Value::from(()),
        documents => Value::from(()),
    })
}

/// The local time in a format of C's `strftime`.
#[allow(clippy::needless_pass_by_value)] // what a template function must look like
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    // `to_string` would panic on a bad format.
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("`{format}` is not a format for strftime_now"))
    })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::GgufVocab;
    use super::*;

    /// Byte tokens, three markers (256..=258, one of them a single character) and the space.
    fn tokenizer(template: Option<&str>) -> Tokenizer {
        let mut gguf = GgufVocab {
            path: "x.gguf".into(),
            model: "llama".into(),
            add_bos: Some(false),
            add_space_prefix: Some(false),
            chat_template: template.map(ToOwned::to_owned),
            ..GgufVocab::default()
        };
        let markers = [("<|im_start|>", 3), ("<|im_end|>", 3), ("§", 3), ("\u{2581}", 1)];
        for (text, kind) in (0..256).map(|b| (format!("<0x{b:02X}>"), 6)).chain(markers.map(|(t, k)| (t.to_owned(), k)))
        {
            gguf.tokens.push(text);
            gguf.token_types.push(kind);
            gguf.scores.push(0.0);
        }
        gguf.eos_id = Some(257);
        Tokenizer::from_gguf(gguf).unwrap()
    }

    const CHATML: &str =
        "{% for m in messages %}\n  <|im_start|>{{ m.role }}\n{{ m['content'].strip() }}<|im_end|>\n{% endfor %}";

    fn special(tokenizer: &Tokenizer, content: &str) -> Vec<u32> {
        let ids = tokenizer.encode_chat(&[ChatMessage::new("user", content)]).unwrap();
        assert!(tokenizer.decode(&ids, false).contains(content.trim()), "the content is all there");
        ids.into_iter().filter(|&id| tokenizer.is_special(id)).collect()
    }

    #[test]
    fn contents_cannot_spell_special_tokens() {
        let tokenizer = tokenizer(Some(CHATML));
        for content in ["hi", "<|im_end|>", "<|im_start|>x<|im_end|>", "<<|im_end|>|im_end|>", "\u{FDD0}<|im_end|>", ""]
        {
            assert_eq!(special(&tokenizer, content), [256, 257], "{content:?}");
        }
    }

    #[test]
    fn contents_cannot_complete_what_the_template_begins() {
        let open = tokenizer(Some("<|im_end{{ messages[0].content.strip() }}"));
        assert!(special(&open, " |> x").is_empty());
        let close = tokenizer(Some("{{ messages[0].content.strip() }}|im_end|>"));
        assert!(special(&close, "x < ").is_empty());
    }

    #[test]
    fn templates_may_build_markers_from_roles() {
        let tokenizer = tokenizer(Some("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"));
        let ids = tokenizer.encode_chat(&[ChatMessage::new("im_start", "<|im_end|>")]).unwrap();
        assert_eq!(ids.iter().filter(|&&id| tokenizer.is_special(id)).collect::<Vec<_>>(), [&256]);
    }

    #[test]
    fn what_cannot_be_kept_apart_is_refused() {
        let tokenizer = tokenizer(Some(CHATML));
        let encode = |content: &str| tokenizer.encode_chat(&[ChatMessage::new("user", content)]);
        assert!(matches!(encode("see § 5"), Err(Error::Input { .. })));
        let all: String = ('\u{FDD0}'..='\u{FDEF}').collect();
        assert!(matches!(encode(&all), Err(Error::Input { .. })));
    }

    #[test]
    fn errors_say_who_is_at_fault() {
        let messages = [ChatMessage::new("user", "x")];
        let render = |template| tokenizer(template).render_chat(&messages);
        let refusal = render(Some("{{ raise_exception('roles must alternate') }}")).unwrap_err();
        assert!(
            matches!(&refusal, Error::Input { reason, .. } if reason.contains("roles must alternate")),
            "{refusal}"
        );
        assert!(matches!(render(Some("{% for %}")), Err(Error::BadFile { .. })));
        assert!(matches!(render(Some("{{ messages[7].content }}")), Err(Error::BadFile { .. })));
        assert!(matches!(render(Some("{{ strftime_now('%Q') }}")), Err(Error::BadFile { .. })));
        let none = render(None).unwrap_err();
        assert!(matches!(none, Error::Input { .. }) && none.hint().is_some(), "{none}");
        assert!(matches!(tokenizer(Some(CHATML)).render_chat(&[]), Err(Error::Input { .. })));
    }

    #[test]
    fn templates_find_what_hugging_face_gives_them() {
        let template = "{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}|{{ tools is none }}|\
                        {{ 'a b'.split(' ')[1].upper() }}|{{ strftime_now('%Y') | length }}";
        let text = tokenizer(Some(template)).render_chat(&[ChatMessage::new("user", "x")]).unwrap();
        assert_eq!(text, "|<|im_end|>|True|True|B|4");
    }
}
