#!/usr/bin/env bash
# Checks what needs a second real model (470 MB, fetched once): its tokens, logits and answers. Not part of check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

export CANDLE_BARRIER_POOL_SPIN_LIMIT=1
scripts/get_model.sh qwen2.5-coder-0.5b
cargo test --locked --test it -- --ignored second_model qwen::
