"""The one table of request fields is complete, and every word in it is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest

from services.frontend.edge.fields import BODIES, RequestField, fields_of
from services.frontend.edge.values import Handling
from tests.unit.edge.fakes import ScriptedEmbedding, ScriptedGeneration
from tests.unit.edge.harness import embedding_in_memory, error_of, in_memory
from tests.unit.edge.request_examples import LEFT_OUT, body_as, body_with, place_of, values_of

ROOT = Path(__file__).parents[3]


def rows(handling: Handling) -> list[Any]:
    return [
        pytest.param(route, field, id=f"{route} {field.path}")
        for route in BODIES
        for field in fields_of(route)
        if field.handling is handling
    ]


class Outcome:
    """What came of one body: the status, the answer without what differs each time, and what the frontend was asked."""

    def __init__(self, status: int, answer: str, requests: list[Any]) -> None:
        self.status, self.answer, self.requests = status, answer, requests


async def sent(route: str, body: dict[str, Any]) -> Outcome:
    headers = {"x-request-id": "always-the-same"}
    if route == "/v1/embeddings":
        embedding = ScriptedEmbedding()
        async with embedding_in_memory(embedding) as client:
            response = await client.post(route, json=body, headers=headers)
        return Outcome(response.status_code, response.text, embedding.requests)
    generation = ScriptedGeneration()
    async with in_memory(generation) as client:
        response = await client.post(route, json=body, headers=headers)
    return Outcome(response.status_code, response.text, [*generation.requests, *generation.text_requests])


async def both(route: str, path: str) -> tuple[Outcome, Outcome]:
    first, second = [await sent(route, body_with(route, path, value)) for value in values_of(route, path)]
    for outcome in (first, second):
        assert outcome.status == 200, outcome.answer
    return first, second


@pytest.fixture(autouse=True)
def nothing_differs_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)


@pytest.mark.parametrize(("route", "field"), rows(Handling.FORWARDED))
async def test_what_is_forwarded_reaches_the_frontend(route: str, field: RequestField) -> None:
    if field.is_variant:
        outcome = await sent(route, body_as(route, field.path))
        assert outcome.status == 200, outcome.answer
        return
    with_one, with_other = await both(route, field.path)
    assert with_one.requests != with_other.requests


@pytest.mark.parametrize(("route", "field"), rows(Handling.EMULATED))
async def test_what_is_emulated_changes_the_answer(route: str, field: RequestField) -> None:
    with_one, with_other = await both(route, field.path)
    assert with_one.answer != with_other.answer


@pytest.mark.parametrize(("route", "field"), rows(Handling.NO_EFFECT))
async def test_what_has_no_effect_changes_nothing(route: str, field: RequestField) -> None:
    with_one, with_other = await both(route, field.path)
    assert with_one.requests == with_other.requests
    assert without_echo(with_one) == without_echo(with_other)


def without_echo(outcome: Outcome) -> dict[str, Any] | str:
    """The answer; a response also repeats what its text was to be like."""
    if not outcome.answer.startswith("{"):
        return outcome.answer
    return {key: value for key, value in orjson.loads(outcome.answer).items() if key != "text"}


@pytest.mark.parametrize(("route", "field"), rows(Handling.REFUSED))
async def test_what_is_refused_is_refused_by_name(route: str, field: RequestField) -> None:
    body = (
        body_as(route, field.path)
        if field.is_variant
        else body_with(route, field.path, values_of(route, field.path)[0])
    )
    async with in_memory(ScriptedGeneration()) as client:
        response = await client.post(route, json=body)
    assert response.status_code == 400, response.text
    assert place_of(field.path).match(str(error_of(response)["param"]))


@pytest.mark.parametrize(("route", "field"), rows(Handling.REFUSED))
async def test_neutral_values_of_what_is_refused_change_nothing(route: str, field: RequestField) -> None:
    if field.is_variant:
        return
    without = await sent(route, body_with(route, field.path, LEFT_OUT))
    for neutral in (None, *map(orjson.loads, field.accepts)):
        outcome = await sent(route, body_with(route, field.path, neutral))
        assert (outcome.status, outcome.requests) == (200, without.requests), outcome.answer


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_openai_docs", ROOT / "scripts" / "gen_openai_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("route", BODIES)
def test_no_field_of_the_sdk_is_missing(generator: ModuleType, route: str) -> None:
    fields = fields_of(route)
    not_looked_into = frozenset(f.path for f in fields if f.handling in (Handling.REFUSED, Handling.NO_EFFECT))
    assert set(generator.sdk_fields(route, not_looked_into)) - {field.path for field in fields} == set()


def test_the_sdk_is_looked_at_in_depth(generator: ModuleType) -> None:
    fields = generator.sdk_fields("/v1/chat/completions")
    for path in (
        "stream",
        "stream_options.include_usage",
        "messages[user].content[text].text",
        "messages[assistant].tool_calls[function].function.arguments",
        "tools[function].function.strict",
        "response_format[json_schema].json_schema.schema",
        "web_search_options.user_location[approximate].approximate.city",
    ):
        assert path in fields
    assert "input[assistant].content[output_text].annotations[url_citation].url" in generator.sdk_fields(
        "/v1/responses"
    )


@pytest.mark.parametrize("route", BODIES)
def test_every_field_says_why(route: str) -> None:
    assert [field.path for field in fields_of(route) if not field.note] == []


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "openai.md").read_text() == generator.document(), "run `make docs`"
