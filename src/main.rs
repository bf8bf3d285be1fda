//! The command line program. All it does is in [`cli`]; all it computes is in the library.

mod allocator;
mod cli;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: allocator::OrExit = allocator::OrExit;

fn main() -> ExitCode {
    cli::run()
}
