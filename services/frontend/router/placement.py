"""Which workers run one request: round-robin over the pairs that can hand a KV cache to each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import model_pb2
from services.frontend.router.worker import Worker
from services.frontend.router.worker_set import WorkerSet
from services.requests import Limits, Role


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when `decode` is an aggregated worker."""

    decode: Worker
    prefill: Worker | None = None

    @property
    def workers(self) -> list[Worker]:
        """All workers of the request."""
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]


class RoundRobinRouter:
    """Decode (and aggregated) workers in turn, each with the prefill workers that fit it in turn."""

    def __init__(self, workers: WorkerSet) -> None:
        self._workers = workers
        # By model: one model's traffic doesn't shift another's turn.
        self._turns: Counter[str] = Counter()

    def models(self) -> list[model_pb2.ModelInfo]:
        """Every model for which `choose` finds workers, by name."""
        infos: dict[str, model_pb2.ModelInfo] = {}
        for worker in self._targets(None):
            if worker.model_info is not None:
                infos.setdefault(worker.record.model.name, worker.model_info)
        return [infos[name] for name in sorted(infos)]

    def find_model(self, name: str) -> Worker:
        """A worker that knows the model; an empty name means the only one.

        Raises RequestError: NOT_FOUND, INVALID_ARGUMENT when the name is needed, UNAVAILABLE when nothing serves.
        """
        names = {worker.record.model.name for worker in self._workers.all()}
        if name and name not in names:
            if not names:
                raise self._no_worker(name)
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                Reason.MODEL_NOT_FOUND,
                f"model: {name!r} is not served here; there is {', '.join(sorted(names)) or 'none'}",
                field="model",
            )
        if not name and len(names) > 1:
            raise RequestError(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.INVALID_FIELD,
                f"model: missing, and there is more than one: {', '.join(sorted(names))}",
                field="model",
            )
        targets = self._targets(name or None)
        if not targets:
            raise self._no_worker(name)
        return targets[0]

    def limits(self, model: str) -> Limits:
        """What every pair that may run the model's next request takes. Raises RequestError when there is none."""
        targets = self._targets(model)
        if not targets:
            raise self._no_worker(model)
        prefills = [prefill for decode in targets for prefill in self._prefills_for(decode)]
        return Limits.smallest([worker.limits for worker in (*targets, *prefills)])

    def choose(self, model: str, excluded: frozenset[str] = frozenset()) -> Placement:
        """The workers of the next request, without those of the `excluded` instance ids.

        Raises RequestError with UNAVAILABLE and what is missing.
        """
        targets = self._targets(model, excluded)
        if not targets:
            raise self._no_worker(model)
        rounds, turn = divmod(self._turns[model], len(targets))
        self._turns[model] += 1
        decode = targets[turn]
        if decode.role is Role.AGGREGATED:
            return Placement(decode)
        prefills = self._prefills_for(decode, excluded)
        # One further in every round, so that in time every pair is used.
        return Placement(decode, prefills[(rounds + turn) % len(prefills)])

    def _targets(self, model: str | None, excluded: frozenset[str] = frozenset()) -> list[Worker]:
        """Workers that can stream an answer: aggregated ones, and decode workers with a prefill worker that fits."""
        decodes = [
            worker for worker in self._workers.routable(Role.DECODE, model) if self._prefills_for(worker, excluded)
        ]
        candidates = decodes + self._workers.routable(Role.AGGREGATED, model)
        return [worker for worker in candidates if worker.instance_id not in excluded]

    def _prefills_for(self, decode: Worker, excluded: frozenset[str] = frozenset()) -> list[Worker]:
        if decode.role is Role.AGGREGATED:
            return []
        return [
            worker
            for worker in self._workers.routable(Role.PREFILL, decode.record.model.name)
            if worker.record.compat_hash == decode.record.compat_hash and worker.instance_id not in excluded
        ]

    def _no_worker(self, model: str) -> RequestError:
        wanted = model or None
        prefill, decode = self._workers.routable(Role.PREFILL, wanted), self._workers.routable(Role.DECODE, wanted)
        subject = f"model {model!r}" if model else "any model"
        if decode and not prefill:
            reason, what = Reason.NO_PREFILL_WORKER, "no prefill worker"
        elif prefill and not decode:
            reason, what = Reason.NO_DECODE_WORKER, "no decode worker"
        elif prefill and decode:
            reason, what = Reason.NO_COMPATIBLE_PAIR, "no prefill and decode worker with equal compat hashes"
        else:
            reason, what = Reason.NO_WORKER, "no worker"
        states = "; ".join(f"{w.instance_id}: {w.reason}" for w in self._workers.all() if not w.routable)
        return RequestError(
            grpc.StatusCode.UNAVAILABLE,
            reason,
            f"{what} can be routed to for {subject}" + (f" ({states})" if states else ""),
            retry_after=1.0,
        )
