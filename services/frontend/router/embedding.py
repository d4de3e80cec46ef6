"""Which worker embeds the next request of a model."""

from __future__ import annotations

from collections.abc import Collection

import grpc

from kvbaton.errors import Reason, RequestError
from services.embedding_requests import EmbeddingSize
from services.frontend.router.served import resolve_name, why_unroutable
from services.frontend.router.worker import Worker
from services.frontend.router.worker_set import WorkerSet
from services.modes import EMBED
from services.requests import Limits, Role


class EmbeddingRouter:
    """The worker with the fewest calls of this frontend; equal ones in turn."""

    def __init__(self, workers: WorkerSet, *, max_calls: int) -> None:
        """At most `max_calls` at once on each worker."""
        self._workers = workers
        self._max_calls = max_calls
        self._turn = 0

    def find_model(self, name: str) -> Worker:
        """A worker that knows the model. Raises RequestError as `resolve_name`, and UNAVAILABLE when nothing serves."""
        return self._routable(resolve_name(name, self._workers, EMBED))[0]

    def limits(self, model: str) -> tuple[Limits, EmbeddingSize]:
        """What every worker takes that may embed the model's next request. Raises RequestError when there is none."""
        workers = self._routable(model)
        sizes = [EmbeddingSize.from_proto(worker.record.runtime.embedding) for worker in workers]
        return Limits.smallest([worker.limits for worker in workers]), min(sizes, key=lambda size: size.dimension)

    def require_room(self, model: str) -> None:
        """Raises RequestError, RESOURCE_EXHAUSTED, when every worker of the model is full."""
        self._free(model, ())

    def choose(self, model: str, excluded: Collection[str] = ()) -> Worker:
        """The next one without `excluded` instance ids. Raises RequestError: UNAVAILABLE, RESOURCE_EXHAUSTED."""
        free = self._free(model, excluded)
        fewest = min(worker.live_requests for worker in free)
        idlest = [worker for worker in free if worker.live_requests == fewest]
        self._turn += 1
        return idlest[self._turn % len(idlest)]

    def _free(self, model: str, excluded: Collection[str]) -> list[Worker]:
        workers = [worker for worker in self._routable(model) if worker.instance_id not in excluded]
        if not workers:
            raise self._no_worker(model)
        free = [worker for worker in workers if worker.live_requests < self._max_calls]
        if not free:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_REQUESTS,
                f"every embedding worker of model {model!r} has {self._max_calls} calls of this frontend,"
                " as many as --max-embedding-calls",
                retry_after=1.0,
            )
        return free

    def _routable(self, model: str) -> list[Worker]:
        workers = self._workers.routable(Role.EMBEDDING, model)
        if not workers:
            raise self._no_worker(model)
        return workers

    def _no_worker(self, model: str) -> RequestError:
        subject = f"model {model!r}" if model else "any model"
        known = [worker for worker in self._workers.all() if worker.role is Role.EMBEDDING]
        return RequestError(
            grpc.StatusCode.UNAVAILABLE,
            Reason.NO_WORKER,
            f"no embedding worker can be routed to for {subject}{why_unroutable(known, model)}",
            retry_after=1.0,
        )
