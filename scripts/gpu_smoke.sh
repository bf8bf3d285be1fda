#!/usr/bin/env bash
# Verifies the program on an NVIDIA GPU and writes one report to send back: the machine, then for each step PASS or FAIL
# with its command and the end of its output. A step that fails stops no other; the exit status is 1 if any failed.
#
#   scripts/gpu_smoke.sh
#
# Builds with the feature `cuda` (see "Build for a GPU" in src/guide/devices.md), fetches the small model once, and checks: the same
# greedy text, log-probabilities and choices of heads as on the CPU, in f32, with the full and the adaptive cache; scores of
# a text, token by token; the kernel's own tests; memory and speed of both caches; `bench`; heatmaps.
#
# Variables:
#   DEVICE    cuda (default), cuda:N, or cpu: the same steps by candle operations on the CPU, with short prompts, to try
#             the script where there is no GPU
#   BINARY    a program that is built already, instead of building one
#   MODEL     a model of your own, instead of the small one
#   REPORT    the report's path (logs/gpu_smoke.log)
#   TESTS     0: leave out the kernel's tests, which are built first
#   STEP_SECONDS  the longest that a step may take (3600)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

device=${DEVICE:-cuda}
report=${REPORT:-logs/gpu_smoke.log}
config=configs/fastgen.json
text=tests/data/text/eighty_days_ch1-5.txt
fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

# Sizes: characters of the prompts, new tokens; tokens that `eval` compresses and scores; contexts of `bench`.
case $device in
    cuda | cuda:*)
        features=(--features cuda --target-dir target/cuda)
        built=target/cuda/release/adaptive-kvcache
        characters=9000 long_characters=24000 new_tokens=64 eval_tokens=1024 score_tokens=128 contexts=512,2048,7680
        numbers=auto
        command -v nvidia-smi >/dev/null ||
            fail "no NVIDIA GPU was found: there is no \`nvidia-smi\`" \
                "install NVIDIA's driver, or try the script itself with DEVICE=cpu scripts/gpu_smoke.sh"
        gpus=$(nvidia-smi --query-gpu=index,name,compute_cap,memory.total,driver_version --format=csv,noheader 2>&1) &&
            [ -n "$gpus" ] ||
            fail "no NVIDIA GPU was found: \`nvidia-smi\` says: ${gpus:-nothing}" \
                "look at the driver, or try the script itself with DEVICE=cpu scripts/gpu_smoke.sh"
        # The program is linked against CUDA's libraries, which must be found when it starts.
        [ -z "${CUDA_HOME:-}" ] || export LD_LIBRARY_PATH=$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
        index=0
        [ "$device" = cuda ] || index=${device#cuda:}
        if [ -z "${CUDA_COMPUTE_CAP:-}" ]; then
            CUDA_COMPUTE_CAP=$(nvidia-smi --id="$index" --query-gpu=compute_cap --format=csv,noheader | tr -d '. ') ||
                fail "no GPU of index $index, which DEVICE=$device asks for" "nvidia-smi lists: $gpus"
            export CUDA_COMPUTE_CAP
        fi
        ;;
    cpu)
        features=()
        built=target/release/adaptive-kvcache
        characters=500 long_characters=1200 new_tokens=8 eval_tokens=96 score_tokens=8 contexts=32
        numbers=f32 # candle has no fast product with Q4_1 blocks on the CPU
        gpus="none is asked for"
        ;;
    *) fail "expected DEVICE to be cuda, cuda:N or cpu, got \`$device\`" "for the first GPU, leave it out" ;;
esac
for tool in python3 ${BINARY:-cargo}; do
    command -v "$tool" >/dev/null || fail "\`$tool\` is needed" "install it, or put it into the PATH"
done
mkdir -p "$(dirname "$report")" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'echo "interrupted" | tee -a "$report"; exit 130' INT

describe() {
    echo "adaptive-kvcache on device $device: report of scripts/gpu_smoke.sh, $(date -u '+%Y-%m-%d %H:%M UTC')"
    echo "commit   $(git describe --always --dirty 2>/dev/null || echo unknown)"
    echo "system   $(uname -srm)"
    echo "CPU      $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -1), $(nproc 2>/dev/null) cores"
    echo "memory   $(sed -n 's/^MemTotal: *//p' /proc/meminfo 2>/dev/null)"
    echo "Rust     $(rustc --version 2>&1 | head -1)"
    echo "nvcc     $("${NVCC:-nvcc}" --version 2>/dev/null | tail -1 | grep . || echo none)"
    echo "GPUs     $gpus"
    echo "for      compute capability ${CUDA_COMPUTE_CAP:-none}"
}
describe | tee "$report"

passed=0 failed=0 summary=()
limit=()
command -v timeout >/dev/null && limit=(timeout --foreground "${STEP_SECONDS:-3600}")

# NAME COMMAND...: runs a command and reports it.
step() {
    local name=$1 start=$SECONDS status result
    shift
    printf '\n== %s\n$ %s\n' "$name" "$*" | tee -a "$report"
    "${limit[@]}" "$@" >"$work/output" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        result=PASS passed=$((passed + 1))
    else
        result="FAIL (exit status $status)" failed=$((failed + 1))
    fi
    tr '\r' '\n' <"$work/output" | tail -n 40 | cut -c 1-400 | tee -a "$report"
    summary+=("$result  $name")
    echo "$result after $((SECONDS - start)) s" | tee -a "$report"
    return $status
}

cat >"$work/check.py" <<'PYTHON'
"""Checks what the program wrote: `check.py agree|eval|memory|bench|images FILE...`; says what it saw, and fails with 1."""
import glob, json, os, sys

LOG_PROBABILITY = 2e-3  # between two orders of the same f32 additions, over all layers
HEADS = 0.02            # share of heads whose values are so near their threshold that they may differ
SCORE = 5e-3            # relative, of perplexities; absolute, of KL divergences in nats

what, *paths = sys.argv[1:]
problems = []

def expect(holds, problem):
    if not holds:
        problems.append(problem)

def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)

if what == "agree":
    cpu, other = map(read, paths)
    print(f"{cpu['device']} by {cpu['attention']}, {other['device']} by {other['attention']}, "
          f"{len(cpu['prompt_tokens'])} tokens of prompt")
    expect(cpu["attention"] != other["attention"], "both runs were computed in the same way")
    expect(cpu["prompt_tokens"] == other["prompt_tokens"], "the prompts differ")
    expected, got = dict(cpu["next_token_logprobs"]), dict(other["next_token_logprobs"])
    common = expected.keys() & got.keys()
    worst = max((abs(expected[id] - got[id]) for id in common), default=float("inf"))
    print(f"log-probabilities after the prompt: {len(common)} of {len(expected)} in both, largest difference {worst:.2e}")
    expect(len(common) >= len(expected) - 1 and worst < LOG_PROBABILITY, f"log-probabilities differ by {worst:.2e}")
    heads = [[(head["level"], head["kept"]) for layer in run["layers"] for head in layer["heads"]] for run in (cpu, other)]
    differing = sum(a != b for a, b in zip(*heads))
    print(f"heads that keep something else: {differing} of {len(heads[0])}; kept {cpu['kv']['kept_bytes']} and "
          f"{other['kv']['kept_bytes']} bytes of {cpu['kv']['raw_bytes']}")
    expect(len(heads[0]) == len(heads[1]) and differing <= HEADS * len(heads[0]), f"{differing} heads differ")
    texts = [run["generated_tokens"] for run in (cpu, other)]
    equal = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), min(map(len, texts)))
    print(f"greedy tokens equal before the first difference: {equal} of {len(texts[0])}")
    print(f"  {cpu['device']}: {cpu['text']!r}\n  {other['device']}: {other['text']!r}")
    expect(len(texts[0]) > 0 and texts[0] == texts[1], "the greedy texts differ")
elif what == "eval":
    rows, others = map(read, paths)
    expect(len(rows) == len(others) > 0, f"{len(rows)} and {len(others)} rows")
    for row, other in zip(rows, others):
        full, kl = row["perplexity_full"], row["kl_mean"]
        off = max(abs(other[key] / row[key] - 1) for key in ("perplexity_full", "perplexity"))
        print(f"{row['config']}: perplexity of the full cache {full:.5f} and {other['perplexity_full']:.5f}, of this one "
              f"{row['perplexity']:.5f} and {other['perplexity']:.5f}; mean KL {kl:.6f} and {other['kl_mean']:.6f} nats; "
              f"kept {row['kept_ratio']:.4f} and {other['kept_ratio']:.4f}")
        expect(off < SCORE, f"perplexities differ by {off:.2e} of their value ({row['config']})")
        expect(abs(kl - other["kl_mean"]) < SCORE, f"KL divergences differ ({row['config']})")
elif what == "memory":
    runs = dict(zip(("full", "adaptive"), map(read, paths)))
    for name, run in runs.items():
        on_device = run["memory"].get("prefill_device_bytes")
        print(f"{name}: {len(run['prompt_tokens'])} tokens of prompt, KV cache {run['kv']['kept_bytes'] / 2**20:.2f} MB kept, "
              f"{run['kv']['allocated_bytes'] / 2**20:.2f} MB allocated; device memory after prefill "
              f"{'not told' if on_device is None else f'{on_device / 2**20:.0f} MB'}; "
              f"prefill {run['timings']['prefill_tokens_per_s']:.1f}, decode {run['timings']['decode_tokens_per_s']:.1f} tokens/s")
        expect(not run["device"].startswith("cuda") or on_device, f"no device memory in the report of the {name} cache")
    for size in ("kept_bytes", "allocated_bytes"):
        expect(runs["adaptive"]["kv"][size] < runs["full"]["kv"][size], f"{size} of the adaptive cache are not fewer")
elif what == "bench":
    rows = read(paths[0])
    expect(len(rows) >= 2, f"{len(rows)} rows")
    for row in rows:
        expect(row["tokens_per_s"] > 0 and row["kv_bytes"] > 0, f"a row without speed or size: {row}")
elif what == "images":
    run, folder = read(paths[0]), paths[1]
    images = sorted(glob.glob(os.path.join(folder, "*.png")))
    layers = [path for path in images if path.endswith("_attention.png")]
    print(f"{len(images)} pictures, of {min(map(os.path.getsize, images), default=0)} bytes or more")
    expect(len(layers) == run["model"]["num_layers"], f"{len(layers)} heatmaps for {run['model']['num_layers']} layers")
    expect({"policies.png", "kv_memory.png"} <= {os.path.basename(path) for path in images}, "a picture is missing")
    for path in images:
        with open(path, "rb") as file:
            expect(file.read(8) == b"\x89PNG\r\n\x1a\n" and os.path.getsize(path) > 1000, f"{path} is no picture")
else:
    sys.exit(f"error: unknown check {what}")
for problem in problems:
    print(f"problem: {problem}")
sys.exit(bool(problems))
PYTHON
check() { step "$1" python3 "$work/check.py" "${@:2}"; }

if [ -n "${BINARY:-}" ]; then
    binary=$BINARY
else
    step "the program is built" cargo build --release --locked "${features[@]}"
    binary=$built
fi
step "the program starts" "$binary" --version
step "the model is there" scripts/get_model.sh
model=${MODEL:-$(scripts/get_model.sh 2>/dev/null)}

head -c "$characters" "$text" >"$work/prompt.txt"
head -c "$long_characters" "$text" >"$work/long.txt"

# NAME OUTPUT CACHE OPTION...: generates with the full (0) or adaptive (1) cache.
generate() {
    local name=$1 output=$2 adaptive=$3
    shift 3
    step "$name" "$binary" generate --model "$model" --config "$config" --use-adakv "$adaptive" --chat 0 \
        --log-file "$work/test.log" --image-dir "$work/images" --ignore-eos --report "$work/$output.json" "$@"
}
# On the CPU by the program's own kernels; on the device by candle operations, and on CUDA this project's kernel.
reference=(--device cpu --backend kernels)
tested=(--device "$device" --backend candle)
exact=(--dtype f32 --kv-dtype f32 --prompt-file "$work/prompt.txt" -n "$new_tokens")

for adaptive in 0 1; do
    cache=full
    [ $adaptive = 0 ] || cache=adaptive
    generate "$cache cache, f32, CPU" "cpu$adaptive" $adaptive "${exact[@]}" "${reference[@]}"
    generate "$cache cache, f32, $device" "device$adaptive" $adaptive "${exact[@]}" "${tested[@]}"
    check "$cache cache: the CPU and $device agree" agree "$work/cpu$adaptive.json" "$work/device$adaptive.json"
done

score=(eval --model "$model" --text "$text" --dtype f32 --kv-dtype f32 --full-kv-dtype f32 --configs "$config"
    --prompt-tokens "$eval_tokens" --score-tokens "$score_tokens")
step "a text is scored, CPU" "$binary" "${score[@]}" "${reference[@]}" --json "$work/eval_cpu.json"
step "a text is scored, $device" "$binary" "${score[@]}" "${tested[@]}" --json "$work/eval_device.json"
check "scores: the CPU and $device agree" eval "$work/eval_cpu.json" "$work/eval_device.json"

if [ "${TESTS:-1}" = 0 ]; then
    summary+=("SKIP  the kernel's tests")
    printf '\n== the kernel'\''s tests\nSKIP: TESTS=0\n' | tee -a "$report"
else
    step "the kernel's tests" cargo test --locked "${features[@]}" --test it ragged -- --include-ignored
fi

for adaptive in 0 1; do
    generate "A/B: USE_ADAKV=$adaptive" "ab$adaptive" $adaptive "${tested[@]}" --prompt-file "$work/long.txt" \
        -n "$new_tokens" --dtype "$numbers" --quiet
done
check "A/B: the adaptive cache is smaller" memory "$work/ab0.json" "$work/ab1.json"

step "bench" "$binary" bench --model "$model" "${tested[@]}" --dtype "$numbers" --settings "full,$config" \
    --contexts "$contexts" --prefill "${contexts%%,*}" --new-tokens "$new_tokens" --runs 2 --json "$work/bench.json"
check "bench: rows have speeds and sizes" bench "$work/bench.json"

SAVE_IMAGE=1 generate "heatmaps are drawn" images 1 "${tested[@]}" --prompt-file "$work/prompt.txt" -n 2 --dtype "$numbers" --quiet
check "heatmaps are pictures, one for each layer" images "$work/images.json" "$work/images"

{
    printf '\n== summary\n'
    printf '%s\n' "${summary[@]}"
    echo "$passed passed, $failed failed"
} | tee -a "$report"
echo "the report is $report" >&2
[ "$failed" -eq 0 ]
