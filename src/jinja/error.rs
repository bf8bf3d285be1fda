//! What can go wrong with a template, said with the template's name and line.

use std::fmt;

/// What kind of failure it is: what a reader can do about it differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateErrorKind {
    /// Jinja 2 would not take this template either.
    Syntax,
    /// Jinja 2 has it, this engine lacks it.
    Unsupported,
    /// Rendering failed, as it would in Jinja 2: an undefined value, a wrong type, a forbidden method.
    Failed,
    /// The template called `raise_exception`; the message is the text that it gave.
    Refused,
    /// The template went beyond one of the [`super::Limits`].
    Limit,
}

/// Longer messages are cut.
const MAX_MESSAGE_CHARS: usize = 500;

pub(super) type Res<T> = Result<T, TemplateError>;

pub(super) fn syntax(message: impl Into<String>) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Syntax, message)
}

pub(super) fn unsupported(what: impl fmt::Display) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Unsupported, format!("{what} is not supported by this program"))
}

pub(super) fn failed(message: impl Into<String>) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Failed, message)
}

pub(super) fn limit(message: impl Into<String>) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Limit, message)
}

/// The error of `raise_exception`.
pub(super) fn refused(message: &str) -> TemplateError {
    TemplateError::new(TemplateErrorKind::Refused, message)
}

/// Why a template could not be parsed or rendered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateError(Box<Parts>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Parts {
    kind: TemplateErrorKind,
    name: String,
    line: Option<usize>,
    message: String,
}

impl TemplateError {
    pub(super) fn new(kind: TemplateErrorKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        // A name or a value in it may be as large as values may be; what the template itself says stays whole.
        if kind != TemplateErrorKind::Refused
            && let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE_CHARS)
        {
            message.truncate(end);
            message.push_str(" ...");
        }
        Self(Box::new(Parts { kind, name: String::new(), line: None, message }))
    }

    /// Adds the line, unless a more exact one is known.
    pub(super) fn at(mut self, line: u32) -> Self {
        self.0.line.get_or_insert(line as usize);
        self
    }

    pub(super) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.0.name);
        self
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> TemplateErrorKind {
        self.0.kind
    }

    /// The template's name, as it was given to [`super::Template::parse`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The line of the template, from 1, if it is known.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        self.0.line
    }

    /// What went wrong, without the name and the line.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.line {
            Some(line) => write!(f, "`{}`, line {line}: {}", self.0.name, self.0.message),
            None => write!(f, "`{}`: {}", self.0.name, self.0.message),
        }
    }
}

impl std::error::Error for TemplateError {}
