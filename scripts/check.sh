#!/usr/bin/env bash
# The one gate, for people and for CI: format, lints, tests, documentation. Needs Rust, a C compiler, and Python with pip.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; }

# candle's thread pool spins while it waits; on busy cores that makes two threads slower than one.
export CANDLE_BARRIER_POOL_SPIN_LIMIT=1

step "model"
scripts/get_model.sh

step "format"
cargo fmt --check

step "lints"
cargo clippy --locked --all-targets -- -D warnings
cargo clippy --locked --no-default-features --all-targets -- -D warnings

step "tests"
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --locked
else
    cargo test --locked --lib --bins --tests
fi

step "examples in the documentation"
cargo test --locked --doc

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items --quiet

step "all passed"
