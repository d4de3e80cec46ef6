"""Which model a request means: names are shared by the workers that generate with a model and those that embed."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.router.worker import Worker
from services.modes import mode_of


def resolve_name(name: str, workers: Iterable[Worker], rpc: str) -> str:
    """The name of the model, which an empty `name` stands for if it is the only one that takes `rpc`.

    Empty when no worker takes it. Raises RequestError: NOT_FOUND, FAILED_PRECONDITION for a model that takes other
    requests, INVALID_ARGUMENT when the name is needed.
    """
    rpcs: dict[str, set[str]] = {}
    for worker in workers:
        rpcs.setdefault(worker.record.model.name, set()).add(mode_of(worker.role).rpc)
    names = sorted(known for known, taken in rpcs.items() if rpc in taken)
    if name in names:
        return name
    if name in rpcs:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.WRONG_ROLE,
            f"model: {name!r} takes {' and '.join(sorted(rpcs[name]))} here, not {rpc}",
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
    return name or next(iter(names), "")


def why_unroutable(workers: Iterable[Worker]) -> str:
    """The reasons of those that can't be routed to, in brackets behind a space; empty when there are none."""
    states = "; ".join(f"{worker.instance_id}: {worker.reason}" for worker in workers if not worker.routable)
    return f" ({states})" if states else ""
