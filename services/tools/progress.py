"""What is shown while a cluster starts: a live table on a terminal, one line per change of state elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from services.tools.terminal import say


@dataclass(slots=True)
class Row:
    """One process, or one step. Times are of the monotonic clock, in seconds."""

    name: str
    phase: str
    detail: str = ""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def seconds(self, now: float) -> float:
        """Since it began, until it was done."""
        return (now if self.ended is None else self.ended) - self.began


class Board:
    """The rows by name, in the order in which they were first set. `changed` hears of every new phase."""

    def __init__(self, changed: Callable[[Row], None] = lambda _: None) -> None:
        self.rows: dict[str, Row] = {}
        self._changed = changed

    def phase(self, name: str) -> str:
        """The last one; empty for an unknown name."""
        return self.rows[name].phase if name in self.rows else ""

    def set(self, name: str, phase: str, detail: str = "", *, done: bool = False, restart: bool = False) -> None:
        """What `name` is doing now. `done` stops its clock; `restart`, or a phase after that, starts it again."""
        row = self.rows.get(name)
        if row is None:
            row = self.rows[name] = Row(name, "")
        news = row.phase != phase
        if restart or (news and row.ended is not None):
            row.began, row.ended = time.monotonic(), None
        row.phase, row.detail = phase, detail
        if not done:
            row.ended = None
        elif row.ended is None:
            row.ended = time.monotonic()
        if news:
            self._changed(row)


def line(row: Row, since_start: float, now: float) -> str:
    """One change, as text."""
    detail = f"  {row.detail}" if row.detail else ""
    seconds = f" after {row.seconds(now):.1f} s" if row.ended is not None and row.seconds(now) >= 0.05 else ""
    return f"[{since_start:6.1f} s] {row.name:<12} {row.phase}{seconds}{detail}"


@contextmanager
def show(stream: TextIO) -> Generator[Board]:
    """A board that is visible on `stream` while the block runs."""
    if stream.isatty():
        try:
            import rich.console
            import rich.live
            import rich.spinner
        except ImportError:
            pass
        else:
            board = Board()
            spinner = rich.spinner.Spinner("dots", style="cyan")
            console = rich.console.Console(file=stream)
            with rich.live.Live(console=console, get_renderable=lambda: _table(board, spinner), refresh_per_second=8):
                yield board
            return
    yield lines(stream)


def lines(stream: TextIO) -> Board:
    """A board that writes one line per new phase."""
    start = time.monotonic()

    def changed(row: Row) -> None:
        now = time.monotonic()
        say(stream, line(row, now - start, now))

    return Board(changed)


_STYLES = {"starting": "yellow", "loading": "yellow", "warming": "cyan", "stopping": "yellow"}


def _table(board: Board, spinner: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    now = time.monotonic()
    for row in list(board.rows.values()):
        good = "red" if row.phase in ("failed", "killed") else "green"
        mark: Any = spinner if row.ended is None else Text("✘" if good == "red" else "✔", style=good)
        style = _STYLES.get(row.phase, "") if row.ended is None else good
        table.add_row(
            mark, row.name, Text(row.phase, style=style), f"{row.seconds(now):5.1f} s", Text(row.detail, style="dim")
        )
    return table
