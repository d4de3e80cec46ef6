"""The real OpenAI SDK works against the edge, with strict validation of what it receives.

Streams of /v1/completions are the exception: the SDK's type has no null for `finish_reason`, which OpenAI sends.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from kvbaton.errors import Reason, RequestError, invalid
from services.frontend.request.api import FinishReason, Output, ToolCallDelta
from services.requests import TokenLogprob, TopLogprob
from tests.unit.edge.fakes import MODEL, Hang, ScriptedGeneration, Scripts, ended, failure, said
from tests.unit.edge.sdk import HI, sdk, with_sync_sdk

Code = grpc.StatusCode


async def chat(client: AsyncOpenAI) -> str | None:
    answer = await client.chat.completions.create(model=MODEL, messages=HI)
    return answer.choices[0].message.content


async def test_models() -> None:
    async with sdk(ScriptedGeneration(models=["org/tiny", "other"])) as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny", "other"]
        model = await client.models.retrieve("org/tiny")
        assert (model.id, model.object, model.owned_by) == ("org/tiny", "model", "kvbaton")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("absent")
        assert caught.value.code == "model_not_found"


async def test_a_completion() -> None:
    async with sdk(ScriptedGeneration()) as client:
        answer = await client.completions.create(model=MODEL, prompt="Once", seed=1, stop=["x"], max_tokens=5)
    assert answer.choices[0].text == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10


async def test_a_completion_stream() -> None:
    async with sdk(ScriptedGeneration(), strict=False) as client:
        stream = await client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_chat() -> None:
    async with sdk(ScriptedGeneration()) as client:
        assert await chat(client) == "Hello"


async def test_a_chat_stream_with_usage() -> None:
    async with sdk(ScriptedGeneration()) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5, "ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    *text, usage = chunks
    assert text[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text) == "Hello"
    assert text[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in text)
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (7, 3)


async def test_the_sdks_own_stream_helper() -> None:
    async with (
        sdk(ScriptedGeneration()) as client,
        client.chat.completions.stream(model=MODEL, messages=HI) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"


async def test_the_blocking_client() -> None:
    def use(client: OpenAI) -> tuple[str | None, str, list[str]]:
        answer = client.chat.completions.create(model=MODEL, messages=HI)
        stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return answer.choices[0].message.content, text, [model.id for model in client.models.list()]

    assert await with_sync_sdk(ScriptedGeneration(), use) == ("Hello", "Hello", [MODEL])


async def test_several_choices() -> None:
    # The helper raises for an answer that was cut off.
    script = (said("a"), said("x", index=1), said("b"), ended(), ended("y", index=1))
    async with sdk(ScriptedGeneration(*script)) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, n=2)
        async with client.chat.completions.stream(model=MODEL, messages=HI, n=2) as stream:
            streamed = await stream.get_final_completion()
    for completion in (answer, streamed):
        assert [choice.message.content for choice in completion.choices] == ["ab", "xy"]
        assert [choice.finish_reason for choice in completion.choices] == ["stop", "stop"]


async def test_several_prompts() -> None:
    async with sdk(ScriptedGeneration()) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "b"], echo=True)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "aHello"), (1, "bHello")]


async def test_log_probabilities() -> None:
    likeliest = TokenLogprob(5, -0.25, (TopLogprob(6, -2.0, b"Ho"),), b"Hel")
    script = (Output([5], "Hel", logprobs=[likeliest]), ended())
    async with sdk(ScriptedGeneration(*script)) as client:
        chats = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=1)
        completions = await client.completions.create(model=MODEL, prompt="a", logprobs=1)
    of_chat, of_completion = chats.choices[0].logprobs, completions.choices[0].logprobs
    assert of_chat is not None
    assert of_chat.content is not None
    assert [(each.token, each.logprob) for each in of_chat.content] == [("Hel", -0.25)]
    assert of_chat.content[0].top_logprobs[0].token == "Ho"
    assert of_completion is not None
    assert (of_completion.tokens, of_completion.text_offset) == (["Hel"], [0])


class Weather(BaseModel):
    """The weather somewhere."""

    city: str
    degrees: int


SUNNY = '{"city": "Rome", "degrees": 30}'


async def test_a_parsed_answer() -> None:
    generation = ScriptedGeneration(said(SUNNY[:9]), ended(SUNNY[9:]))
    async with sdk(generation) as client:
        answer = await client.chat.completions.parse(model=MODEL, messages=HI, response_format=Weather)
        async with client.chat.completions.stream(model=MODEL, messages=HI, response_format=Weather) as stream:
            streamed = await stream.get_final_completion()
    for completion in (answer, streamed):
        assert completion.choices[0].message.parsed == Weather(city="Rome", degrees=30)
    assert orjson.loads(generation.requests[0].sampling.json_schema)["required"] == ["city", "degrees"]


CALLING = (
    Output([1], tool_calls=[ToolCallDelta(0, "call_1", "Weather", SUNNY[:9])]),
    Output([1], tool_calls=[ToolCallDelta(0, arguments=SUNNY[9:])]),
    ended(reason=FinishReason.TOOL_CALLS),
)


async def test_tools_and_the_way_back() -> None:
    generation = ScriptedGeneration(*CALLING)
    tools = [openai.pydantic_function_tool(Weather)]
    async with sdk(generation) as client:
        answer = await client.chat.completions.parse(model=MODEL, messages=HI, tools=tools)
        async with client.chat.completions.stream(model=MODEL, messages=HI, tools=tools) as stream:
            events = [event.type async for event in stream]
            streamed = await stream.get_final_completion()
        for completion in (answer, streamed):
            message = completion.choices[0].message
            assert completion.choices[0].finish_reason == "tool_calls"
            assert message.content is None
            assert message.tool_calls is not None
            (call,) = message.tool_calls
            assert (call.id, call.function.name) == ("call_1", "Weather")
            assert call.function.parsed_arguments == Weather(city="Rome", degrees=30)
            # What came is sent back as it is, with the result.
            result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "30"}
            history = [*HI, cast("ChatCompletionMessageParam", message), result]
            await client.chat.completions.create(model=MODEL, messages=history, tools=tools)
    assert "tool_calls.function.arguments.done" in events
    sent = generation.requests[-1].chat
    assert (sent.tools[0].name, sent.tools[0].strict) == ("Weather", True)
    assert orjson.loads(sent.messages[1].tool_calls[0].arguments) == {"city": "Rome", "degrees": 30}
    assert sent.messages[2].tool_call_id == "call_1"


async def test_reasoning() -> None:
    async with sdk(ScriptedGeneration(*Scripts.REASONING)) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HI, reasoning_effort="high")
    assert answer.choices[0].message.content == "42"
    assert cast("Any", answer.choices[0].message).reasoning_content == "Hmm."


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (invalid("sampling.top_p", "2 is not in [0, 1]"), openai.BadRequestError),
        (failure(Code.UNAUTHENTICATED), openai.AuthenticationError),
        (failure(Code.PERMISSION_DENIED), openai.PermissionDeniedError),
        (failure(Code.NOT_FOUND, Reason.MODEL_NOT_FOUND), openai.NotFoundError),
        (failure(Code.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST_ID), openai.ConflictError),
        (failure(Code.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS), openai.RateLimitError),
        (failure(Code.UNAVAILABLE, Reason.NO_WORKER), openai.InternalServerError),
        (failure(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_PREFILL), openai.InternalServerError),
    ],
)
async def test_a_refusal_is_the_sdks_error(refusal: RequestError, kind: type[openai.APIStatusError]) -> None:
    async with sdk(ScriptedGeneration(refusal=refusal)) as client:
        with pytest.raises(kind) as caught:
            await chat(client)
    assert caught.value.code == refusal.reason.lower()
    assert caught.value.param == (refusal.field.removeprefix("sampling.") or None)
    assert caught.value.request_id is not None


async def test_an_unsupported_field_is_a_bad_request() -> None:
    async with sdk(ScriptedGeneration()) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model=MODEL, prompt="a", suffix="b")
    assert caught.value.param == "suffix"


async def test_an_error_in_a_stream_is_raised_after_the_text() -> None:
    generation = ScriptedGeneration(said("Hel"), failure(Code.ABORTED, Reason.LEG_ENDED_EARLY, message="decode died"))
    async with sdk(generation, strict=False) as client:
        stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
        assert (await anext(stream)).choices[0].text == "Hel"
        with pytest.raises(openai.APIError, match="decode died") as caught:
            await anext(stream)
    assert caught.value.code == "leg_ended_early"


async def test_a_retry_comes_after_the_time_that_was_asked_for() -> None:
    generation = ScriptedGeneration(refusal=failure(Code.UNAVAILABLE, Reason.NO_WORKER, retry_after=0.2))
    async with sdk(generation) as client:
        asking = asyncio.create_task(chat(client.with_options(max_retries=3)))
        await generation.submitted.wait()
        generation.refusal = None
        async with asyncio.timeout(5):
            assert await asking == "Hello"
    assert len(generation.requests) == 2


async def test_closing_a_stream_cancels_the_request() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with sdk(generation) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        await anext(stream)
        await stream.close()
        async with asyncio.timeout(1):
            await generation.live[0].cancelled.wait()


async def test_a_plain_call_that_is_given_up_cancels_the_request() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with sdk(generation) as client:
        with pytest.raises(openai.APITimeoutError):
            await chat(client.with_options(timeout=0.3))
        async with asyncio.timeout(1):
            await generation.live[0].cancelled.wait()
