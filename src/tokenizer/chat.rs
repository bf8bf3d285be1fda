//! Conversations to prompts: the model's own Jinja chat template or a built-in one, and tokens that a message cannot
//! forge.
//!
//! A template gets what Hugging Face's transformers gives it. What it prints of its own text, and of the names of special
//! tokens, may spell special tokens; what it prints of messages, tools and other input is text, whatever it spells (but
//! for a role that a template puts between `<|` and `|>`). The engine keeps the two apart character by character (see [`crate::jinja`]), so that a template sees its input as it is.
//! Templates of models are in `template.rs`, the built-in ones in `templates.rs`.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::marked::Marked;
use super::messages::{ChatContext, ChatMessage};
use super::special::{Occurrence, TokenSet};
use super::template::{ChatTemplate, Templates, failed};
use super::templates::{BuiltIn, CHATML, ChatFormat, LLAMA2, LLAMA3};
use super::{Place, Tokenizer};
use crate::error::{Error, Result};
use crate::jinja::{Limits, Template};

/// A key that is put into parts of contents to see how a template prints them.
const PROBE: &str = "is_this_printed_whole";

/// What marks the end of a message that is to be gone on with: transformers' own text, since a template that minds it
/// does so there, too. The space at its end tells whether the template trims.
const END_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Tokenizer {
    /// Which chat format messages are put in: the model's own template, else a built-in one that its special tokens
    /// tell, else none. A base model may have these tokens without knowing the format.
    #[must_use]
    pub fn chat_format(&self) -> ChatFormat {
        match (self.has_chat_template(), self.built_in()) {
            (true, _) => ChatFormat::Own,
            (false, Some(format)) => ChatFormat::BuiltIn(format.name),
            (false, None) => ChatFormat::None,
        }
    }

    /// Takes a chat template in place of the model's own.
    pub fn set_chat_template(&mut self, template: ChatTemplate) {
        self.templates = Templates::single(template);
    }

    fn built_in(&self) -> Option<BuiltIn> {
        let has =
            |texts: [&str; 2]| texts.iter().all(|text| self.vocab.id(text).is_some_and(|id| self.vocab.is_marker(id)));
        if has(["<|start_header_id|>", "<|eot_id|>"]) {
            Some(LLAMA3)
        } else if has(["<|im_start|>", "<|im_end|>"]) {
            Some(CHATML)
        } else if self.vocab.is_sentence_piece() && has(["<s>", "</s>"]) {
            Some(LLAMA2)
        } else {
            None
        }
    }

    /// Prepares the chat template for conversations with these tools, documents and variables.
    ///
    /// # Errors
    /// [`Error::Input`] if no chat format is known (see [`Tokenizer::chat_format`]); [`Error::Template`] if the template
    /// is none, or uses what this program lacks.
    pub fn chat<'t>(&'t self, context: &'t ChatContext) -> Result<Chat<'t>> {
        let built_in = || self.built_in().map(|format| ChatTemplate::new(self.vocab.path(), format.template));
        let template = self.templates.choose(context.tools.is_some())?.cloned().or_else(built_in).ok_or_else(|| {
            Error::input(format!("`{}` has no chat template", self.vocab.path().display()))
                .with_hint("give the text as a raw prompt, or use an instruction-tuned model")
        })?;
        Ok(Chat { tokenizer: self, context, template: template.parse()? })
    }

    /// As [`Chat::render`], of messages alone.
    ///
    /// # Errors
    /// As [`Tokenizer::chat`] and [`Chat::render`].
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String> {
        self.chat(&ChatContext::default())?.render(messages)
    }

    /// As [`Chat::encode`], of messages alone.
    ///
    /// # Errors
    /// As [`Tokenizer::chat`] and [`Chat::encode`].
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.chat(&ChatContext::default())?.encode(messages)
    }

    /// As [`Chat::encode_turn`], of messages alone.
    ///
    /// # Errors
    /// As [`Tokenizer::chat`] and [`Chat::encode_turn`].
    pub fn encode_chat_turn(&self, previous: &[ChatMessage], new: &[ChatMessage]) -> Result<Vec<u32>> {
        self.chat(&ChatContext::default())?.encode_turn(previous, new)
    }

    /// Tokenises what a template rendered: special tokens are found where all of their text is the template's.
    fn encode_marked(&self, marked: &Marked, place: Place) -> Result<Vec<u32>> {
        self.check_length(marked.text())?;
        let found = |o: &Occurrence| !self.vocab.is_marker(o.id) || marked.may_be_token(&(o.start..o.start + o.len));
        let text = |text: &str, place: Place, ids: &mut Vec<u32>| self.encode_unforged(text, place, ids);
        self.encode_parts(marked.text(), place, found, text)
    }

    /// Appends the ids of ordinary text, none of which is a special token.
    ///
    /// A few vocabularies have merges that make special tokens of plain text. There the text is cut inside of them.
    fn encode_unforged(&self, text: &str, place: Place, ids: &mut Vec<u32>) -> Result<()> {
        let is_forged = |id: &u32| !self.is_unknown(*id) && self.vocab.is_marker(*id);
        let begin = ids.len();
        self.encode_text(text, place, ids)?;
        let Some(&forged) = ids[begin..].iter().find(|id| is_forged(id)) else { return Ok(()) };
        ids.truncate(begin);
        let inside = |o: Occurrence| text[o.start..].chars().next().map(|first| o.start + first.len_utf8());
        let mut cuts: Vec<usize> = self.markers.occurrences(text).filter_map(inside).collect();
        cuts.push(text.len());
        let (mut start, mut place) = (0, place);
        for end in cuts {
            if start < end {
                self.encode_text(&text[start..end], place, ids)?;
                (start, place) = (end, Place::AfterText);
            }
        }
        if ids[begin..].iter().any(is_forged) {
            let token = self.vocab.text(forged).unwrap_or_default();
            return Err(Error::input(format!(
                "a message holds `{token}`, which the model can only read as its marker"
            )));
        }
        Ok(())
    }
}

/// A chat template that is ready for conversations. Made by [`Tokenizer::chat`].
#[derive(Debug)]
pub struct Chat<'t> {
    tokenizer: &'t Tokenizer,
    context: &'t ChatContext,
    template: Template,
}

impl Chat<'_> {
    /// Renders the template, with the start of the assistant's answer at the end: the text that a person would see as the
    /// prompt.
    ///
    /// Contents that are lists of parts go to the template as they are. Only if it cannot take them, or would print them
    /// as Python prints a list, does it get their texts joined.
    ///
    /// Don't tokenise it: special tokens in the contents could not be told from the template's. [`Chat::encode`] can.
    ///
    /// # Errors
    /// [`Error::Input`] if there are no messages, or the template refuses them (some want the roles to alternate);
    /// [`Error::Template`] if it fails, or takes too long or too much memory.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        Ok(self.rendered(&self.suited(messages)?, true)?.into_text())
    }

    /// Renders the template and tokenises it: the template's markers are special tokens, the same spellings inside a
    /// message are plain text. BOS is added if the settings say so and the template has not.
    ///
    /// # Errors
    /// As [`Chat::render`], and [`Tokenizer::encode`].
    pub fn encode(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let rendered = self.rendered(&self.suited(messages)?, true)?;
        Ok(self.tokenizer.with_bos(self.tokenizer.encode_marked(&rendered, Place::Start)?))
    }

    /// Tokenises a conversation that ends with an answer which is to be gone on with: all up to the end of that answer,
    /// as transformers' `continue_final_message` has it. White space at its end goes where the template trims it.
    ///
    /// # Errors
    /// As [`Chat::encode`]; [`Error::Input`] also if the last message is not an assistant's, has no text, or is not
    /// printed as it is.
    pub fn encode_continued(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let rendered = self.continued(messages)?;
        Ok(self.tokenizer.with_bos(self.tokenizer.encode_marked(&rendered, Place::Start)?))
    }

    /// Tokenises what follows a conversation when it goes on: the ids from the end of the last answer to the start of
    /// the next one.
    ///
    /// * `previous`: the conversation so far, the answer as it was generated last. Its ids are in the sequence already,
    ///   the end-of-turn token is not. If empty, this is [`Chat::encode`]; if there is no answer at its end, it is what
    ///   [`Chat::encode_beginning`] gave, and this is [`Chat::encode_rest`].
    /// * `new`: what comes next, often one message of the user
    ///
    /// # Errors
    /// As [`Chat::encode`]; [`Error::Unsupported`] also if the template renders earlier turns differently when the
    /// conversation goes on, so that nothing can be appended, or if the answer is not a text that answers something.
    pub fn encode_turn(&self, previous: &[ChatMessage], new: &[ChatMessage]) -> Result<Vec<u32>> {
        let Some((answer, asked)) = previous.split_last() else { return self.encode(new) };
        if new.is_empty() {
            return Err(Error::input("a chat needs at least one new message to go on"));
        }
        if answer.role() != "assistant" {
            return self.encode_rest(previous, new);
        }
        let all = [previous, new].concat();
        let all = self.suited(&all)?;
        let text = answer.get("content").and_then(Value::as_str).filter(|_| answer.keys().len() == 2);
        if let Some(text) = text.filter(|_| !asked.is_empty()) {
            // What the sequence began with, and what it would begin with now.
            let (prompt, whole) = (self.rendered(&all[..asked.len()], true)?, self.rendered(&all, true)?);
            if let Some(end) = end_of_answer(&prompt, &whole, text, &self.tokenizer.markers) {
                let after = whole.cut(end..whole.text().len());
                return self.tokenizer.encode_marked(&after, Place::AfterText);
            }
        }
        Err(self.changes_earlier_turns())
    }

    /// Tokenises messages that nobody answers yet, such as a long text that questions are to follow: without the start of an
    /// answer. [`Chat::encode_rest`] goes on from there.
    ///
    /// # Errors
    /// As [`Chat::encode`].
    pub fn encode_beginning(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let rendered = self.rendered(&self.suited(messages)?, false)?;
        Ok(self.tokenizer.with_bos(self.tokenizer.encode_marked(&rendered, Place::Start)?))
    }

    /// Tokenises what follows [messages that nobody has answered](Chat::encode_beginning), up to the start of the answer.
    ///
    /// # Errors
    /// As [`Chat::encode`]; [`Error::Unsupported`] also if the template renders the first messages differently when others
    /// follow.
    pub fn encode_rest(&self, previous: &[ChatMessage], new: &[ChatMessage]) -> Result<Vec<u32>> {
        let all = [previous, new].concat();
        let all = self.suited(&all)?;
        let (begun, whole) = (self.rendered(&all[..previous.len()], false)?, self.rendered(&all, true)?);
        let end = begun.text().len();
        if whole.same_start(&begun, end, &self.tokenizer.markers) {
            return self.tokenizer.encode_marked(&whole.cut(end..whole.text().len()), Place::AfterText);
        }
        Err(self.changes_earlier_turns())
    }

    fn changes_earlier_turns(&self) -> Error {
        let path = self.tokenizer.vocab.path().display();
        Error::unsupported(format!(
            "going on with a conversation, given that the chat template of `{path}` changes earlier turns,"
        ))
        .with_hint("begin anew with all messages")
    }

    /// Tokenises what stands between the end of a user's words and the assistant's answer: the turn change.
    ///
    /// # Errors
    /// As [`Chat::encode`]; [`Error::Input`] also if the template does not print a user's words as they are.
    pub fn encode_answer_start(&self) -> Result<Vec<u32>> {
        let rendered = self.rendered(&[ChatMessage::new("user", END_TAG.trim_end())], true)?;
        let (text, words) = (rendered.text(), END_TAG.trim_end());
        let said = text.rfind(words).map(|start| start..start + words.len()).filter(|range| rendered.is_input(range));
        let Some(said) = said else {
            let path = self.tokenizer.vocab.path().display();
            return Err(Error::input(format!(
                "the chat template of `{path}` does not print a user's message as it is"
            )));
        };
        self.tokenizer.encode_marked(&rendered.cut(said.end..text.len()), Place::AfterText)
    }

    /// Renders messages; `answer` adds the start of the assistant's answer.
    fn rendered(&self, messages: &[ChatMessage], answer: bool) -> Result<Marked> {
        if messages.is_empty() {
            return Err(Error::input("a chat needs at least one message"));
        }
        let ChatContext { tools, documents, template_kwargs } = self.context;
        let mut input = template_kwargs.clone();
        let roles = messages.iter().map(|message| message.role().to_owned()).collect();
        let messages = messages.iter().map(|message| Value::Object(message.keys().clone())).collect();
        // Absent tools are none in transformers, too, and not undefined.
        let list = |list: &Option<Vec<Value>>| list.clone().map_or(Value::Null, Value::Array);
        input.insert("messages".to_owned(), messages);
        input.insert("tools".to_owned(), list(tools));
        input.insert("documents".to_owned(), list(documents));
        let tokens = self.tokenizer.named_tokens.iter().filter(|(name, _)| !input.contains_key(name));
        let mut trusted: Map<String, Value> =
            tokens.map(|(name, token)| (name.clone(), Value::String(token.clone()))).collect();
        trusted.insert("add_generation_prompt".to_owned(), Value::Bool(answer));
        let rendered = self.template.render(&trusted, &input, &Limits::default());
        rendered.map(|rendered| Marked::new(&rendered, roles)).map_err(|error| failed(&error))
    }

    /// The messages in a form that the template can take: lists of parts as they are, or their texts joined.
    fn suited<'m>(&self, messages: &'m [ChatMessage]) -> Result<Cow<'m, [ChatMessage]>> {
        let mut probes = messages.to_vec();
        let parts = probes.iter_mut().filter_map(ChatMessage::parts_mut).flatten().filter_map(Value::as_object_mut);
        let mut any = false;
        for part in parts {
            part.insert(PROBE.to_owned(), Value::Bool(true));
            any = true;
        }
        // A template that prints JSON means to.
        let pythons = format!("'{PROBE}'");
        if !any || self.rendered(&probes, true).is_ok_and(|rendered| !rendered.text().contains(&pythons)) {
            return Ok(Cow::Borrowed(messages));
        }
        let mut joined = messages.to_vec();
        for message in &mut joined {
            let Some(parts) = message.parts_mut() else { continue };
            if let Some(part) = parts.iter().find(|part| part["type"] != "text") {
                let what = format!("a part `{}` in this model's chat template", part["type"].as_str().unwrap_or("?"));
                return Err(Error::unsupported(what).with_hint("leave the part out"));
            }
            message.set("content", Value::String(message.text()));
        }
        Ok(Cow::Owned(joined))
    }

    /// Renders messages up to the end of the last one, an answer.
    fn continued(&self, messages: &[ChatMessage]) -> Result<Marked> {
        let mut messages = self.suited(messages)?.into_owned();
        let mut tag = END_TAG.to_owned();
        while messages.iter().any(|message| message.text().contains(tag.trim_end())) {
            tag.insert(0, '_');
        }
        let Some(last) = messages.last_mut() else { return Err(Error::input("a chat needs at least one message")) };
        if last.role() != "assistant" {
            let reason = format!("the conversation ends with a message of `{}`, so there is no answer", last.role());
            return Err(Error::input(reason + " to go on with").with_hint("the last message must be an `assistant`'s"));
        }
        let text = match last.parts_mut() {
            Some(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
                Some(Value::String(text)) => Some(text),
                _ => None,
            }),
            None => last.content_mut(),
        };
        let Some(text) = text else {
            return Err(Error::input("the last message has no text to go on with"));
        };
        let answer = text.clone();
        text.push_str(&tag);
        let rendered = self.rendered(&messages, false)?;
        let (text, name) = (rendered.text(), tag.trim_end());
        let Some(at) = text.rfind(name).filter(|_| text.contains(answer.trim())) else {
            let path = self.tokenizer.vocab.path().display();
            return Err(Error::input(format!(
                "the chat template of `{path}` does not print the last message as it is, so it cannot be gone on with"
            )));
        };
        let end = if text[at..].starts_with(&tag) { at } else { text[..at].trim_end().len() };
        Ok(rendered.cut(0..end))
    }
}

/// Where an answer ends in a conversation that goes on; none if what comes before is not as it was.
///
/// White space around an answer is the template's choice; the rest must be as it was generated.
///
/// * `prompt`: what was rendered for the answer; * `whole`: the conversation with the answer and what follows
/// * `markers`: the special tokens
fn end_of_answer(prompt: &Marked, whole: &Marked, answer: &str, markers: &TokenSet) -> Option<usize> {
    let begun = prompt.text().trim_end().len();
    if !whole.same_start(prompt, begun, markers) {
        return None;
    }
    let (text, spoken) = (whole.text(), answer.trim());
    let mut end = if spoken.is_empty() {
        let both = text[begun..].chars().zip(prompt.text()[begun..].chars());
        begun + both.take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum::<usize>()
    } else {
        let start = text.len() - text[begun..].trim_start().len();
        let end = start + spoken.len();
        (text[start..].starts_with(spoken) && whole.is_input(&(start..end))).then_some(end)?
    };
    let spoken_end = end;
    // What the answer itself had at its end was generated with it.
    for (c, own) in text[end..].chars().zip(answer[answer.trim_end().len()..].chars()) {
        let next = end + c.len_utf8();
        if c != own || !whole.is_input(&(end..next)) {
            break;
        }
        end = next;
    }
    // Of an answer that is blank, nothing else shows that it was printed.
    (!spoken.is_empty() || end - spoken_end == answer.len()).then_some(end)
}

#[cfg(test)]
mod tests;
