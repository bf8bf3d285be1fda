#!/usr/bin/env bash
# Measures sequences that decode together: 16 prompts of some 512 tokens at 1, 4 and 16 at a time, and how many are under
# way within a budget of KV bytes, with the full and with the adaptive cache. Prints two Markdown tables.
#
#   scripts/measure_batch.sh [MODEL.gguf]
#
# Variables: THREADS (2), NEW_TOKENS (64), BUDGET (64MB), CONFIG (configs/fastgen.json), KV_DTYPES ("f16 q8_0").
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
model=${1:-$("$root/scripts/get_model.sh")}
(cd "$root" && cargo build --release --locked --quiet)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 - "$root/tests/data/text/eighty_days_ch1-5.txt" >"$work/prompts.jsonl" <<'PYTHON'
import json, sys

text = open(sys.argv[1], encoding="utf-8").read()
for index in range(16):
    print(json.dumps({"prompt": text[2200 * index : 2200 * index + 1970]}))
PYTHON

# NAME, cache (0 or 1), KV dtype, and further options.
measure() {
    local name=$1 adaptive=$2 kv_dtype=$3
    shift 3
    "$root/target/release/adaptive-kvcache" generate --model "$model" --prompts "$work/prompts.jsonl" --quiet \
        --use-adakv "$adaptive" --config "${CONFIG:-$root/configs/fastgen.json}" --kv-dtype "$kv_dtype" \
        --threads "${THREADS:-2}" -n "${NEW_TOKENS:-64}" --ignore-eos --log-file "$work/test.log" \
        --report "$work/$name-$adaptive-$kv_dtype.json" "$@" >/dev/null
}

for kv_dtype in ${KV_DTYPES:-f16 q8_0}; do
    for adaptive in 0 1; do
        for batch in 1 4 16; do measure "batch$batch" "$adaptive" "$kv_dtype" --batch "$batch"; done
        measure budget "$adaptive" "$kv_dtype" --batch 16 --kv-budget "${BUDGET:-64MB}"
    done
done
python3 - "$work" "${BUDGET:-64MB}" ${KV_DTYPES:-f16 q8_0} <<'PYTHON'
import json, sys

work, budget, *kv_dtypes = sys.argv[1:]
read = lambda name, adaptive, kv_dtype: json.load(open(f"{work}/{name}-{adaptive}-{kv_dtype}.json"))
caches = [(kv_dtype, adaptive) for kv_dtype in kv_dtypes for adaptive in (0, 1)]
name = lambda kv_dtype, adaptive: f"{('full', 'adaptive')[adaptive]}, {kv_dtype}"
print("| cache | 1 sequence, tokens/s | 4 together | 16 together | KV cache of 16, MB |\n|---|---|---|---|---|")
for kv_dtype, adaptive in caches:
    runs = [read(f"batch{batch}", adaptive, kv_dtype) for batch in (1, 4, 16)]
    speeds = " | ".join(f"{run['decode_tokens_per_s']:.0f}" for run in runs)
    print(f"| {name(kv_dtype, adaptive)} | {speeds} | {runs[2]['most_kv_bytes'] / 2**20:.1f} |")
print(f"\n| cache, within {budget} | sequences at a time | decode, tokens/s together | KV cache, MB |\n|---|---|---|---|")
for kv_dtype, adaptive in caches:
    run = read("budget", adaptive, kv_dtype)
    print(f"| {name(kv_dtype, adaptive)} | {run['most_sequences']} | {run['decode_tokens_per_s']:.0f} | "
          f"{run['most_kv_bytes'] / 2**20:.1f} |")
PYTHON
