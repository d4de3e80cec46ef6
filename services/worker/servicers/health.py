"""HealthService of a worker: its state from loading on, its load, and a real generation or embedding."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import health_pb2, health_pb2_grpc
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineDeadError, EngineLoad

PROBE_TIMEOUT = 30.0
LOADS_TIMEOUT = 2.0


class HealthServicer(health_pb2_grpc.HealthServiceServicer):
    """Answers in every state."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    async def Status(
        self, request: health_pb2.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.StatusResponse:
        """State, identity and load. The load is left out while the engine can't say."""
        core = self._core
        response = health_pb2.StatusResponse(
            state=core.lifecycle.state,
            detail=core.lifecycle.detail,
            role=core.role.to_proto(),
            instance_id=core.instance_id,
            incarnation=core.incarnation,
        )
        response.started_at.FromNanoseconds(int(core.lifecycle.started_at * 1e9))
        response.load.live_requests = len(core.legs)
        if (loaded := core.loaded) is not None:
            response.model.CopyFrom(loaded.record.model)
            response.versions.CopyFrom(loaded.record.runtime.versions)
            try:
                async with asyncio.timeout(LOADS_TIMEOUT):
                    _write_load(response.load, await core.loads())
            except (TimeoutError, EngineDeadError):
                response.detail = response.detail or "the engine does not report its load"
        return response

    async def Probe(
        self, request: health_pb2.ProbeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.ProbeResponse:
        """A generation, or an embedding, through the engine."""
        loaded = self._core.require_loaded()
        if request.dp_rank >= loaded.info.dp_size:
            raise invalid("dp_rank", f"{request.dp_rank}: this worker has {loaded.info.dp_size} data-parallel ranks")
        started = time.monotonic()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await loaded.engine.probe(request.dp_rank, loaded.probe_payload)
        except TimeoutError as error:
            raise self._failed(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer from the engine within {PROBE_TIMEOUT:g} s"
            ) from error
        except (EngineDeadError, RuntimeError) as error:
            raise self._failed(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        response = health_pb2.ProbeResponse()
        response.elapsed.FromNanoseconds(int((time.monotonic() - started) * 1e9))
        return response

    def _failed(self, code: grpc.StatusCode, message: str) -> RequestError:
        core = self._core
        return RequestError(code, Reason.WORKER_NOT_SERVING, message, leg=core.role, worker=core.instance_id)


def _write_load(load: health_pb2.Load, ranks: list[EngineLoad]) -> None:
    for rank in ranks:
        load.ranks.add(
            dp_rank=rank.dp_rank,
            running_requests=rank.running_requests,
            waiting_requests=rank.waiting_requests,
            used_tokens=rank.used_tokens,
            total_tokens=rank.total_tokens,
        )
    load.running_requests = sum(rank.running_requests for rank in ranks)
    load.waiting_requests = sum(rank.waiting_requests for rank in ranks)
    load.used_tokens = sum(rank.used_tokens for rank in ranks)
    load.total_tokens = sum(rank.total_tokens for rank in ranks)
