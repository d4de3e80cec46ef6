"""How many requests a minute may a key send? GCRA: a bucket of tokens that is one number.

Of the libraries, `limits` takes the time of day from the operating system and `aiolimiter` waits instead of refusing;
neither says when to come back, which is what a client needs to be told.
"""

from __future__ import annotations

from services.frontend.access.usage import Cells

_MINUTE = 60.0
# Of a token. Times are floats: what adds up to exactly one minute must not be a rounding error more.
_TOLERANCE = 1e-6


class RequestRate:
    """A bucket that holds one minute's requests and fills evenly; full at first. Times are seconds of any one clock."""

    def __init__(self, per_minute: int, full_at: Cells | None = None) -> None:
        """`full_at` is where its one number is kept, if others take from the same bucket."""
        self.per_minute = per_minute
        self._full_at: Cells = [float("-inf")] if full_at is None else full_at

    def take(self, now: float) -> float:
        """Takes one request out of the bucket: 0.0, or the seconds until there is one, with nothing taken."""
        full_at = max(self._full_at[0], now) + self._interval
        early = full_at - now - _MINUTE
        if early > self._interval * _TOLERANCE:
            return early
        self._full_at[0] = full_at
        return 0.0

    def remaining(self, now: float) -> int:
        """How many requests are in the bucket."""
        return int((_MINUTE - self.seconds_to_full(now)) / self._interval + _TOLERANCE)

    def seconds_to_full(self, now: float) -> float:
        """Until the bucket is full, if nobody takes anything."""
        return max(0.0, self._full_at[0] - now)

    @property
    def _interval(self) -> float:
        return _MINUTE / self.per_minute
