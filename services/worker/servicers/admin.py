"""AdminService of a worker: what an operator does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import admin_pb2, admin_pb2_grpc
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineDeadError

log = structlog.get_logger()

_DRAIN_BEGINS_WITHIN = 5.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """One per worker."""

    def __init__(self, core: WorkerCore, stop: Callable[[], None]) -> None:
        """`stop` begins the drain, and does nothing more when it is called again."""
        self._core = core
        self._stop = stop

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.DrainResponse:
        """As SIGTERM, but never a second one: what runs is waited for however often this is called."""
        core = self._core
        if not core.lifecycle.registered:
            raise core.unavailable(Reason.WORKER_NOT_SERVING, grpc.StatusCode.FAILED_PRECONDITION)
        log.info("drain asked for", peer=context.peer(), live_requests=len(core.legs))
        self._stop()
        async with asyncio.timeout(_DRAIN_BEGINS_WITHIN):
            await core.lifecycle.ending.wait()
        return admin_pb2.DrainResponse(live_requests=len(core.legs))

    async def FlushCache(
        self, request: admin_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.FlushCacheResponse:
        """Refused while requests run, as by the engine: their pages hang on the cached ones."""
        core = self._core
        loaded = core.require_loaded()
        if core.legs:
            raise self._running(f"{len(core.legs)} requests run")
        try:
            flushed = await loaded.engine.flush_cache()
        except EngineDeadError as error:
            raise self._failed(grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD, str(error)) from error
        except TimeoutError as error:
            raise self._failed(
                grpc.StatusCode.DEADLINE_EXCEEDED, Reason.WORKER_NOT_SERVING, "the engine does not answer"
            ) from error
        if not flushed:
            raise self._running("the engine has not ended its requests yet")
        log.info("cache flushed", peer=context.peer())
        return admin_pb2.FlushCacheResponse()

    def _running(self, what: str) -> RequestError:
        return self._failed(
            grpc.StatusCode.FAILED_PRECONDITION, Reason.REQUESTS_RUNNING, f"the cache is not flushed: {what}"
        )

    def _failed(self, code: grpc.StatusCode, reason: Reason, message: str) -> RequestError:
        core = self._core
        return RequestError(code, reason, message, leg=core.role, worker=core.instance_id)
