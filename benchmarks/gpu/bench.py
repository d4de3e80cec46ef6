"""Stage `bench`: Baton's pair and bare SGLang's pair on the same two GPUs, the same loads in turn, one table.

Both pairs are up all the time, and an engine without requests leaves its GPU alone. Each round runs every load on one
system and then on the other, in alternating order; the table has the rounds together. With `--variant` there is a run
for each set of flags, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.gpu.launch import Running, Setup, bare_aggregated, bare_pair, baton, with_words
from benchmarks.gpu.load import PAUSE, Load
from benchmarks.gpu.load import run as run_load
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.rows import Measured, table, write_times
from benchmarks.gpu.startup import startups
from benchmarks.gpu.systems import Baton, Http, System, Workers
from benchmarks.gpu.targets import against_bare, penalties
from benchmarks.gpu.variants import Variant, variant
from kvbaton.client import Client
from kvbaton.v1 import worker_pb2
from services.tools.terminal import columns

_LENGTHS = (500, 2000, 4000, 8000)
LOADS = (
    *(Load(length, 32, requests=10, concurrency=1, pause=PAUSE) for length in _LENGTHS),
    *(Load(length, 32, requests=10, concurrency=1) for length in _LENGTHS),
    Load(500, 128, requests=160, concurrency=32),
    Load(2000, 128, requests=128, concurrency=32),
    Load(4000, 32, requests=96, concurrency=32),
    Load(2000, 128, requests=100, rate=8.0),
)
QUICK = (
    Load(64, 8, requests=4, concurrency=1, pause=PAUSE),
    Load(64, 8, requests=12, concurrency=4),
    Load(64, 8, requests=4, rate=2.0),
)
# Ways to engines that another system has started.
_SHARED = {"workers": " again", "http": " over http"}


@dataclass(frozen=True)
class Plan:
    """What is asked of which systems."""

    systems: tuple[str, ...]
    loads: tuple[Load, ...]
    rounds: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    known = "baton, http (Baton's), workers (Baton's, without the frontend), bare, baton-agg, bare-agg"
    parser.add_argument("--systems", default="baton,bare", help=f"of {known}, in this order")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", default="", help="only those whose names this regular expression is found in")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="NAME=FLAGS and VARIABLES")
    parser.add_argument("--frontend-env", action="append", default=[], help="NAME=VALUE for Baton's frontend")


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """Plain, or once for each variant."""
    loads = tuple(load for load in (QUICK if parsed.quick else LOADS) if re.search(parsed.loads, load.name))
    plan = Plan(tuple(parsed.systems.split(",")), loads, parsed.rounds)
    frontend = dict(pair.split("=", 1) for pair in parsed.frontend_env)
    if "http" in plan.systems:
        setup = with_words(setup, setup.logs / "shape")
    variants: list[Variant] = parsed.variant or [Variant("")]
    outcome.data["rows"], outcome.data["startups"] = [], []
    for each in variants:
        changed = each.applied(setup)
        await outcome.part(each.name or "bench", _measure(plan, changed, frontend, each.name, outcome), needs=60)
    outcome.tables.append(table(outcome.data["rows"]))
    if compared := against_bare(outcome.data["rows"]):
        outcome.data["against_bare"] = compared
        outcome.tables.append(_target_table(compared))
        for row in compared:
            name = f"target: {row['load']} {row['variant']}".rstrip()
            outcome.check(name, row["within"], f"TTFT p50 {row['ttft_p50_later_ms']:+.1f} ms")
    outcome.data["penalties"] = found = penalties(outcome.data["rows"])
    for row in found:
        name = f"target: {row['system']} pair against aggregated, {row['load']}"
        outcome.check(name, row["within"], f"TTFT p50 {row['later_ms']:+.1f} ms")


def _target_table(compared: Sequence[dict[str, Any]]) -> str:
    head = ("BATON AGAINST BARE", "TTFT P50 LATER ms", "REQUESTS/S", "ITL P99", "WITHIN TARGET")
    rows = [
        (
            f"{row['load']} {row['variant']}",
            f"{row['ttft_p50_later_ms']:+.1f}",
            f"x {row['requests_ratio']:.3f}",
            f"x {row['itl_p99_ratio']:.2f}",
            "yes" if row["within"] else "NO",
        )
        for row in compared
    ]
    return "\n".join(columns([head, *rows]))


async def _measure(plan: Plan, setup: Setup, frontend: dict[str, str], variant: str, outcome: Outcome) -> None:
    async with contextlib.AsyncExitStack() as stack:
        systems = await _start(plan, setup, frontend, outcome, stack)
        for system in systems:
            for load in plan.loads:  # every shape of batch once
                await run_load(_warm(load), system, "warm-up", setup.vocabulary)
        measured = {(load.name, each.name): Measured(load.name, each.name) for load in plan.loads for each in systems}
        try:
            await _rounds(plan, systems, measured, setup.vocabulary, outcome)
        finally:
            _keep([each for each in measured.values() if each.rounds], variant, setup, outcome)


async def _rounds(
    plan: Plan,
    systems: Sequence[System],
    measured: dict[tuple[str, str], Measured],
    vocabulary: int,
    outcome: Outcome,
) -> None:
    took = 0.0
    for number in range(plan.rounds):
        if number and outcome.left < 1.15 * took:
            outcome.skip(f"round {number + 1}", f"{outcome.left:.0f} s were left, a round takes {took:.0f}")
            return
        began = time.monotonic()
        for load in plan.loads:
            for system in systems if number % 2 == 0 else reversed(systems):
                # A second way to the same engines would find the first one's prompts in the prefix cache.
                turn = await run_load(load, system, f"round {number}{_SHARED.get(system.name, '')}", vocabulary)
                measured[load.name, system.name].rounds.append(turn)
                for what, example in turn.results.examples.items():
                    print(f"{system.name} {load.name}: {what}: {example}", flush=True)
        took = time.monotonic() - began


def _keep(measured: Sequence[Measured], variant: str, setup: Setup, outcome: Outcome) -> None:
    rows = [{**each.row(), "variant": variant} for each in measured]
    for row in rows:
        row["system"] += f"+{variant}" if variant else ""
        said = f"{row['finished']} finished, {row['failed']} failed"
        outcome.check(f"{row['system']} {row['load']}", row["failed"] == 0, said)
    outcome.data["rows"] += rows
    write_times(measured, setup.logs / f"times{'-' if variant else ''}{variant}.json.gz")


def _warm(load: Load) -> Load:
    return Load(load.input_tokens, 4, requests=2 if not load.rate else 8, concurrency=load.concurrency or 8)


async def _start(
    plan: Plan, setup: Setup, frontend: dict[str, str], outcome: Outcome, stack: contextlib.AsyncExitStack
) -> list[System]:
    """In turn: each takes its share of the memory that those before it have left."""
    systems: list[System] = []
    own = [name for name in plan.systems if name not in _SHARED]
    for position, name in enumerate(own):
        began = time.monotonic()
        given = setup.sharing(0.4 + 0.2 * position)
        if name.startswith("baton"):
            running = await stack.enter_async_context(_baton(name, given, frontend))
            outcome.data["startups"] += startups(running)
            outcome.data["versions"] = running.versions
            systems += await _ways(name, running, plan, stack)
        else:
            started = bare_aggregated(given) if name == "bare-agg" else bare_pair(given)
            systems.append(await stack.enter_async_context(started))
            outcome.data["startups"].append({"system": name, "ready_s": time.monotonic() - began})
    return systems


@contextlib.asynccontextmanager
async def _baton(name: str, setup: Setup, frontend: dict[str, str]) -> AsyncGenerator[Running]:
    if name == "baton-agg":
        started = baton(setup, name, "agg", decode=2, env={"frontend": frontend})
    else:
        started = baton(setup, name, env={"frontend": frontend})
    async with started as running:
        yield running


async def _ways(name: str, running: Running, plan: Plan, stack: contextlib.AsyncExitStack) -> list[System]:
    """To the same engines."""
    systems: list[System] = [Baton(name, running.client)]
    if name != "baton":
        return systems
    if "http" in plan.systems:
        client = httpx.AsyncClient(base_url=running.cluster.http_url, timeout=240, limits=httpx.Limits())
        await stack.enter_async_context(client)
        systems.append(Http("http", client, (await running.client.model_info()).model.name))
    if "workers" in plan.systems:
        systems.append(await _workers(running, stack))
    return systems


async def _workers(running: Running, stack: contextlib.AsyncExitStack) -> Workers:
    """The same engines without the frontend."""
    records = running.cluster.workers.values()
    clients = {each.role: await stack.enter_async_context(Client(each.grpc_endpoint)) for each in records}
    bootstrap = next(each.bootstrap for each in records if each.HasField("bootstrap"))
    return Workers(
        "workers", clients[worker_pb2.WORKER_ROLE_PREFILL], clients[worker_pb2.WORKER_ROLE_DECODE], bootstrap
    )
