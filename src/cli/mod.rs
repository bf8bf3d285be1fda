//! The commands: the only place that prints, reads the environment, and decides exit statuses.
//!
//! Text that a run is made for goes to standard output; progress, tables and errors go to standard error. Exit status: 0
//! success (a closed pipe is success), 1 failure, 2 wrong use, 130, 143 or 129 ended by Ctrl-C, SIGTERM or SIGHUP.

mod args;
mod batch;
mod bench;
mod bus;
mod cache;
mod chat;
mod compare;
mod configurations;
mod device;
mod encode;
mod eval;
mod generate;
mod hub;
mod idle;
mod inspect;
mod interrupt;
mod kept;
mod logging;
mod measure;
mod outputs;
mod pictures;
mod places;
mod prefixes;
mod prompts;
mod session;
mod terminal;
mod threads;
mod tune;
mod variables;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use adaptive_kvcache::Error;
use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command};

/// How a command ended, when it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Interrupted,
}

/// What is said when the output's reader is there, and it cannot be written to.
const STDOUT_FAILED: &str = "failed to write to standard output";

/// Text from a file as one harmless line: control characters are escaped.
fn plain(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Parses the command line, runs the command and reports its failure.
pub fn run() -> ExitCode {
    adaptive_kvcache::memory::share_one_heap();
    quiet_guarded_panics();
    interrupt::install();
    bus::install();
    match parse().and_then(|cli| execute(&cli.command)) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::status()),
        Err(error) => fail(&error),
    }
}

/// The command line, with the variables that count.
fn parse() -> anyhow::Result<Cli> {
    let args: Vec<_> = std::env::args_os().collect();
    let parsed = variables::parse(&Cli::command(), &args)?;
    let cli = Cli::from_arg_matches(&parsed.matches)?;
    idle::check(&cli.command, &parsed.typed)?;
    parsed.notes.iter().for_each(terminal::note);
    Ok(cli)
}

fn execute(command: &Command) -> anyhow::Result<Outcome> {
    threads::choose(command);
    if !matches!(command, Command::Generate(_) | Command::Chat(_) | Command::Cache(_)) {
        // The others start a log of their own.
        logging::start()?;
    }
    match command {
        Command::Generate(args) => match &args.batch.prompts {
            Some(prompts) => batch::run(args, prompts),
            None => generate::run(args),
        },
        Command::Chat(args) => chat::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Cache(command) => cache::run(command),
        Command::Inspect(args) => inspect::run(args),
    }
}

/// What panics inside of a call that makes an error of it has its sentence there.
fn quiet_guarded_panics() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !adaptive_kvcache::guard::is_guarded() {
            hook(panic);
        }
    }));
}

fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(error) = error.downcast_ref::<clap::Error>() {
        // Help, which is success, or wrong use; clap prints both in its own form.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    let is_closed_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    };
    if error.chain().any(is_closed_pipe) {
        return ExitCode::SUCCESS;
    }
    let known = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    if matches!(known, Some(Error::Interrupted)) {
        return ExitCode::from(interrupt::status());
    }
    print_error(error);
    ExitCode::from(if known.is_some_and(Error::is_usage) { 2 } else { 1 })
}

/// Prints a message, and the remedy on a line of its own.
fn print_error(error: &anyhow::Error) {
    let known = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    let message = match known {
        // The library's messages hold their own cause.
        Some(error) => error.to_string(),
        None => format!("{error:#}"),
    };
    // Nobody may be listening: the exit status still tells.
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {}", plain(&message));
    let hint = known.and_then(Error::hint).unwrap_or_default();
    let blamed = variables::blamed(&format!("{message}; {hint}"));
    let hints: Vec<String> = Some(hint.to_owned()).filter(|hint| !hint.is_empty()).into_iter().chain(blamed).collect();
    if !hints.is_empty() {
        let _ = writeln!(stderr, "hint: {}", plain(&hints.join("; ")));
    }
}
