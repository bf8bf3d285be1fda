#!/usr/bin/env bash
# Shows what computing in 8 bits costs: the divergence (KL, nats) of the next token's probabilities along a text, from those
# of `--compute exact` on the same file, of this program's default and of llama.cpp. All read the same tokens: a prompt,
# and then the tokens behind it one by one, with a full f16 cache.
#
#   scripts/compare_compute.sh [MODEL.gguf] [TEXT...]
#
# Variables: PROMPT (2048) and SCORE (256) tokens. Needs what scripts/fetch_llamacpp.sh does.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
prompt=${PROMPT:-2048} score=${SCORE:-256}

model=$(realpath "${1:-$("$root/scripts/get_model.sh")}")
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- "$root/tests/data/text/eighty_days_ch1-5.txt"
"$root/scripts/fetch_llamacpp.sh"
cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" --example forced_logits
forced_logits=$root/target/release/examples/forced_logits
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "$(basename "$model"), $prompt + $score tokens"
for text; do
    for compute in exact fast; do
        "$forced_logits" "$model" "$text" "$prompt" "$score" "$compute" "$work/$compute" "$work/ids"
    done
    python3 "$root/scripts/compare_peers.py" logits-llamacpp --model "$model" --libraries "$root/.cache/llamacpp" \
        --ids "$work/ids" --prompt-tokens "$prompt" --logits "$work/llama.cpp"
    echo
    echo "$(basename "$text"):"
    (cd "$work" && "$forced_logits" compare "$score" exact fast llama.cpp)
done
