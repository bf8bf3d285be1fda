//! Lines on standard error. Nobody may be listening there, or its disk may be full: that must never end a run, so what
//! cannot be written is dropped.

use std::fmt::Display;
use std::io::Write;

use super::plain;

/// Writes one line, as it is.
pub fn line(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Tells what the user should know though the run goes on: one line, which control characters cannot break.
pub fn note(text: impl Display) {
    line(format_args!("note: {}", plain(&text.to_string())));
}
