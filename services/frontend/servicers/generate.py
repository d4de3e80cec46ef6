"""GenerateService of the frontend."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.frontend.processes.siblings import Siblings
from services.frontend.request.api import Finished, FinishReason, Generation, Output
from services.requests import check_request_id
from services.telemetry.tracing import pick_headers

_FINISH_REASONS = {
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: generate_pb2.FINISH_REASON_TOOL_CALLS,
}


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """A thin edge over `Generation`, of this process and its `siblings`."""

    def __init__(self, generation: Generation, siblings: Siblings | None = None) -> None:
        self._generation = generation
        self._siblings = siblings

    async def Generate(  # type: ignore[override]
        self, request: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Streams one answer with all its choices; a cancelled call cancels every leg.

        It writes instead of yielding because a write to a client that doesn't read never returns, and must be given up
        when the request is cut off.
        """
        trace_headers = pick_headers(context.invocation_metadata() or ())
        live = await self._generation.submit(request, trace_headers)
        async with contextlib.aclosing(live.outputs()) as outputs:  # type: ignore[type-var]
            try:
                async with asyncio.timeout(None) as writing:
                    live.when_cut_off(lambda: writing.reschedule(0))
                    async for output in outputs:
                        await context.write(_response(output, live.request_id))
            except TimeoutError:
                await anext(outputs)  # raises why

    async def Abort(
        self, request: generate_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generate_pb2.AbortResponse:
        """Cancels a live request."""
        if not request.request_id:
            raise invalid("request_id", "missing")
        request_id = check_request_id(request.request_id)
        if self._siblings is None:
            found = self._generation.abort(request_id)
        else:
            found = await self._siblings.abort(request_id, tuple(context.invocation_metadata() or ()))
        return generate_pb2.AbortResponse(found=found)


def _response(output: Output, request_id: str) -> generate_pb2.GenerateResponse:
    response = generate_pb2.GenerateResponse(
        token_ids=output.token_ids,
        text=output.text,
        index=output.index,
        reasoning=output.reasoning,
        tool_calls=[
            generate_pb2.ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
            for call in output.tool_calls
        ],
        logprobs=[each.to_proto() for each in output.logprobs],
    )
    if output.finished is not None:
        _write_finished(response.finished, output.finished, request_id)
    return response


def _write_finished(wire: generate_pb2.Finished, finished: Finished, request_id: str) -> None:
    wire.reason = _FINISH_REASONS[finished.reason]
    if finished.matched_stop is not None:
        wire.matched_stop = finished.matched_stop
    elif finished.matched_token_id is not None:
        wire.matched_token_id = finished.matched_token_id
    wire.usage.prompt_tokens = finished.prompt_tokens
    wire.usage.completion_tokens = finished.completion_tokens
    wire.usage.cached_prompt_tokens = finished.cached_prompt_tokens
    wire.request_id = request_id
    wire.prefill_worker, wire.decode_worker = finished.prefill_worker, finished.decode_worker
    wire.migrations = finished.migrations
    timings = finished.timings
    for phase, seconds in (
        (wire.timings.queue, timings.queue),
        (wire.timings.prefill, timings.prefill),
        (wire.timings.transfer, timings.transfer),
        (wire.timings.decode, timings.decode),
        (wire.timings.tokenization, timings.tokenization),
        (wire.timings.routing, timings.routing),
    ):
        if seconds is not None:
            phase.FromNanoseconds(int(seconds * 1e9))
