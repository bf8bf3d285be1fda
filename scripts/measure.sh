#!/usr/bin/env bash
# Measures prefill, decoding and memory with the full and the adaptive cache, side by side, and prints a Markdown table.
#
#   scripts/measure.sh [MODEL.gguf]
#
# Variables: THREADS (2), RUNS (3), CONFIG (configs/fastgen.json). The prompt is the beginning of the text under
# tests/data/text. The two caches take turns; each figure is the median of its runs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
model=${1:-$("$root/scripts/get_model.sh")}
(cd "$root" && cargo build --release --locked --quiet)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for bytes in 7700 30500; do
    head -c "$bytes" "$root/tests/data/text/eighty_days_ch1-5.txt" >"$work/prompt.txt"
    for run in $(seq "${RUNS:-3}"); do
        for adaptive in 0 1; do
            "$root/target/release/adaptive-kvcache" generate --model "$model" --chat 0 --prompt-file "$work/prompt.txt" \
                --config "${CONFIG:-$root/configs/fastgen.json}" --use-adakv "$adaptive" --threads "${THREADS:-2}" \
                --max-new-tokens 64 --ignore-eos --quiet --log-file "$work/test.log" \
                --report "$work/$bytes-$adaptive-$run.json" >"$work/text"
        done
    done
done
python3 - "$work" <<'PYTHON'
import glob, json, statistics, sys

print("| prompt | cache | prefill, tokens/s | decode, tokens/s | KV cache, MB | resident after prefill, MB | peak, MB |")
print("|---|---|---|---|---|---|---|")
for size in ("7700", "30500"):
    for adaptive, name in ((0, "full"), (1, "adaptive")):
        reports = [json.load(open(path)) for path in sorted(glob.glob(f"{sys.argv[1]}/{size}-{adaptive}-*.json"))]
        median = lambda group, key, unit=1: statistics.median(report[group][key] for report in reports) / unit
        cells = [
            f"{median('timings', 'prefill_tokens_per_s'):.0f}",
            f"{median('timings', 'decode_tokens_per_s'):.1f}",
            f"{median('kv', 'kept_bytes', 1 << 20):.1f}",
            f"{median('memory', 'prefill_rss_bytes', 1 << 20):.1f}",
            f"{median('memory', 'peak_rss_bytes', 1 << 20):.1f}",
        ]
        print(f"| {len(reports[0]['prompt_tokens'])} tokens | {name} | " + " | ".join(cells) + " |")
PYTHON
