//! The command line program. All it does is in [`cli`]; all it computes is in the library.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
