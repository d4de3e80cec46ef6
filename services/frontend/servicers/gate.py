"""The gate in front of the frontend's gRPC services: metadata `authorization: Bearer KEY`, before a message is read."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from kvbaton.errors import RequestError
from services.frontend.access.gate import Caller, Gate

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""What probes and grpcurl ask for. Every other method needs a key: `HealthService.Status` names all workers."""

_UNCOUNTED = ("/Abort", "/ListModels", "/GetModelInfo", "/GetTokenizer", "/Status")


class RpcGate(grpc.aio.ServerInterceptor):
    """Server interceptor, inside of `TypedErrors`. What it lets through counts as running until its call has ended."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Refuses without a handler, so that nothing of the request is read."""
        method = handler_call_details.method
        if method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        try:
            caller = self._gate.identify(_authorization(handler_call_details))
        except RequestError as error:
            return _refusal(error)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        counted = not method.endswith(_UNCOUNTED)
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            if (behaviour := getattr(handler, kind)) is not None:
                return handler._replace(**{kind: self._admitted(behaviour, caller, counted)})
        return handler

    def _admitted(
        self, behaviour: Callable[[Any, Any], Any], caller: Caller, counted: bool
    ) -> Callable[[Any, Any], Any]:
        async def answered(request: Any, context: Any) -> Any:
            with self._gate.admit(caller, counted=counted):
                return await behaviour(request, context)

        async def streamed(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._gate.admit(caller, counted=counted):
                async with contextlib.aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response

        return streamed if inspect.isasyncgenfunction(behaviour) else answered


def _refusal(error: RequestError) -> Any:
    async def refuse(_requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        raise error
        yield

    # Of all kinds the one that waits for no message. On the wire they are the same.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _authorization(details: grpc.HandlerCallDetails) -> bytes | None:
    values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    if not values:
        return None
    return b", ".join(value.encode() if isinstance(value, str) else value for value in values)
