"""Stage `timeline`: one request at a time, taken apart, through Baton and through bare SGLang."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from benchmarks.gpu.answers import greedy
from benchmarks.gpu.launch import Setup, bare_pair, baton
from benchmarks.gpu.load import PAUSE
from benchmarks.gpu.moments import MOMENTS, STAGES, complete, middle, moments, stages
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.prompts import prompt
from benchmarks.gpu.startup import startups
from benchmarks.gpu.systems import Prompt
from benchmarks.gpu.timeline_plot import plot
from benchmarks.gpu.transfers import ProbeLines, moved
from benchmarks.gpu.variants import Variant, variant
from kvbaton.client import Client
from services.tools.terminal import columns

LENGTHS = (500, 2000, 4000, 8000)
QUICK_LENGTHS = (50, 300)
_OUTPUT_TOKENS = 8
_TOLD_SECONDS = 5.0


@dataclass
class Asked:
    """One request as its client saw it. Seconds since the epoch; `timings` are the frontend's, in seconds."""

    sent: float
    first_token: float = 0.0
    timings: dict[str, float] = field(default_factory=dict[str, float])


class Asking(Protocol):
    """A way to ask that says when."""

    async def __call__(self, token_ids: Prompt) -> Asked:
        """To the request's end."""
        ...


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    parser.add_argument("--systems", default="baton,bare", help="of baton and bare")
    parser.add_argument("--requests", type=int, default=12, help="of each length")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="NAME=FLAGS and VARIABLES")


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """Each system after the other, so that nothing else is on the GPUs."""
    outcome.data["rows"], outcome.data["startups"] = [], []
    if setup.simulated:
        outcome.skip("timeline", "the probe is in SGLang, and the engine is simulated")
        return
    lengths = QUICK_LENGTHS if parsed.quick else LENGTHS
    for each in parsed.variant or [Variant("")]:
        for system in parsed.systems.split(","):
            name = f"{system}+{each.name}" if each.name else system
            given = each.applied(replace(setup.sharing(0.85), probe=True))
            given = replace(given, logs=given.logs / system)
            await outcome.part(name, _take_apart(name, given, lengths, parsed.requests, outcome), needs=75)
    rows = outcome.data["rows"]
    outcome.tables += [_moment_table(rows), _stage_table(rows)]
    outcome.data["svg"] = plot(rows)


async def _take_apart(name: str, setup: Setup, lengths: Sequence[int], count: int, outcome: Outcome) -> None:
    async with AsyncExitStack() as stack:
        ask: Asking
        if name.startswith("bare"):
            ask = _bare(await stack.enter_async_context(bare_pair(setup)))
        else:
            running = await stack.enter_async_context(baton(setup, "baton"))
            outcome.data["startups"] += startups(running)
            outcome.data["versions"] = running.versions
            ask = _baton(running.client)
        lines = ProbeLines(setup.probe_folder)
        for length in lengths:
            requests = await _requests(ask, setup, lines, length, count)
            _keep(name, length, requests, outcome)


async def _requests(
    ask: Asking, setup: Setup, lines: ProbeLines, length: int, count: int
) -> list[tuple[Asked, list[dict[str, Any]]]]:
    """The first two of a length are a warm-up."""
    found: list[tuple[Asked, list[dict[str, Any]]]] = []
    for number in range(-2, count):
        token_ids = prompt(length, f"timeline {number}", setup.vocabulary)
        lines.new()
        await asyncio.sleep(PAUSE)
        asked = await ask(Prompt(token_ids, _OUTPUT_TOKENS))
        told = await _told(lines)
        if number == -1 and not complete(told):
            raise RuntimeError(f"the probe told of {sorted({line['event'] for line in told})} only")
        if number >= 0:
            found.append((asked, told))
    return found


async def _told(lines: ProbeLines) -> list[dict[str, Any]]:
    """What the engines wrote of the request; decode's line comes behind its last token."""
    found = lines.new()
    until = time.monotonic() + _TOLD_SECONDS
    while not complete(found) and time.monotonic() < until:
        await asyncio.sleep(0.02)
        found += lines.new()
    return found


def _keep(name: str, length: int, requests: list[tuple[Asked, list[dict[str, Any]]]], outcome: Outcome) -> None:
    apart = [moments(asked.sent, asked.first_token, asked.timings.get("queue"), told) for asked, told in requests]
    whole = [each for each in apart if {name for _, _, name in STAGES} <= set(each)]
    outcome.check(f"{name}: {length} tokens", len(whole) == len(apart), f"{len(whole)} of {len(apart)} told entirely")
    if not whole:
        return
    transfers = [moved(told) for _, told in requests]
    timings = [asked.timings for asked, _ in requests]
    median = middle(whole)
    outcome.data["rows"].append(
        {
            "system": name,
            "input_tokens": length,
            "ttft_ms": median["first_token"],
            "moments": median,
            "stages": stages(whole),
            "frontend_ms": {phase: _median_ms(timings, phase) for phase in timings[0]},
            "transfer": next((each.row() for each in transfers if each is not None), None),
            "requests": apart,
        }
    )


def _median_ms(timings: Sequence[dict[str, float]], phase: str) -> float:
    values = sorted(each[phase] for each in timings if phase in each)
    return values[len(values) // 2] * 1e3


def _baton(client: Client) -> Asking:
    async def ask(token_ids: Prompt) -> Asked:
        asked = Asked(time.time())
        options: Any = {"token_ids": token_ids.token_ids, "sampling": greedy(token_ids.output_tokens)}
        async for chunk in client.stream(**options):
            if chunk.token_ids and not asked.first_token:
                asked.first_token = time.time()
            if chunk.HasField("finished"):
                timings = chunk.finished.timings
                asked.timings = {each.name: value.ToNanoseconds() / 1e9 for each, value in timings.ListFields()}
        return asked

    return ask


def _bare(pair: Any) -> Asking:
    async def ask(token_ids: Prompt) -> Asked:
        asked = Asked(time.time())
        async for _ in pair.stream(token_ids):
            asked.first_token = asked.first_token or time.time()
        return asked

    return ask


def _moment_table(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(["medians, ms since the client sent it", *_columns(rows, MOMENTS, lambda row: row["moments"])])


def _stage_table(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name, _, _ in STAGES]
    return "\n".join(["medians of each stage, ms", *_columns(rows, names, lambda row: row["stages"])])


def _columns(
    rows: Sequence[dict[str, Any]], names: Sequence[str], of: Callable[[dict[str, Any]], dict[str, float]]
) -> list[str]:
    """A line for each moment or stage, a column for each system and length."""
    head = ("", *(f"{row['system']} {row['input_tokens']}" for row in rows))
    return columns(
        [head, *((name, *(f"{of(row)[name]:.2f}" if name in of(row) else "" for row in rows)) for name in names)]
    )
