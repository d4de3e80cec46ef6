"""Keeps one worker's record in etcd as the worker wants it.

The worker states what should stand there; the publisher makes it so and checks it once per lease time. That covers a
lost lease, an etcd that came back without data, and a key that someone deleted.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import structlog

from kvbaton.v1.worker_pb2 import WORKER_STATE_DRAINING, WorkerRecord
from services.registry.backoff import Backoff
from services.registry.etcd import EtcdClient, EtcdError, KeyValue, LeaseNotFoundError
from services.registry.lease import LeaseKeeper
from services.registry.records import RecordError, WorkerKey, decode, encode, is_newer

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class NewerIncarnationError(Exception):
    """A process that started later has this worker's key. This one must leave it alone."""

    def __init__(self, key: WorkerKey, newer: WorkerRecord) -> None:
        super().__init__(f"{key} belongs to a newer process, at {newer.grpc_endpoint}")
        self.key = key
        self.newer = newer


class RecordPublisher:
    """One worker's record, bound to the keeper's lease. Open it inside the keeper's context.

    `publish` or `update`, then `withdraw`, drain, `delete`. All of them return whether etcd holds the result within
    `deadline` seconds; after False the publisher goes on trying by itself (not after `delete`, whose key dies with the
    lease). They raise nothing but NewerIncarnationError (publish and update) and RecordError.
    """

    def __init__(self, client: EtcdClient, keeper: LeaseKeeper, namespace: str) -> None:
        self._client = client
        self._keeper = keeper
        self._namespace = namespace
        self._desired: WorkerRecord | None = None
        self._withdrawn = False
        self._newer: NewerIncarnationError | None = None
        self._superseded = asyncio.Event()
        self._writing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        keeper.on_new_lease(lambda _: self._wake.set())

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="record-publisher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops looking after the record. It stays until `delete`, or until its lease ends."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def publish(self, record: WorkerRecord, deadline: float = 10.0) -> bool:
        """Puts the record. Raises NewerIncarnationError when a process that started later has the key."""
        if self._desired is not None:
            raise RuntimeError("published already; use update")
        encode(record)  # a bad record is the caller's error, not etcd's
        self._newer = None
        self._superseded.clear()
        self._withdrawn = False
        self._desired = _copy(record)
        try:
            return await self._settle(deadline)
        except NewerIncarnationError:
            self._desired = None
            raise

    async def update(self, record: WorkerRecord, deadline: float = 5.0) -> bool:
        """Replaces the record: same instance, same incarnation. Once withdrawn it stays DRAINING whatever this says."""
        if self._desired is None:
            raise RuntimeError("nothing is published")
        encode(record)
        held = (self._desired.role, self._desired.instance_id, self._desired.incarnation)
        if held != (record.role, record.instance_id, record.incarnation):
            raise RecordError("an update may not change the role, the instance id or the incarnation")
        self._desired = _copy(record)
        if self._withdrawn:
            self._desired.state = WORKER_STATE_DRAINING
        return await self._settle(deadline)

    async def withdraw(self, deadline: float = 3.0) -> bool:
        """Writes DRAINING: no frontend sends a new request here. True also when there is nothing to withdraw."""
        if self._desired is None or self._newer is not None:
            return True
        self._withdrawn = True
        self._desired = _copy(self._desired)
        self._desired.state = WORKER_STATE_DRAINING
        try:
            return await self._settle(deadline)
        except NewerIncarnationError:
            return True

    async def delete(self, deadline: float = 3.0) -> bool:
        """Deletes the record if it is still this incarnation's. True also when it is gone or another's."""
        desired, self._desired = self._desired, None
        if desired is None or self._newer is not None:
            return True
        key = WorkerKey.of(self._namespace, desired)
        try:
            async with asyncio.timeout(deadline), self._writing:
                while (held := await self._client.get(key.path, deadline=deadline)) is not None:
                    if not _is_ours(key, held, desired):
                        return True
                    if await self._client.delete_if(key.path, mod_revision=held.mod_revision, deadline=deadline):
                        return True
                return True
        except (EtcdError, TimeoutError) as error:
            _log.warning("record_not_deleted", key=key.path, error=str(error) or "deadline")
            return False

    async def superseded(self) -> NewerIncarnationError:
        """Waits until a newer process is seen on this worker's key; the publisher has then stopped writing."""
        await self._superseded.wait()
        assert self._newer is not None
        return self._newer

    async def _settle(self, deadline: float) -> bool:
        try:
            async with asyncio.timeout(deadline):
                return await self._until_written()
        except TimeoutError:
            key = "" if self._desired is None else WorkerKey.of(self._namespace, self._desired).path
            _log.warning("record_not_written", key=key, lease_alive=self._keeper.state().alive, deadline=deadline)
            self._wake.set()
            return False

    async def _until_written(self) -> bool:
        backoff = Backoff()
        while True:
            try:
                await self._reconcile()
                return True
            except EtcdError:
                await asyncio.sleep(backoff.next())

    async def _run(self) -> None:
        backoff = Backoff()
        wait = float(self._keeper.ttl)
        while True:
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._reconcile()
                backoff.reset()
                wait = float(self._keeper.ttl)
            except EtcdError:
                wait = backoff.next()
            except NewerIncarnationError:
                wait = float(self._keeper.ttl)
            except Exception:  # noqa: BLE001 - a bug here must not leave the record unattended
                _log.exception("record_publisher_bug")
                wait = backoff.next()

    async def _reconcile(self) -> None:
        """Makes etcd hold `_desired` under the current lease."""
        lease = await self._keeper.lease()
        async with self._writing:
            while (desired := self._desired) is not None and self._newer is None:
                key = WorkerKey.of(self._namespace, desired)
                value = encode(desired)
                held = await self._client.get(key.path)
                if held is not None:
                    self._refuse_newer(key, held, desired)
                    if (held.value, held.lease) == (value, lease):
                        return
                mod_revision = 0 if held is None else held.mod_revision
                try:
                    written = await self._client.put_if(key.path, value, lease=lease, mod_revision=mod_revision)
                except LeaseNotFoundError:
                    self._keeper.report_lost(lease)
                    raise
                if written:
                    _log.info("record_put", key=key.path, state=desired.state, lease=f"{lease:x}")
                    return
        if self._newer is not None:
            raise self._newer

    def _refuse_newer(self, key: WorkerKey, held: KeyValue, desired: WorkerRecord) -> None:
        try:
            record = decode(key, held.value)
        except RecordError as error:
            _log.warning("record_corrupt", key=key.path, error=str(error), action="overwritten")
            return
        if is_newer(record.incarnation, desired.incarnation):
            self._newer = NewerIncarnationError(key, record)
            self._superseded.set()
            _log.error("record_superseded", key=key.path, by=record.incarnation.uuid, at=record.grpc_endpoint)
            raise self._newer


def _is_ours(key: WorkerKey, held: KeyValue, desired: WorkerRecord) -> bool:
    try:
        return decode(key, held.value).incarnation == desired.incarnation
    except RecordError:
        return False


def _copy(record: WorkerRecord) -> WorkerRecord:
    copy = WorkerRecord()
    copy.CopyFrom(record)
    return copy
