"""The official `openai` client against a frontend whose workers play a script: tools, reasoning, choices, errors.

What a real model does with it is in tests/e2e/test_openai_sdk.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from services.requests import Role
from tests.support.cluster import FakeCluster
from tests.support.etcd import etcd_endpoint
from tests.support.fake_engine import Behaviour
from tests.support.scripted import CALL, HI, WEATHER, Scripted, write_model
from tests.support.waiting import eventually

__all__ = ["etcd_endpoint"]

MODEL = "fake-model"
HELLO: Any = [HI]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": WEATHER.name,
        "description": WEATHER.description,
        "parameters": json.loads(WEATHER.parameters),
    },
}
RESPONSE_TOOL: Any = {"type": "function", **TOOL["function"], "strict": False}
ARGUMENTS = '{"city": "Köln", "days": [1, 2]}'


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def scripted(cluster: FakeCluster, model_folder: Path) -> AsyncIterator[Scripted]:
    yield Scripted(cluster, model_folder)


@pytest_asyncio.fixture
async def sdk(cluster: FakeCluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=base_url(cluster), api_key="none", max_retries=0, timeout=20) as client:
        yield client


def base_url(cluster: FakeCluster) -> str:
    return f"http://127.0.0.1:{cluster.frontend.http_port}/v1"


async def test_calls_of_a_plain_chat_and_of_its_stream_are_the_same(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(tool_call_parser="hermes", grammars=True)
    scripted.plays(f"Let me look.\n{CALL}\n{CALL}", tools=[WEATHER])
    # The SDK's own helper reads strict tools only.
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    question: Any = {"model": MODEL, "messages": HELLO, "tools": [strict], "temperature": 0, "max_tokens": 1000}
    plain = (await sdk.chat.completions.create(**question)).choices[0]
    async with sdk.chat.completions.stream(**question) as stream:
        kinds = {event.type async for event in stream}
        streamed = (await stream.get_final_completion()).choices[0]
    assert plain.finish_reason == streamed.finish_reason == "tool_calls"
    assert plain.message.content == streamed.message.content == "Let me look."
    for choice in (plain, streamed):
        calls: list[Any] = [*(choice.message.tool_calls or [])]
        assert [(call.function.name, call.function.arguments) for call in calls] == [(WEATHER.name, ARGUMENTS)] * 2
        assert len({call.id for call in calls}) == 2
    assert "tool_calls.function.arguments.delta" in kinds


async def test_a_named_function_is_called_whatever_the_model_would_say(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(tool_call_parser="hermes", grammars=True)
    scripted.plays(f'[{{"name": "{WEATHER.name}", "parameters": {ARGUMENTS}}}]', tools=[WEATHER])
    for choice in ("required", {"type": "function", "function": {"name": WEATHER.name}}):
        forced: Any = choice
        answer = await sdk.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[TOOL], tool_choice=forced, temperature=0, max_tokens=1000
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == (WEATHER.name, ARGUMENTS)
        assert not answer.choices[0].message.content


async def test_the_result_of_a_call_goes_back_to_the_model(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays(CALL, tools=[WEATHER])
    asked = await sdk.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL], temperature=0, max_tokens=1000)
    message = asked.choices[0].message
    (call,) = message.tool_calls or []
    conversation: Any = [*HELLO, message, {"role": "tool", "tool_call_id": call.id, "content": "12 °C"}]
    answer = await sdk.chat.completions.create(model=MODEL, messages=conversation, tools=[TOOL], max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > (asked.usage.prompt_tokens if asked.usage else 0)


async def test_reasoning_is_told_from_the_answer(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(reasoning_parser="qwen3")
    scripted.plays("<think>\nHm.\n</think>\n\nYes.")
    question: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 1000}
    plain: Any = (await sdk.chat.completions.create(**question)).choices[0].message
    deltas: list[Any] = [
        chunk.choices[0].delta async for chunk in await sdk.chat.completions.create(**question, stream=True)
    ]
    assert (plain.content, plain.reasoning_content) == ("Yes.", "Hm.")
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


async def test_a_response_has_reasoning_and_calls_as_items(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(tool_call_parser="hermes", reasoning_parser="qwen3")
    scripted.plays(f"<think>\nHm.\n</think>\n\n{CALL}", tools=[WEATHER])
    question: Any = {"model": MODEL, "input": HI["content"], "tools": [RESPONSE_TOOL], "max_output_tokens": 1000}
    plain = await sdk.responses.create(**question, temperature=0)
    async with sdk.responses.stream(**question, temperature=0) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_response()
    for response in (plain, streamed):
        call: Any = response.output[-1]
        assert [item.type for item in response.output] == ["reasoning", "function_call"]
        assert (call.name, call.arguments) == (WEATHER.name, ARGUMENTS)
    assert "response.function_call_arguments.delta" in kinds
    assert kinds[-1] == "response.completed"


async def test_choices_and_log_probabilities(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start()
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, max_tokens=5, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or []) == 5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 15


async def test_the_synchronous_client_works_the_same(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays(CALL, tools=[WEATHER])
    question: Any = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "temperature": 0, "max_tokens": 1000}

    def ask() -> tuple[Any, list[Any]]:
        with OpenAI(base_url=base_url(scripted.cluster), api_key="none", max_retries=0, timeout=20) as client:
            return client.chat.completions.create(**question), list(
                client.chat.completions.create(**question, stream=True)
            )

    plain, chunks = await asyncio.to_thread(ask)
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(piece.function.arguments or "" for piece in pieces) == ARGUMENTS
    assert plain.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS


async def test_nobody_serves(cluster: FakeCluster, sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as none:
        await sdk.chat.completions.create(model=MODEL, messages=HELLO)
    assert none.value.status_code == 503
    assert none.value.response.headers["retry-after"]
    assert [model async for model in sdk.models.list()] == []


async def test_a_worker_that_takes_too_long(etcd_endpoint: str, model_folder: Path) -> None:
    async with FakeCluster(
        etcd_endpoint, "too-long", model_folder, link="streams", total_timeout=0.5, retries=0
    ) as cluster:
        await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=30.0))
        await cluster.routable(1)
        async with AsyncOpenAI(base_url=base_url(cluster), api_key="none", max_retries=0, timeout=20) as sdk:
            with pytest.raises(openai.InternalServerError) as late:
                await sdk.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert late.value.status_code == 504


async def test_a_client_that_leaves_ends_every_choice(scripted: Scripted, sdk: AsyncOpenAI) -> None:
    await scripted.start(decode_step=0.02)
    stream = await sdk.completions.create(
        model=MODEL, prompt="Count", n=3, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()

    async def idle() -> bool:
        status = await scripted.cluster.client.status()
        return not any(worker.live_requests for worker in status.workers)

    await eventually(idle, what="every leg of every choice ends")
