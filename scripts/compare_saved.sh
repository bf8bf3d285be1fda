#!/usr/bin/env bash
# Sets saved caches beside llama.cpp's saved state of the same prompt: sizes, and how long it takes from an open model until
# there are logits of a one-token prompt; and shows what a thousand questions to one saved text take in memory. Prints
# Markdown.
#
#   scripts/compare_saved.sh [MODEL.gguf]
#
# Variables: TOKENS (7680), CACHES ("full:f16 configs/best.json:f16 configs/best.json:q8_0"), QUESTIONS (1000), BATCH (16),
# NEW_TOKENS (16). Needs what scripts/fetch_llamacpp.sh does. Nobody else should use the machine meanwhile.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
model=$(realpath "${1:-$(scripts/get_model.sh)}")
tokens=${TOKENS:-7680} questions=${QUESTIONS:-1000}
text=tests/data/text/eighty_days_ch1-5.txt
scripts/fetch_llamacpp.sh
cargo build --release --locked --quiet --bins --example saved_cache
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - "$text" "$work/text" "$tokens" <<'PYTHON'
import sys
text = open(sys.argv[1], encoding="utf-8").read()
open(sys.argv[2], "w", encoding="utf-8").write(text * (int(sys.argv[3]) * 8 // len(text) + 1))
PYTHON

lines=()
for cache in ${CACHES:-full:f16 configs/best.json:f16 configs/best.json:q8_0}; do
    lines+=("${cache}=$(target/release/examples/saved_cache "$model" "$work/text" "$tokens" "${cache%%:*}" "${cache##*:}" \
        "$work/cache.kv" "$work/ids")")
done
lines+=("llama.cpp, f16=$(python3 scripts/compare_peers.py state-llamacpp --model "$model" --libraries .cache/llamacpp \
    --ids "$work/ids" --state "$work/state")")
echo "$(basename "$model"), $tokens tokens:"
python3 - "${lines[@]}" <<'PYTHON'
import json, sys

rows = [(name, json.loads(line)) for name, line in (text.split("=", 1) for text in sys.argv[1:])]
peer = rows[-1][1]
print("\n| cache | file, MB (to llama.cpp's) | read, ms | save, ms | load, ms | load and first logits, ms (reading to it) |")
print("|---|---|---|---|---|---|")
for name, row in rows:
    megabytes, share = row["bytes"] / 2**20, row["bytes"] / peer["bytes"]
    first = row["first_logits_ms"]
    print(f"| {name} | {megabytes:.1f} ({share:.2f}) | {row['read_ms']:.0f} | {row['save_ms']:.0f} | {row['load_ms']:.1f} "
          f"| {first:.1f} ({row['read_ms'] / first:.0f}) |")
print()
PYTHON

# Each question's own tokens, and nothing else, should be added to what the model and the mapped file take.
python3 -c "
for i in range($questions):
    print(f'\"\\\\n\\\\nQuestion {i}: Who is the gentleman that this book is about, and what is his wager? Answer:\"')
" >"$work/questions"
head -n 1 "$work/questions" >"$work/one"
peak() { python3 -c "import json,sys; r=json.load(open(sys.argv[1])); print(r['peak_rss_bytes'], r['most_kv_bytes'])" "$1"; }
for file in one questions; do
    target/release/adaptive-kvcache generate --model "$model" --cache "$work/cache.kv" --prompts "$work/$file" \
        --batch "${BATCH:-16}" -n "${NEW_TOKENS:-16}" --quiet --draft off --report "$work/$file.json" --log-file "$work/log" >/dev/null
done
read -r one _ < <(peak "$work/one.json")
read -r all own < <(peak "$work/questions.json")
python3 -c "
one, all_, own = $one / 2**20, $all / 2**20, $own / 2**20
print(f'{$questions} questions, {${BATCH:-16}} at a time, on one saved text: {all_:.1f} MB at most, one question {one:.1f} MB: '
      f'{all_ - one:.1f} MB more, of which {own:.1f} MB are the keys and values of the questions and answers')"
