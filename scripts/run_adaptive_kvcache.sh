#!/usr/bin/env bash
# Builds the program and generates text with it.
#
#   scripts/run_adaptive_kvcache.sh [MODEL] [OPTION ...]
#
# MODEL is a GGUF file, a folder in Hugging Face's or Meta's layout, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.
# Without one it fetches a small model once. Variables (each is an option of the binary too, see
# `adaptive-kvcache generate --help`):
#
#   MODEL_PATH        the model, if none is given
#   USE_ADAKV         1 (default): adaptive cache; 0: full cache
#   SAVE_IMAGE        1: write heatmaps to images/
#   PROMPT            the prompt
#   MAX_NEW_TOKENS    the most tokens to generate
#   CONFIG            configuration of the adaptive cache, such as configs/fastgen.json
#   DEVICE            cpu, cuda, cuda:N or metal: where to compute; cuda and metal build for it (to target/cuda or
#                     target/metal; see "Build for a GPU" in src/guide/devices.md). Without it, the CPU
#   CHAT              1: wrap the prompt in the model's chat template, 0: do not; auto (default): if the model has one
#   IMAGE_DIR         folder of the heatmaps, if not images/
#   KV_CACHE_DIR      folder in which later runs find what was read; none by default. KV_CACHE_DIR_LIMIT: its size (2GB)
#
# An empty variable counts as unset, and one loses against an option that it conflicts with.
# Each head's choice is appended to logs/test.log. More options, such as `--report run.json`, are passed on.
set -euo pipefail

here=$PWD
root=$(cd "$(dirname "$0")/.." && pwd)

case "${1:-}" in
    "" | -*) model=${MODEL_PATH:-} ;;
    *) model=$1; shift ;;
esac
[ -n "$model" ] || model=$("$root/scripts/get_model.sh")

target=$root/target
case "${DEVICE:-}" in
    cuda | cuda:*) features=(--features cuda) target=$target/cuda ;;
    metal) features=(--features metal) target=$target/metal ;;
    *) features=() ;;
esac
cd "$root"
cargo build --release --locked --quiet ${features[@]+"${features[@]}"} --target-dir "$target"
binary=$target/release/adaptive-kvcache
cd "$here"
# The binary for a GPU finds CUDA's libraries where it was built with them.
[ -z "${CUDA_HOME:-}" ] || export LD_LIBRARY_PATH=$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

[ -z "${DEVICE:-}" ] || set -- --device "$DEVICE" "$@"
# What is not typed is left to variables, which lose against options.
export CONFIG=${CONFIG:-$root/configs/config.json} IMAGE_DIR=${IMAGE_DIR:-$root/images} CHAT=${CHAT:-auto}
exec "$binary" generate --model "$model" --log-file "$root/logs/test.log" "$@"
