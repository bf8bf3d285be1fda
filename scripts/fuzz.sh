#!/usr/bin/env bash
# Makes inputs at random, kind by kind, for longer than the tests do: templates, messages, prompts, tokenizer files,
# configurations, and models (GGUF files and safetensors folders) that are loaded and run for one token. Whatever comes,
# there must be an error or a result: no panic, no abort, no case that does not end, no more than 1 GB.
#
#   scripts/fuzz.sh [TARGET] [MINUTES]
#
# TARGET is a test whose name begins with `fuzz_`, or a part of such a name; without it, or with `all`, each has its turn.
# MINUTES for each target, 15 if not given. A case that fails says how to repeat it: FUZZ_SEED, FUZZ_FIRST (the case)
# and FUZZ_CASES. FUZZ_PROFILE is cargo's profile (dev).
set -uo pipefail
cd "$(dirname "$0")/.."

target=${1:-all}
minutes=${2:-15}
[ "$target" = all ] && target=
profile=${FUZZ_PROFILE:-dev}
given_seed=${FUZZ_SEED:-}
export CANDLE_BARRIER_POOL_SPIN_LIMIT=1 MALLOC_ARENA_MAX=1 RAYON_NUM_THREADS=2

# Address space: what a process maps, and some room, so that a runaway ends before the machine does.
limit_kb=$((4 << 20))
most_rss_kb=$((1 << 20))

echo "building the tests"
binaries=$(cargo test --locked --profile "$profile" --lib --test it --no-run --message-format json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
[ -n "$binaries" ] || { cargo test --locked --profile "$profile" --lib --test it --no-run; exit 1; }

# A number of KB from GNU time, where there is one.
measure=()
if command -v /usr/bin/time >/dev/null; then measure=(/usr/bin/time -f 'peak %M KB' -o); fi

failed=0
found=0
log=$(mktemp)
trap 'rm -f "$log" "$log.peak"' EXIT

run_target() { # binary, name of the test
    local ends=$((SECONDS + minutes * 60)) round=0 status left peak=
    echo "== $2"
    while :; do
        left=$((ends - SECONDS))
        if [ "$round" -gt 0 ] && { [ "$left" -le 0 ] || [ -n "${FUZZ_CASES:-}" ]; }; then break; fi
        # Every round has cases of its own; tests that count cases and not seconds go round by round.
        export FUZZ_SEED=${given_seed:-$((RANDOM << 30 | RANDOM << 15 | RANDOM))}
        [ -n "${FUZZ_CASES:-}" ] || export FUZZ_SECONDS=$((left < 1 ? 1 : left))
        (
            ulimit -v "$limit_kb"
            ulimit -c 0
            export PROPTEST_CASES=${PROPTEST_CASES:-5000}
            exec timeout --kill-after=5 $((left + 120)) "${measure[@]}" ${measure[@]:+"$log.peak"} \
                "$1" --exact "$2" --nocapture --test-threads 1
        ) >"$log" 2>&1
        status=$?
        round=$((round + 1))
        if [ "$status" -ne 0 ]; then
            failed=1
            echo "FAILED with status $status"
            tail -n 40 "$log"
            cat "${TMPDIR:-/tmp}"/adaptive-kvcache-fuzz-*.case 2>/dev/null
            echo
            return
        fi
        peak=$(sed -n 's/^peak \([0-9]*\) KB$/\1/p' "$log.peak" 2>/dev/null)
        if [ -n "$peak" ] && [ "$peak" -gt "$most_rss_kb" ]; then
            failed=1
            echo "FAILED: $peak KB, seed $FUZZ_SEED"
            return
        fi
        grep -h "cases, seed" "$log"
    done
    echo "ok, $round rounds${peak:+, at most $peak KB in the last}"
}

for binary in $binaries; do
    for name in $("$binary" --list 2>/dev/null | sed -n 's/: test$//p' | grep -E '(^|::)fuzz_[a-z0-9_]*$'); do
        case "${name##*::}" in *"$target"*) ;; *) continue ;; esac
        found=$((found + 1))
        run_target "$binary" "$name"
    done
done
[ "$found" -gt 0 ] || { echo "no test \`fuzz_*$target*\`"; exit 2; }
exit "$failed"
