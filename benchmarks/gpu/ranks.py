"""Stage `ranks`: two pairs, and workers of several GPUs, tensor parallel and data parallel, against aggregated ones.

Made for four GPUs; on two, prefill and decode of several ranks share both.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.gpu.answers import Answered, answered, depend_on_the_context, difference, greedy
from benchmarks.gpu.launch import Running, Setup, baton, shape
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.prompts import prompt
from benchmarks.gpu.transfers import ProbeLines, gpu_names
from services.tools.options import gpus_per_worker
from services.tools.terminal import columns

# One after the other, so that tokens must be equal; enough of them that each rank gets some.
LENGTHS = (5, 500, 4000, *range(300, 380, 10))
QUICK_LENGTHS = (5, 50, *range(20, 28))
OUTPUT_TOKENS = 16
_GPUS = 4
# A thread of their own for the ranks of one engine on a CPU.
_CPU_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass(frozen=True, slots=True)
class Plan:
    """So many workers of each role, each with SGLang's `flags`."""

    name: str
    flags: tuple[str, ...] = ()
    workers: int = 1

    @property
    def tp(self) -> int:
        """Ranks that compute a request together."""
        return int(self.flags[1]) if "--tp" in self.flags else 1

    @property
    def dp(self) -> int:
        """Ranks that compute requests of their own."""
        return int(self.flags[1]) if "--dp" in self.flags else 1


TWO_PAIRS, TENSOR, DATA = Plan("2 + 2", workers=2), Plan("tp 2", ("--tp", "2")), Plan("dp 2", ("--dp", "2"))


@dataclass
class Answers:
    """Of one mode, by the prompt's length; who gave them, and the probe's lines."""

    tokens: dict[int, Answered] = field(default_factory=dict[int, Answered])
    workers: set[str] = field(default_factory=set[str])
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    mean_something: bool = False


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """Every plan that this device can show."""
    outcome.data["rows"] = []
    if parsed.device == "cpu":
        plans: Sequence[Plan] = (TWO_PAIRS,) if setup.simulated else (DATA,)
        setup = replace(setup, env={**setup.env, **_CPU_RANKS})
        outcome.skip("other plans", "a CPU has room for one, and SmolLM2's nine heads can't be halved")
    else:
        plans = (TWO_PAIRS,) if setup.simulated else (TENSOR, DATA, TWO_PAIRS)
        small = setup.with_flag("--max-total-tokens", "20000").sharing(0.3)
        setup = replace(small, model=str(shape(4, setup.logs / "4-layers")))
        if len(gpu_names()) < _GPUS:
            outcome.skip(
                "GPUs of their own for all", f"{len(gpu_names())} of {_GPUS} GPUs: prefill and decode share them"
            )
    for plan in plans:
        await outcome.part(plan.name, _compare(plan, setup, outcome), needs=75)
    head = ("RANKS", "MODE", "READY s", "WORKERS ASKED")
    cells = [(row["plan"], row["mode"], f"{row['ready_s']:.0f}", str(row["workers"])) for row in outcome.data["rows"]]
    outcome.tables.append("\n".join(columns([head, *cells])))


async def _compare(plan: Plan, setup: Setup, outcome: Outcome) -> None:
    given = replace(setup.with_flags(*plan.flags), logs=setup.logs / plan.name.replace(" ", ""))
    if setup.device == "cpu":
        pair, aggregated = [await _answers(plan, given, mode, outcome) for mode in ("disagg", "agg")]
    else:
        pair, aggregated = await asyncio.gather(*(_answers(plan, given, mode, outcome) for mode in ("disagg", "agg")))
    outcome.check(f"{plan.name}: answers depend on the context", pair.mean_something and aggregated.mean_something)
    for length, tokens in pair.tokens.items():
        differs = difference(tokens, aggregated.tokens[length])
        outcome.check(f"{plan.name}: {length} tokens", differs is None, "equal" if differs is None else str(differs))
    expected = 2 * plan.workers
    outcome.check(f"{plan.name}: every worker", len(pair.workers) == expected, f"{len(pair.workers)} of {expected}")
    if plan.dp > 1:
        check_rooms(plan, pair.lines, outcome)
    if plan.tp > 1:
        writers = processes(pair.lines, "written")
        outcome.check(f"{plan.name}: every rank writes its heads", len(writers) == plan.tp, f"{len(writers)} processes")


def check_rooms(plan: Plan, lines: Sequence[Mapping[str, Any]], outcome: Outcome) -> None:
    """A rank of prefill takes the rooms that are its number modulo their number; every rank of both roles has some."""
    rooms = rooms_by_process(lines)
    aligned = {process: {room % plan.dp for room in those} for process, those in rooms["prefill"].items()}
    ranks = sorted(rank for those in aligned.values() for rank in those)
    outcome.check(f"{plan.name}: rooms are their rank's", ranks == list(range(plan.dp)), str(list(aligned.values())))
    found = {role: len(those) for role, those in rooms.items()}
    outcome.check(f"{plan.name}: every rank of both roles", set(found.values()) == {plan.dp}, str(found))


def rooms_by_process(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """The rooms of each engine process's requests, by role; canaries have none."""
    found: dict[str, dict[str, list[int]]] = {"prefill": defaultdict(list), "decode": defaultdict(list)}
    for line in lines:
        if line["event"] == "request" and line["room"] and line["role"] in found:
            found[line["role"]][line["process"]].append(line["room"])
    return found


def processes(lines: Iterable[Mapping[str, Any]], event: str) -> set[str]:
    """Those that have told of such an event."""
    return {line["process"] for line in lines if line["event"] == event}


async def _answers(plan: Plan, setup: Setup, mode: Literal["disagg", "agg"], outcome: Outcome) -> Answers:
    answers, pair = Answers(), mode == "disagg"
    given = replace(setup, probe=pair and not setup.simulated)
    lengths = QUICK_LENGTHS if setup.device == "cpu" else LENGTHS
    count = plan.workers if pair else 1
    async with baton(given, mode, mode, prefill=count, decode=count, env=_gpus(plan, given, mode)) as running:
        outcome.data["versions"] = running.versions
        answers.mean_something = await depend_on_the_context(running.client, setup.vocabulary)
        for length in lengths:
            await _ask(running, length, setup.vocabulary, answers)
        if given.probe:
            answers.lines = ProbeLines(given.probe_folder).new()
        row = {"plan": plan.name, "mode": mode, "ready_s": running.ready, "workers": len(answers.workers)}
        outcome.data["rows"].append(row)
    return answers


async def _ask(running: Running, length: int, vocabulary: int, answers: Answers) -> None:
    token_ids = prompt(length, "ranks", vocabulary)
    answer = await running.client.generate(token_ids=token_ids, sampling=greedy(OUTPUT_TOKENS), logprobs=2)
    answers.tokens[length] = answered(answer)
    finished = answer.finished
    answers.workers |= {worker for worker in (finished.prefill_worker, finished.decode_worker) if worker}


def _gpus(plan: Plan, setup: Setup, mode: str) -> dict[str, dict[str, str]]:
    """As the cluster has it where there are enough: prefill's, then decode's. Else both on the same."""
    if setup.device == "cpu" or len(gpu_names()) >= _GPUS or mode == "agg":
        return {}
    each = gpus_per_worker(setup.flags)
    if plan.workers == 1:
        shared = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(each)))}
        return {"prefill": shared, "decode": shared}
    numbers = range(1, plan.workers + 1)
    return {f"{role}-{n}": {"CUDA_VISIBLE_DEVICES": str(n - 1)} for role in ("prefill", "decode") for n in numbers}
