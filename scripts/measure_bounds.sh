#!/usr/bin/env bash
# Measures what sequences do at their bounds: a text of 40,000 tokens read and written within a budget in bytes, beyond the
# model's context, and whether a conversation at its end knows what it was told at its beginning. Prints Markdown.
#
#   scripts/measure_bounds.sh [MODEL.gguf]
#
# Variables: TOKENS (40960), KV_DTYPE (q8_0), BUDGET (32MB), CONFIGS ("configs/best.json configs/streaming_llm.json"),
# TRIALS (24), RECALLED (4000: tokens between the fact and the question), PASSAGE (1000: of them in a turn).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
model=$(realpath "${1:-$(scripts/get_model.sh)}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The novel first, then the pages of the guide.
cat tests/data/text/eighty_days_ch1-5.txt src/guide/*.md CHANGELOG.md README.md >"$work/text"
cargo build --release --locked --quiet --example long_text --example recall
read -ra configs <<<"${CONFIGS:-configs/best.json configs/streaming_llm.json}"
echo "$(basename "$model"), ${TOKENS:-40960} tokens, ${KV_DTYPE:-q8_0}, ${BUDGET:-32MB}:"
echo
target/release/examples/long_text "$model" "$work/text" "${TOKENS:-40960}" "${KV_DTYPE:-q8_0}" "${BUDGET:-32MB}" "${configs[@]}"
echo
target/release/examples/recall "$model" tests/data/text/eighty_days_ch1-5.txt "${TRIALS:-24}" "${RECALLED:-4000}" "${PASSAGE:-1000}" \
    "${configs[0]}"
