"""Greedy requests to simulated workers, each compared with the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator

from kvbaton.client import Client, SamplingParams
from services.requests import Sampling
from services.worker.engines.simulated.oracle import expected_tokens

WRONG_ANSWER = "the answer is not the oracle's"
_VOCABULARY = 32000


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(max_new_tokens=tokens, temperature=0)


def oracle(prompt: list[int], tokens: int) -> list[int]:
    """The right answer to `prompt` with `greedy(tokens)`."""
    return expected_tokens(prompt, Sampling(max_new_tokens=tokens, temperature=0.0))


def fresh_prompt(tokens: int) -> list[int]:
    """A prompt that nobody has sent before, so that no prefix cache and no stale page can know it."""
    return random.choices(range(3, _VOCABULARY), k=tokens)


async def ask(client: Client, *, prompt_tokens: int, tokens: int, timeout: float = 60.0) -> None:
    """One request. Raises RequestError, or AssertionError for an answer that is not the oracle's."""
    prompt = fresh_prompt(prompt_tokens)
    answer = await client.generate(token_ids=prompt, sampling=greedy(tokens), timeout=timeout)
    assert answer.token_ids == oracle(prompt, tokens), WRONG_ANSWER


@contextlib.asynccontextmanager
async def steady(
    client: Client, per_second: float, *, prompt_tokens: int = 24, tokens: int = 8
) -> AsyncGenerator[None]:
    """Requests at that rate as long as the context is open; then waits for their answers. Each must be the oracle's.

    Raises the failures of all of them together, and AssertionError when there were none to fail.
    """
    asked: list[asyncio.Task[None]] = []

    async def go_on() -> None:
        while True:
            asked.append(asyncio.create_task(ask(client, prompt_tokens=prompt_tokens, tokens=tokens)))
            await asyncio.sleep(1 / per_second)

    asking = asyncio.create_task(go_on())
    try:
        yield
    finally:
        asking.cancel()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.gather(asking, return_exceptions=True)
    assert outcomes, "no request was sent"
    if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
        raise ExceptionGroup(f"{len(failures)} of {len(outcomes)} requests failed", failures)
