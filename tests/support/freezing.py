"""Freezing processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def freeze(pid: int, within: float = 10.0) -> None:
    """SIGSTOP; returns when every thread stands still. Until one of them has taken the signal, the others run on."""
    os.kill(pid, signal.SIGSTOP)
    ends = time.monotonic() + within
    while not all(_stands(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < ends, f"process {pid} does not stop"
        time.sleep(0.002)


def thaw(pid: int) -> None:
    """SIGCONT."""
    os.kill(pid, signal.SIGCONT)


def _stands(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended since it was listed
