"""How long to wait before the next attempt: exponential with jitter."""

from __future__ import annotations

import random


class Backoff:
    """Doubles from `first` to `longest` seconds; each wait is drawn from the upper half, so that a fleet spreads."""

    def __init__(self, first: float = 0.1, longest: float = 3.0) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """Seconds to wait now."""
        wait = self._next
        self._next = min(self._next * 2, self._longest)
        return wait * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next = self._first
