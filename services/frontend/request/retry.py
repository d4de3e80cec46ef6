"""Which failures other workers may cure, and which workers a request must do without."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.blame import EITHER_ONES_FAULT, Verdict
from services.frontend.router.placement import Incarnation, incarnation_of
from services.requests import Role

# The worker that says so, or that can't be reached, is at fault; its peer is not.
_ONE_WORKERS_FAULT = frozenset(
    {
        Reason.WORKER_UNREACHABLE,
        Reason.WORKER_SILENT,
        Reason.WORKER_NOT_SERVING,
        Reason.WORKER_DRAINING,
        Reason.SHUTTING_DOWN,
        Reason.ENGINE_DEAD,
        Reason.LEG_ENDED_EARLY,
    }
)
# That worker is gone or going: it comes back, or another process takes its place. One that is silent may stay so.
_LEAVES = _ONE_WORKERS_FAULT - {Reason.LEG_ENDED_EARLY, Reason.WORKER_SILENT}
_JITTER_SECONDS = 0.05


@dataclass
class RetryPolicy:
    """Further attempts of one request: how many before its first token, and on which workers."""

    retries_left: int
    # Those that failed it, by role those that may have, those of the last attempt among them, and those that are no
    # good to it.
    _failed: set[Incarnation] = field(default_factory=set[Incarnation])
    _suspects: dict[Role, set[Incarnation]] = field(default_factory=lambda: defaultdict(set))
    _latest: set[Incarnation] = field(default_factory=set[Incarnation])
    _unfit: set[Incarnation] = field(default_factory=set[Incarnation])

    def spend(self, error: RequestError) -> None:
        """One more try before the first token. Raises the error where there is none left."""
        if self.retries_left <= 0:
            raise error
        self.retries_left -= 1

    def failed(self, verdict: Verdict) -> None:
        """By these workers, or one of them, an attempt has failed."""
        self._latest = {incarnation_of(worker) for worker in verdict.suspects}
        if len(verdict.suspects) == 1:
            self._failed |= self._latest
            return
        for worker in verdict.suspects:
            self._suspects[worker.role].add(incarnation_of(worker))

    def exclude(self, unfit: Collection[Incarnation]) -> None:
        """These workers can't help, through no fault of theirs."""
        self._unfit.update(unfit)

    def forgive(self) -> None:
        """There is nobody else: who failed, even in the last attempt, is better than nobody."""
        self._failed.clear()
        self._suspects.clear()
        self._latest.clear()

    def exclusions(self) -> Iterator[frozenset[Incarnation]]:
        """Workers to do without, the safest choice first.

        Of two workers that may both be the cause one is innocent: without another pair, another prefill with the
        same decode will do, or the other way round. And what failed an earlier attempt may serve again by now.
        """
        suspects, certain = self._suspects, self._failed | self._unfit
        yield frozenset(certain.union(*suspects.values()))
        for role in list(suspects):
            yield frozenset(certain | suspects[role])
        if not certain <= (forgiving := self.avoided()):
            yield forgiving

    def avoided(self) -> frozenset[Incarnation]:
        """What to wait without where nothing else is left: the last attempt's failures."""
        return frozenset(self._latest | self._unfit)

    def pause(self) -> float:
        """Seconds until the next attempt: a little, and not the same for every request of a failed worker."""
        return random.uniform(0, _JITTER_SECONDS)


def retryable(error: RequestError) -> bool:
    """Whether the failure was the workers' and not the request's."""
    if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED):
        return False
    return error.reason in _ONE_WORKERS_FAULT | EITHER_ONES_FAULT


def leaves(error: RequestError) -> bool:
    """Whether the worker is on its way out, so that waiting for it or its successor makes sense."""
    return error.reason in _LEAVES
