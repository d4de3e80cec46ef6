"""Bodies and stream events have exactly OpenAI's shape."""

from __future__ import annotations

import time
from typing import Any

import pytest

from services.frontend.request.api import FinishReason, Output
from tests.unit.edge.fakes import MODEL, ScriptedGeneration, ended, said
from tests.unit.edge.harness import CHAT, COMPLETIONS, ROUTES, events_of, post

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def without_identity(body: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The body without what differs from answer to answer, which is checked here."""
    assert body.pop("id").startswith(prefix)
    assert abs(body.pop("created") - time.time()) < 60
    assert body.pop("model") == MODEL
    assert body.pop("system_fingerprint") is None
    return body


async def test_a_plain_completion() -> None:
    response = await post(ScriptedGeneration(), COMPLETIONS)
    assert response.headers["content-type"] == "application/json"
    assert without_identity(response.json(), "cmpl-") == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


async def test_a_plain_chat_completion() -> None:
    response = await post(ScriptedGeneration(said("Hel"), ended("lo", reason=FinishReason.LENGTH)), CHAT)
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    assert without_identity(response.json(), "chatcmpl-") == {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
    }


def completion_choice(text: str, reason: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]


def chat_choice(delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]


OPENING = {"role": "assistant", "content": "", "refusal": None}
STREAMS = {
    COMPLETIONS: [completion_choice("Hel"), completion_choice("lo"), completion_choice("", "stop")],
    CHAT: [
        chat_choice(OPENING),
        chat_choice({"content": "Hel"}),
        chat_choice({"content": "lo"}),
        chat_choice({}, "stop"),
    ],
}
OBJECTS = {COMPLETIONS: "text_completion", CHAT: "chat.completion.chunk"}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
async def test_a_stream(route: str, options: object) -> None:
    *chunks, done = events_of(await post(ScriptedGeneration(), route, stream=True, stream_options=options))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    bodies = [without_identity(chunk, "") for chunk in chunks]
    assert bodies == [{"object": OBJECTS[route], "choices": choices} for choices in STREAMS[route]]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_with_usage(route: str) -> None:
    response = await post(ScriptedGeneration(), route, stream=True, stream_options={"include_usage": True})
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    bodies = [without_identity(chunk, "") for chunk in chunks]
    assert bodies == [
        *({"object": OBJECTS[route], "choices": choices, "usage": None} for choices in STREAMS[route]),
        {"object": OBJECTS[route], "choices": [], "usage": USAGE},
    ]


@pytest.mark.parametrize("route", ROUTES)
async def test_outputs_without_text_are_no_events(route: str) -> None:
    held_back = Output(token_ids=[3])
    generation = ScriptedGeneration(held_back, said("Hel"), held_back, held_back, said("lo"), held_back, ended())
    chunks = events_of(await post(generation, route, stream=True))[:-1]
    assert [chunk["choices"] for chunk in chunks] == STREAMS[route]


@pytest.mark.parametrize("route", ROUTES)
async def test_text_of_the_last_output_comes_before_the_finish_reason(route: str) -> None:
    chunks = events_of(await post(ScriptedGeneration(said("Hel"), ended("lo")), route, stream=True))[:-1]
    assert [chunk["choices"] for chunk in chunks] == STREAMS[route]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_answer_of_one_output(route: str) -> None:
    chunks = events_of(await post(ScriptedGeneration(ended("Hello")), route, stream=True))[:-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "Hello" in str(chunks[-2]["choices"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_text_arrives_unchanged(route: str, stream: bool) -> None:
    text = 'línea\n\ndata: [DONE]\n\n"\\ \u2028 🙂\x00'
    response = await post(ScriptedGeneration(said(text), ended()), route, stream=stream)
    choices = [event["choices"][0] for event in events_of(response)[:-1]] if stream else response.json()["choices"]
    texts = [c.get("text") or (c.get("delta") or c.get("message") or {}).get("content", "") for c in choices]
    assert "".join(texts) == text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request_was_not_cancelled(route: str, stream: bool) -> None:
    generation = ScriptedGeneration()
    await post(generation, route, stream=stream)
    assert generation.live[0].finished
    assert not generation.live[0].cancelled.is_set()


@pytest.mark.parametrize("route", ROUTES)
async def test_proxies_are_told_not_to_collect_a_stream(route: str) -> None:
    headers = (await post(ScriptedGeneration(), route, stream=True)).headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
