"""POST /tokenize and /detokenize, in the shape that users of SGLang and of vLLM know."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest

from kvbaton.errors import Reason, invalid
from kvbaton.v1 import text_pb2
from tests.unit.edge.fakes import MODEL, ScriptedGeneration, failure
from tests.unit.edge.harness import error_of, in_memory

TOKENIZE = ("/tokenize", "/v1/tokenize")
DETOKENIZE = ("/detokenize", "/v1/detokenize")


async def post(generation: ScriptedGeneration, route: str, **body: Any) -> httpx.Response:
    async with in_memory(generation) as client:
        return await client.post(route, json=body)


@pytest.mark.parametrize("route", TOKENIZE)
async def test_the_tokens_of_a_prompt(route: str) -> None:
    response = await post(ScriptedGeneration(), route, model=MODEL, prompt="Hi")
    assert response.json() == {"tokens": [72, 105], "count": 2, "max_model_len": 2048}
    assert response.headers["x-request-id"].startswith("tokn-")


async def test_what_tokens_stand_for() -> None:
    response = await post(ScriptedGeneration(), "/tokenize", prompt="Hi", return_token_strs=True)
    assert response.json()["token_strs"] == ["H", "i"]


async def test_the_tokens_of_a_conversation() -> None:
    generation = ScriptedGeneration()
    tool = {"type": "function", "function": {"name": "f"}}
    response = await post(
        generation,
        "/tokenize",
        messages=[{"role": "user", "content": "Hi"}],
        tools=[tool],
        chat_template_kwargs={"a": 1},
        add_special_tokens=True,
    )
    assert response.json()["count"] == 2
    (request,) = generation.text_requests
    assert isinstance(request, text_pb2.TokenizeRequest)
    assert request.chat.messages[0].content == "Hi"
    assert request.chat.tools[0].name == "f"
    assert request.chat.template_arguments == '{"a":1}'
    assert request.add_special_tokens


@pytest.mark.parametrize("route", DETOKENIZE)
async def test_the_text_of_tokens(route: str) -> None:
    generation = ScriptedGeneration()
    response = await post(generation, route, model=MODEL, tokens=[72, 105], skip_special_tokens=False)
    assert response.json() == {"text": "Hi", "prompt": "Hi"}
    (request,) = generation.text_requests
    assert request == text_pb2.DetokenizeRequest(model=MODEL, token_ids=[72, 105], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "temperature": 1}, "temperature"),
        ("/tokenize", {"prompt": "a", "model": ""}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [[1]]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "Hi"}, "tokens"),
    ],
)
async def test_a_bad_body_is_refused_by_name(route: str, body: dict[str, Any], param: str) -> None:
    generation = ScriptedGeneration()
    response = await post(generation, route, **body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert generation.text_requests == []


@pytest.mark.parametrize(
    ("route", "body", "field", "param"),
    [
        ("/tokenize", {"prompt": "a"}, "text", "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "chat.messages", "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "chat", "messages"),
        ("/detokenize", {"tokens": [1]}, "token_ids", "tokens"),
    ],
)
async def test_a_field_that_the_frontend_refuses_has_its_name(
    route: str, body: dict[str, Any], field: str, param: str
) -> None:
    response = await post(ScriptedGeneration(refusal=invalid(field, "is bad")), route, **body)
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["message"]) == (param, f"{param}: is bad")


async def test_an_unknown_model_is_404() -> None:
    refusal = failure(grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND)
    response = await post(ScriptedGeneration(refusal=refusal), "/tokenize", model="x", prompt="a")
    assert response.status_code == 404
