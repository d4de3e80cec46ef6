"""An event loop whose time passes only while nobody has anything to do: seconds of waiting cost nothing.

So a play takes as long as its computing, and its times depend neither on the machine nor on what else runs there. Only
for code that waits by the loop alone: no sockets, no threads.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class SimulatedClock(asyncio.SelectorEventLoop):
    """Starts at 0 seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        """Seconds since the start."""
        return self.now


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: what the loop would have slept, its clock has passed."""

    def __init__(self, loop: SimulatedClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        """See `selectors`. Without a timer only another thread could wake the loop: then it really waits."""
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0:
            self._loop.now += timeout
        return ready
