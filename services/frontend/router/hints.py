"""Which workers a request names for itself, and whether it can have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.frontend.router.worker import Worker
from services.requests import Role


@dataclass(frozen=True, slots=True)
class Hints:
    """Instance ids; empty where the policy chooses. Taken under every policy."""

    prefill: str = ""
    decode: str = ""
    optional: bool = False
    """Missing names are nobody's mistake, whatever the policy: a probe tries whoever is there."""

    @classmethod
    def of(cls, request: generate_pb2.GenerateRequest, *, optional: bool = False) -> Hints:
        """What the request names."""
        return cls(request.prefill_worker, request.decode_worker, optional)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


NO_HINTS = Hints()

_STREAMING = (Role.DECODE, Role.AGGREGATED)


def unmet(hints: Hints, model: str, workers: Sequence[Worker]) -> RequestError:
    """Why the model's `workers`, of which some can be routed to, can't serve a request with these hints.

    NOT_FOUND for a name that is none of theirs, UNAVAILABLE for a worker that no request can go to now.
    """
    named = [
        _named("prefill_worker", hints.prefill, (Role.PREFILL,), model, workers),
        _named("decode_worker", hints.decode, _STREAMING, model, workers),
    ]
    for worker in named:
        if isinstance(worker, RequestError):
            return worker
    if isinstance(named[1], Worker) and named[1].role is Role.AGGREGATED and hints.prefill:
        return invalid("prefill_worker", f"decode_worker {hints.decode!r} is aggregated: it needs no prefill worker")
    field = "prefill_worker" if hints.prefill else "decode_worker"
    return RequestError(
        grpc.StatusCode.UNAVAILABLE,
        Reason.NO_COMPATIBLE_PAIR,
        f"{field}: {hints.prefill or hints.decode!r} has no worker that it can hand a KV cache over with",
        field=field,
        retry_after=1.0,
    )


def required(field: str) -> RequestError:
    """INVALID_ARGUMENT: under the policy "direct" a request names its workers."""
    flag = "--prefill-policy" if field == "prefill_worker" else "--decode-policy"
    return invalid(field, f"missing: {flag} is direct, so every request names its worker")


def _named(
    field: str, name: str, roles: tuple[Role, ...], model: str, workers: Sequence[Worker]
) -> Worker | RequestError | None:
    if not name:
        return None
    found = [worker for worker in workers if worker.role in roles and worker.record.model.name == model]
    worker = next((each for each in found if each.instance_id == name), None)
    if worker is None:
        there_is = ", ".join(each.instance_id for each in found) or "none"
        return RequestError(
            grpc.StatusCode.NOT_FOUND,
            Reason.WORKER_NOT_FOUND,
            f"{field}: model {model!r} has no {roles[0]} worker {name!r} here; there is {there_is}",
            field=field,
        )
    if not worker.routable:
        return RequestError(
            grpc.StatusCode.UNAVAILABLE,
            Reason.WORKER_NOT_SERVING,
            f"{field}: no request can go to {name!r}: {worker.reason}",
            field=field,
            worker=name,
            retry_after=1.0,
        )
    return worker
