//! What stands beside a tokenizer in a model folder: `tokenizer_config.json`, `special_tokens_map.json`,
//! `added_tokens.json` and the chat template's files.
//!
//! Only reading them and adding their tokens to a vocabulary; the vocabulary itself comes from other files. Source: the
//! files that Hugging Face's transformers writes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::template::{ChatTemplate, Templates};
use super::vocab::{Draft, Kind};
use crate::error::{Error, Result};
use crate::json::Object;
use crate::side_files::{read_json, read_json_if_any};

/// A token that is found in the text before anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    pub special: bool,
    /// Whether it is looked for in the normalised text.
    pub normalized: bool,
    pub flags: Flags,
}

/// How an added token takes part of its surroundings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flags {
    /// White space before it belongs to it.
    pub lstrip: bool,
    /// White space after it belongs to it.
    pub rstrip: bool,
    /// It is not found inside a word.
    pub single_word: bool,
}

/// The settings of a folder.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// The file that most of them are from, for messages.
    path: PathBuf,
    pub add_bos: Option<bool>,
    pub add_prefix_space: Option<bool>,
    pub legacy: Option<bool>,
    pub bos: Option<String>,
    pub eos: Option<String>,
    unk: Option<String>,
    /// Padding and additional special tokens.
    others: Vec<String>,
    pub added: Vec<Added>,
    /// Tokens that the model can tell apart, if this is known.
    num_embeddings: Option<usize>,
    pub templates: Templates,
    /// What chat templates call the special tokens, and their spellings, as the files say. An empty one is one.
    pub named_tokens: Vec<(String, String)>,
    /// Names of those that the files mention, be it to say that there is none.
    mentioned: Vec<String>,
    /// Whether the tokenizer's class has `<s>`, `</s>` and `<unk>` for what the files don't mention.
    has_defaults: bool,
}

/// The template for conversations with tools, where it has a file of its own.
const TOOL_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// What chat templates call the special tokens, in transformers.
const TOKEN_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Tokenizer classes with defaults for the first three of [`TOKEN_NAMES`].
const LLAMA_CLASSES: [&str; 4] =
    ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"];

impl Settings {
    /// Reads what there is of the files; `num_embeddings` is how many tokens the model can tell apart, if this is known.
    ///
    /// # Errors
    /// [`Error::Io`] if a file is there and cannot be read; [`Error::BadFile`] if it is not of its form.
    pub fn read(folder: &Path, num_embeddings: Option<usize>) -> Result<Self> {
        let path = folder.join("tokenizer_config.json");
        let config = read_json_if_any(&path)?;
        let mut settings = Self { path: path.clone(), num_embeddings, has_defaults: true, ..Self::default() };
        if let Some(config) = &config {
            let object = Object::new(config, &path)?;
            settings.read_special(&object)?;
            settings.add_bos = object.flag("add_bos_token")?;
            settings.add_prefix_space = object.flag("add_prefix_space")?;
            settings.legacy = object.flag("legacy")?;
            settings.read_added_decoder(&object)?;
            settings.templates = object.templates()?;
            settings.has_defaults =
                object.get("tokenizer_class").and_then(Value::as_str).is_some_and(|name| LLAMA_CLASSES.contains(&name));
        }
        let path = folder.join("special_tokens_map.json");
        if let Some(map) = read_json_if_any(&path)? {
            settings.read_special(&Object::new(&map, &path)?)?;
        }
        settings.read_added_tokens(&folder.join("added_tokens.json"))?;
        let mut added = std::mem::take(&mut settings.added);
        added.retain(|token| settings.is_known(token));
        settings.added = added;
        settings.read_templates(folder)?;
        Ok(settings)
    }

    /// Whether the model knows an added token.
    pub fn is_known(&self, token: &Added) -> bool {
        self.num_embeddings.is_none_or(|count| (token.id as usize) < count)
    }

    /// Takes the special tokens by role; those that are known already stay.
    fn read_special(&mut self, object: &Object<'_>) -> Result<()> {
        for (slot, key) in [(&mut self.bos, "bos_token"), (&mut self.eos, "eos_token"), (&mut self.unk, "unk_token")] {
            if slot.is_none() {
                // Early conversions write an empty text for none.
                *slot = object.token(key)?.filter(|token| !token.is_empty());
            }
        }
        self.others.extend(object.token("pad_token")?);
        self.read_named(object);
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            if let Some(Value::Array(list)) = object.get(key) {
                for value in list {
                    self.others.push(object.token_value(key, value)?);
                }
            }
        }
        Ok(())
    }

    /// Takes what chat templates call the tokens: the well-known names, others that end in `_token`, and those of
    /// `extra_special_tokens`.
    fn read_named(&mut self, object: &Object<'_>) {
        let extra = object.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
        let named = object.map.iter().filter(|(name, _)| name.ends_with("_token")).chain(extra);
        for (name, value) in named {
            if self.mentioned.contains(name) {
                continue;
            }
            let is_known = TOKEN_NAMES.contains(&name.as_str());
            // Settings such as `add_bos_token` are no tokens.
            if let Ok(token) = object.token_value(name, value) {
                self.named_tokens.push((name.clone(), token));
                self.mentioned.push(name.clone());
            } else if is_known {
                self.mentioned.push(name.clone());
            }
        }
    }

    /// What chat templates call the special tokens, and their spellings.
    ///
    /// * `found`: by name, what the tokenizer's own files give; it counts where the settings are silent
    pub fn named_tokens<'t>(
        &self,
        found: impl IntoIterator<Item = (&'t str, Option<&'t str>)>,
    ) -> Vec<(String, String)> {
        let silent = |name: &str| self.has_defaults && self.mentioned.iter().all(|known| known != name);
        let found = found.into_iter().filter(|(name, _)| silent(name));
        let found = found.filter_map(|(name, token)| Some((name.to_owned(), token?.to_owned())));
        self.named_tokens.iter().cloned().chain(found).collect()
    }

    /// `added_tokens_decoder`: from ids, as strings, to tokens.
    fn read_added_decoder(&mut self, object: &Object<'_>) -> Result<()> {
        let decoder = object.typed("added_tokens_decoder", "an object from ids to tokens", Value::as_object)?;
        for (id, token) in decoder.into_iter().flatten() {
            let Ok(number) = id.parse() else {
                return Err(object.wrong_value("added_tokens_decoder", "ids as keys", Some(&id.as_str().into())));
            };
            self.added.push(Added::read(token, Some(number), object.path)?);
        }
        Ok(())
    }

    /// `added_tokens.json`: from tokens to ids. Older folders have only this one.
    fn read_added_tokens(&mut self, path: &Path) -> Result<()> {
        let Some(map) = read_json_if_any(path)? else { return Ok(()) };
        let object = Object::new(&map, path)?;
        let known: HashSet<(u32, &str)> = self.added.iter().map(|token| (token.id, token.content.as_str())).collect();
        let special = [&self.bos, &self.eos, &self.unk].into_iter().flatten().chain(&self.others);
        let special: HashSet<&str> = special.map(String::as_str).collect();
        let mut more = Vec::new();
        for (content, id) in object.map {
            let Some(number) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                return Err(object.wrong(content, "an id"));
            };
            if known.contains(&(number, content)) {
                continue;
            }
            let special = special.contains(content.as_str());
            let (content, flags) = (content.clone(), Flags::default());
            more.push(Added { id: number, content, special, normalized: !special, flags });
        }
        self.added.append(&mut more);
        Ok(())
    }

    /// The chat template's own files. `chat_template.jinja`, the newer form, takes the place of all that other files have;
    /// one for conversations with tools may be in a folder beside it.
    fn read_templates(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join("chat_template.jinja");
        if path.exists() {
            self.templates = Templates::single(ChatTemplate::read(&path)?);
        } else if self.templates.is_empty() && folder.join("chat_template.json").exists() {
            let path = folder.join("chat_template.json");
            let file = read_json(&path)?;
            self.templates = Object::new(&file, &path)?.templates()?;
        }
        let path = folder.join(TOOL_TEMPLATE);
        if path.exists() {
            self.templates.insert("tool_use", ChatTemplate::read(&path)?);
        }
        Ok(())
    }

    /// Gives the added tokens their ids, and marks those that carry structure.
    ///
    /// # Errors
    /// [`Error::BadFile`] if an id means two tokens or is far behind the others, or BOS or EOS is not a token.
    pub fn apply(&self, added: &[Added], draft: &mut Draft) -> Result<()> {
        for token in added {
            let kind = match draft.kind(token.id) {
                Some(Kind::Unknown) => Kind::Unknown,
                _ if token.special => Kind::Control,
                Some(Kind::Control) => Kind::Control,
                _ => Kind::UserDefined,
            };
            match draft.text(token.id) {
                // Reserved special tokens may be given names.
                Some(there) if there != token.content && draft.kind(token.id) != Some(Kind::Control) => {
                    let reason = format!("token {} is both `{there}` and `{}`", token.id, token.content);
                    return Err(Error::bad_file(draft.path(), reason));
                }
                _ => draft.set(token.id, &token.content, kind)?,
            }
        }
        let others = self.others.iter().map(String::as_str).filter(|text| !text.is_empty()).collect();
        for (id, text) in draft.find(&others) {
            if draft.kind(id) != Some(Kind::Unknown) {
                draft.set(id, &text, Kind::Control)?;
            }
        }
        if let Some(text) = self.unk.as_ref().filter(|_| draft.is_sentence_piece())
            && let Some(id) = draft.id(text)
        {
            draft.set(id, text, Kind::Unknown)?;
        }
        for (key, text) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            let Some(text) = text else { continue };
            let Some(id) = draft.id(text) else {
                let reason = format!("its `{key}` is `{text}`, which is not a token of `{}`", draft.path().display());
                return Err(Error::bad_file(&self.path, reason));
            };
            draft.set(id, text, Kind::Control)?;
        }
        Ok(())
    }
}

impl Added {
    /// Reads a token with its flags; `id` is given where it is not among them.
    pub fn read(value: &Value, id: Option<u32>, path: &Path) -> Result<Self> {
        let object = Object::new(value, path)?;
        let content = match object.get("content") {
            Some(Value::String(content)) if !content.is_empty() => content.clone(),
            _ => return Err(object.wrong("content", "the spelling of an added token")),
        };
        let id = match (id, object.get("id")) {
            (Some(id), _) => id,
            (None, value) => value
                .and_then(Value::as_u64)
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| object.wrong("id", "the id of an added token"))?,
        };
        let flag = |key| Ok::<_, Error>(object.flag(key)?.unwrap_or(false));
        let special = flag("special")?;
        let normalized = object.flag("normalized")?.unwrap_or(!special);
        let flags = Flags { lstrip: flag("lstrip")?, rstrip: flag("rstrip")?, single_word: flag("single_word")? };
        Ok(Self { id, content, special, normalized, flags })
    }
}

impl Object<'_> {
    /// A token's spelling: a string, or an object with `content`.
    fn token(&self, key: &str) -> Result<Option<String>> {
        self.get(key).map(|value| self.token_value(key, value)).transpose()
    }

    fn token_value(&self, key: &str, value: &Value) -> Result<String> {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
        text.map(ToOwned::to_owned).ok_or_else(|| self.wrong_value(key, "a token", Some(value)))
    }

    /// `chat_template`: a string, or a list of named ones (in `chat_template.json` also an object).
    fn templates(&self) -> Result<Templates> {
        let wrong =
            |value| Err(self.wrong_value("chat_template", "a string or a list of named templates", Some(value)));
        let mut templates = Templates::default();
        let new = |source: &str| ChatTemplate::new(self.path, source);
        match self.get("chat_template") {
            None => {}
            Some(Value::String(source)) => templates.insert("default", new(source)),
            Some(Value::Array(list)) => {
                for value in list {
                    let text = |key| value.get(key).and_then(Value::as_str);
                    let (Some(name), Some(source)) = (text("name"), text("template")) else { return wrong(value) };
                    templates.insert(name, new(source));
                }
            }
            Some(Value::Object(named)) if !named.is_empty() => {
                for (name, value) in named {
                    let Some(source) = value.as_str() else { return wrong(value) };
                    templates.insert(name, new(source));
                }
            }
            Some(other) => return wrong(other),
        }
        Ok(templates)
    }
}
