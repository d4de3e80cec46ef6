"""Child processes that don't outlive this one, whatever ends it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# Becomes the command after asking Linux for a signal when the parent dies. No preexec_fn: forking a process that runs
# gRPC and then running Python in the fork is unsafe.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[2]):
    os.execvp(sys.argv[3], sys.argv[3:])
"""


def dying_with_parent(command: Sequence[str], number: signal.Signals) -> list[str]:
    """The command line that runs `command` and has it signalled when the thread that starts it ends (Linux only)."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(number)), str(os.getpid()), *command]


def describe_exit(status: int | None) -> str:
    """ "exited with status 3", "was killed by SIGKILL"."""
    if status is None:
        return "is running"
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
