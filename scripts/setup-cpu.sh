#!/usr/bin/env bash
# Creates or completes .venv with everything that a machine without a GPU needs. Run it as often as you like: when nothing
# changed it returns at once.
#
#   VENV                 where the environment goes (default: .venv beside pyproject.toml)
#   PYTHON               the interpreter to build it with (default: the first of python3, python3.11 … python3.13 that fits)
#   KVBATON_TORCH_INDEX  the index to take torch from (default: pip's own sources, then PyTorch's CPU index)
#
# GPU hosts: docs/install.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
STEPS=7
cd "$ROOT"

say() { printf '%s\n' "$*"; }

fail() {
    printf '\nSet-up failed: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.13."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 found." "Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# Everything that decides what the environment holds.
fingerprint() {
    { cat scripts/setup-cpu.sh pyproject.toml requirements/cpu-torch.txt requirements/cpu.txt requirements/cpu-nodeps.txt
      printf '%s\n' "$ROOT" "${KVBATON_TORCH_INDEX:-}" "${PYTHON:-}"
    } | sha256sum | cut -d' ' -f1
}

step_number=0

# step TITLE ADVICE COMMAND...: run the command with its output in the log; on failure say what to try and where to look.
step() {
    local title=$1 advice=$2 began=$SECONDS
    shift 2
    step_number=$((step_number + 1))
    printf '[%d/%d] %s ... ' "$step_number" "$STEPS" "$title"
    printf '\n=== [%d/%d] %s\n' "$step_number" "$STEPS" "$title" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        say "FAILED after $((SECONDS - began)) s"
        say ""
        say "Last lines of the log:"
        tail -n 12 "$LOG" | sed 's/^/  | /'
        grep -q 'No space left' "$LOG" && advice="the disk is full: about 3 GB are needed under $VENV and 1 GB under the temporary folder."
        fail "step $step_number, $title." "Try: $advice" "Full log: $LOG" "Running this script again resumes from what is already installed."
    fi
    say "$((SECONDS - began)) s"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@" --progress-bar off; }

usable_venv() {
    [[ -x $VENV/bin/python ]] && fits "$VENV/bin/python" || return
    [[ -z ${PYTHON:-} || $("$PYTHON" -V) == "$("$VENV/bin/python" -V)" ]]
}

create_venv() {
    usable_venv && return
    # --clear empties the folder: only one that is an environment, or nothing yet.
    if [[ -d $VENV && ! -f $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
        say "$VENV exists and is no virtual environment: choose another folder with VENV=..."
        return 1
    fi
    "$python" -m venv --clear "$VENV"
}

# A plain `torch==2.13.0` would be the CUDA build on Linux, so the +cpu build is asked for by its full version: pip's own
# sources are tried first (a mirror or a wheel folder may have it), then PyTorch's CPU index. Hashes are checked either way.
install_torch() {
    local install=(install --no-deps --require-hashes -r requirements/cpu-torch.txt)
    if [[ -n ${KVBATON_TORCH_INDEX:-} ]]; then
        pip "${install[@]}" --index-url "$KVBATON_TORCH_INDEX"
    else
        pip "${install[@]}" || { say "not in pip's own sources; trying $TORCH_CPU_INDEX" &&
            pip "${install[@]}" --index-url "$TORCH_CPU_INDEX"; }
    fi
}

verify() {
    "$VENV/bin/python" - <<'PY'
import importlib.metadata as metadata

import grpc, nixl, tokenizers, torch, transformers, zmq  # noqa: E401

assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
assert torch.ones(2, 2).sum().item() == 4
print("torch", torch.__version__, "| sglang", metadata.version("sglang"), "| nixl", metadata.version("nixl"),
      "| grpcio", grpc.__version__)
PY
}

verify_command() { [[ ! -f services/cli.py ]] || "$VENV/bin/kvbaton" --help; }

[[ $(uname -s) == Linux ]] || fail "the engine set-up is for Linux (NIXL and Triton have no builds for $(uname -s))." \
    "The client alone installs anywhere: pip install kvbaton"
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || true)
[[ -n $glibc && $(printf '2.34\n%s\n' "${glibc#glibc }" | sort -V | head -n 1) == 2.34 ]] ||
    fail "this needs glibc 2.34 or newer (found: ${glibc:-none}); SGLang's wheels are built for it." \
        "Debian 12, Ubuntu 22.04 and RHEL 9 have it."

STAMP=$VENV/.kvbaton-setup
want=$(fingerprint)
if [[ -x $VENV/bin/python && -x $VENV/bin/kvbaton && -f $STAMP && $(<"$STAMP") == "$want" ]]; then
    say "$VENV is up to date."
    exit 0
fi

python=$(find_python)
mkdir -p build
LOG=$ROOT/build/setup-cpu.log
: >"$LOG"
rm -f "$STAMP"
say "Setting up $VENV (about 3 GB; one to a few minutes). Log: $LOG"

network="check the network and pip's index settings (pip config list)."
step "virtual environment ($("$python" -V))" \
    "install the venv module of $python (Debian, Ubuntu: apt install python3-venv)." create_venv
step "torch, CPU build" \
    "set KVBATON_TORCH_INDEX to an index that holds torch 2.13.0+cpu (default: $TORCH_CPU_INDEX)." install_torch
step "locked packages (requirements/cpu.txt)" "$network" \
    pip install --require-hashes -r requirements/cpu.txt
step "SGLang and NIXL without their CUDA requirements (requirements/cpu-nodeps.txt)" "$network" \
    pip install --no-deps --require-hashes -r requirements/cpu-nodeps.txt
step "kvbaton itself, editable" "read the log: the package does not build." \
    pip install --no-deps --no-build-isolation -e .
step "verification of the environment" "delete $VENV and run this script again." verify
printf '%s' "$want" >"$STAMP"
step "verification of kvbaton --help" "the environment is fine; the code in this checkout does not start." verify_command

grep '^torch .*| sglang' "$LOG"
say "Ready after $SECONDS s. Next: make demo, or $VENV/bin/kvbaton --help"
