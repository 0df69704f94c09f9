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
# Files run side by side; an engine of these sizes gains nothing from a second thread, and one that
# binds its thread to a core would meet the others there.
workers=$(nproc 2>/dev/null || echo 1)
((workers > 4)) && workers=4
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
printf '== pytest -n %s --dist loadfile %s\n' "$workers" "$*"
"$bin/pytest" -n "$workers" --dist loadfile "$@"
status=$?
((status == 0 && ${#failed[@]})) && status=1
exit "$status"
