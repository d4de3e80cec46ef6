"""The prefill workers that a decode worker knows of: the only ones it lets a request point it at.

SGLang's scheduler connects, blocking, to whatever address a request names, so the address must be a registered one.
Known peers are remembered while etcd is away; a peer that is not known yet is looked up once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import worker_pb2
from services.registry.etcd import EtcdClient, EtcdError
from services.registry.lookup import list_workers
from services.registry.records import RecordError, check_label
from services.requests import Room

LOOKUP_DEADLINE = 2.0

# Every record of the namespace, from etcd. Raises EtcdError.
ListWorkers = Callable[[], Awaitable[tuple[worker_pb2.WorkerRecord, ...]]]


class PrefillPeers:
    """Belongs to the serving loop."""

    def __init__(self, list_records: ListWorkers) -> None:
        self._list_records = list_records
        self._known: dict[tuple[str, int], str] = {}

    @classmethod
    def of(cls, client: EtcdClient, namespace: str) -> PrefillPeers:
        """The prefill workers of one namespace."""
        return cls(lambda: list_workers(client, namespace, deadline=LOOKUP_DEADLINE))

    async def check(self, room: Room) -> None:
        """Raises RequestError unless a registered prefill worker's bootstrap server is at the room's address."""
        address = (room.host, room.port)
        if address in self._known:
            return
        await self._refresh()
        if address not in self._known:
            raise invalid(
                "bootstrap.host",
                f"no prefill worker of this namespace has its bootstrap server at {room.host}:{room.port}",
            )

    async def find(self, instance_id: str) -> worker_pb2.WorkerRecord | None:
        """A prefill worker's record, fresh from etcd; None when there is none. Raises RequestError."""
        try:
            check_label("instance_id", instance_id)
        except RecordError as error:
            raise invalid("instance_id", str(error)) from error
        return next((record for record in await self._refresh() if record.instance_id == instance_id), None)

    async def _refresh(self) -> list[worker_pb2.WorkerRecord]:
        try:
            records = await self._list_records()
        except EtcdError as error:
            raise RequestError(
                grpc.StatusCode.UNAVAILABLE,
                Reason.REGISTRY_UNAVAILABLE,
                f"etcd does not say which prefill workers there are: {error}",
                retry_after=1.0,
            ) from error
        prefills = [record for record in records if record.role == worker_pb2.WORKER_ROLE_PREFILL]
        self._known |= {(record.bootstrap.host, record.bootstrap.port): record.instance_id for record in prefills}
        return prefills
