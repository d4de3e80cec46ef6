"""Real decode workers: answers undisturbed, asked for in two parts, and with one of the workers killed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass

from kvbaton.client import Answer, Client, SamplingParams
from tests.support.processes import Processes
from tests.support.waiting import eventually

TOKENS = 96
FIRST_PART = 12
# What a client has when the worker is killed.
AMID = 8
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True),
    "seeded": SamplingParams(max_new_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True),
}


@dataclass(frozen=True)
class Failover:
    """Tokens by kind of sampling: of whole answers, and of answers in two parts. `moved` were amid the kill."""

    whole: Mapping[str, list[int]]
    in_parts: Mapping[str, list[int]]
    moved: Mapping[str, list[Answer]]


async def fail_over(processes: Processes, client: Client, prompt: list[int], doomed: str) -> Failover:
    """Asks, and kills the `doomed` decode worker amid four answers; another decode worker is there."""
    whole = await by_kind(client, dict.fromkeys(SAMPLING, prompt), TOKENS)
    begun = await by_kind(client, dict.fromkeys(SAMPLING, prompt), FIRST_PART)
    rest = await by_kind(client, {kind: prompt + part for kind, part in begun.items()}, TOKENS - FIRST_PART)
    moved = {kind: [Answer(), Answer()] for kind in SAMPLING}
    async with asyncio.TaskGroup() as reading:
        # In turn, so that each decode worker has one of each kind.
        for kind, answers in moved.items():
            for answer in answers:
                reading.create_task(read(client, prompt, SAMPLING[kind], answer))
                await eventually(lambda answer=answer: answer.token_ids, within=60)
        every = [answer for answers in moved.values() for answer in answers]
        await eventually(lambda: all(len(answer.token_ids) >= AMID for answer in every), within=60)
        assert not any(len(answer.token_ids) == TOKENS for answer in every), "an answer was complete before the kill"
        await asyncio.to_thread(processes.kill, doomed)
    return Failover(whole, {kind: begun[kind] + rest[kind] for kind in SAMPLING}, moved)


async def by_kind(client: Client, prompts: Mapping[str, list[int]], count: int) -> dict[str, list[int]]:
    """So many tokens behind each kind's prompt."""
    requests: list[Awaitable[Answer]] = []
    for kind, prompt in prompts.items():
        sampling = SamplingParams()
        sampling.CopyFrom(SAMPLING[kind])
        sampling.max_new_tokens = count
        requests.append(client.generate(token_ids=prompt, sampling=sampling))
    answers = await asyncio.gather(*requests)
    return {kind: answer.token_ids for kind, answer in zip(prompts, answers, strict=True)}


async def read(client: Client, prompt: list[int], sampling: SamplingParams, into: Answer) -> None:
    """Follows one answer."""
    async for chunk in client.stream(token_ids=prompt, sampling=sampling):
        into.add(chunk)
