#!/usr/bin/env bash
# Compares what methods with a budget keep with what NVIDIA's kvpress keeps: same weights in f32, same token ids, half of
# the prompt. Prints for each method how many heads keep exactly the same positions, and for the others how near the
# scores lie that were decided differently.
#
#   scripts/compare_kvpress.sh [MODEL.gguf]
#
# Variables: TEXT (a file, default the chapters under tests/data/text), TOKENS (500), KEPT_RATIO (0.5), METHODS (all that
# kvpress has too), REPEAT_CHUNK (2048: what kvzip repeats at a time), TURN (its model's turn from the user to the
# assistant, default ChatML's). With GOLDEN=FILE nothing is compared: what kvpress keeps is written there. tests/data/kvpress.json was
# made so:
#
#   GOLDEN=tests/data/kvpress.json TOKENS=150 scripts/compare_kvpress.sh tests/data/fixtures/gqa-tied
#
# and with kvzip's chunks of 60 tokens, tests/data/kvpress_kvzip.json:
#
#   GOLDEN=tests/data/kvpress_kvzip.json TOKENS=150 METHODS=kvzip,kvzip_plus REPEAT_CHUNK=60 scripts/compare_kvpress.sh \
#       tests/data/fixtures/gqa-tied
#
# kvpress, transformers, PyTorch and gguf are fetched once into .cache/kvpress (some 6 GB with PyTorch's default build),
# and the model's weights are written there as f32 safetensors. Needs Python 3.10 or later with pip; takes a minute on
# two cores after that. The default model must have been fetched (scripts/get_model.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
export CANDLE_BARRIER_POOL_SPIN_LIMIT=1

model=${1:-$(scripts/get_model.sh)}
peer=.cache/kvpress
if [ ! -f "$peer/ready" ]; then
    echo "fetching kvpress ..." >&2
    mkdir -p "$peer"
    python3 -m venv "$peer/venv"
    "$peer/venv/bin/pip" install --quiet kvpress==0.5.4 transformers==5.2.0 gguf
    touch "$peer/ready"
fi

[ -n "${GOLDEN:-}" ] || cargo build --release --locked --quiet
exec "$peer/venv/bin/python" scripts/compare_kvpress.py \
    --binary target/release/adaptive-kvcache \
    --model "$model" \
    --work "$peer" \
    --text "${TEXT:-tests/data/text/eighty_days_ch1-5.txt}" \
    --tokens "${TOKENS:-500}" \
    --kept-ratio "${KEPT_RATIO:-0.5}" \
    ${REPEAT_CHUNK:+--repeat-chunk "$REPEAT_CHUNK"} \
    ${TURN:+--turn "$TURN"} \
    ${METHODS:+--methods "$METHODS"} \
    ${GOLDEN:+--golden "$GOLDEN"}
