//! The library's one error type.
//!
//! Variants are cut by what the reader can do about them: fix a file, fix a setting, fix the input, or report a bug.
//! A message is one lower-case sentence that holds the path and the value; the remedy, where there is one, is apart in
//! [`Error::hint`], so that a program can put it on a line of its own.

use std::path::{Path, PathBuf};

/// Result of everything in this library that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, said so that a person can act on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("failed to {action} `{}`: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error, hint: Option<String> },

    /// A file was read, and its content is not what its format promises.
    #[error("`{}` is not usable: {reason}", path.display())]
    BadFile { path: PathBuf, reason: String, hint: Option<String> },

    /// A chat template cannot be rendered, since it is wrong, uses what this program lacks, fails for these messages, or
    /// takes too long or too much memory.
    #[error("the chat template of `{}`{}: {reason}", path.display(), line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Template { path: PathBuf, line: Option<usize>, reason: String, hint: Option<String> },

    /// The input is well formed, and asks for something that this program does not do.
    #[error("{what} is not supported")]
    Unsupported { what: String, hint: Option<String> },

    /// A configuration names an unknown key or holds a value that makes no sense.
    #[error("{}`{key}`: {reason}", path.as_ref().map(|p| format!("`{}`: ", p.display())).unwrap_or_default())]
    Config { path: Option<PathBuf>, key: String, reason: String, hint: Option<String> },

    /// The prompt or an option's value cannot be used.
    #[error("{reason}")]
    Input { reason: String, hint: Option<String> },

    /// The hub that models come from refuses, lacks or garbles what it is asked for, or cannot be reached.
    #[error("{reason}")]
    Hub { reason: String, hint: Option<String> },

    /// Two things that must have the same size have not: a bug of the caller.
    #[error("shape mismatch in {what}: expected {expected}, got {got}")]
    Shape { what: &'static str, expected: String, got: String },

    /// The model computed what is not a number, so that nothing can be drawn, kept or compared by it.
    #[error("not a number: {what}{}", place.as_ref().map(|place| format!(" ({place})")).unwrap_or_default())]
    NotANumber { what: String, place: Option<String>, hint: Option<String> },

    /// A computation on tensors failed.
    #[error("tensor computation failed: {0}")]
    Tensor(#[from] candle_core::Error),

    /// The caller asked to stop (see [`crate::generate`]).
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An operating system's refusal; `action` is a verb phrase such as `"read"`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_owned(), source, hint: None }
    }

    /// A file whose content is wrong.
    pub fn bad_file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::BadFile { path: path.as_ref().to_owned(), reason: reason.into(), hint: None }
    }

    /// Something that this program does not do; `what` starts the sentence "... is not supported".
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), hint: None }
    }

    /// An unusable prompt or option value.
    pub fn input(reason: impl Into<String>) -> Self {
        Self::Input { reason: reason.into(), hint: None }
    }

    /// A hub that cannot or does not want to give what it is asked for.
    pub fn hub(reason: impl Into<String>) -> Self {
        Self::Hub { reason: reason.into(), hint: None }
    }

    /// Something computed that is not a number; `what` names it and says where it is, such as "the output of layer 3".
    pub fn not_a_number(what: impl Into<String>) -> Self {
        Self::NotANumber { what: what.into(), place: None, hint: None }
            .with_hint("the model's weights hold values that are no numbers, or values overflow: try --dtype f32 and --kv-dtype f32, or fetch the model again")
    }

    /// Says in what run something [was no number](Self::NotANumber), such as a prompt or a cache, unless that is known;
    /// other errors are returned as they are.
    #[must_use]
    pub fn in_place(mut self, run: impl FnOnce() -> String) -> Self {
        if let Self::NotANumber { place: place @ None, .. } = &mut self {
            *place = Some(run());
        }
        self
    }

    /// A size that is not the expected one.
    pub fn shape(what: &'static str, expected: impl std::fmt::Debug, got: impl std::fmt::Debug) -> Self {
        Self::Shape { what, expected: format!("{expected:?}"), got: format!("{got:?}") }
    }

    /// Adds the remedy; variants without room for one are returned as they are.
    #[must_use]
    pub fn with_hint(mut self, text: impl Into<String>) -> Self {
        if let Self::Io { hint, .. }
        | Self::BadFile { hint, .. }
        | Self::Template { hint, .. }
        | Self::Unsupported { hint, .. }
        | Self::Config { hint, .. }
        | Self::Input { hint, .. }
        | Self::Hub { hint, .. }
        | Self::NotANumber { hint, .. } = &mut self
        {
            *hint = Some(text.into());
        }
        self
    }

    /// What the reader can do about it, if this is known.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Io { hint, .. }
            | Self::BadFile { hint, .. }
            | Self::Template { hint, .. }
            | Self::Unsupported { hint, .. }
            | Self::Config { hint, .. }
            | Self::Input { hint, .. }
            | Self::Hub { hint, .. }
            | Self::NotANumber { hint, .. } => hint.as_deref(),
            _ => None,
        }
    }

    /// Whether the command line, the configuration or the prompt is at fault (exit status 2) and not the run (1).
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Config { .. } | Self::Input { .. })
    }
}
