"""Which workers are there? Asked of etcd, of every worker itself, and of the frontend; any of them may not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kvbaton.client import Client
from kvbaton.errors import RequestError
from kvbaton.v1 import health_pb2, worker_pb2
from services.config.common import EtcdFlags
from services.registry.etcd import EtcdClient, EtcdError
from services.registry.lookup import list_workers


@dataclass(frozen=True, slots=True)
class Seen:
    """One worker. `status` None: it doesn't answer, `problem` says how. `known` None: the frontend has never met it."""

    record: worker_pb2.WorkerRecord
    in_etcd: bool
    status: health_pb2.StatusResponse | None
    problem: str
    known: health_pb2.KnownWorker | None

    @property
    def replaced(self) -> bool:
        """Whether another process answers at its address than the one of the record."""
        return self.status is not None and self.status.incarnation != self.record.incarnation

    @property
    def serving(self) -> bool:
        """Whether the process itself says that it serves."""
        return self.status is not None and not self.replaced and self.status.state == worker_pb2.WORKER_STATE_SERVING


@dataclass(frozen=True, slots=True)
class Topology:
    """What could be found out. A problem is empty where the part answered."""

    frontend: health_pb2.StatusResponse | None
    frontend_problem: str
    etcd_problem: str
    workers: tuple[Seen, ...]

    @property
    def serving(self) -> bool:
        """Whether something serves: the frontend when it answers, otherwise any worker."""
        if self.frontend is not None:
            return self.frontend.state == worker_pb2.WORKER_STATE_SERVING
        return any(worker.serving for worker in self.workers)


async def look(etcd: EtcdFlags, connect: Callable[[str], Client], frontend_endpoint: str) -> Topology:
    """One look, each question with a deadline of seconds. Raises nothing for what doesn't answer."""
    (frontend, frontend_problem), (records, etcd_problem) = await asyncio.gather(
        _ask(connect, frontend_endpoint), _registered(etcd)
    )
    known = {_key(worker.record): worker for worker in (frontend.workers if frontend is not None else ())}
    everyone = {key: worker.record for key, worker in known.items()} | {_key(record): record for record in records}
    in_etcd = {_key(record) for record in records}
    answers = await asyncio.gather(*(_ask(connect, record.grpc_endpoint) for record in everyone.values()))
    workers = tuple(
        Seen(record, key in in_etcd, status, problem, known.get(key))
        for (key, record), (status, problem) in zip(everyone.items(), answers, strict=True)
    )
    return Topology(
        frontend, frontend_problem, etcd_problem, tuple(sorted(workers, key=lambda w: (w.record.role, _key(w.record))))
    )


async def _ask(connect: Callable[[str], Client], endpoint: str) -> tuple[health_pb2.StatusResponse | None, str]:
    try:
        async with connect(endpoint) as client:
            return await client.status(), ""
    except RequestError as error:
        return None, f"{error.code.name}: {error.message}"


async def _registered(flags: EtcdFlags) -> tuple[tuple[worker_pb2.WorkerRecord, ...], str]:
    async with EtcdClient(flags.endpoints, flags.tls()) as client:
        try:
            return await list_workers(client, flags.namespace), ""
        except EtcdError as error:
            return (), str(error)


def _key(record: worker_pb2.WorkerRecord) -> tuple[str, str]:
    """A worker and its incarnation: the frontend may still know an older one."""
    return record.instance_id, record.incarnation.uuid
