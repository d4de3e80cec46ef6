"""Turns what a gRPC handler raises into a typed status, in one place for every service.

`RequestError` becomes its status with ErrorInfo, and so does a message that can't be parsed; anything else is a bug: it
is logged with its traceback and becomes INTERNAL, without the traceback on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

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
        parse = _Parser(handler.request_deserializer)
        if inspect.iscoroutinefunction(handler.unary_unary):
            behaviour = _coroutine(handler.unary_unary, method)
            return handler._replace(unary_unary=behaviour, request_deserializer=parse)
        if inspect.iscoroutinefunction(handler.unary_stream):
            behaviour = _coroutine(handler.unary_stream, method)
            return handler._replace(unary_stream=behaviour, request_deserializer=parse)
        if inspect.isasyncgenfunction(handler.unary_stream):
            behaviour = _stream(handler.unary_stream, method, _readable)
            return handler._replace(unary_stream=behaviour, request_deserializer=parse)
        if inspect.isasyncgenfunction(handler.stream_stream):
            behaviour = _stream(handler.stream_stream, method, _all_readable)
            return handler._replace(stream_stream=behaviour, request_deserializer=parse)
        return handler


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a message that can't be parsed, until someone can answer."""

    cause: str


class _Parser:
    """Never raises: gRPC would make UNKNOWN of it, and a traceback in the log, for what anybody can send."""

    def __init__(self, parse: Callable[[bytes], Any]) -> None:
        self._parse = parse

    def __call__(self, data: bytes) -> Any:
        try:
            return self._parse(data)
        except DecodeError as error:
            return _Unreadable(str(error))


def _readable(request: Any) -> Any:
    """The request. Raises RequestError for one that could not be parsed."""
    if isinstance(request, _Unreadable):
        raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD, request.cause)
    return request


async def _all_readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _coroutine(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(_readable(request), context)
        except Exception as error:  # noqa: BLE001 - each becomes a status
            del request  # see _let_go
            await _abort(context, error, method)

    return wrapped


def _stream(
    behaviour: Callable[[Any, Any], AsyncIterator[Any]], method: str, readable: Callable[[Any], Any]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def wrapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(behaviour(readable(request), context)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - each becomes a status
            del request
            await _abort(context, error, method)

    return wrapped


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.BaseError)):
        raise error
    if not isinstance(error, RequestError):
        log.error("handler failed", method=method, exc_info=error)
        error = RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, f"internal error in {method}")
    _let_go(error)
    # Missing in the published stubs.
    abort = context.abort_with_status  # pyright: ignore[reportAttributeAccessIssue]
    try:
        async with asyncio.timeout(_STATUS_TIMEOUT):
            await abort(error.to_status())
    except TimeoutError:
        raise grpc.aio.AbortError from error
    raise AssertionError("abort_with_status raises")


def _let_go(error: BaseException) -> None:
    """Drops the frames that the error has come through, and with them the request.

    gRPC keeps an aborted call's exception in the call's state, and the exception's frames keep the state: such a cycle
    waits for the collector's next full round, which megabytes of prompts do not hasten.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
