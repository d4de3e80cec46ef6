"""One HTTP exchange: submits the request, writes its outputs as they come, and cancels it when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvbaton.errors import RequestError
from services.frontend.edge.errors import error_body, internal_error
from services.frontend.edge.responses import AnswerFormat, event
from services.frontend.edge.translate import Call
from services.frontend.request.api import Finished, Generation, Output
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
    """The answer to one request, plain or as server-sent events.

    The status waits for the first output, so that a request that never produced one is an HTTP error (RequestError,
    for the app's handler). A failure after that is the last event of the stream, which then has no [DONE]. A client
    that closes the connection, or takes nothing of its answer for `write_timeout` seconds, cancels the request, in
    every phase.
    """

    def __init__(
        self, generation: Generation, call: Call, answer_format: AnswerFormat, *, stream: bool, write_timeout: float
    ) -> None:
        super().__init__()
        self._generation = generation
        self._call = call
        self._format = answer_format
        self._stream = stream
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application; the request's body must have been read."""
        trace_headers = pick_headers(Headers(scope=scope).items())
        await while_client_stays(receive, self._answer(send, trace_headers))

    async def _answer(self, send: Send, trace_headers: Mapping[str, str]) -> None:
        try:
            async with _outputs_of(self._generation, self._call, trace_headers) as outputs:
                await (self._send_events(outputs, send) if self._stream else self._send_whole(outputs, send))
        except RequestError as error:
            raise self._call.in_openai_terms(error) from error
        except _ClientStalledError:
            # Returning with an unfinished response makes the server close the connection.
            _LOG.warning(
                "http_client_stalled", request_id=self._call.request.request_id, after_seconds=self._write_timeout
            )

    async def _send_whole(self, outputs: AsyncIterator[Output], send: Send) -> None:
        texts: list[str] = []
        finished: Finished | None = None
        async for output in outputs:
            texts.append(output.text)
            finished = output.finished
        body = self._format.whole("".join(texts), _required(finished))
        await self._start(send, {"content-type": "application/json", "content-length": str(len(body))})
        await self._write(send, {"type": "http.response.body", "body": body})

    async def _send_events(self, outputs: AsyncIterator[Output], send: Send) -> None:
        first = await anext(outputs, None)
        if first is None:
            raise internal_error("the answer ended before it began")
        await self._start(send, _STREAM_HEADERS)
        async with aclosing(self._events(first, outputs)) as events:
            async for chunk in events:
                await self._write(send, {"type": "http.response.body", "body": chunk, "more_body": True})
        await self._write(send, {"type": "http.response.body", "body": b""})

    async def _events(self, first: Output, outputs: AsyncIterator[Output]) -> AsyncGenerator[bytes, None]:
        """The events of each output that has any; a failure is the last event."""
        finished = first.finished
        if chunk := self._format.opening() + self._piece(first):
            yield chunk
        try:
            async for output in outputs:
                finished = output.finished
                if chunk := self._piece(output):
                    yield chunk
            # The end of the outputs says that the request is over on our side too, not its last token.
            yield self._format.closing(_required(finished))
        except RequestError as error:
            yield event(error_body(self._call.in_openai_terms(error)))
        except Exception:
            yield event(error_body(internal_error("internal error")))
            raise

    def _piece(self, output: Output) -> bytes:
        return self._format.piece(output.text) if output.text else b""

    async def _start(self, send: Send, headers: dict[str, str]) -> None:
        headers = headers | {"x-request-id": self._call.request.request_id}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._write(send, {"type": "http.response.start", "status": 200, "headers": raw})

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await send(message)
        except TimeoutError:
            raise _ClientStalledError from None


@asynccontextmanager
async def _outputs_of(
    generation: Generation, call: Call, trace_headers: Mapping[str, str]
) -> AsyncGenerator[AsyncIterator[Output], None]:
    """The outputs of a request that is over, one way or the other, when the context ends."""
    live = await generation.submit(call.request, trace_headers)
    outputs = live.outputs()
    try:
        yield outputs
    finally:
        live.cancel()
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()


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


def _required(finished: Finished | None) -> Finished:
    if finished is None:
        raise internal_error("the answer ended without a finish reason")
    return finished
