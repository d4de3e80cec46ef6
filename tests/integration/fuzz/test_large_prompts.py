"""Prompts of ten megabytes: refused by their length, while others are served, and their memory is given back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import grpc
import httpx
import pytest

from kvbaton.client import Client
from kvbaton.errors import RequestError
from tests.support.fuzz_target import EMBEDDING_MODEL, MODEL, Target
from tests.support.traffic import greedy

MEGABYTE = 2**20
SIZE = 10 * MEGABYTE
# Ten megabytes of JSON, too.
IDS = [1_000_000] * (SIZE // 10)
# What a first round leaves behind is the allocator's; the same rounds again may add no more than this to it, which is
# less than what they send.
ROUNDS = 3
AT_ONCE = 2
GROWTH_BYTES = 128 * MEGABYTE
FIRST_GROWTH_BYTES = 512 * MEGABYTE
# /live beside them; on an idle machine it is some tens of milliseconds.
LIVE_SECONDS = 5.0

TEXTS = {
    "one letter": "a" * SIZE,
    "words": "Good morning, " * (SIZE // 14),
    "three bytes each": "\u6f22" * (SIZE // 3),
}

Ask = Callable[[Target, str], Awaitable[None]]


async def by_http(target: Target, text: str) -> None:
    async with httpx.AsyncClient(base_url=target.http_url, timeout=60) as http:
        bodies = {
            "/v1/completions": {"model": MODEL, "prompt": text, "max_tokens": 1},
            "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1},
            "/v1/embeddings": {"model": EMBEDDING_MODEL, "input": [text]},
        }
        for path, body in bodies.items():
            answer = await http.post(path, json=body)
            assert 400 <= answer.status_code < 500, f"{path}: {answer.status_code} {answer.text[:500]}"
            assert len(answer.content) < 10_000, f"{path} gives the prompt back"


async def ids_by_http(target: Target, _: str) -> None:
    content = json.dumps({"model": MODEL, "prompt": IDS, "max_tokens": 1})
    async with httpx.AsyncClient(base_url=target.http_url, timeout=60) as http:
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text[:500]}"


async def by_grpc(target: Target, text: str) -> None:
    async with Client(target.target, timeout=60, call_timeout=60) as client:
        for ask in (
            client.generate(model=MODEL, text=text, sampling=greedy(1)),
            client.generate(model=MODEL, chat=[{"role": "user", "content": text}], sampling=greedy(1)),
            client.generate(model=MODEL, token_ids=IDS, sampling=greedy(1)),
            client.embed([text], model=EMBEDDING_MODEL),
        ):
            with pytest.raises(RequestError) as caught:
                await ask
            assert caught.value.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def ids_to_a_worker(target: Target, _: str) -> None:
    async with Client(target.grpc_endpoints["decode"], timeout=60) as worker:
        with pytest.raises(RequestError) as caught:
            await worker.generate(token_ids=IDS, sampling=greedy(1))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def live_beside(target: Target, attack: Awaitable[object]) -> float:
    """The longest that /live took while `attack` ran, in seconds."""
    longest = 0.0
    running = asyncio.ensure_future(attack)
    async with httpx.AsyncClient(base_url=target.http_url, timeout=30) as http:
        while not running.done():
            began = time.monotonic()
            (await http.get("/live")).raise_for_status()
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(0.02)
    await running
    return longest


@pytest.mark.parametrize("ask", [by_http, ids_by_http, by_grpc, ids_to_a_worker])
async def test_a_prompt_of_ten_megabytes_is_refused_and_forgotten(target: Target, ask: Ask) -> None:
    async with target.unharmed(growth_bytes=FIRST_GROWTH_BYTES):
        await asyncio.gather(*(ask(target, TEXTS["words"]) for _ in range(AT_ONCE)))
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for _ in range(ROUNDS):
            await asyncio.gather(*(ask(target, TEXTS["words"]) for _ in range(AT_ONCE)))


async def test_what_no_message_may_hold_is_not_read(target: Target) -> None:
    async with target.unharmed(growth_bytes=GROWTH_BYTES), Client(target.target, timeout=60) as client:
        with pytest.raises(RequestError) as caught:
            await client.generate(model=MODEL, text="a" * (65 * MEGABYTE), sampling=greedy(1))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("text", TEXTS)
async def test_nobody_waits_for_the_tokenization_of_ten_megabytes(target: Target, text: str) -> None:
    async with target.unharmed(growth_bytes=FIRST_GROWTH_BYTES):
        longest = await live_beside(target, by_http(target, TEXTS[text]))
    print(f"/live took {longest * 1000:.0f} ms at most")
    assert longest < LIVE_SECONDS
