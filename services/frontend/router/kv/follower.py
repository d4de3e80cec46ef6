"""Follows one worker's KV events over its connection, for as long as the worker is known.

A broken stream is resumed where it broke. On any doubt (a gap in the numbers, a message that makes no sense, a page
removed that was never there) all of this worker's pages are forgotten and learnt anew from a snapshot.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
import grpc.aio
import structlog

from kvbaton.v1 import kv_events_pb2_grpc, worker_pb2
from services.frontend.link.broken import STREAM_BROKE, why_broken
from services.frontend.router.kv.index import KvIndex, cache_owner
from services.frontend.router.kv.state import DoubtError, NoHashesError, WorkerPages
from services.prefixes import hashed_page_size
from services.registry.backoff import Backoff
from services.requests import Role
from services.telemetry import metrics

log = structlog.get_logger()

# A worker that tells no events keeps to that for its life.
_NO_EVENTS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


class FollowedWorker(Protocol):
    """A worker as its follower sees it; `router.worker.Worker` is one."""

    @property
    def instance_id(self) -> str:
        """Name in the registry."""
        ...

    @property
    def role(self) -> Role:
        """What it computes."""
        ...

    @property
    def record(self) -> worker_pb2.WorkerRecord:
        """What it says of itself."""
        ...

    @property
    def channel(self) -> grpc.aio.Channel:
        """Its connection."""
        ...


class KvFollower:
    """One incarnation of a worker; from now on until `stop`."""

    def __init__(self, index: KvIndex, worker: FollowedWorker, *, events: bool = True) -> None:
        self.worker = cache_owner(worker.role, worker.instance_id)
        self.incarnation = worker.record.incarnation
        runtime = worker.record.runtime
        self._page_size = hashed_page_size(max(1, runtime.page_size))
        self._pool_tokens = runtime.max_total_tokens
        self._pages = WorkerPages(index, self.worker, self.incarnation)
        self._events = kv_events_pb2_grpc.KvEventServiceStub(worker.channel)
        self._index = index
        self._was_exact = False
        self._labels = (worker.role, worker.instance_id)
        metrics.KV_INDEX_EXACT.labels(*self._labels).set(0)
        self._task = asyncio.create_task(self._follow() if events else self._guess(), name=f"kv events {self.worker}")

    @property
    def exact(self) -> bool:
        """Whether what the index knows of it is what it holds, as far as the index has room."""
        return self._pages.exact

    @property
    def page_size(self) -> int:
        """Tokens per hash."""
        return self._pages.hashed_page_size or self._page_size

    @property
    def capacity(self) -> int:
        """Pages of that size that one dp rank's KV pool holds."""
        return self._pool_tokens // self.page_size

    def stop(self) -> None:
        """No message is applied after this; its pages are forgotten."""
        self._task.cancel()
        self._index.forget(self.worker)
        metrics.KV_INDEX_EXACT.remove(*self._labels)

    async def ended(self) -> None:
        """After `stop`: its task is gone."""
        await asyncio.gather(self._task, return_exceptions=True)

    async def _guess(self) -> None:
        self._give_up("its events are not wanted")

    async def _follow(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._read(backoff)
                why = "the worker ended the stream"
            except STREAM_BROKE as error:
                why = why_broken(error)
                if isinstance(error, grpc.aio.AioRpcError) and error.code() in _NO_EVENTS:
                    self._give_up(why)
                    return
            except NoHashesError:
                self._give_up("its version tells no prefix hashes")
                return
            except DoubtError as doubt:
                why = f"doubt: {doubt}"
                self._pages.forget("doubt")
            except Exception as error:  # whatever one message sets off, the worker must not be lost for ever
                log.exception("kv events failed", worker=self.worker)
                why = f"{type(error).__name__}: {error}"
                self._pages.forget("doubt")
            self._pages.broken()
            self._tell(why)
            await asyncio.sleep(backoff.next())

    async def _read(self, backoff: Backoff) -> None:
        """One stream, until it ends."""
        call = self._events.Subscribe(self._pages.next_request())
        try:
            async for message in call:
                self._pages.take(message)
                if self._pages.exact:
                    backoff.reset()
                self._tell()
        finally:
            call.cancel()

    def _give_up(self, why: str) -> None:
        """What it holds can only be guessed from what is sent there."""
        self._pages.forget("missed")
        self._tell()
        log.info("worker without kv events", worker=self.worker, why=why)

    def _tell(self, why: str = "") -> None:
        exact = self._pages.exact
        if exact != self._was_exact:
            self._was_exact = exact
            metrics.KV_INDEX_EXACT.labels(*self._labels).set(exact)
            log.info("kv cache known" if exact else "kv events broken off", worker=self.worker, why=why)
