"""How a request body is read: bounded in bytes and time, strict JSON, refused in OpenAI's error shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from services.frontend.edge.errors import HttpError
from services.frontend.edge.options import EdgeOptions

MAX_JSON_PARTS = 100_000
"""Lists, objects and keys of objects together. To check a million of them takes a minute, and gigabytes."""


# In the whole text, also inside of strings. No prompt that a model takes has as many, and ten millions of empty lists
# take the parser 20 s.
_MAX_BRACKETS = 1_000_000


def json_route(options: EdgeOptions) -> type[APIRoute]:
    """The route class whose handlers get their body through `JsonRequest`."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                memory: BodyMemory = request.app.state.body_memory
                with memory.share() as share:
                    return await handler(JsonRequest(request, options, share))

            return handle

    return JsonRoute


class BodyMemory:
    """What the bodies of one app may take together, in bytes; `app.state.body_memory`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    @contextmanager
    def share(self) -> Generator[Callable[[int], None]]:
        """A function that takes so many bytes more, for one body. Raises HttpError, 503, when there are none left."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self._used + size > self._limit:
                raise HttpError(503, "too_many_bodies", "too many large requests at once", headers={"retry-after": "1"})
            mine += size
            self._used += size

        try:
            yield take
        finally:
            self._used -= mine


class JsonRequest(Request):
    """A request whose body is JSON of bounded size; anything else raises HttpError: 400, 408, 413, 415 or 503."""

    def __init__(self, request: Request, options: EdgeOptions, take_memory: Callable[[int], None]) -> None:
        super().__init__(request.scope, request.receive)
        self._options = options
        self._take_memory = take_memory
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
                message = f"the request body did not arrive within {seconds:g} s"
                raise HttpError(408, "body_timeout", message, headers={"connection": "close"}) from None
        return self._bounded_body

    async def json(self) -> Any:
        """The body's value. NaN, infinities, lone surrogates and trailing content are no JSON."""
        body = await self.body()
        brackets = body.count(b"[") + body.count(b"{")
        if brackets > _MAX_BRACKETS:
            raise _too_many_parts()
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise HttpError(400, "invalid_json", f"the body is not valid JSON in UTF-8: {error}") from None
        # Most bodies are settled by this: a long text and a long list of tokens have few of either.
        if brackets + body.count(b":") > MAX_JSON_PARTS:
            _check_parts(value)
        return value

    async def _read(self, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            self._take_memory(len(chunk))
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


def _check_parts(value: Any) -> None:
    """Raises HttpError for a value of too many parts. The parser has bounded its depth."""
    level, parts = [value], 0
    while level:
        parts += len(level) + sum(len(each) for each in level if isinstance(each, dict))
        if parts > MAX_JSON_PARTS:
            raise _too_many_parts()
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for inside in children for child in inside if isinstance(child, dict | list)]


def _too_many_parts() -> HttpError:
    return HttpError(400, "invalid_json", f"more than {MAX_JSON_PARTS} lists, objects and keys of objects")


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "body_too_large", f"the request body is larger than {limit} bytes")
