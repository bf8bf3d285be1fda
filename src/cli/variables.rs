//! Variables of the environment that stand for options.
//!
//! An empty one counts as unset. One loses against the option that it stands for, and against every option that it
//! conflicts with: what is typed is meant now, a variable may have been set for something else. What a variable's value
//! breaks is said of the variable. The variables themselves are declared with their options (`env` in `args`).
//!
//! Not for: variables that stand for no option, such as those of the hub.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;

use adaptive_kvcache::Error;
use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

/// Arguments whose value is a path, which needs not be UTF-8.
const PATHS: [&str; 4] = ["model", "config", "image_dir", "cache_dir"];

/// Options that need a chat template, by id: they ask for it themselves.
pub const NEED_TEMPLATE: [(&str, &str); 4] =
    [("system", "--system"), ("messages", "--messages"), ("chat_template", "--chat-template"), ("go_on", "--continue")];

/// The option that names a saved cache.
const CACHE: &str = "--cache";

/// Variables that took effect.
static IN_EFFECT: OnceLock<Vec<Variable>> = OnceLock::new();

/// A variable that stands for an argument of the command.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Variable {
    name: String,
    value: OsString,
    /// The argument's id.
    arg: String,
    /// The option that it stands for, such as `--config`.
    option: String,
}

/// What stands on the command line: a command and arguments.
#[derive(Debug, Default)]
pub struct Typed {
    /// The command, and that within it, if there is one.
    command: Vec<String>,
    args: HashSet<String>,
}

impl Typed {
    /// * `arg`: an argument's id
    pub fn has(&self, arg: &str) -> bool {
        self.args.contains(arg)
    }

    /// Where the command line cannot be parsed, some arguments may be missing.
    fn of(matches: &ArgMatches) -> Self {
        let (mut command, mut matches) = (Vec::new(), matches);
        while let Some((name, inner)) = matches.subcommand() {
            command.push(name.to_owned());
            matches = inner;
        }
        if command.is_empty() {
            return Self::default();
        }
        let is_typed = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
        let args = matches.ids().map(clap::Id::as_str).filter(is_typed).map(str::to_owned).collect();
        Self { command, args }
    }
}

/// What parsing gave.
pub struct Parsed {
    pub matches: ArgMatches,
    pub typed: Typed,
    /// What the user should know of variables that lost.
    pub notes: Vec<String>,
}

/// Parses a command line, with the variables that count.
///
/// * `command`: with all of its variables
///
/// # Errors
/// [`clap::Error`] for wrong use, and for help; [`Error::Input`] for a variable that is not UTF-8.
pub fn parse(command: &Command, args: &[OsString]) -> anyhow::Result<Parsed> {
    let mut counted = Counted { typed: typed(command, args), notes: Vec::new(), in_effect: Vec::new() };
    let command = command.clone().mut_subcommands(|command| counted.with_variables(command, 0));
    let Counted { typed, notes, in_effect } = counted;
    let result = command.try_get_matches_from(args);
    if let Err(error) = &result
        && error.kind() == ErrorKind::InvalidUtf8
        && let Some(variable) = in_effect
            .iter()
            .find(|variable| !PATHS.contains(&variable.arg.as_str()) && variable.value.to_str().is_none())
    {
        return Err(Error::input(format!("the variable {} is not UTF-8 text", variable.name)).into());
    }
    let matches = result.map_err(|error| named(error, &in_effect))?;
    let _ = IN_EFFECT.set(in_effect);
    Ok(Parsed { matches, typed, notes })
}

/// Which variables count.
struct Counted {
    typed: Typed,
    notes: Vec<String>,
    in_effect: Vec<Variable>,
}

impl Counted {
    /// A command without the variables that do not count.
    ///
    /// * `depth`: of commands that it is within
    fn with_variables(&mut self, command: Command, depth: usize) -> Command {
        let is_chosen = self.typed.command.get(depth).is_some_and(|chosen| command.get_name() == chosen);
        let command = command.mut_args(|arg| {
            let Some(name) = arg.get_env().map(OsStr::to_owned) else { return arg };
            let Some(value) = std::env::var_os(&name) else { return arg };
            let id = arg.get_id().as_str();
            if value.is_empty() {
                return arg.env(Resettable::Reset);
            }
            if !is_chosen || self.typed.has(id) {
                return arg;
            }
            if let Some(option) = loses_against(id, &value, &self.typed) {
                if id == "use_adakv" && option != CACHE {
                    self.notes.push(format!(
                        "{option} asks for an adaptive cache, and so the variable USE_ADAKV, for the full one, is not \
                         obeyed"
                    ));
                }
                return arg.env(Resettable::Reset);
            }
            let (name, option) = (name.to_string_lossy().into_owned(), format!("--{}", arg.get_long().unwrap_or(id)));
            self.in_effect.push(Variable { name, value, arg: id.to_owned(), option });
            arg
        });
        command.mut_subcommands(|inner| self.with_variables(inner, depth + 1))
    }
}

/// A command without variables.
fn without_variables(command: Command) -> Command {
    let command = command.mut_args(|arg| if arg.get_env().is_some() { arg.env(Resettable::Reset) } else { arg });
    command.mut_subcommands(without_variables)
}

/// What stands on the command line, whatever variables say and whether or not it makes sense together.
fn typed(command: &Command, args: &[OsString]) -> Typed {
    let without = command.clone().ignore_errors(true).mut_subcommands(without_variables);
    without.try_get_matches_from(args).map(|matches| Typed::of(&matches)).unwrap_or_default()
}

/// The typed option that a variable conflicts with.
///
/// * `arg`: id of the argument that it stands for
fn loses_against(arg: &str, value: &OsStr, typed: &Typed) -> Option<&'static str> {
    let first = |options: &[(&str, &'static str)]| {
        options.iter().find(|(option, _)| typed.has(option)).map(|(_, option)| *option)
    };
    match arg {
        "prompt" => first(&[("prompts", "--prompts"), ("prompt_file", "--prompt-file"), ("messages", "--messages")]),
        "save_image" => first(&[("prompts", "--prompts"), ("cache_file", CACHE)]),
        // A saved cache stays what it is.
        "config" | "cache_dir" => first(&[("cache_file", CACHE)]),
        "use_adakv" if typed.has("cache_file") => Some(CACHE),
        "chat" => first(&NEED_TEMPLATE),
        "use_adakv" if is_false(value) => {
            // With many prompts, it is what all of them may come to, whatever the cache.
            let budget = first(&[("kv_budget", "--kv-budget")]).filter(|_| !typed.has("prompts"));
            first(&[("kept_ratio", "--kept-ratio")]).or(budget)
        }
        _ => None,
    }
}

/// As clap reads it.
fn is_false(value: &OsStr) -> bool {
    let value = value.to_string_lossy().to_lowercase();
    matches!(value.as_str(), "n" | "no" | "f" | "false" | "off" | "0")
}

/// Names the variable in the place of the option whose value it gave.
fn named(mut error: clap::Error, variables: &[Variable]) -> clap::Error {
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return error;
    }
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else { return error };
    // It is shown with its value, as in `--config <PATH>`.
    let option = arg.split([' ', '[']).next().unwrap_or_default().to_owned();
    if let Some(variable) = variables.iter().find(|variable| variable.option == option) {
        error.insert(ContextKind::InvalidArg, ContextValue::String(variable.name.clone()));
    }
    error
}

/// Whether an argument's value comes from its variable.
pub fn gave(arg: &str) -> bool {
    IN_EFFECT.get().is_some_and(|variables| variables.iter().any(|variable| variable.arg == arg))
}

/// Which variable a message, with its hint, is about, as a sentence; `None` if it is about none.
pub fn blamed(message: &str) -> Option<String> {
    let is_about = |variable: &&Variable| match variable.arg.as_str() {
        "prompt" => message.contains("the prompt"),
        arg if PATHS.contains(&arg) => message.contains(&format!("`{}", variable.value.to_string_lossy())),
        _ => false,
    };
    let variable = IN_EFFECT.get()?.iter().find(is_about)?;
    let what = if variable.arg == "prompt" { "the prompt" } else { "this path" };
    Some(format!("{what} comes from the variable {}", variable.name))
}
