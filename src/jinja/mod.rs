//! Chat templates, rendered as Hugging Face's transformers renders them with Jinja 2, within bounds.
//!
//! A model's file brings its template along, so this runs code of strangers: time, output, memory and recursion are
//! bounded (see [`Limits`]). Every character of the result knows whether the template or the user wrote it (see
//! [`Origin`]), so that nobody can forge a model's control tokens in a message.
//!
//! Not a general template engine: there is no loader (`include`, `import`, `extends`), and no automatic escaping.

mod error;

use serde_json::{Map, Value as Json};

pub use error::{TemplateError, TemplateErrorKind};

/// A template that was read without errors.
#[derive(Debug, Clone)]
pub struct Template {
    name: String,
}

impl Template {
    /// Reads a template. `name` is how errors call it: a path, or ``the chat template of `x.gguf` ``.
    ///
    /// # Errors
    /// Of kind [`TemplateErrorKind::Syntax`], [`TemplateErrorKind::Unsupported`] or [`TemplateErrorKind::Limit`].
    pub fn parse(_source: &str, name: &str) -> Result<Self, TemplateError> {
        Ok(Self { name: name.to_owned() })
    }

    /// Renders the template.
    ///
    /// * `trusted`: variables of the program, such as `bos_token`
    /// * `input`: variables that come from the user. Every character of every string in them is marked as
    ///   [`Origin::Input`], and stays so whatever the template does with it. They win over `trusted` ones of the same
    ///   name.
    ///
    /// # Errors
    /// Of any kind but [`TemplateErrorKind::Syntax`].
    pub fn render(
        &self,
        _trusted: &Map<String, Json>,
        _input: &Map<String, Json>,
        _limits: &Limits,
    ) -> Result<Rendered, TemplateError> {
        Err(TemplateError::new(TemplateErrorKind::Unsupported, "rendering").named(&self.name))
    }
}

/// How much a template may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Steps of the interpreter; an operation on large values costs more of them.
    pub steps: u64,
    /// Size of the rendered text.
    pub output_bytes: usize,
    /// Size of any string, list or dictionary.
    pub value_bytes: usize,
    /// Size of all values that are alive at once.
    pub memory_bytes: usize,
    /// How deep expressions, blocks, calls and values may be nested.
    pub depth: usize,
}

impl Default for Limits {
    /// Enough for any real template with a long conversation; a hostile template ends within a second.
    fn default() -> Self {
        Self { steps: 20_000_000, output_bytes: 32 << 20, value_bytes: 32 << 20, memory_bytes: 96 << 20, depth: 200 }
    }
}

/// Who wrote a piece of the rendered text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The template, or the program.
    Template,
    /// The user.
    Input,
}

/// A rendered text that knows where its characters are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    /// Where each run of one origin ends, in bytes; the origins of neighbours differ.
    runs: Vec<(usize, Origin)>,
}

impl Rendered {
    /// The whole text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text in pieces of one origin each, none of them empty; neighbours differ in origin.
    pub fn pieces(&self) -> impl Iterator<Item = (&str, Origin)> {
        let mut start = 0;
        self.runs.iter().map(move |&(end, origin)| {
            let piece = &self.text[start..end];
            start = end;
            (piece, origin)
        })
    }
}
