"""How a request body is read: bounded in bytes and time, strict JSON, refused in OpenAI's error shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from services.frontend.edge.errors import HttpError
from services.frontend.edge.options import EdgeOptions

# The rest of a body that we don't read would otherwise be read as the next request of the connection.
_CLOSE = {"connection": "close"}


def json_route(options: EdgeOptions) -> type[APIRoute]:
    """The route class whose handlers get their body through `JsonRequest`."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await handler(JsonRequest(request, options))

            return handle

    return JsonRoute


class JsonRequest(Request):
    """A request whose body is JSON of bounded size; anything else raises HttpError with 400, 408, 413 or 415."""

    def __init__(self, request: Request, options: EdgeOptions) -> None:
        super().__init__(request.scope, request.receive)
        self._options = options
        self._bounded_body: bytes | None = None

    async def body(self) -> bytes:
        """The whole body."""
        if self._bounded_body is None:
            _check_media_type(self.headers)
            _check_length(self.headers, self._options.max_body_bytes)
            try:
                async with asyncio.timeout(self._options.body_timeout_seconds):
                    self._bounded_body = await self._read(self._options.max_body_bytes)
            except TimeoutError:
                seconds = self._options.body_timeout_seconds
                raise HttpError(
                    408, "body_timeout", f"the request body did not arrive within {seconds:g} s", headers=_CLOSE
                ) from None
        return self._bounded_body

    async def json(self) -> Any:
        """The body's value. NaN, infinities, lone surrogates and trailing content are no JSON."""
        try:
            return orjson.loads(await self.body())
        except orjson.JSONDecodeError as error:
            raise HttpError(400, "invalid_json", f"the body is not valid JSON in UTF-8: {error}") from None

    async def _read(self, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)


def _check_media_type(headers: Headers) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(
            415, "unsupported_media_type", f"content-type must be application/json, not {media_type or 'missing'}"
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HttpError(415, "unsupported_media_type", f"content-encoding {encoding} is not supported")


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "body_too_large", f"the request body is larger than {limit} bytes", headers=_CLOSE)
