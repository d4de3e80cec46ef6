"""Ways to reach an edge: in memory, through a socket, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

import httpx
import orjson
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from kvbaton.v1 import embed_pb2
from services.frontend.edge import EdgeOptions, create_app
from services.frontend.embedding.service import Embedding
from services.frontend.request.api import Generation
from services.http_server import HttpServer
from tests.unit.edge.fakes import MODEL, ScriptedEmbedding, ScriptedGeneration

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "Once"}
CONVERSATION: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BODIES = {COMPLETIONS: COMPLETION, CHAT: CONVERSATION}
ROUTES = tuple(BODIES)


class Stage:
    """Lets one app, which is slow to build, serve the generation, or the embedding, of each test."""

    def __init__(self) -> None:
        self.generation = ScriptedGeneration()
        self.embedding = ScriptedEmbedding()

    async def embed(self, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        return await self.embedding.embed(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generation, name)


@cache
def staged_app(options: EdgeOptions | None) -> tuple[FastAPI, Stage]:
    stage = Stage()
    return create_app(
        cast("Generation", stage), cast("Embedding", stage), options=options, registry=CollectorRegistry()
    ), stage


def app_for(generation: ScriptedGeneration, options: EdgeOptions | None) -> FastAPI:
    """An edge over this generation, until the next one is asked for."""
    app, stage = staged_app(options)
    stage.generation = generation
    return app


def embedding_in_memory(embedding: ScriptedEmbedding) -> httpx.AsyncClient:
    _, stage = staged_app(None)
    stage.embedding = embedding
    return in_memory(ScriptedGeneration())


def in_memory(generation: ScriptedGeneration, options: EdgeOptions | None = None) -> httpx.AsyncClient:
    app = app_for(generation, options)
    # As a server does: what the app raises after its own answer is for the log.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://edge", trust_env=False)


@asynccontextmanager
async def served(generation: ScriptedGeneration, options: EdgeOptions | None = None) -> AsyncGenerator[int]:
    """The port of an edge behind a real socket."""
    app = app_for(generation, options)
    async with HttpServer(app, host="127.0.0.1", port=0, flag="--http-port", stop_grace_seconds=1.0) as server:
        yield server.port


async def post(generation: ScriptedGeneration, route: str, **fields: Any) -> httpx.Response:
    """The route's smallest body, with `fields` in it."""
    async with in_memory(generation) as client:
        return await client.post(route, json=BODIES[route] | fields)


async def refused(generation: ScriptedGeneration, route: str, **fields: Any) -> dict[str, Any]:
    """The error of a request that must be refused with 400 and cost no generation."""
    response = await post(generation, route, **fields)
    assert response.status_code == 400, response.text
    assert generation.requests == []
    return error_of(response)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a body that must have OpenAI's shape and no more."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def events_of(response: httpx.Response) -> list[Any]:
    """The stream's events; "[DONE]" as it stands."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]
