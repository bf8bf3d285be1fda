#!/usr/bin/env bash
# Compares our rendering of chat templates with jinja2's, set up as transformers does it, byte for byte:
#
#   - every template of llama.cpp's models/templates with 11 conversations,
#   - the cases of llama.cpp's tests/test-jinja.cpp, with what jinja2 makes of them and with what the file expects,
#   - random expressions (ROUNDS of them, default 20000).
#
# Where jinja2 fails, so must ours; a text of raise_exception must be the same.
#
#   scripts/compare_templates.sh
#
# The templates come from the source archive of llama-cpp-python on PyPI (77 MB, fetched once into .cache/templates) and
# are not part of this repository. Needs Python 3.9 or later with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
export CANDLE_BARRIER_POOL_SPIN_LIMIT=1

peer=.cache/templates
if [ ! -f "$peer/ready" ]; then
    mkdir -p "$peer"
    python3 -m venv "$peer/venv"
    "$peer/venv/bin/pip" install --quiet jinja2==3.1.6
    "$peer/venv/bin/python" scripts/compare_templates.py fetch "$peer"
    touch "$peer/ready"
fi

export TEMPLATE_CASES="$PWD/$peer/cases.jsonl" TEMPLATE_RESULTS="$PWD/$peer/results.jsonl"
"$peer/venv/bin/python" scripts/compare_templates.py make "$peer" --rounds "${ROUNDS:-20000}" --seed "${SEED:-1}"
cargo test --locked --quiet --test it -- --ignored --exact jinja::render_cases
exec "$peer/venv/bin/python" scripts/compare_templates.py check "$peer"
