//! Chat templates as a model or a user brings them: several under names, where each is from, and how their failures are
//! said.
//!
//! What a template is given is `chat.rs`'s business; formats for models without one are in `templates.rs`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::jinja::{Template, TemplateError, TemplateErrorKind};
use crate::json::without_bom;
use crate::side_files::read_bounded;

/// A chat template: Jinja as Hugging Face's transformers sets it up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
}

impl ChatTemplate {
    /// * `path`: the file that it is from, for messages
    pub(super) fn new(path: &Path, source: &str) -> Self {
        Self { path: path.to_owned(), source: without_bom(source).to_owned() }
    }

    /// Reads a template from a file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::BadFile`] if it is not text; [`Error::Template`], with the line,
    /// if it is no template or uses what this program lacks.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let template = Self::read(path.as_ref())?;
        template.parse()?;
        Ok(template)
    }

    /// Reads a template without looking into it: whether it can be used matters only to those who chat.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let source = String::from_utf8(read_bounded(path)?);
        let source = source.map_err(|_| Error::bad_file(path, "it is not UTF-8"))?;
        Ok(Self::new(path, &source))
    }

    /// Whether there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.source.is_empty()
    }

    /// # Errors
    /// [`Error::Template`], with the line.
    pub(super) fn parse(&self) -> Result<Template> {
        Template::parse(&self.source, &self.path.display().to_string()).map_err(|error| failed(&error))
    }
}

/// What a template failed with, as this library's error.
pub(super) fn failed(error: &TemplateError) -> Error {
    const ANOTHER: &str = "give another chat template in its place, or the text as a raw prompt";
    let (line, message) = (error.line(), error.message());
    let reason = match error.kind() {
        TemplateErrorKind::Refused => {
            let line = line.map(|line| format!(", line {line},")).unwrap_or_default();
            return Error::input(format!(
                "the chat template of `{}`{line} refuses these messages: {message}",
                error.name()
            ));
        }
        TemplateErrorKind::Unsupported => format!("{message}, which is not supported"),
        TemplateErrorKind::Syntax | TemplateErrorKind::Failed | TemplateErrorKind::Limit => message.to_owned(),
    };
    let hint = (error.kind() != TemplateErrorKind::Failed).then(|| ANOTHER.to_owned());
    Error::Template { path: error.name().into(), line, reason, hint }
}

/// The templates of a model: most have one, some a few by name.
#[derive(Debug, Clone, Default)]
pub(super) struct Templates {
    /// In the file's order; one that stands alone is called `default`.
    named: Vec<(String, ChatTemplate)>,
}

impl Templates {
    /// A template that stands alone; none if it is empty.
    pub fn single(template: ChatTemplate) -> Self {
        let mut templates = Self::default();
        templates.insert("default", template);
        templates
    }

    /// Adds a template, in place of one of the same name; an empty one counts as none.
    pub fn insert(&mut self, name: &str, template: ChatTemplate) {
        self.named.retain(|(known, _)| known != name);
        if !template.is_empty() {
            self.named.push((name.to_owned(), template));
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// The template for a conversation, as transformers chooses it: `tool_use` where there are tools, else `default`;
    /// none if there are no templates at all.
    ///
    /// # Errors
    /// [`Error::Input`] if there are others and not that one.
    pub fn choose(&self, has_tools: bool) -> Result<Option<&ChatTemplate>> {
        let named = |wanted: &str| self.named.iter().find(|(name, _)| name == wanted).map(|(_, template)| template);
        let chosen = named("tool_use").filter(|_| has_tools).or_else(|| named("default"));
        match (chosen, self.named.first()) {
            (None, Some((_, other))) => {
                let names: Vec<_> = self.named.iter().map(|(name, _)| format!("`{name}`")).collect();
                let path = other.path.display();
                Err(Error::input(format!("`{path}` has no chat template `default`, but {}", names.join(", ")))
                    .with_hint("choose one of them, and give it as a file"))
            }
            _ => Ok(chosen),
        }
    }
}
