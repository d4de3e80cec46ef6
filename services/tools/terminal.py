"""Text for people: to a terminal that may already be closed, in aligned columns."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TextIO


def say(stream: TextIO, text: str, *, end: str = "\n") -> None:
    """Writes and flushes. A closed terminal is no reason to stop what runs."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text + end)
        stream.flush()


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per row, two spaces between columns, nothing after the last one."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """For people: 4 s, 3 m 12 s, 2 h 5 m, 3 d 4 h."""
    whole = max(0, int(seconds))
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {small_unit}"
    return f"{whole} s"
