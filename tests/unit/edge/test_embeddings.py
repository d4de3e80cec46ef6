"""POST /v1/embeddings: what is forwarded, what is refused by name, how vectors are written."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import grpc
import httpx
import openai
import pytest

from kvbaton.errors import Reason, invalid
from kvbaton.token_ids import unpack
from tests.unit.edge.fakes import MODEL, ScriptedEmbedding, ScriptedGeneration, failure
from tests.unit.edge.harness import embedding_in_memory, error_of, served

ROUTE = "/v1/embeddings"


async def post(embedding: ScriptedEmbedding, **fields: Any) -> httpx.Response:
    async with embedding_in_memory(embedding) as client:
        return await client.post(ROUTE, json={"model": MODEL, "input": "Once"} | fields)


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a"], ["a"]),
    ],
)
async def test_every_form_of_input(given: Any, forwarded: list[Any]) -> None:
    embedding = ScriptedEmbedding()
    assert (await post(embedding, input=given)).status_code == 200
    (request,) = embedding.requests
    assert [each.text or list(unpack(each.token_ids)) for each in request.inputs] == forwarded


async def test_fields_are_forwarded_and_left_out_ones_stay_unset() -> None:
    embedding = ScriptedEmbedding()
    await post(embedding)
    await post(embedding, dimensions=64, truncate=False, user="me", encoding_format="float")
    plain, full = embedding.requests
    assert plain.model == MODEL
    assert not plain.HasField("dimensions")
    assert not plain.HasField("truncate")
    assert (full.dimensions, full.truncate, full.HasField("truncate")) == (64, False, True)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_field"),
        ({"input": 5}, "input", "invalid_field"),
        ({"input": ["a", 1]}, "input", "invalid_field"),
        ({"input": [[1], "a"]}, "input", "invalid_field"),
        ({"input": [1, "a"]}, "input", "invalid_field"),
        ({"input": [[1], []]}, "input", "invalid_field"),
        ({"input": [-1]}, "input", "invalid_field"),
        ({"input": ["a"] * 2049}, "input", "invalid_field"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_field"),
        ({"dimensions": 0}, "dimensions", "invalid_field"),
        ({"dimensions": "64"}, "dimensions", "invalid_field"),
        ({"model": ""}, "model", "invalid_field"),
        ({"input_type": "query"}, "input_type", "unsupported_field"),
    ],
)
async def test_bad_bodies_are_refused_by_name(fields: dict[str, Any], param: str, code: str) -> None:
    embedding = ScriptedEmbedding()
    response = await post(embedding, **fields)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert embedding.requests == []


@pytest.mark.parametrize(
    ("given", "field", "param"),
    [
        (["a", "b"], "inputs[1].text", "input[1]"),
        ([[1], [2]], "inputs[0].token_ids", "input[0]"),
        ("a", "inputs[0].text", "input"),
        (["a"], "inputs", "input"),
        ("a", "dimensions", "dimensions"),
    ],
)
async def test_the_frontends_fields_get_openais_names(given: Any, field: str, param: str) -> None:
    response = await post(ScriptedEmbedding(refusal=invalid(field, "too long")), input=given)
    error = error_of(response)
    assert (response.status_code, error["param"], error["message"]) == (400, param, f"{param}: too long")


async def test_a_full_service_says_when_to_come_back() -> None:
    refusal = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS, retry_after=2.0)
    response = await post(ScriptedEmbedding(refusal=refusal))
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    assert error_of(response)["type"] == "rate_limit_error"


async def test_vectors_as_numbers_and_in_base64() -> None:
    body = (await post(ScriptedEmbedding(), input=["a", "b"])).json()
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.5, 1.0]},
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    (each,) = (await post(ScriptedEmbedding(), encoding_format="base64")).json()["data"]
    assert struct.unpack("<ff", base64.b64decode(each["embedding"])) == (0.5, 0.0)


async def test_the_request_id_of_the_header_comes_back() -> None:
    async with embedding_in_memory(ScriptedEmbedding()) as client:
        response = await client.post(ROUTE, json={"model": MODEL, "input": "a"}, headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(("strict", "arguments"), [(False, {}), (True, {"encoding_format": "float"})])
async def test_the_openai_sdk_gets_numbers(strict: bool, arguments: dict[str, Any]) -> None:
    """It asks for base64 by itself, and its own validation then refuses every answer: the type has numbers only."""
    embedding = ScriptedEmbedding()
    embedding_in_memory(embedding)
    async with (
        served(ScriptedGeneration()) as port,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            max_retries=0,
            timeout=10,
            _strict_response_validation=strict,
        ) as client,
    ):
        answer = await client.embeddings.create(model=MODEL, input=["a", "b"], **arguments)
    assert [each.embedding for each in answer.data] == [[0.5, 0.0], [0.5, 1.0]]


async def test_a_client_that_leaves_cancels_the_request() -> None:
    embedding = ScriptedEmbedding(hangs=True)
    embedding_in_memory(embedding)
    async with served(ScriptedGeneration()) as port, httpx.AsyncClient() as client:
        leaving = asyncio.create_task(
            client.post(f"http://127.0.0.1:{port}{ROUTE}", json={"model": MODEL, "input": "a"})
        )
        await asyncio.wait_for(embedding.asked.wait(), 5)
        leaving.cancel()
        await asyncio.wait_for(embedding.cancelled.wait(), 5)
