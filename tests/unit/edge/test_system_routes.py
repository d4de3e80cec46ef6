"""Health agrees with the list of models; liveness and metrics are always there; the API description is true."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from services.frontend.edge import create_app
from tests.unit.edge.fakes import ScriptedEmbedding, ScriptedGeneration
from tests.unit.edge.harness import in_memory


@pytest.mark.parametrize(
    ("models", "draining", "status", "word"),
    [
        (["org/tiny"], False, 200, "ok"),
        (["org/tiny", "other"], False, 200, "ok"),
        ([], False, 503, "no_model"),
        (["org/tiny"], True, 503, "draining"),
        ([], True, 503, "draining"),
    ],
)
async def test_health_agrees_with_the_models(models: list[str], draining: bool, status: int, word: str) -> None:
    generation = ScriptedGeneration(models=models)
    generation.draining = draining
    async with in_memory(generation) as client:
        health = await client.get("/health")
        listed = await client.get("/v1/models")
        retrieved = await client.get("/v1/models/org/tiny")
    assert health.status_code == status
    assert health.json()["status"] == word
    assert health.json()["models"] == [model["id"] for model in listed.json()["data"]]
    assert retrieved.status_code == (200 if "org/tiny" in health.json()["models"] else 404)


async def test_health_follows_the_frontend() -> None:
    generation = ScriptedGeneration(models=[])
    async with in_memory(generation) as client:
        assert (await client.get("/health")).status_code == 503
        generation.model_names = ["org/tiny"]
        assert (await client.get("/health")).status_code == 200
        generation.draining = True
        assert (await client.get("/health")).status_code == 503


async def test_a_model() -> None:
    async with in_memory(ScriptedGeneration()) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model == (await client.get("/v1/models/org%2Ftiny")).json()
    assert isinstance(model.pop("created"), int)
    assert model == {"id": "org/tiny", "object": "model", "owned_by": "kvbaton", "max_model_len": 2048}


async def test_live_without_models() -> None:
    generation = ScriptedGeneration(models=[])
    generation.draining = True
    async with in_memory(generation) as client:
        assert (await client.get("/live")).status_code == 200


async def test_metrics_are_those_of_the_registry() -> None:
    registry = CollectorRegistry()
    Counter("kvbaton_example", "An example.", registry=registry).inc(3)
    app = create_app(ScriptedGeneration(), ScriptedEmbedding(), registry=registry)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "kvbaton_example_total 3.0" in response.text


class TestOpenApi:
    @pytest.fixture
    def document(self) -> dict[str, Any]:
        return create_app(ScriptedGeneration(), ScriptedEmbedding(), registry=CollectorRegistry()).openapi()

    def test_every_route_is_there(self, document: dict[str, Any]) -> None:
        assert {(method, path) for path, item in document["paths"].items() for method in item} == {
            ("post", "/v1/completions"),
            ("post", "/v1/embeddings"),
            ("post", "/v1/responses"),
            ("post", "/v1/chat/completions"),
            ("post", "/tokenize"),
            ("post", "/v1/tokenize"),
            ("post", "/detokenize"),
            ("post", "/v1/detokenize"),
            ("get", "/v1/models"),
            ("get", "/v1/models/{model_id}"),
            ("get", "/health"),
            ("get", "/live"),
            ("get", "/metrics"),
        }

    @pytest.mark.parametrize(
        ("path", "request_name", "response_name"),
        [
            ("/v1/completions", "CompletionRequest", "Completion"),
            ("/v1/chat/completions", "ChatCompletionRequest", "ChatCompletion"),
        ],
    )
    def test_a_generation_route(
        self, document: dict[str, Any], path: str, request_name: str, response_name: str
    ) -> None:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{request_name}")
        assert set(operation["responses"]) == {"200", "4XX", "5XX"}
        answers = operation["responses"]["200"]["content"]
        assert answers["application/json"]["schema"]["$ref"].endswith(f"/{response_name}")
        assert "text/event-stream" in answers
        for status in ("4XX", "5XX"):
            schema = operation["responses"][status]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorBody")

    def test_a_field_that_only_takes_its_neutral_value_says_so(self, document: dict[str, Any]) -> None:
        schema = document["components"]["schemas"]["ChatCompletionRequest"]
        assert schema["properties"]["store"]["enum"] == [False, None]
        assert schema["additionalProperties"] is False
