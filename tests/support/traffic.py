"""Greedy requests to simulated workers, each compared with the oracle."""

from __future__ import annotations

import random

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
