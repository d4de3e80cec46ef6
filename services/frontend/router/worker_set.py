"""All workers of the namespace, kept equal to the registry.

Gone from the registry is not gone: a record that disappears without having said DRAINING (a lease that expired while
etcd was frozen, say) only marks its worker unregistered. It stays routable while it answers, for a bounded time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from kvbaton.v1 import worker_pb2
from services.config.frontend import FrontendConfig
from services.frontend.router.breaker import BreakerState
from services.frontend.router.ejection import ejected
from services.frontend.router.worker import Worker
from services.frontend.text_models import TextModels
from services.registry.records import WorkerKey, is_newer
from services.registry.watcher import RegistryWatcher, WorkerPut, WorkerUnregistered, WorkerWithdrawn
from services.requests import Role
from services.telemetry import metrics

log = structlog.get_logger()

# A model whose last worker has left is unavailable for so long, then unknown: time to load its next worker.
_REMEMBERED_SECONDS = 600.0


class WorkerSet:
    """Use it as an async context manager; it follows the watcher's events until it is left."""

    def __init__(self, config: FrontendConfig, watcher: RegistryWatcher, texts: TextModels) -> None:
        self._config = config
        self._watcher = watcher
        self._texts = texts
        self._workers: dict[WorkerKey, Worker] = {}
        # By key; sorted when a worker comes or goes, not for every request.
        self._in_order: list[Worker] = []
        self._kinds: frozenset[tuple[str, Role]] = frozenset()
        # Withdrawn or replaced, with requests that still run.
        self._retiring: set[asyncio.Task[None]] = set()
        self._expiries: dict[WorkerKey, asyncio.TimerHandle] = {}
        # Until when each is remembered.
        self._left: dict[tuple[str, Role], float] = {}
        self._listeners: list[Callable[[], None]] = []
        self._credit_listeners: list[Callable[[Worker], None]] = []
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._following = asyncio.create_task(self._follow(), name="worker-set")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._following, *self._retiring) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self._expiries.values():
            timer.cancel()
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
        self._workers.clear()
        self._sort()

    def all(self) -> list[Worker]:
        """Every known worker, in a stable order."""
        return list(self._in_order)

    def routable(self, role: Role, model: str | None = None) -> list[Worker]:
        """Workers that a new request may go to, in a stable order."""
        return [
            worker
            for worker in self._in_order
            if worker.role is role and worker.routable and (model is None or worker.record.model.name == model)
        ]

    def kinds(self) -> frozenset[tuple[str, Role]]:
        """Model and role of every known worker: few, however many workers there are."""
        return self._kinds

    def left_lately(self) -> list[tuple[str, Role]]:
        """Model and role of workers that were withdrawn in the last ten minutes, or did not come back."""
        now = time.monotonic()
        self._left = {key: until for key, until in self._left.items() if until > now}
        return list(self._left)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Called after every change of what is known or routable."""
        self._listeners.append(listener)

    def on_credits(self, listener: Callable[[Worker], None]) -> None:
        """Called when a worker has granted credits, or its free slots have changed."""
        self._credit_listeners.append(listener)

    async def _follow(self) -> None:
        async for event in self._watcher.events():
            match event:
                case WorkerPut(key=key, record=record):
                    self._put(key, record)
                case WorkerWithdrawn(key=key):
                    self._retire(key, "withdrawn")
                case WorkerUnregistered(key=key):
                    self._unregister(key)
                case _:
                    pass

    def _put(self, key: WorkerKey, record: worker_pb2.WorkerRecord) -> None:
        self._cancel_expiry(key)
        known = self._workers.get(key)
        if known is not None and known.record.incarnation == record.incarnation:
            if known.record.grpc_endpoint == record.grpc_endpoint:
                known.update(record)
                return
        elif known is not None and is_newer(known.record.incarnation, record.incarnation):
            return
        if known is not None:
            self._retire(key, "replaced by a new incarnation")
        if record.state == worker_pb2.WORKER_STATE_DRAINING:
            return  # it leaves before we ever met it
        log.info("worker found", worker=record.instance_id, endpoint=record.grpc_endpoint, model=record.model.name)
        self._workers[key] = Worker(
            record,
            config=self._config,
            texts=self._texts,
            changed=self._changed,
            credits_came=self._credits_came,
        )
        self._sort()
        self._changed()

    def _sort(self) -> None:
        self._in_order = [self._workers[key] for key in sorted(self._workers, key=str)]
        self._kinds = frozenset((worker.record.model.name, worker.role) for worker in self._in_order)

    def _unregister(self, key: WorkerKey) -> None:
        worker = self._workers.get(key)
        if worker is None or not worker.registered:
            return
        worker.registered = False
        grace = self._config.unregistered_grace
        log.warning("worker unregistered", worker=worker.instance_id, kept_for_seconds=grace)
        loop = asyncio.get_running_loop()
        self._expiries[key] = loop.call_later(grace, self._retire, key, "unregistered for too long")
        self._changed()

    def _retire(self, key: WorkerKey, why: str) -> None:
        """Routable no longer; closed when its requests have ended."""
        self._cancel_expiry(key)
        worker = self._workers.pop(key, None)
        if worker is None:
            return
        self._left[worker.record.model.name, worker.role] = time.monotonic() + _REMEMBERED_SECONDS
        self._sort()
        worker.want_no_credits()
        log.info("worker gone", worker=worker.instance_id, why=why, live_requests=worker.live_requests)
        task = asyncio.create_task(self._close_when_idle(worker), name=f"retire {worker.instance_id}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        self._changed()

    async def _close_when_idle(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self._config.total_timeout):
                await worker.idle()
        except TimeoutError:
            pass
        finally:
            await worker.close()

    def _cancel_expiry(self, key: WorkerKey) -> None:
        if (timer := self._expiries.pop(key, None)) is not None:
            timer.cancel()

    def _credits_came(self, worker: Worker) -> None:
        for listener in self._credit_listeners:
            listener(worker)

    def _eject(self) -> None:
        gone = ejected(self._in_order)
        for worker in self._in_order:
            if worker.ejected != (worker in gone):
                worker.ejected = not worker.ejected
                log.info("worker ejected" if worker.ejected else "worker taken back", worker=worker.instance_id)

    def _changed(self) -> None:
        self._eject()
        for role in Role:
            metrics.ROUTABLE_WORKERS.labels(role).set(len(self.routable(role)))
            workers = [worker for worker in self._in_order if worker.role is role]
            metrics.EJECTED_WORKERS.labels(role).set(sum(worker.ejected for worker in workers))
            for state in BreakerState:
                metrics.BREAKERS.labels(role, state).set(sum(worker.breaker.state is state for worker in workers))
        for listener in self._listeners:
            listener()
