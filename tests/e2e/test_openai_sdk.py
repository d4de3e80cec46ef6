"""The official `openai` client, unmodified, against the real pair: what a user of OpenAI's API does first."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from tokenizers import Tokenizer

from tests.e2e.conftest import Pair, no_live_requests_on
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 24}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    """What structured output is held to."""

    name: str
    inhabitants: int


@pytest.fixture
def sdk(pair: Pair) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{pair.cluster.http_url}/v1", api_key="none", max_retries=0, timeout=180) as client:
        yield client


@pytest.fixture
def model(sdk: OpenAI) -> str:
    (only,) = sdk.models.list().data
    return only.id


def async_sdk(pair: Pair) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{pair.cluster.http_url}/v1", api_key="none", max_retries=0, timeout=180)


async def in_thread(call: Any, /, **arguments: Any) -> Any:
    """The synchronous client, beside the loop that runs the cluster's own side."""
    return await asyncio.to_thread(call, **arguments)


async def test_the_synchronous_client_chats(sdk: OpenAI, model: str) -> None:
    answer = await in_thread(sdk.chat.completions.create, model=model, messages=CAPITAL, temperature=0, max_tokens=32)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_is_the_plain_answer_in_pieces(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        question: Any = {"model": model, "messages": CAPITAL, "temperature": 0, "max_completion_tokens": 32}
        plain = await sdk.chat.completions.create(**question)
        stream = await sdk.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


async def test_n_answers_have_seeds_of_their_own(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        story: Any = {"model": model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "seed": 7}
        three = await sdk.completions.create(**story, n=3)
        again = await sdk.completions.create(**story, n=3)
        one = await sdk.completions.create(**story)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.text for choice in three.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in again.choices]
    assert texts[0] == one.choices[0].text, "the first of n answers is the one that n=1 gives"
    assert three.usage is not None
    assert three.usage.prompt_tokens == 4
    assert three.usage.completion_tokens == 36


async def test_logprobs_say_how_likely_the_answer_was(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        answer = await sdk.chat.completions.create(
            model=model, messages=CAPITAL, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
        )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert answer.usage is not None
    assert len(entries) == answer.usage.completion_tokens
    said = b"".join(bytes(entry.bytes or []) for entry in entries).decode()
    assert said.startswith(choice.message.content or "?")
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        likeliest = max(entry.top_logprobs, key=lambda top: top.logprob)
        assert (entry.token, entry.logprob) == (likeliest.token, pytest.approx(likeliest.logprob, abs=1e-5)), "greedy"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6


async def test_logprobs_of_a_completion(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        answer = await sdk.completions.create(
            model=model, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2
        )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.logprobs.text_offset == [
        sum(map(len, (choice.logprobs.tokens or [])[:index])) for index in range(len(choice.logprobs.tokens or []))
    ]
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs or [])


async def test_logit_bias_bans_and_forces_tokens(pair: Pair, model: str, model_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    paris, rome = (tokenizer.encode(text, add_special_tokens=False).ids[0] for text in (" Paris", " Rome"))
    question: Any = {"model": model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 1}
    async with async_sdk(pair) as sdk:
        plain = await sdk.completions.create(**question)
        banned = await sdk.completions.create(**question, logit_bias={str(paris): -100})
        forced = await sdk.completions.create(**question, logit_bias={str(rome): 100})
    assert plain.choices[0].text == " Paris"
    assert banned.choices[0].text != " Paris"
    assert forced.choices[0].text == " Rome"


async def test_min_tokens_outlive_the_end_of_the_answer(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        question: Any = {"model": model, "messages": CAPITAL, "temperature": 0, "max_tokens": 64}
        plain = await sdk.chat.completions.create(**question)
        longer = await sdk.chat.completions.create(**question, extra_body={"min_tokens": 40})
    assert plain.usage is not None
    assert longer.usage is not None
    assert plain.usage.completion_tokens < 40 <= longer.usage.completion_tokens


async def test_structured_output_is_parsed_into_a_model(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        answer = await sdk.chat.completions.parse(
            model=model,
            messages=[{"role": "user", "content": "Describe Paris as JSON with name and inhabitants."}],
            response_format=City,
            temperature=0,
            max_tokens=96,
        )
    assert isinstance(answer.choices[0].message.parsed, City)


async def test_json_object(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        answer = await sdk.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": 'Reply with the JSON object {"a": 1} and nothing else.'}],
            response_format={"type": "json_object"},
            temperature=0,
            max_tokens=128,
        )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    else:
        assert (answer.choices[0].message.content or "").lstrip().startswith("{")


async def test_tools_that_the_model_cannot_be_told_of_are_refused_by_name(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        with pytest.raises(openai.BadRequestError) as refused:
            await sdk.chat.completions.create(model=model, messages=CAPITAL, tools=[WEATHER])
    assert refused.value.param == "tools"


async def test_a_response_is_streamed_and_plain(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        plain = await sdk.responses.create(
            model=model, input="What is the capital of France?", temperature=0, max_output_tokens=32
        )
        async with sdk.responses.stream(
            model=model, input="What is the capital of France?", temperature=0, max_output_tokens=32
        ) as events:
            kinds = [event.type async for event in events]
            streamed = await events.get_final_response()
    assert "Paris" in plain.output_text
    assert plain.status == "completed"
    assert streamed.output_text == plain.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


async def test_state_is_refused_by_name(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        for field, value in (("store", True), ("previous_response_id", "resp_1")):
            arguments: Any = {field: value}
            with pytest.raises(openai.BadRequestError) as refused:
                await sdk.responses.create(model=model, input="Hi", **arguments)
            assert refused.value.param == field


async def test_errors_are_the_sdks_own_and_name_the_field(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        with pytest.raises(openai.NotFoundError) as unknown:
            await sdk.chat.completions.create(model="absent", messages=CAPITAL)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        for field, value in (
            ("temperature", -1),
            ("top_p", 0),
            ("max_tokens", 10**9),
            ("logit_bias", {"99999999": 1}),
            ("top_logprobs", 99),
            ("n", 0),
            ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
        ):
            arguments: Any = {field: value} | ({"logprobs": True} if field == "top_logprobs" else {})
            with pytest.raises(openai.BadRequestError) as bad:
                await sdk.chat.completions.create(model=model, messages=CAPITAL, **arguments)
            assert (bad.value.param or "").startswith(field), bad.value
        answer = await sdk.chat.completions.create(model=model, messages=CAPITAL, max_tokens=1)
    assert answer.usage is not None, "the pair goes on"


async def test_a_client_that_leaves_ends_both_legs(pair: Pair, model: str) -> None:
    async with async_sdk(pair) as sdk:
        stream = await sdk.completions.create(
            model=model, prompt="Count:", max_tokens=1500, stream=True, n=2, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
    for record in pair.cluster.workers.values():
        from kvbaton.client import Client

        async with Client(record.grpc_endpoint) as worker:
            await eventually(no_live_requests_on(worker), what="both legs end")
