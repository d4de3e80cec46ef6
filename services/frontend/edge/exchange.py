"""One HTTP exchange: submits the request, writes its outputs as they come, and cancels it when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvbaton.errors import RequestError
from services.frontend.edge.answer import BodyWriter, EventWriter
from services.frontend.edge.errors import internal_error
from services.frontend.edge.outputs import Work, outputs_of
from services.frontend.request.api import Generation, Output
from services.telemetry.tracing import pick_headers

_LOG = structlog.get_logger()

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would collect the events otherwise.
    "x-accel-buffering": "no",
}


class _ClientStalledError(Exception):
    """The client reads nothing of its answer."""


class Exchange(Response):
    """The answer to one request, plain or as server-sent events, whichever its writer writes.

    The status waits for the first output, so that a request that never produced one is an HTTP error (RequestError,
    for the app's handler). A failure after that is the last event of the stream. A client that closes the connection,
    or takes nothing of its answer for `write_timeout` seconds, cancels the request, in every phase.
    """

    def __init__(
        self, generation: Generation, work: Work, writer: EventWriter | BodyWriter, *, write_timeout: float
    ) -> None:
        super().__init__()
        self._generation = generation
        self._work = work
        self._writer = writer
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application; the request's body must have been read."""
        trace_headers = pick_headers(Headers(scope=scope).items())
        await while_client_stays(receive, self._answer(send, trace_headers))

    async def _answer(self, send: Send, trace_headers: Mapping[str, str]) -> None:
        writer = self._writer
        admitted = writer.prompt if isinstance(writer, EventWriter) else _not_needed
        try:
            async with outputs_of(self._generation, self._work, trace_headers, admitted) as outputs:
                if isinstance(writer, EventWriter):
                    await self._send_events(writer, outputs, send)
                else:
                    await self._send_whole(writer, outputs, send)
        except RequestError as error:
            raise self._renamed(error) from error
        except _ClientStalledError:
            # Returning with an unfinished response makes the server close the connection.
            _LOG.warning("http_client_stalled", request_id=self._work.request_id, after_seconds=self._write_timeout)

    async def _send_whole(self, writer: BodyWriter, outputs: AsyncIterator[Output], send: Send) -> None:
        async for output in outputs:
            writer.take(output)
        body = writer.body()
        await self._start(send, {"content-type": "application/json", "content-length": str(len(body))})
        await self._write(send, {"type": "http.response.body", "body": body})

    async def _send_events(self, writer: EventWriter, outputs: AsyncIterator[Output], send: Send) -> None:
        first = await anext(outputs, None)
        if first is None:
            raise internal_error("the answer ended before it began")
        await self._start(send, _STREAM_HEADERS)
        async with aclosing(self._events(writer, first, outputs)) as events:
            async for chunk in events:
                await self._write(send, {"type": "http.response.body", "body": chunk, "more_body": True})
        await self._write(send, {"type": "http.response.body", "body": b""})

    async def _events(
        self, writer: EventWriter, first: Output, outputs: AsyncIterator[Output]
    ) -> AsyncGenerator[bytes, None]:
        """The events of each output that has any; a failure is the last event."""
        try:
            if chunk := writer.events(first):
                yield chunk
            async for output in outputs:
                if chunk := writer.events(output):
                    yield chunk
            # The end of the outputs says that the request is over on our side too, not its last token.
            yield writer.closing()
        except RequestError as error:
            yield writer.failed(self._renamed(error))
        except Exception:
            yield writer.failed(internal_error("internal error"))
            raise

    def _renamed(self, error: RequestError) -> RequestError:
        """With the names of the route instead of the contract's; the error of one of several prompts has them."""
        return self._work.calls[0].in_openai_terms(error, self._work.request_id)

    async def _start(self, send: Send, headers: dict[str, str]) -> None:
        headers = headers | {"x-request-id": self._work.request_id}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._write(send, {"type": "http.response.start", "status": 200, "headers": raw})

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await send(message)
        except TimeoutError:
            raise _ClientStalledError from None


def _not_needed(_position: int, _tokens: int) -> None:
    """A body's counts come with its ends."""


async def while_client_stays(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Runs `answer`, and cancels it when the client closes the connection. Raises what it raises."""
    answering = asyncio.create_task(answer, name="http-answer")
    leaving = asyncio.create_task(_client_left(receive), name="http-client-left")
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.wait((answering, leaving))
    for task in (leaving, answering):
        if not task.cancelled():
            task.result()


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
