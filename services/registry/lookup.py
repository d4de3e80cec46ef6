"""One-off reads of the registry: one worker, or all of them."""

from __future__ import annotations

import structlog

from kvbaton.v1.worker_pb2 import WorkerRecord, WorkerRole
from services.registry.etcd import EtcdClient
from services.registry.records import RecordError, WorkerKey, decode, workers_prefix

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def find_worker(
    client: EtcdClient, namespace: str, role: WorkerRole, instance_id: str, *, deadline: float = 3.0
) -> WorkerRecord | None:
    """The worker's record as of now; None when there is none. Raises EtcdError, and RecordError for a corrupt value."""
    key = WorkerKey(namespace, role, instance_id)
    held = await client.get(key.path, deadline=deadline)
    return None if held is None else decode(key, held.value)


async def list_workers(client: EtcdClient, namespace: str, *, deadline: float = 3.0) -> tuple[WorkerRecord, ...]:
    """Every worker's record as of now, by role and instance id; corrupt ones are logged and left out."""
    records: list[WorkerRecord] = []
    for held in (await client.list_prefix(workers_prefix(namespace), deadline=deadline)).items:
        try:
            records.append(decode(WorkerKey.parse(held.key), held.value))
        except RecordError as error:
            _log.warning("record_corrupt", key=held.key, error=str(error), action="skipped")
    return tuple(records)
