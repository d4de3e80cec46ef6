"""The OpenAPI document is true: it accepts what the edge accepts and describes what it answers."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest
from prometheus_client import CollectorRegistry

from services.frontend.edge import create_app
from services.frontend.edge.fields import BODIES, RequestField, fields_of
from services.frontend.edge.values import Handling
from tests.unit.edge.fakes import ScriptedEmbedding, ScriptedGeneration, Scripts, Step
from tests.unit.edge.harness import events_of, in_memory
from tests.unit.edge.request_examples import MINIMAL, body_as, body_with, values_of


@cache
def document() -> dict[str, Any]:
    return create_app(ScriptedGeneration(), ScriptedEmbedding(), registry=CollectorRegistry()).openapi()


def validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """With what the schema refers to."""
    return jsonschema.Draft202012Validator(schema | {"components": document()["components"]})


@cache
def of_requests(route: str) -> jsonschema.Draft202012Validator:
    return validator(document()["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"])


@cache
def of_answers(route: str, status: str = "200") -> jsonschema.Draft202012Validator:
    return validator(document()["paths"][route]["post"]["responses"][status]["content"]["application/json"]["schema"])


def rows(*handlings: Handling) -> list[Any]:
    return [
        pytest.param(route, field, id=f"{route} {field.path}")
        for route in BODIES
        for field in fields_of(route)
        if field.handling in handlings
    ]


def test_the_document_is_served() -> None:
    assert document()["openapi"].startswith("3.1")


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_the_headers_are_described(route: str) -> None:
    described = {each["name"]: each for each in document()["paths"][route]["post"]["parameters"]}
    for name in ("x-request-id", "x-kvbaton-prefill-worker", "x-kvbaton-decode-worker"):
        assert (described[name]["in"], described[name]["required"]) == ("header", False)
        assert described[name]["description"]


async def test_where() -> None:
    async with in_memory(ScriptedGeneration()) as client:
        assert (await client.get("/openapi.json")).json()["paths"].keys() == document()["paths"].keys()


@pytest.mark.parametrize(("route", "field"), rows(Handling.FORWARDED, Handling.EMULATED, Handling.NO_EFFECT))
def test_what_is_accepted_is_described(route: str, field: RequestField) -> None:
    bodies = (
        [body_as(route, field.path)]
        if field.is_variant
        else [body_with(route, field.path, value) for value in values_of(route, field.path)]
    )
    for body in bodies:
        of_requests(route).validate(body)


@pytest.mark.parametrize(("route", "field"), rows(Handling.REFUSED))
def test_what_is_refused_is_not(route: str, field: RequestField) -> None:
    body = (
        body_as(route, field.path)
        if field.is_variant
        else body_with(route, field.path, values_of(route, field.path)[0])
    )
    assert not of_requests(route).is_valid(body)


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/chat/completions", {"nonsense": 1}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}),
        ("/v1/chat/completions", {"top_logprobs": 21}),
        ("/v1/chat/completions", {"n": 0}),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("/v1/chat/completions", {"logit_bias": {"a": 1}}),
        ("/v1/chat/completions", {"logit_bias": {"1": 101}}),
        ("/v1/chat/completions", {"stop": [""]}),
        ("/v1/chat/completions", {"stop": ["a"] * 17}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": ["a", 1]}),
        ("/v1/completions", {"prompt": [-1]}),
        ("/v1/completions", {"prompt": ["a"] * 129}),
        ("/v1/completions", {"temperature": -1}),
        ("/v1/completions", {"top_p": 0}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": [{"role": "user"}]}),
        ("/v1/responses", {"include": ["file_search_call.results"]}),
    ],
)
def test_what_is_malformed_is_not(route: str, fields: dict[str, Any]) -> None:
    of_requests(route).validate(MINIMAL[route])
    assert not of_requests(route).is_valid(MINIMAL[route] | fields)


ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("script", Scripts.ALL)
async def test_an_answer_is_as_described(route: str, script: tuple[Step, ...]) -> None:
    async with in_memory(ScriptedGeneration(*script)) as client:
        response = await client.post(route, json=MINIMAL[route])
    of_answers(route).validate(response.json())


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("script", Scripts.ALL)
async def test_events_are_as_described(route: str, script: tuple[Step, ...]) -> None:
    content = document()["paths"][route]["post"]["responses"]["200"]["content"]["text/event-stream"]
    body = MINIMAL[route] | {"stream": True, "stream_options": {"include_usage": True}}
    async with in_memory(ScriptedGeneration(*script)) as client:
        events = events_of(await client.post(route, json=body))
    for event in events[:-1]:
        jsonschema.Draft202012Validator(content["x-itemSchema"]).validate(event)


@pytest.mark.parametrize("route", ROUTES)
async def test_an_error_is_as_described(route: str) -> None:
    async with in_memory(ScriptedGeneration()) as client:
        response = await client.post(route, json={})
    of_answers(route, "4XX").validate(response.json())


@pytest.mark.parametrize(("route", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_text_and_tokens_are_as_described(route: str, body: dict[str, Any]) -> None:
    of_requests(route).validate(body)
    async with in_memory(ScriptedGeneration()) as client:
        response = await client.post(route, json=body)
    of_answers(route).validate(response.json())


@pytest.mark.parametrize(("route", "body"), [("/tokenize", {}), ("/detokenize", {"tokens": []})])
def test_no_text_and_no_tokens_are_not(route: str, body: dict[str, Any]) -> None:
    assert not of_requests(route).is_valid(body)
