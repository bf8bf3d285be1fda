//! Chat templates, rendered as Hugging Face's transformers renders them with Jinja 2, within bounds.
//!
//! A model's file brings its template along, so this runs code of strangers: time, output, memory and recursion are
//! bounded (see [`Limits`]). Every character of the result knows whether the template or the user wrote it (see
//! [`Origin`]), so that nobody can forge a model's control tokens in a message.
//!
//! Not a general template engine: there is no loader (`include`, `import`, `extends`), and no automatic escaping.

mod ast;
mod dict;
mod error;
mod filters;
mod format;
mod functions;
mod heap;
mod interp;
mod iter;
mod json;
mod lexer;
mod lists;
mod methods;
mod names;
mod number;
mod object;
mod ops;
mod parser;
mod printf;
mod repr;
mod scope;
mod string;
mod strings;
mod tests;
mod text;
mod texts;
mod unicode;
mod value;
mod wrap;

use std::sync::Arc;
use std::thread;

use chrono::NaiveDateTime;
use serde_json::{Map, Value as Json};

use ast::Program;
use error::{Res, limit};
use interp::Vm;

pub use error::{TemplateError, TemplateErrorKind};

/// Templates longer than this are refused; real ones are below 100 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Stack for the parser, which nests as deep as it allows itself.
const PARSER_STACK_BYTES: usize = 32 << 20;

/// Stack for each level that rendering may nest. Most take a tenth of it, even without optimisation.
const STACK_BYTES_PER_LEVEL: usize = 48 << 10;

/// A template that was read without errors.
#[derive(Debug, Clone)]
pub struct Template {
    name: String,
    program: Arc<Program>,
    now: Option<NaiveDateTime>,
}

impl Template {
    /// Reads a template. `name` is how errors call it: a path, or ``the chat template of `x.gguf` ``.
    ///
    /// # Errors
    /// Of kind [`TemplateErrorKind::Syntax`], [`TemplateErrorKind::Unsupported`] or [`TemplateErrorKind::Limit`].
    pub fn parse(source: &str, name: &str) -> Result<Self, TemplateError> {
        let parse = || {
            if source.len() > MAX_SOURCE_BYTES {
                return Err(limit(format!("{} bytes are too long for a template", source.len())));
            }
            let mut program = parser::parse(&lexer::normalized(source))?;
            scope::resolve(&mut program)?;
            Ok(program)
        };
        let program = on_stack(PARSER_STACK_BYTES, parse).map_err(|error| error.named(name))?;
        Ok(Self { name: name.to_owned(), program: Arc::new(program), now: None })
    }

    /// Fixes the time that `strftime_now` tells, for comparisons; otherwise it is the local time.
    #[must_use]
    #[doc(hidden)]
    pub fn with_now(mut self, now: NaiveDateTime) -> Self {
        self.now = Some(now);
        self
    }

    /// Renders the template.
    ///
    /// * `trusted`: variables of the program, such as `bos_token`
    /// * `input`: variables that come from the user. Every character of every string in them is marked as
    ///   [`Origin::Input`], and stays so whatever the template does with it. They win over `trusted` ones of the same
    ///   name.
    ///
    /// # Errors
    /// Of any kind; of [`TemplateErrorKind::Syntax`] only for filters and tests that nobody knows.
    pub fn render(
        &self,
        trusted: &Map<String, Json>,
        input: &Map<String, Json>,
        limits: &Limits,
    ) -> Result<Rendered, TemplateError> {
        let render = || {
            let vm = Vm::new(&self.program, *limits, self.now);
            for (variables, origin) in [(trusted, Origin::Template), (input, Origin::Input)] {
                for (name, value) in variables {
                    vm.define(name, json::from_json(&vm, value, origin)?);
                }
            }
            let (text, runs) = vm.render()?.into_parts();
            Ok(Rendered { text, runs })
        };
        let stack = STACK_BYTES_PER_LEVEL * (limits.depth.min(20_000) + 64);
        on_stack(stack, render).map_err(|error| error.named(&self.name))
    }
}

/// Runs something on a thread with a stack of a known size.
fn on_stack<T: Send>(bytes: usize, run: impl FnOnce() -> Res<T> + Send) -> Res<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("template".into()).stack_size(bytes).spawn_scoped(scope, run);
        let thread = thread.map_err(|error| limit(format!("no thread can be started for it: {error}")))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
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
        Self { steps: 10_000_000, output_bytes: 16 << 20, value_bytes: 16 << 20, memory_bytes: 64 << 20, depth: 1000 }
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
