"""The real OpenAI SDK works against the edge, with strict validation of what it receives.

Streams of /v1/completions are the exception: the SDK's type has no null for `finish_reason`, which OpenAI sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from kvbaton.errors import Reason, RequestError, invalid
from tests.unit.edge.fakes import MODEL, Hang, ScriptedGeneration, failure, said
from tests.unit.edge.harness import served

Code = grpc.StatusCode


@asynccontextmanager
async def sdk(generation: ScriptedGeneration, *, strict: bool = True) -> AsyncGenerator[AsyncOpenAI]:
    async with (
        served(generation) as port,
        AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            max_retries=0,
            timeout=10,
            _strict_response_validation=strict,
        ) as client,
    ):
        yield client


async def chat(client: AsyncOpenAI) -> str | None:
    answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
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
    async with sdk(ScriptedGeneration()) as client:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
        async with client.chat.completions.stream(model=MODEL, messages=messages) as stream:
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (invalid("sampling.top_p", "2 is not in [0, 1]"), openai.BadRequestError),
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
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
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
