"""Whose fault a failed attempt was: what the breakers of its workers are told, and whom the next attempt avoids."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.router.placement import Placement
from services.frontend.router.worker import Worker

# Of the worker that says so, or that the frontend says it of. Draining, full and refusing workers do as they should.
_ONES_OWN_FAULT = frozenset(
    {
        Reason.WORKER_UNREACHABLE,
        Reason.WORKER_SILENT,
        Reason.ENGINE_DEAD,
        Reason.LEG_ENDED_EARLY,
        Reason.INTERNAL,
    }
)
_UNTYPED_FAULTS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
# A hand-over that failed, or took too long: either side may be the cause.
EITHER_ONES_FAULT = frozenset({Reason.ENGINE_ABORTED, Reason.DEADLINE_PREFILL, Reason.DEADLINE_TRANSFER})


@dataclass(frozen=True, slots=True)
class Verdict:
    """By whom an attempt has failed."""

    suspects: tuple[Worker, ...]
    """One of them has; nobody knows which of several."""
    faulty: bool
    """Whether that speaks against a worker. One that drains, say, is no good to the request, but does as it should."""


class Blame:
    """Of one attempt.

    Its KV cache is handed over when decode gives its first token, which it can't have without the whole of it. That it
    is this request's shows when that token is prefill's too.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._sent = 0.0
        self._handed_over = placement.prefill is None

    def sent(self) -> None:
        """The legs are on their way."""
        self._sent = time.monotonic()

    def handed_over(self) -> None:
        """What goes wrong from now on is not the hand-over."""
        self._handed_over = True

    def proven(self) -> None:
        """The KV cache that was handed over is the request's."""
        assert self._placement.prefill is not None
        self._placement.prefill.breaker.succeeded()
        self._placement.decode.breaker.handed_over()

    def ended(self, *, answered: bool, error: RequestError | None) -> None:
        """The attempt is over: with a complete answer, by `error`, or because nobody wants it any more. Once."""
        if answered:
            self._placement.decode.breaker.succeeded()
        elif error is not None:
            self._tell_breakers(error)

    def verdict(self, error: RequestError) -> Verdict:
        """On what the attempt has failed by."""
        workers, named = tuple(self._placement.workers), self._named(error)
        if error.reason is Reason.DEADLINE_TOKEN_GAP:
            return Verdict((self._placement.decode,), faulty=True)
        if error.reason is Reason.FIRST_TOKEN_MISMATCH:
            return Verdict(workers, faulty=True)
        if error.reason in EITHER_ONES_FAULT:
            return Verdict((named or self._placement.decode,) if self._handed_over else workers, faulty=True)
        if named is None:
            return Verdict(workers, faulty=False)
        return Verdict((named,), faulty=is_workers_fault(error))

    def _tell_breakers(self, error: RequestError) -> None:
        verdict = self.verdict(error)
        shared = len(verdict.suspects) > 1
        # If one of several is known to be bad, it is the one.
        if verdict.faulty and not (shared and any(not worker.breaker.closed for worker in verdict.suspects)):
            for worker in verdict.suspects:
                worker.breaker.failed(str(error), sent=self._sent, shared=shared)

    def _named(self, error: RequestError) -> Worker | None:
        return next((worker for worker in self._placement.workers if worker.role.value == error.leg), None)


def is_workers_fault(error: RequestError) -> bool:
    """Whether the worker that the error names is to blame for it, and neither the request nor a partner."""
    if error.reason is Reason.UNTYPED:
        return error.code in _UNTYPED_FAULTS
    return error.reason in _ONES_OWN_FAULT
