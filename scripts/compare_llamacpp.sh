#!/usr/bin/env bash
# Measures this program and llama.cpp in turn, on the same model, text and machine, and prints Markdown tables of tokens
# per second: decoding after prompts of several lengths, and prefill.
#
#   scripts/compare_llamacpp.sh [MODEL.gguf]
#
# Variables: THREADS ("1 2"), ROUNDS (3), CONTEXTS ("32 2048 7680"), PREFILL ("512 2048 7680"), NEW_TOKENS (16),
# CACHES ("full:f16 configs/fastgen.json:f16 configs/fastgen.json:q8_0": setting and KV dtype of each column). A round of
# all of it takes some ten minutes on two cores; CONTEXTS="32 2048" PREFILL=512 takes one or two.
#
# llama.cpp is fetched once into .cache/llamacpp (11 MB from npm, 77 MB from PyPI): its own CPU libraries, and Python
# declarations of its functions. It runs with an f16 cache, with and without flash attention; the better of the two
# counts. Needs npm, and Python with pip, on x86-64 Linux. Nobody else should use the machine meanwhile.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
npm_package=@node-llama-cpp/linux-x64@3.22.1
python_package=llama-cpp-python==0.3.36 # declares the functions of the same llama.cpp

threads=${THREADS:-1 2} rounds=${ROUNDS:-3} new_tokens=${NEW_TOKENS:-16}
contexts=${CONTEXTS-32 2048 7680} prefill=${PREFILL-512 2048 7680}
caches=${CACHES:-full:f16 configs/fastgen.json:f16 configs/fastgen.json:q8_0}

for tool in npm python3 cargo; do
    command -v "$tool" >/dev/null || { echo "error: \`$tool\` is needed" >&2; exit 1; }
done

peer=$root/.cache/llamacpp
if [ ! -f "$peer/llama_cpp.py" ]; then
    echo "fetching llama.cpp (88 MB, once) ..." >&2
    mkdir -p "$root/.cache"
    rm -rf "$peer.part"
    mkdir "$peer.part"
    (
        cd "$peer.part"
        npm pack --silent "$npm_package" >/dev/null
        tar xzf node-llama-cpp-*.tgz --strip-components=3 package/bins/linux-x64
        tar xzf node-llama-cpp-*.tgz --strip-components=1 package/LICENSE
        python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest . "$python_package" >&2
        tar xzf llama_cpp_python-*.tar.gz --strip-components=2 --wildcards '*/llama_cpp/llama_cpp.py'
        rm -f ./*.tgz ./*.tar.gz llama-addon.node
        for library in libllama libggml; do ln -s "$(ls "$library".v*.so)" "$library.so"; done
    )
    rm -rf "$peer"
    mv "$peer.part" "$peer"
fi

model=$(realpath "${1:-$("$root/scripts/get_model.sh")}")
cd "$root" # settings are paths from here
cargo build --release --locked --quiet
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
text=$root/tests/data/text/eighty_days_ch1-5.txt
list() { echo "$*" | tr -s ' ' ','; }

for round in $(seq "$rounds"); do
    for count in $threads; do
        for flash_attention in 0 1; do
            echo "round $round of $rounds, $count threads: llama.cpp, flash attention $flash_attention" >&2
            python3 scripts/compare_llamacpp.py measure --libraries "$peer" --model "$model" --text "$text" \
                --threads "$count" --flash-attention "$flash_attention" --contexts "$(list $contexts)" \
                --prefill "$(list $prefill)" --new-tokens "$new_tokens" --json "$work/llamacpp-$round-$count-$flash_attention.json"
        done
        # Caches in the same numbers are measured together.
        for dtype in $(for cache in $caches; do echo "${cache##*:}"; done | sort -u); do
            settings=$(for cache in $caches; do [ "${cache##*:}" = "$dtype" ] && echo "${cache%:*}"; done | paste -sd, || true)
            echo "round $round of $rounds, $count threads: this program, $settings, $dtype" >&2
            options=()
            [ -z "$contexts" ] || options+=(--contexts "$(list $contexts)" --new-tokens "$new_tokens")
            [ -z "$prefill" ] || options+=(--prefill "$(list $prefill)")
            target/release/adaptive-kvcache bench --model "$model" --prompt-file "$text" --threads "$count" \
                --settings "$settings" --kv-dtype "$dtype" "${options[@]}" --runs 1 \
                --json "$work/ours-$round-$count-$dtype.json" >&2
        done
    done
done
echo "$(target/release/adaptive-kvcache --version) ($(git describe --always --dirty 2>/dev/null || echo 'no git')), $(basename "$model")"
python3 scripts/compare_llamacpp.py table --version "$(basename "$peer"/libllama.v*.so .so | cut -dv -f2)" --caches "$(list $caches)" "$work"/*.json
