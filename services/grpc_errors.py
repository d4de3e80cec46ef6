"""Turns what a gRPC handler raises into a typed status, in one place for every service.

`RequestError` becomes its status with ErrorInfo; anything else is a bug: it is logged with its traceback and becomes
INTERNAL, without the traceback on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from kvbaton.errors import Reason, RequestError

log = structlog.get_logger()

# Seconds for a status to reach its client. Then the handler ends: gRPC keeps the status, behind what the client has not
# read, until it reads it or hangs up.
_STATUS_TIMEOUT = 1.0


class TypedErrors(grpc.aio.ServerInterceptor):
    """Server interceptor; `transport.make_server` puts it on every server."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps unary-unary handlers and those that stream responses to one request; of the others, generators."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if inspect.iscoroutinefunction(handler.unary_unary):
            return handler._replace(unary_unary=_coroutine(handler.unary_unary, method))
        if inspect.iscoroutinefunction(handler.unary_stream):
            return handler._replace(unary_stream=_coroutine(handler.unary_stream, method))
        if inspect.isasyncgenfunction(handler.unary_stream):
            return handler._replace(unary_stream=_stream(handler.unary_stream, method))
        if inspect.isasyncgenfunction(handler.stream_stream):
            return handler._replace(stream_stream=_stream(handler.stream_stream, method))
        return handler


def _coroutine(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - each becomes a status
            await _abort(context, error, method)

    return wrapped


def _stream(
    behaviour: Callable[[Any, Any], AsyncIterator[Any]], method: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(behaviour(request, context)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - each becomes a status
            await _abort(context, error, method)

    return wrapped


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.BaseError)):
        raise error
    if not isinstance(error, RequestError):
        log.error("handler failed", method=method, exc_info=error)
        error = RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, f"internal error in {method}")
    # Missing in the published stubs.
    abort = context.abort_with_status  # pyright: ignore[reportAttributeAccessIssue]
    try:
        async with asyncio.timeout(_STATUS_TIMEOUT):
            await abort(error.to_status())
    except TimeoutError:
        raise grpc.aio.AbortError from error
    raise AssertionError("abort_with_status raises")
