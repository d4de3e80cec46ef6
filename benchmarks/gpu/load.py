"""One load on one system: closed loop or Poisson, and what its client saw."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from benchmarks.gpu.prompts import prompt
from benchmarks.gpu.rows import Round
from benchmarks.gpu.systems import Prompt, System
from services.tools.bench.options import Objective
from services.tools.bench.results import Results
from services.tools.bench.samples import Kind, Outcome, Sample
from services.tools.bench.workload import poisson

OBJECTIVES = (Objective("ttft", 1.0), Objective("itl_p99", 0.05))

PAUSE = 0.05
"""Seconds behind an answer until engines are at rest: SGLang's overlap scheduler computes one step more behind an
answer's last token, and a request that comes at once waits for it."""


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` prompts; `concurrency` in flight, or `rate` a second as they come.

    `pause` is in seconds, behind each answer.
    """

    input_tokens: int
    output_tokens: int
    requests: int
    concurrency: int = 0
    rate: float = 0.0
    pause: float = 0.0

    @property
    def name(self) -> str:
        """ISL/OSL and how they come."""
        how = f"{self.rate:g}/s" if self.rate else f"c={self.concurrency}"
        return f"{self.input_tokens}/{self.output_tokens} {how}{' idle' if self.pause else ''}"

    def prompt(self, seed: str, index: int, vocabulary: int) -> Prompt:
        """The same for every system and round of this seed."""
        return Prompt(prompt(self.input_tokens, f"{seed}:{self.name}:{index}", vocabulary), self.output_tokens)


async def run(load: Load, system: System, seed: str, vocabulary: int = 150_000) -> Round:
    """All requests to their ends; a failure is an outcome."""
    turn = Round(Results(OBJECTIVES))
    turn.results.begin(perf_counter())
    prompts = [load.prompt(seed, index, vocabulary) for index in range(load.requests)]
    async with asyncio.TaskGroup() as group:
        if load.rate:
            began = perf_counter()
            for index, arrival in zip(range(load.requests), poisson(load.rate, 1), strict=False):
                await asyncio.sleep(max(0.0, began + arrival - perf_counter()))
                group.create_task(_one(system, index, prompts[index], turn, began + arrival))
        else:
            indices = iter(range(load.requests))
            for _ in range(load.concurrency):
                group.create_task(_in_turn(system, indices, prompts, turn, load.pause))
    return turn


async def _in_turn(system: System, indices: Iterator[int], prompts: list[Prompt], turn: Round, pause: float) -> None:
    for index in indices:
        await _one(system, index, prompts[index], turn, None)
        await asyncio.sleep(pause)


async def _one(system: System, index: int, prompt: Prompt, turn: Round, start: float | None) -> None:
    sent = perf_counter()
    sample = Sample(index, sent if start is None else start, sent)
    try:
        async for tokens in system.stream(prompt):
            sample.times.append(perf_counter())
            sample.tokens.append(len(tokens))
        wrong = sample.output_tokens != prompt.output_tokens
        sample.outcome = Outcome(Kind.ERROR, "SHORT") if wrong else Outcome(Kind.FINISHED)
    except Exception as error:  # noqa: BLE001 - it stands in the table
        sample.outcome, sample.detail = Outcome(Kind.ERROR, type(error).__name__), str(error)
    sample.ended = perf_counter()
    sample.prompt_tokens = len(prompt.token_ids)
    turn.results.add(sample)
    turn.samples.append(sample)
