"""Whose fault a failed attempt was, as far as the breakers of its workers are concerned."""

from __future__ import annotations

import time

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.retry import EITHER_ONES_FAULT
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
_HAND_OVER_FAULTS = EITHER_ONES_FAULT | {Reason.FIRST_TOKEN_MISMATCH}


class Blame:
    """What the workers of one attempt are told of it, once."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._sent = 0.0
        self._handed_over = placement.prefill is None

    def sent(self) -> None:
        """The legs are on their way."""
        self._sent = time.monotonic()

    def handed_over(self) -> None:
        """The KV cache has come over, and is the request's."""
        self._handed_over = True
        assert self._placement.prefill is not None
        self._placement.prefill.breaker.succeeded()
        self._placement.decode.breaker.handed_over()

    def ended(self, *, answered: bool, error: RequestError | None) -> None:
        """The attempt is over: with a complete answer, by `error`, or because nobody wants it any more."""
        if answered:
            self._placement.decode.breaker.succeeded()
        elif error is not None:
            self._blame(error)

    def _blame(self, error: RequestError) -> None:
        if (worker := self._alone_at_fault(error)) is not None:
            worker.breaker.failed(str(error), sent=self._sent)
        elif error.reason in _HAND_OVER_FAULTS:
            # If one of the two is known to be bad, it is the one.
            innocent = [worker for worker in self._placement.workers if worker.breaker.closed]
            if len(innocent) == len(self._placement.workers):
                for worker in innocent:
                    worker.breaker.failed(str(error), sent=self._sent, shared=True)

    def _alone_at_fault(self, error: RequestError) -> Worker | None:
        if error.reason is Reason.DEADLINE_TOKEN_GAP:
            return self._placement.decode
        if error.reason in _HAND_OVER_FAULTS:
            return self._named(error) or self._placement.decode if self._handed_over else None
        return self._named(error) if is_workers_fault(error) else None

    def _named(self, error: RequestError) -> Worker | None:
        return next((worker for worker in self._placement.workers if worker.role.value == error.leg), None)


def is_workers_fault(error: RequestError) -> bool:
    """Whether the worker that the error names is to blame for it, and neither the request nor a partner."""
    if error.reason is Reason.UNTYPED:
        return error.code in _UNTYPED_FAULTS
    return error.reason in _ONES_OWN_FAULT
