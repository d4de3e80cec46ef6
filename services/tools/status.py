"""`kvbaton status`: every worker, what it says of itself, and what the frontend thinks of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from google.protobuf import duration_pb2

from kvbaton.v1 import health_pb2, worker_pb2
from services.config.common import EtcdFlags
from services.config.flags import ConfigError, add_flags, build
from services.tools.client_flags import ClientFlags
from services.tools.terminal import columns, duration, say
from services.tools.topology import Seen, Topology, look

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

_CALL_TIMEOUT = 3.0
_SUSPECT = (health_pb2.BREAKER_STATE_OPEN, health_pb2.BREAKER_STATE_HALF_OPEN)
_HEADINGS = ("ROLE", "INSTANCE", "STATE", "ENDPOINT", "MODEL", "PAGES", "LIVE", "TOKENS", "AGE", "ETCD", "ROUTABLE")


def add_arguments(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `kvbaton status`."""
    parser = commands.add_parser(
        "status",
        help="every worker, its load, and whether requests can go to it",
        allow_abbrev=False,
        epilog="Exit status 0 when something serves: the frontend when it answers, otherwise any worker.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    add_flags(parser, ClientFlags)
    add_flags(parser, EtcdFlags)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace, _: list[str]) -> int:
    """0 when something serves, 1 otherwise."""
    flags, etcd = build(ClientFlags, parsed, os.environ), build(EtcdFlags, parsed, os.environ)
    try:
        topology = asyncio.run(
            look(etcd, lambda endpoint: flags.client(endpoint, call_timeout=_CALL_TIMEOUT), flags.endpoint)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        return 130
    if parsed.json:
        say(sys.stdout, json.dumps(as_json(topology, time.time()), indent=2))
    else:
        say(sys.stdout, as_text(topology, flags.endpoint, etcd, time.time()))
    return 0 if topology.serving else 1


def as_text(topology: Topology, endpoint: str, etcd: EtcdFlags, now: float) -> str:
    """The whole page. `now` in seconds since the epoch."""
    found = len([worker for worker in topology.workers if worker.in_etcd])
    etcd_says = topology.etcd_problem or f"{found} worker{'' if found == 1 else 's'} in namespace {etcd.namespace}"
    head = columns(
        [
            ["frontend", endpoint, _frontend_says(topology, now)],
            ["etcd", etcd.etcd_endpoints, f"unreachable: {etcd_says}" if topology.etcd_problem else etcd_says],
            *([["", "the frontend's view", _view(topology.frontend.registry)]] if topology.frontend else []),
        ]
    )
    if not topology.workers:
        return "\n".join([*head, "", "No worker is known."])
    table = columns([_HEADINGS, *(_row(worker, topology, now) for worker in topology.workers)])
    problems = [f"  {worker.record.instance_id}: {worker.problem}" for worker in topology.workers if worker.problem]
    return "\n".join([*head, "", *table, *(["", "Unreachable:", *problems] if problems else [])])


def as_json(topology: Topology, now: float) -> dict[str, object]:
    """The same for programs; null where something is not known."""
    frontend = topology.frontend
    return {
        "serving": topology.serving,
        "frontend": None
        if frontend is None
        else {
            "state": _state_name(frontend.state),
            "live_requests": frontend.load.live_requests,
            "registry_age_seconds": _seconds(frontend.registry.age) if frontend.registry.HasField("age") else None,
            "registry_problem": frontend.registry.problem or None,
        },
        "frontend_problem": topology.frontend_problem or None,
        "etcd_problem": topology.etcd_problem or None,
        "workers": [_worker_json(worker, now) for worker in topology.workers],
    }


def _frontend_says(topology: Topology, now: float) -> str:
    status = topology.frontend
    if status is None:
        return f"unreachable: {topology.frontend_problem}"
    state = (
        "no model can be served yet" if status.state == worker_pb2.WORKER_STATE_STARTING else _state_name(status.state)
    )
    age = duration(now - status.started_at.ToNanoseconds() / 1e9)
    return f"{state}, {status.load.live_requests} live requests, up for {age}"


def _view(registry: health_pb2.RegistryView) -> str:
    """How old the frontend's list of workers is, and why it is old."""
    age = f"{duration(_seconds(registry.age))} old" if registry.HasField("age") else "etcd has never answered it"
    if not registry.problem:
        return age
    return f"{age}, etcd unreachable for {duration(_seconds(registry.problem_for))}: {registry.problem}"


def _row(worker: Seen, topology: Topology, now: float) -> list[str]:
    record, status = worker.record, worker.status
    load = status.load if status is not None and not worker.replaced else None
    return [
        _role_name(record.role),
        record.instance_id,
        _state(worker),
        record.grpc_endpoint,
        record.model.name,
        str(record.runtime.total_kv_pages),
        "-" if load is None else str(load.live_requests),
        "-" if load is None else f"{load.used_tokens}/{load.total_tokens}",
        duration(now - record.incarnation.created_us / 1e6),
        "?" if topology.etcd_problem else ("yes" if worker.in_etcd else "no"),
        _routable(worker, topology),
    ]


def _state(worker: Seen) -> str:
    if worker.status is None:
        return "unreachable"
    return "replaced" if worker.replaced else _state_name(worker.status.state)


def _routable(worker: Seen, topology: Topology) -> str:
    if topology.frontend is None:
        return "?"
    if worker.known is None:
        return "no: the frontend doesn't know it"
    suffix = "" if worker.known.registered else " (unregistered)"
    if worker.known.routable and worker.known.breaker in _SUSPECT:
        suffix += " (last resort: its breaker is open)"
    return ("yes" if worker.known.routable else f"no: {worker.known.reason}") + suffix


def _worker_json(worker: Seen, now: float) -> dict[str, object]:
    record, status, known = worker.record, worker.status, worker.known
    answers = status is not None and not worker.replaced
    return {
        "role": _role_name(record.role),
        "instance_id": record.instance_id,
        "incarnation": record.incarnation.uuid,
        "age_seconds": round(now - record.incarnation.created_us / 1e6, 3),
        "endpoint": record.grpc_endpoint,
        "system_endpoint": record.system_endpoint,
        "model": record.model.name,
        "total_kv_pages": record.runtime.total_kv_pages,
        "page_size": record.runtime.page_size,
        "in_etcd": worker.in_etcd,
        "state": _state(worker),
        "problem": worker.problem or None,
        "live_requests": status.load.live_requests if status is not None and answers else None,
        "used_tokens": status.load.used_tokens if status is not None and answers else None,
        "total_tokens": status.load.total_tokens if status is not None and answers else None,
        "routable": known.routable if known is not None else None,
        "not_routable_because": known.reason or None if known is not None else None,
        "registered": known.registered if known is not None else None,
        "breaker": _breaker_name(known.breaker) if known is not None else None,
    }


def _state_name(state: worker_pb2.WorkerState) -> str:
    return worker_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()


def _breaker_name(state: health_pb2.BreakerState) -> str:
    return health_pb2.BreakerState.Name(state).removeprefix("BREAKER_STATE_").lower()


def _seconds(span: duration_pb2.Duration) -> float:
    return round(span.ToNanoseconds() / 1e9, 3)


def _role_name(role: worker_pb2.WorkerRole) -> str:
    return worker_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()
