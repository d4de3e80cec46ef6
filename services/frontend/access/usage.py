"""Where is it counted what a key uses: in this process, or in files that all processes of a frontend write?"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_CELL_BYTES = 8


class Cells(Protocol):
    """Numbers that may be shared memory."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...
    def __iter__(self) -> Iterator[float]: ...


@dataclass(frozen=True, slots=True)
class Usage:
    """One key's. Nothing is locked: in shared memory two requests of the same microsecond may count as one."""

    full_at: Cells
    """One number, `RequestRate`'s."""

    running_by_process: Cells
    own: int
    """The place of this process in it."""

    @property
    def running(self) -> int:
        """Requests, in all processes."""
        return int(sum(self.running_by_process))

    def add(self, change: int) -> None:
        """So many more run in this process."""
        self.running_by_process[self.own] += change


def own_usage(_: str) -> Usage:
    """Of a process alone."""
    return Usage([float("-inf")], [0.0], 0)


def forget_usage(folder: Path, number: int) -> None:
    """What ran in a process that has ended runs no more."""
    for path in _keys_of(folder).glob("*"):
        with contextlib.suppress(OSError), path.open("r+b") as cells:
            cells.seek(number * _CELL_BYTES)  # behind `full_at`
            cells.write(bytes(_CELL_BYTES))


def _keys_of(folder: Path) -> Path:
    return folder / "keys"


class SharedUsages:
    """Of the processes numbered 1 to `count` that share `folder`. Their clock must be the machine's (monotonic)."""

    def __init__(self, folder: Path, number: int, count: int) -> None:
        self._folder = _keys_of(folder)
        self._folder.mkdir(exist_ok=True)
        self._number, self._count = number, count
        self._known: dict[str, Usage] = {}

    def __call__(self, name: str) -> Usage:
        """The same each time, so that requests of a key that went and came back still count. Raises OSError."""
        if name not in self._known:
            self._known[name] = self._open(name)
        return self._known[name]

    def _open(self, name: str) -> Usage:
        # A key's name is a file's, too: see `check_name`. New cells are zero: a bucket that was full at boot.
        size = (1 + self._count) * _CELL_BYTES
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size)
            cells = memoryview(mmap.mmap(descriptor, size)).cast("d")
        finally:
            os.close(descriptor)
        running = cells[1:]
        running[self._number - 1] = 0.0  # what ran in the process whose place this one takes
        return Usage(cells[:1], running, self._number - 1)
