"""Which workers can run a model's requests together: every worker that streams answers, with whom it can pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import model_pb2
from services.frontend.link.load import LegShare
from services.frontend.link.protocol import Credit
from services.frontend.router.hints import NO_HINTS, Hints, unmet
from services.frontend.router.served import resolve_name, why_unroutable
from services.frontend.router.worker import Worker
from services.frontend.router.worker_set import WorkerSet
from services.modes import EMBED, GENERATE
from services.registry.compat import describe_differences
from services.requests import Limits, Role

# One process of a worker. Another role may have its instance id, and so has the process that takes its place.
Incarnation = str


def incarnation_of(worker: Worker) -> Incarnation:
    """The uuid of its record."""
    return worker.record.incarnation.uuid


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of one attempt. `prefill` is None when `decode` is an aggregated worker. `credit` is decode's.

    A rank of None leaves the choice to the engine. The shares are the legs' parts of their workers' loads. `routing` is
    how many seconds the choice took.
    """

    decode: Worker
    prefill: Worker | None = None
    credit: Credit | None = None
    routing: float = 0.0
    decode_rank: int | None = None
    prefill_rank: int | None = None
    decode_share: LegShare | None = None
    prefill_share: LegShare | None = None

    @property
    def workers(self) -> list[Worker]:
        """All workers of the request."""
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]

    def share_of(self, worker: Worker) -> LegShare | None:
        """The part of the leg that runs there."""
        return self.decode_share if worker is self.decode else self.prefill_share

    def give_back(self) -> None:
        """Nothing was sent, and nothing will be."""
        if self.credit is not None:
            self.decode.link.give_back(self.credit)
        for share in (self.decode_share, self.prefill_share):
            if share is not None:
                share.end()


@dataclass(frozen=True, slots=True)
class Target:
    """A worker that streams answers: a decode worker with the prefill workers that fit it, or an aggregated one."""

    decode: Worker
    prefills: tuple[Worker, ...] = ()

    @property
    def aggregated(self) -> bool:
        """Whether it needs no prefill worker."""
        return self.decode.role is Role.AGGREGATED

    @property
    def workers(self) -> list[Worker]:
        """All of them."""
        return [self.decode, *self.prefills]

    def possible(self, excluded: frozenset[Incarnation], hints: Hints = NO_HINTS) -> bool:
        """Whether it can run a request without the `excluded` workers, on those that `hints` name."""
        if hints.decode not in ("", self.decode.instance_id) or (excluded and incarnation_of(self.decode) in excluded):
            return False
        if self.aggregated:
            return not hints.prefill
        return any(True for _ in self.prefills_for(excluded, hints))

    def prefills_for(self, excluded: frozenset[Incarnation], hints: Hints) -> Iterator[Worker]:
        """The prefill workers that such a request may go to."""
        if not excluded and not hints.prefill:
            return iter(self.prefills)
        return (
            prefill
            for prefill in self.prefills
            if incarnation_of(prefill) not in excluded and hints.prefill in ("", prefill.instance_id)
        )


class Router:
    """What can be routed to, by model. Computed when workers change, not for every request."""

    def __init__(self, workers: WorkerSet) -> None:
        self._workers = workers
        self._targets: dict[str, list[Target]] | None = None
        self._limits: dict[str, Limits] = {}
        workers.on_change(self._forget)

    def models(self) -> list[model_pb2.ModelInfo]:
        """Every model that has targets, or workers that embed with it, by name."""
        infos = {
            name: target.decode.model_info
            for name, targets in self._all().items()
            for target in targets
            if target.decode.model_info is not None
        }
        for worker in self._workers.routable(Role.EMBEDDING):
            if worker.model_info is not None:
                name = worker.record.model.name
                infos[name] = _with_embedding(infos.get(name), worker.model_info)
        return [infos[name] for name in sorted(infos)]

    def targets(self, model: str) -> Sequence[Target]:
        """Who can stream the model's answers now, in a stable order; empty when nobody can."""
        return self._all().get(model, ())

    def known(self) -> list[Worker]:
        """Every worker."""
        return self._workers.all()

    def streaming(self) -> list[Worker]:
        """Every worker whose legs need a credit, routable or not."""
        return [worker for worker in self._workers.all() if worker.role in (Role.DECODE, Role.AGGREGATED)]

    def find_model(self, name: str) -> Worker:
        """A worker that knows the model; an empty name means the only one.

        Raises RequestError: NOT_FOUND, INVALID_ARGUMENT when the name is needed, UNAVAILABLE when nothing serves.
        """
        model = resolve_name(name, self._workers, GENERATE)
        targets = self.targets(model)
        if not targets:
            raise self.no_worker(model)
        return targets[0].decode

    def find_text(self, name: str) -> tuple[Worker, Limits]:
        """A worker that has the tokenizer of a model that `models` has, and what all of the model's workers take.

        Raises RequestError as `find_model`, for embedding models too.
        """
        model = resolve_name(name, self._workers, GENERATE, EMBED)
        if targets := self.targets(model):
            return targets[0].decode, self.limits(model)
        if embedding := self._workers.routable(Role.EMBEDDING, model):
            return embedding[0], Limits.smallest([worker.limits for worker in embedding])
        raise self.no_worker(model)

    def limits(self, model: str) -> Limits:
        """What every pair that may run the model's next request takes. Raises RequestError when there is none."""
        targets = self.targets(model)
        if not targets:
            raise self.no_worker(model)
        if model not in self._limits:
            self._limits[model] = Limits.smallest([worker.limits for target in targets for worker in target.workers])
        return self._limits[model]

    def unmet(self, model: str, hints: Hints) -> RequestError:
        """Why nobody can serve a request for the model with these hints."""
        return unmet(hints, model, self._workers.all()) if hints and self.targets(model) else self.no_worker(model)

    def no_worker(self, model: str) -> RequestError:
        """UNAVAILABLE, with what is missing."""
        wanted = model or None
        prefill, decode = self._workers.routable(Role.PREFILL, wanted), self._workers.routable(Role.DECODE, wanted)
        subject = f"model {model!r}" if model else "any model"
        if decode and not prefill:
            reason, what = Reason.NO_PREFILL_WORKER, "no prefill worker"
        elif prefill and not decode:
            reason, what = Reason.NO_DECODE_WORKER, "no decode worker"
        elif prefill and decode:
            apart = describe_differences([w.record for w in decode], [w.record for w in prefill])
            reason, what = (
                Reason.NO_COMPATIBLE_PAIR,
                "no prefill and decode worker that fit each other" + (f" ({apart})" if apart else ""),
            )
        else:
            reason, what = Reason.NO_WORKER, "no worker"
        known = [worker for worker in self._workers.all() if worker.role is not Role.EMBEDDING]
        return RequestError(
            grpc.StatusCode.UNAVAILABLE,
            reason,
            f"{what} can be routed to for {subject}{why_unroutable(known, model)}",
            retry_after=1.0,
        )

    def _forget(self) -> None:
        self._targets = None
        self._limits.clear()

    def _all(self) -> dict[str, list[Target]]:
        if self._targets is None:
            prefills: defaultdict[tuple[str, str], list[Worker]] = defaultdict(list)
            for worker in self._workers.routable(Role.PREFILL):
                prefills[_pairs_by(worker)].append(worker)
            targets: defaultdict[str, list[Target]] = defaultdict(list)
            for decode in self._workers.routable(Role.DECODE):
                if partners := prefills.get(_pairs_by(decode)):
                    targets[decode.record.model.name].append(Target(decode, tuple(partners)))
            for worker in self._workers.routable(Role.AGGREGATED):
                targets[worker.record.model.name].append(Target(worker))
            self._targets = dict(targets)
        return self._targets


def _pairs_by(worker: Worker) -> tuple[str, str]:
    """What a prefill and a decode worker must have in common."""
    return (worker.record.model.name, worker.record.compat_hash)


def _with_embedding(generating: model_pb2.ModelInfo | None, embedding: model_pb2.ModelInfo) -> model_pb2.ModelInfo:
    """One entry of a model that other workers may generate with."""
    if generating is None or set(embedding.rpcs) <= set(generating.rpcs):
        return generating or embedding
    both = model_pb2.ModelInfo()
    both.CopyFrom(generating)
    both.rpcs.extend(embedding.rpcs)
    both.runtime.embedding.CopyFrom(embedding.runtime.embedding)
    return both
