"""GenerateService of a worker: one stream per leg."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.requests import check_request_id
from services.telemetry.tracing import pick_headers
from services.worker.core import WorkerCore
from services.worker.leg_runner import LegRunner


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """One per worker; errors leave as RequestError and become statuses in `grpc_errors`."""

    def __init__(self, core: WorkerCore, runner: LegRunner) -> None:
        self._core = core
        self._runner = runner

    async def Generate(  # type: ignore[override]
        self, request: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Streams one leg. Cancelling the call aborts it in the engine."""

        async def accepted() -> None:
            # Headers now, not with the first token: they tell the frontend that the leg is accepted.
            await context.send_initial_metadata(())

        trace_headers = pick_headers(context.invocation_metadata() or ())
        run = self._runner.run(request, trace_headers, accepted)
        async with contextlib.aclosing(run) as responses:  # type: ignore[type-var]
            async for response in responses:
                yield response

    async def Abort(
        self, request: generate_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generate_pb2.AbortResponse:
        """Aborts a leg by its request id."""
        if not request.request_id:
            raise invalid("request_id", "missing")
        return generate_pb2.AbortResponse(found=await self._core.legs.abort(check_request_id(request.request_id)))
