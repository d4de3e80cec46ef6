"""How long each phase of a request may take, in seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.states import State


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The limits of one request, its length taken into account."""

    queue: float
    """Until workers are chosen."""
    prefill: float
    """From dispatch until prefill's token: hand-shake, prefill's queue and computation."""
    transfer: float
    """From prefill's token until decode's first."""
    token_gap: float
    """Between two tokens."""
    total: float


_REASONS = {
    State.ADMITTED: (Reason.DEADLINE_QUEUE, "no workers"),
    State.BOOTSTRAPPING: (Reason.DEADLINE_PREFILL, "prefill has not ended"),
    State.PREFILLING: (Reason.DEADLINE_PREFILL, "prefill has not ended"),
    State.TRANSFERRING: (Reason.DEADLINE_TRANSFER, "no first token from decode"),
    State.DECODING: (Reason.DEADLINE_TOKEN_GAP, "no further token"),
}


class DeadlineClock:
    """The next deadline of one running request."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        now = time.monotonic()
        self._total_at = now + deadlines.total
        self._phase = State.ADMITTED
        self._phase_seconds = deadlines.queue
        self._phase_at = now + deadlines.queue

    def enter(self, state: State) -> None:
        """The request is in this state now. Bootstrapping and prefilling share one deadline."""
        seconds = {
            State.ADMITTED: self._deadlines.queue,
            State.BOOTSTRAPPING: self._deadlines.prefill,
            State.TRANSFERRING: self._deadlines.transfer,
            State.DECODING: self._deadlines.token_gap,
        }.get(state)
        self._phase = state
        if seconds is not None:
            self._phase_seconds = seconds
            self._phase_at = time.monotonic() + seconds

    def renew(self, deadlines: Deadlines) -> None:
        """From the next phase on these count, for a longer prompt; the total stays what it was."""
        self._deadlines = deadlines

    def token(self) -> None:
        """A token came."""
        self._phase_at = time.monotonic() + self._deadlines.token_gap

    @property
    def deadline(self) -> float:
        """When the next one passes, on the monotonic clock."""
        return min(self._total_at, self._phase_at)

    def expired(self) -> RequestError:
        """The error of the deadline that has passed."""
        if self._total_at <= self._phase_at:
            reason, what, seconds = Reason.DEADLINE_TOTAL, "no end", self._deadlines.total
        else:
            reason, what = _REASONS[self._phase]
            seconds = self._phase_seconds
        return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, reason, f"{what} within {seconds:g} s")
