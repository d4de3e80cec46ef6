"""How long a request may take, in seconds: until its first token, between two tokens, and in all."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The limits of one request."""

    first_token: float
    token_gap: float
    total: float


class DeadlineClock:
    """The next deadline of one running request."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._total_at = time.monotonic() + deadlines.total
        self._phase_at = time.monotonic() + deadlines.first_token
        self._first_token = False

    def token(self) -> None:
        """A token came: from now on the gap counts."""
        self._first_token = True
        self._phase_at = time.monotonic() + self._deadlines.token_gap

    def remaining(self) -> float:
        """Seconds until the next deadline; not negative."""
        return max(0.0, min(self._total_at, self._phase_at) - time.monotonic())

    def expired(self) -> RequestError:
        """The error of the deadline that has passed."""
        if self._total_at <= self._phase_at:
            reason, what, seconds = Reason.DEADLINE_TOTAL, "no end", self._deadlines.total
        elif self._first_token:
            reason, what, seconds = Reason.DEADLINE_TOKEN_GAP, "no further token", self._deadlines.token_gap
        else:
            reason, what, seconds = Reason.DEADLINE_FIRST_TOKEN, "no first token", self._deadlines.first_token
        return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, reason, f"{what} within {seconds:g} s")
