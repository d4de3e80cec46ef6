"""Real text through both legs: streaming, chat, stop strings, seeds, the HTTP edge."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from kvbaton.client import ChatMessage, SamplingParams
from kvbaton.v1 import generate_pb2
from tests.e2e.conftest import Pair

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

CAPITAL = "What is the capital of France?"


async def test_the_answer_names_both_workers(pair: Pair) -> None:
    async with pair.client() as client:
        answer = await client.generate(
            text="The capital of France is", sampling=SamplingParams(max_new_tokens=8, temperature=0)
        )
    assert answer.text.startswith(" Paris")
    assert answer.finished.prefill_worker == pair.cluster.workers["prefill"].instance_id
    assert answer.finished.decode_worker == pair.cluster.workers["decode"].instance_id
    assert answer.finished.usage.prompt_tokens == 5
    assert answer.finished.timings.prefill.ToNanoseconds() > 0


async def test_streamed_text_equals_decoding_all_tokens_at_once(pair: Pair, model_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    async with pair.client() as client:
        chunks = [
            chunk
            async for chunk in client.stream(
                text="Emoji for animals: 🐶 🐱 🐭 🐹",
                sampling=SamplingParams(max_new_tokens=48, temperature=0, ignore_eos=True, skip_special_tokens=False),
            )
        ]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    text = "".join(chunk.text for chunk in chunks)
    assert text == tokenizer.decode(tokens, skip_special_tokens=False)
    assert len(chunks) > 8, "it streams"
    assert all("\ufffd" not in chunk.text for chunk in chunks[:-1]), "no split character"


async def test_chat_uses_the_models_template(pair: Pair) -> None:
    async with pair.client() as client:
        answer = await client.generate(
            chat=[ChatMessage(role="user", content=CAPITAL)], sampling=SamplingParams(max_new_tokens=32, temperature=0)
        )
    assert "Paris" in answer.text
    assert "<|im_" not in answer.text
    assert answer.finished.reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.usage.prompt_tokens > 20, "system prompt and role markers of the template"


async def test_a_stop_string_ends_the_answer_before_itself(pair: Pair) -> None:
    async with pair.client() as client:
        sampling = SamplingParams(max_new_tokens=64, temperature=0, stop=["Paris"])
        answer = await client.generate(chat=[ChatMessage(role="user", content=CAPITAL)], sampling=sampling)
    assert answer.finished.matched_stop == "Paris"
    assert "capital of France" in answer.text
    assert "Paris" not in answer.text
    assert answer.finished.usage.completion_tokens == len(answer.token_ids)


async def test_a_seed_makes_sampling_repeatable(pair: Pair) -> None:
    async with pair.client() as client:

        async def sample(seed: int) -> list[int]:
            sampling = SamplingParams(max_new_tokens=16, temperature=1.0, seed=seed)
            return (await client.generate(text="Once upon a time", sampling=sampling)).token_ids

        first, again, other = await sample(1), await sample(1), await sample(2)
    assert first == again
    assert first != other


async def test_http_completions_and_chat(pair: Pair) -> None:
    async with httpx.AsyncClient(base_url=pair.cluster.http_url, timeout=120) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/live")).status_code == 200
        (model,) = (await http.get("/v1/models")).json()["data"]
        body = {"model": model["id"], "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        plain = (await http.post("/v1/completions", json=body)).json()
        assert plain["choices"][0]["text"].startswith(" Paris")
        assert plain["usage"] == plain["usage"] | {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
        chat = {"model": model["id"], "messages": [{"role": "user", "content": CAPITAL}], "temperature": 0}
        whole = (await http.post("/v1/chat/completions", json=chat | {"max_tokens": 32})).json()
        streamed = ""
        async with http.stream("POST", "/v1/chat/completions", json=chat | {"max_tokens": 32, "stream": True}) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    streamed += delta.get("content") or ""
        assert streamed == whole["choices"][0]["message"]["content"]
        assert "Paris" in streamed
