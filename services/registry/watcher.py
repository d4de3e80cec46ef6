"""Every worker of a namespace, kept current: list at revision R, watch from R+1, on any doubt list again and diff."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Self

import structlog

from kvbaton.v1.worker_pb2 import WORKER_STATE_DRAINING, WorkerRecord
from services.registry.backoff import Backoff
from services.registry.etcd import EtcdClient, EtcdError, Listing
from services.registry.records import RecordError, WorkerKey, decode, workers_prefix
from services.registry.watch import KeyPut, WatchBatch, WatchEndedError, WatchStream

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerPut:
    """A worker is new or has changed. May be a new incarnation under a known key, or say DRAINING."""

    key: WorkerKey
    record: WorkerRecord


@dataclass(frozen=True, slots=True)
class WorkerWithdrawn:
    """A worker that had said DRAINING has deleted its record: it is gone on purpose."""

    key: WorkerKey
    record: WorkerRecord


@dataclass(frozen=True, slots=True)
class WorkerUnregistered:
    """A record vanished without DRAINING: its lease expired, or etcd lost data. That does not mean a dead worker."""

    key: WorkerKey
    record: WorkerRecord


@dataclass(frozen=True, slots=True)
class RegistrySynced:
    """Every event up to store revision `revision` has been delivered; `workers` have a record."""

    revision: int
    workers: int


@dataclass(frozen=True, slots=True)
class RegistryTrouble:
    """etcd can't be followed since `seconds`; `reason` is what it met first."""

    seconds: float
    reason: str


RegistryEvent = WorkerPut | WorkerWithdrawn | WorkerUnregistered | RegistrySynced


class RegistryWatcher:
    """Follows the workers of one namespace, for one consumer, for as long as the context is open.

    Never fails: while etcd is away the last known workers stay, and `last_synced_age` grows. A watch that says nothing
    for `ping_interval` seconds is asked for a sign of life and given up after `silence_deadline`; every
    `audit_interval` seconds the list is read again anyway, against events that etcd itself lost.
    """

    def __init__(
        self,
        client: EtcdClient,
        namespace: str,
        *,
        ping_interval: float = 2.0,
        silence_deadline: float = 6.0,
        audit_interval: float = 60.0,
    ) -> None:
        self._client = client
        self._prefix = workers_prefix(namespace)
        self._ping_interval = ping_interval
        self._silence_deadline = silence_deadline
        self._audit_interval = audit_interval
        self._workers: dict[WorkerKey, WorkerRecord] = {}
        self._corrupt: dict[str, int] = {}
        self._revision = 0
        self._synced_at: float | None = None
        self._synced = asyncio.Event()
        self._lost_at: float | None = None
        self._lost_reason = ""
        self._events: asyncio.Queue[RegistryEvent] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="registry-watcher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def events(self) -> AsyncIterator[RegistryEvent]:
        """What changed, in order, from the first list on. Ends only by cancellation."""
        while True:
            yield await self._events.get()

    @property
    def workers(self) -> Mapping[WorkerKey, WorkerRecord]:
        """The workers with a record as last seen (a live view; do not change the records)."""
        return MappingProxyType(self._workers)

    async def wait_synced(self) -> None:
        """Waits for the first complete list, without a deadline of its own."""
        await self._synced.wait()

    def last_synced_age(self) -> float | None:
        """Seconds since etcd last proved that this view is complete; None before the first list."""
        return None if self._synced_at is None else time.monotonic() - self._synced_at

    def trouble(self) -> RegistryTrouble | None:
        """Why the view may be out of date; None while etcd is followed."""
        return None if self._lost_at is None else RegistryTrouble(time.monotonic() - self._lost_at, self._lost_reason)

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            endpoint = self._client.endpoint
            try:
                await self._follow(backoff)
            except (EtcdError, WatchEndedError) as error:
                self._lost(endpoint, error)
                self._client.leave_endpoint(endpoint)
            except Exception as error:  # noqa: BLE001 - a bug here must not freeze the frontend's view
                _log.exception("registry_watcher_bug")
                self._lost(endpoint, error)
            else:
                continue
            await asyncio.sleep(backoff.next())

    async def _follow(self, backoff: Backoff) -> None:
        """List and diff, then the watch until the next audit is due."""
        listing = await self._client.list_prefix(self._prefix)
        self._diff(listing)
        self._proven()
        self._emit(RegistrySynced(self._revision, len(self._workers)))
        self._synced.set()
        stream = await self._client.watch_prefix(self._prefix, listing.revision + 1)
        try:
            self._refuse_older(stream.revision)
            # Not before: a list that no watch can follow, again and again, would be a change each time.
            self._regained()
            await self._read(stream, backoff)
        finally:
            await stream.close()

    async def _read(self, stream: WatchStream, backoff: Backoff) -> None:
        started = heard = time.monotonic()
        while (now := time.monotonic()) - started < self._audit_interval:
            audit_in = started + self._audit_interval - now
            batch = await stream.receive(min(self._ping_interval, audit_in))
            if batch is not None:
                heard = time.monotonic()
                self._apply(batch)
                backoff.reset()
            elif time.monotonic() - heard >= self._silence_deadline:
                raise WatchEndedError(f"the watch has been silent for {self._silence_deadline:.1f} s")
            elif audit_in > self._ping_interval:
                await stream.request_progress(self._ping_interval)

    def _diff(self, listing: Listing) -> None:
        if listing.revision < self._revision:
            _log.warning("registry_data_lost", revision=listing.revision, known_revision=self._revision)
            self._corrupt.clear()
        self._revision = listing.revision
        listed: set[str] = set()
        for item in listing.items:
            listed.add(item.key)
            self._put(item.key, item.value, item.mod_revision)
        for key in [key for key in self._workers if key.path not in listed]:
            self._remove(key)
        self._corrupt = {path: revision for path, revision in self._corrupt.items() if path in listed}

    def _apply(self, batch: WatchBatch) -> None:
        self._refuse_older(batch.revision)
        for event in batch.events:
            if event.mod_revision <= self._revision:
                continue
            if isinstance(event, KeyPut):
                self._put(event.key, event.value, event.mod_revision)
            else:
                self._corrupt.pop(event.key, None)
                self._remove_path(event.key)
        if batch.events:
            self._revision = max(event.mod_revision for event in batch.events)
        self._proven()

    def _refuse_older(self, revision: int) -> None:
        """A store that is behind us lost its data; a watch on it would stay silent until it has caught up."""
        if revision < self._revision:
            raise WatchEndedError(f"etcd is at revision {revision}, behind {self._revision}")

    def _put(self, path: str, value: bytes, mod_revision: int) -> None:
        try:
            key = WorkerKey.parse(path)
            record = decode(key, value)
        except RecordError as error:
            # What was known of the worker stays: a value that nobody can read says nothing about it.
            if self._corrupt.get(path) != mod_revision:
                self._corrupt[path] = mod_revision
                _log.warning("record_corrupt", key=path, error=str(error), action="skipped")
            return
        self._corrupt.pop(path, None)
        if self._workers.get(key) != record:
            self._workers[key] = record
            self._emit(WorkerPut(key, record))

    def _remove_path(self, path: str) -> None:
        try:
            self._remove(WorkerKey.parse(path))
        except RecordError:
            return  # it was never taken for a worker

    def _remove(self, key: WorkerKey) -> None:
        record = self._workers.pop(key, None)
        if record is None:
            return
        if record.state == WORKER_STATE_DRAINING:
            self._emit(WorkerWithdrawn(key, record))
        else:
            self._emit(WorkerUnregistered(key, record))

    def _emit(self, event: RegistryEvent) -> None:
        self._events.put_nowait(event)

    def _proven(self) -> None:
        self._synced_at = time.monotonic()

    def _lost(self, endpoint: str, error: Exception) -> None:
        if self._lost_at is None:
            self._lost_at, self._lost_reason = time.monotonic(), f"{endpoint}: {error}"
            _log.warning("registry_lost", endpoint=endpoint, reason=str(error), workers=len(self._workers))

    def _regained(self) -> None:
        if self._lost_at is not None:
            outage = round(time.monotonic() - self._lost_at, 1)
            _log.info("registry_regained", endpoint=self._client.endpoint, outage_s=outage, workers=len(self._workers))
            self._lost_at = None
