#!/usr/bin/env bash
# Measures this program and others in turn, on the same model and machine, and prints Markdown tables: tokens per second
# of decoding after prompts of several lengths and of prefill, and peak memory.
#
#   scripts/compare_peers.sh [MODEL.gguf]
#
# Variables: THREADS ("1 2"), ROUNDS (3), CONTEXTS ("32 2048 7680"), PREFILL ("512 2048 7680"), NEW_TOKENS (16),
# CACHES ("full:f16 configs/fastgen.json:f16 configs/fastgen.json:q8_0": setting and KV dtype of each column),
# PEERS ("llama.cpp", with a MODEL mistral.rs, too, and ik_llama.cpp if IK_LLAMA names it). A round of all of it takes some
# ten minutes on two cores for SmolLM2; CONTEXTS="32 2048" PREFILL=512 takes one or two. Larger models:
#
#   scripts/make_shape.py shape.gguf --shape 1.5b --format q4_k_m
#   THREADS=2 CONTEXTS="32 7680" PREFILL="512 2048" scripts/compare_peers.sh shape.gguf
#
# PAST (0) tokens are in every cache before what is timed, as of an earlier turn: for llama.cpp and ours, PEERS="llama.cpp".
#
# - llama.cpp is fetched once into .cache/llamacpp (11 MB from npm, 77 MB from PyPI): its own CPU libraries, and Python
#   declarations of its functions. It runs with an f16 cache, with and without flash attention; the better of the two
#   counts (LLAMACPP_FLASH=1 or 0: only that one). LLAMACPP_KV=q8_0 gives it a cache in these numbers, with flash attention.
#   LLAMACPP_CPU=haswell takes that one of its CPU libraries (AVX2) instead of the best; OPTIONS are further options of our
#   `bench`.
# - mistral.rs is installed once into .cache/mistralrs (its CPU wheel from PyPI, 30 MB). It is fast with K-quants. With Q4_0 and
#   Q4_1, as SmolLM2's, it computes at a tenth of the others' speed and less, and a round takes hours.
# - ik_llama.cpp has no packages. IK_LLAMA is the path of a `llama-bench` that was built on this machine, for its processor:
#       git clone https://github.com/ikawrakow/ik_llama.cpp && cd ik_llama.cpp
#       cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
#       cmake --build build --target llama-bench -j
#
# All but ik_llama.cpp read the text, of which each takes as many tokens as asked for. Ours is built, or OURS names it.
# Needs npm, and Python with pip and venv, on x86-64 Linux. Nobody else should use the machine meanwhile.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mistralrs_package=mistralrs==0.9.5

threads=${THREADS:-1 2} rounds=${ROUNDS:-3} new_tokens=${NEW_TOKENS:-16}
contexts=${CONTEXTS-32 2048 7680} prefill=${PREFILL-512 2048 7680}
caches=${CACHES:-full:f16 configs/fastgen.json:f16 configs/fastgen.json:q8_0}
peers=${PEERS-llama.cpp ${1:+mistral.rs} ${IK_LLAMA:+ik_llama.cpp}}
read -ra options <<<"${OPTIONS:-}"
past=${PAST:-0} llamacpp_kv=${LLAMACPP_KV:-f16} llamacpp_flash=${LLAMACPP_FLASH:-0 1}
[ "$llamacpp_kv" = f16 ] || llamacpp_flash=1 # values in other numbers need it

fail() { echo "error: $*" >&2; exit 1; }
need() { for tool; do command -v "$tool" >/dev/null || fail "\`$tool\` is needed"; done; }
list() { echo "$*" | tr -s ' ' ','; }
need python3

fetch_mistralrs() {
    [ ! -f "$root/.cache/mistralrs/ready" ] || return 0
    echo "fetching mistral.rs (30 MB, once) ..." >&2
    rm -rf "$root/.cache/mistralrs"
    python3 -m venv "$root/.cache/mistralrs"
    "$root/.cache/mistralrs/bin/pip" install --quiet --only-binary :all: "$mistralrs_package" >&2
    touch "$root/.cache/mistralrs/ready"
}

for peer in $peers; do
    case $peer in
        llama.cpp) "$root/scripts/fetch_llamacpp.sh" ;;
        mistral.rs) fetch_mistralrs ;;
        ik_llama.cpp) [ -x "${IK_LLAMA:-}" ] || fail "IK_LLAMA must name ik_llama.cpp's \`llama-bench\`, not \`${IK_LLAMA:-}\`" ;;
        *) fail "PEERS: \`$peer\` is none of llama.cpp, mistral.rs, ik_llama.cpp" ;;
    esac
done
[ "$past" = 0 ] || [ -z "${peers//llama.cpp/}" ] || fail "PAST is for PEERS=\"llama.cpp\", not \`$peers\`"
[ -n "$contexts$prefill" ] || fail "CONTEXTS or PREFILL must name a length"

model=$(realpath "${1:-$("$root/scripts/get_model.sh")}")
[ -z "${OURS:-}" ] || OURS=$(realpath "$OURS")
cd "$root" # settings are paths from here
if [ -z "${OURS:-}" ]; then
    need cargo
    cargo build --release --locked --quiet
    OURS=target/release/adaptive-kvcache
fi
busy=$(cut -d' ' -f1 /proc/loadavg)
[ "${busy%.*}" = 0 ] || echo "warning: others use this machine (load $busy), so the figures are not to be trusted" >&2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
text=$root/tests/data/text/eighty_days_ch1-5.txt

# measure NAME, how to run Python's part, and its options: one peer, in this round.
measure() {
    local name=$1
    shift
    echo "round $round of $rounds, $count threads: $name" >&2
    "$@" --model "$model" --threads "$count" --contexts "$(list $contexts)" --prefill "$(list $prefill)" \
        --new-tokens "$new_tokens" --json "$work/$round-$count-${name// /-}.json" >"$work/log" 2>&1 || {
        cat "$work/log" >&2
        fail "$name failed"
    }
}

measure_peer() {
    local python=scripts/compare_peers.py flash
    case $1 in
        llama.cpp)
            for flash in $llamacpp_flash; do
                measure "llama.cpp flash attention $flash" python3 $python measure-llamacpp --text "$text" \
                    --libraries .cache/llamacpp --processor "${LLAMACPP_CPU:-}" --flash-attention $flash \
                    --past "$past" --kv-dtype "$llamacpp_kv"
            done
            ;;
        mistral.rs)
            RAYON_NUM_THREADS=$count measure mistral.rs .cache/mistralrs/bin/python $python measure-mistralrs --text "$text"
            ;;
        ik_llama.cpp) measure ik_llama.cpp python3 $python measure-ik --bench "$IK_LLAMA" ;;
    esac
}

measure_ours() {
    local dtype settings lengths=()
    [ -z "$contexts" ] || lengths+=(--contexts "$(list $contexts)" --new-tokens "$new_tokens")
    [ -z "$prefill" ] || lengths+=(--prefill "$(list $prefill)")
    # Caches in the same numbers are measured together.
    for dtype in $(for cache in $caches; do echo "${cache##*:}"; done | sort -u); do
        settings=$(for cache in $caches; do [ "${cache##*:}" = "$dtype" ] && echo "${cache%:*}"; done | paste -sd, || true)
        echo "round $round of $rounds, $count threads: this program, $settings, $dtype" >&2
        "$OURS" bench --model "$model" --prompt-file "$text" --threads "$count" --settings "$settings" --kv-dtype "$dtype" \
            "${lengths[@]}" --past "$past" --runs 1 --json "$work/$round-$count-ours-$dtype.json" "${options[@]}" >&2
    done
}

for round in $(seq "$rounds"); do
    for count in $threads; do
        for peer in $peers; do measure_peer "$peer"; done
        measure_ours
    done
done
echo "$("$OURS" --version) ($(git describe --always --dirty 2>/dev/null || echo 'no git')) ${OPTIONS:-}, $(basename "$model")"
python3 scripts/compare_peers.py table --caches "$(list $caches)" --peers "$(list $peers)" "$work"/*.json
