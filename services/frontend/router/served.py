"""Which model a request means: names are shared by the workers that generate with a model and those that embed."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.router.worker import Worker
from services.frontend.router.worker_set import WorkerSet
from services.modes import mode_of
from services.requests import Role


def resolve_name(name: str, workers: WorkerSet, *wanted: str) -> str:
    """The name of the model, which an empty `name` stands for if it is the only one that takes a `wanted` RPC.

    Perhaps of a model whose last worker has left lately: clients are to come again, not to give up. Empty when no
    worker takes such an RPC. Raises RequestError: NOT_FOUND, FAILED_PRECONDITION for a model that takes other requests,
    INVALID_ARGUMENT when the name is needed.
    """
    rpcs = _rpcs_by_name(workers.kinds())
    names = sorted(known for known, taken in rpcs.items() if taken.intersection(wanted))
    left = _rpcs_by_name(workers.left_lately())
    names_left = sorted(known for known, taken in left.items() if taken.intersection(wanted))
    if name in names or name in names_left:
        return name
    if name in rpcs:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.WRONG_ROLE,
            f"model: {name!r} takes {' and '.join(sorted(rpcs[name]))} here, not {' or '.join(wanted)}",
            field="model",
        )
    if name and rpcs:
        raise RequestError(
            grpc.StatusCode.NOT_FOUND,
            Reason.MODEL_NOT_FOUND,
            f"model: {name!r} is not served here; there is {', '.join(names) or 'none'}",
            field="model",
        )
    if not name and len(names) > 1:
        raise RequestError(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.INVALID_FIELD,
            f"model: missing, and there is more than one: {', '.join(names)}",
            field="model",
        )
    return name or next(iter(names or names_left), "")


def _rpcs_by_name(known: Iterable[tuple[str, Role]]) -> dict[str, set[str]]:
    rpcs: dict[str, set[str]] = {}
    for name, role in known:
        rpcs.setdefault(name, set()).add(mode_of(role).rpc)
    return rpcs


def why_unroutable(workers: Iterable[Worker], model: str) -> str:
    """The reasons of a model's that can't be routed to, in brackets behind a space; empty when there are none.

    An empty `model` means every model.
    """
    workers = [worker for worker in workers if not model or worker.record.model.name == model]
    states = "; ".join(f"{worker.instance_id}: {worker.reason}" for worker in workers if not worker.routable)
    return f" ({states})" if states else ""
