"""The gate in front of the HTTP edge, in OpenAI's terms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from services.frontend.access.gate import Gate
from services.frontend.access.guarded import GuardedEmbedding, GuardedGeneration
from services.frontend.edge import create_app
from services.frontend.edge.gate import OPEN_PATHS, duration
from tests.unit.access.support import ALICE, BOB, Clock, key
from tests.unit.edge.fakes import MODEL, ScriptedEmbedding, ScriptedGeneration
from tests.unit.edge.harness import BODIES, COMPLETION, COMPLETIONS, error_of

EMBEDDINGS = "/v1/embeddings"
INPUT: dict[str, Any] = {"model": MODEL, "input": "Once"}
POSTS = {**BODIES, EMBEDDINGS: INPUT}


class Edge:
    def __init__(self, gate: Gate, *, models: tuple[str, ...] = (MODEL,)) -> None:
        self.generation = ScriptedGeneration(models=models)
        self.embedding = ScriptedEmbedding()
        self.app = create_app(
            GuardedGeneration(self.generation),
            GuardedEmbedding(self.embedding, self.generation),
            gate=gate,
            registry=CollectorRegistry(),
        )

    @property
    def untouched(self) -> bool:
        return not self.generation.requests and not self.embedding.requests

    def client(self, secret: str | None = ALICE) -> httpx.AsyncClient:
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://edge", headers=headers, trust_env=False)


async def test_a_key_opens_every_route() -> None:
    async with Edge(Gate([key()])).client() as client:
        for route, body in POSTS.items():
            assert (await client.post(route, json=body)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("secret", [None, "kvb-wrong"])
async def test_without_one_nothing_but_the_open_routes_answers(secret: str | None) -> None:
    edge = Edge(Gate([key()]))
    async with edge.client(secret) as client:
        for route, body in POSTS.items():
            response = await client.post(route, json=body)
            assert response.status_code == 401
            assert error_of(response)["code"] == ("api_key_missing" if secret is None else "invalid_api_key")
            assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/tokenize", "/v1//models", "/health/", "/no-such-route"):
            assert (await client.get(path)).status_code == 401, path
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200, path
    assert edge.untouched


async def test_the_key_is_checked_before_the_body() -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{"

    async with Edge(Gate([key()])).client("kvb-wrong") as client:
        response = await client.post(COMPLETIONS, content=body(), headers={"content-type": "application/json"})
        assert response.status_code == 401
    # httpx's transport in memory hands the body over when it is asked for it.
    assert not read


async def test_two_keys_in_one_request_are_none() -> None:
    async with Edge(Gate([key(), key("bob", BOB)])).client() as client:
        headers = [("authorization", f"Bearer {secret}") for secret in (ALICE, BOB)]
        request = httpx.Request("GET", "http://edge/v1/models", headers=headers)
        assert (await client.send(request)).status_code == 401


@pytest.mark.parametrize("route", POSTS)
async def test_a_model_that_the_key_may_not_use(route: str) -> None:
    edge = Edge(Gate([key(models=frozenset({"other"}))]), models=(MODEL, "other"))
    async with edge.client() as client:
        response = await client.post(route, json=POSTS[route])
        assert response.status_code == 403
        error = error_of(response)
        assert (error["code"], error["param"], error["type"]) == ("model_not_allowed", "model", "permission_error")
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["other"]
        assert (await client.get("/health")).json()["models"] == [MODEL, "other"]
    assert edge.untouched


async def test_too_many_requests_a_minute() -> None:
    clock = Clock()
    async with Edge(Gate([key(requests_per_minute=2)], clock=clock)).client() as client:
        first = await client.post(COMPLETIONS, json=COMPLETION)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30s"
        await client.post(COMPLETIONS, json=COMPLETION)
        third = await client.post(COMPLETIONS, json=COMPLETION)
        assert third.status_code == 429
        error = error_of(third)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert third.headers["retry-after"] == "30"
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert third.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert (await client.get("/v1/models")).status_code == 200, "listing is not counted"
        clock.now += 30
        assert (await client.post(COMPLETIONS, json=COMPLETION)).status_code == 200


async def test_too_many_requests_at_once() -> None:
    gate = Gate([key(concurrent_requests=1)])
    edge = Edge(gate)
    async with edge.client() as client:
        with gate.admit(gate.identify(f"Bearer {ALICE}".encode())):
            response = await client.post(COMPLETIONS, json=COMPLETION)
            assert response.status_code == 429
            assert error_of(response)["code"] == "concurrency_limit_exceeded"
            assert response.headers["retry-after"] == "1"
        assert (await client.post(COMPLETIONS, json=COMPLETION)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [({}, b"{", 400), ({}, b'{"model": 1}', 400), ({"content-type": "text/plain"}, b"{}", 415)],
)
async def test_a_bad_request_gives_its_place_back(headers: dict[str, str], body: bytes, status: int) -> None:
    async with Edge(Gate([key(concurrent_requests=1)])).client() as client:
        for _ in range(3):
            response = await client.post(
                COMPLETIONS, content=body, headers={"content-type": "application/json"} | headers
            )
            assert response.status_code == status


async def test_the_sdk_raises_its_own_errors() -> None:
    gate = Gate([key(models=frozenset({MODEL})), key("bob", BOB, requests_per_minute=1)])
    edge = Edge(gate, models=(MODEL, "other"))

    def sdk(secret: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=secret, base_url="http://edge/v1", http_client=edge.client(None), max_retries=0
        )

    with pytest.raises(openai.AuthenticationError) as wrong:
        await sdk("kvb-wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        await sdk(ALICE).completions.create(model="other", prompt="x")
    assert forbidden.value.param == "model"
    await sdk(BOB).completions.create(model=MODEL, prompt="x")
    with pytest.raises(openai.RateLimitError) as limited:
        await sdk(BOB).completions.create(model=MODEL, prompt="x")
    assert int(limited.value.response.headers["retry-after-ms"]) > 0


async def test_the_document_says_which_routes_need_a_key() -> None:
    async with Edge(Gate([key()])).client(None) as client:
        document = (await client.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in OPEN_PATHS), path


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.0174, "17ms"), (1.5, "1.5s"), (59.9, "59.9s"), (60, "1m0s"), (361.25, "6m1.25s")],
)
def test_durations_look_as_openais(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
