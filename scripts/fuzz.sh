#!/usr/bin/env bash
# Damages model and tokenizer files at random, for longer than the tests do: GGUF, safetensors and .pth headers, and the
# tokenizer readers. Whatever the damage, there must be an error or a model that works, and no panic.
#
#   scripts/fuzz.sh [ROUNDS]      default: 100000 for each format, a minute or two
set -euo pipefail
cd "$(dirname "$0")/.."
export FUZZ_ROUNDS=${1:-100000} CANDLE_BARRIER_POOL_SPIN_LIMIT=1
cargo test --locked --lib --test it -- random_damage
