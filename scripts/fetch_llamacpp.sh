#!/usr/bin/env bash
# Fetches llama.cpp once into .cache/llamacpp (11 MB from npm, 77 MB from PyPI): its own CPU libraries, and Python
# declarations of its functions, for what compares with it. Needs npm, and Python with pip, on x86-64 Linux.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
npm_package=@node-llama-cpp/linux-x64@3.22.1
python_package=llama-cpp-python==0.3.36 # declares the functions of the same llama.cpp

[ ! -f "$root/.cache/llamacpp/llama_cpp.py" ] || exit 0
command -v npm >/dev/null || { echo "error: \`npm\` is needed" >&2; exit 1; }
echo "fetching llama.cpp (88 MB, once) ..." >&2
part=$root/.cache/llamacpp.part
rm -rf "$part"
mkdir -p "$part"
cd "$part"
npm pack --silent "$npm_package" >/dev/null
tar xzf node-llama-cpp-*.tgz --strip-components=3 package/bins/linux-x64
tar xzf node-llama-cpp-*.tgz --strip-components=1 package/LICENSE
python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest . "$python_package" >&2
tar xzf llama_cpp_python-*.tar.gz --strip-components=2 --wildcards '*/llama_cpp/llama_cpp.py'
rm -f ./*.tgz ./*.tar.gz llama-addon.node
for library in libllama libggml; do ln -s "$(ls "$library".v*.so)" "$library.so"; done
rm -rf "$root/.cache/llamacpp"
mv "$part" "$root/.cache/llamacpp"
