#!/usr/bin/env bash
# Measures what guesses from the text gain (`--draft`): texts that repeat their prompt, and texts that do not, with guesses
# and without in turn. Prints a Markdown table: tokens/s of decoding without, the median ratio with guesses to without,
# how many of the guesses came true, and passes over the weights for each token. It fails if a text is not the same.
#
#   scripts/measure_draft.sh [MODEL.gguf]
#
# Variables: THREADS (2), ROUNDS (5), NEW_TOKENS (256), KV_DTYPE (f16), BINARY (a binary, instead of building one), REPORTS
# (a folder that keeps the reports), and OPTIONS for all runs, such as "--kept-ratio 0.5" (--use-adakv 0).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
model=${1:-$("$root/scripts/get_model.sh")}
binary=${BINARY:-$root/target/release/adaptive-kvcache}
[ -n "${BINARY:-}" ] || (cd "$root" && cargo build --release --locked --quiet)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 - "$root/tests/data/text/eighty_days_ch1-5.txt" "$work" <<'PYTHON'
import pathlib, sys

novel, work = open(sys.argv[1], encoding="utf-8").read(), pathlib.Path(sys.argv[2])
part = novel[300:1900]
code = '''def monthly_summary(records, start, end, currency):
    """Summarise all records between two dates."""
    totals = {}
    counts = {}
    skipped = 0
    for record in records:
        date = record["date"]
        if date < start or date > end:
            skipped += 1
            continue
        category = record.get("category", "other")
        amount = record["amount"]
        if record["currency"] != currency:
            amount = convert(amount, record["currency"], currency)
        totals[category] = totals.get(category, 0) + amount
        counts[category] = counts.get(category, 0) + 1
    lines = []
    for category in sorted(totals):
        average = totals[category] / counts[category]
        lines.append(f"{category}: {totals[category]:.2f} {currency} in {counts[category]} records, {average:.2f} each")
    if skipped > 0:
        lines.append(f"{skipped} records were outside of the dates")
    return "\\n".join(lines)
'''
for name, prompt in {
    "1 code, a variable renamed": f"Rename the variable `totals` to `sums` in this function. Answer with the whole function "
    f"and nothing else.\n\n```python\n{code}```",
    "2 code, a comment added": f"Add a comment to this function. Repeat the whole function.\n\n```python\n{code}```",
    "3 spelling corrected": f"Correct the spelling of this text, and write out the whole text:\n\n{part}",
    "4 summary with quotes": f"Read this text:\n\n{part}\n\nSummarise it in five sentences, and quote the sentence of the text "
    "that each is about.",
    "5 a program": "Write a Python program that reads a CSV file, groups its rows by a column and prints the mean of another.",
    "6 a recipe": "What is the recipe of mayonnaise?",
    "7 a letter": "Write a letter to a friend about a journey to the mountains.",
    "8 a story": "Write a long story about a lighthouse keeper who finds a map.",
    "9 a novel gone on with, raw": novel[12000:20000],
}.items():
    (work / f"{name}.txt").write_text(prompt, encoding="utf-8")
PYTHON

# NAME (sampled or greedy), draft (auto or off), round.
run() {
    local chat=(--chat)
    case "$1" in *raw) chat=() ;; esac
    local sampling=()
    [ "$2" = greedy ] || sampling=(--temperature 0.7 --seed 5)
    # shellcheck disable=SC2086
    "$binary" generate --model "$model" --prompt-file "$work/$1.txt" "${chat[@]}" "${sampling[@]}" --draft "$3" \
        --kv-dtype "${KV_DTYPE:-f16}" --threads "${THREADS:-2}" -n "${NEW_TOKENS:-256}" --quiet --log-file "$work/test.log" \
        --report "$work/$1.$2.$3.$4.json" ${OPTIONS:---use-adakv 0} >/dev/null
}

for round in $(seq "${ROUNDS:-5}"); do
    for text in "$work"/*.txt; do
        for sampling in greedy drawn; do
            order="off auto"
            [ $((round % 2)) = 1 ] || order="auto off"
            for draft in $order; do run "$(basename "$text" .txt)" "$sampling" "$draft" "$round"; done
        done
    done
done
[ -z "${REPORTS:-}" ] || cp "$work"/*.json "$REPORTS"
python3 - "$work" "${ROUNDS:-5}" <<'PYTHON'
import json, pathlib, statistics, sys

work, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print("| text | greedy, without | with guesses | came true | drawn, without | with guesses | came true |\n|---|---|---|---|---|---|---|")
for text in sorted(work.glob("*.txt")):
    cells = [text.stem[2:]]
    for sampling in ("greedy", "drawn"):
        read = lambda draft, n: json.load(open(work / f"{text.stem}.{sampling}.{draft}.{n}.json"))
        runs = [(read("off", n), read("auto", n)) for n in range(1, rounds + 1)]
        assert all(off["generated_tokens"] == auto["generated_tokens"] for off, auto in runs), text
        speed = lambda run: run["timings"]["decode_tokens_per_s"]
        ratio = statistics.median(speed(auto) / speed(off) for off, auto in runs)
        drafts, decoded = runs[0][1]["draft"], len(runs[0][0]["generated_tokens"]) - 1
        cells += [f"{statistics.median(speed(off) for off, _ in runs):.1f}", f"{ratio:.2f}",
                  f"{drafts['accepted']} of {drafts['drafted']}, {1 - drafts['accepted'] / max(decoded, 1):.2f} passes"]
    print("| " + " | ".join(cells) + " |")
PYTHON
