#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest, whose closing line comes last. A failed check does not
# keep the tests from running, but it does fail the whole.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
failed=()

check() {
    printf '== %s\n' "$*"
    "$bin/$1" "${@:2}" || failed+=("$*")
}

check ruff check
check ruff format --check
check mypy
for name in "${failed[@]+"${failed[@]}"}"; do printf '== FAILED: %s\n' "$name" >&2; done
printf '== pytest %s\n' "$*"
"$bin/pytest" "$@"
status=$?
((status == 0 && ${#failed[@]})) && status=1
exit "$status"
