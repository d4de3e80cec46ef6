"""Stage `smoke`: the pair against one aggregated worker, for 5, 500 and 4 000 input tokens.

Every process has the same dummy weights (one seed), so equal tokens mean that decode read exactly the KV cache that
prefill wrote.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.answers import depend_on_the_context, greedy
from benchmarks.gpu.launch import Setup, baton, shape
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.prompts import prompt
from kvbaton.client import Client, SamplingParams
from services.tools.terminal import columns

INPUT_TOKENS = (5, 500, 4000)
QUICK_INPUT_TOKENS = (5, 50, 500)
NEW_TOKENS = 32


@dataclass
class Run:
    """One mode's answers. Seconds; `first_token` by input length, the best of three."""

    mode: str
    ready: float
    versions: str
    tokens: dict[int, list[int]]
    first_token: dict[int, float]
    features: dict[str, bool]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    parser.add_argument("--layers", type=int, help="of the model's shape, for a quick check")


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """Both modes, one after the other."""
    if parsed.layers:
        setup = replace(setup, model=str(shape(parsed.layers, Path(setup.logs) / "shape")))
    await outcome.part("smoke", _compare(setup.sharing(0.85), outcome))


async def _compare(setup: Setup, outcome: Outcome) -> None:
    lengths = QUICK_INPUT_TOKENS if setup.device == "cpu" else INPUT_TOKENS
    pair, aggregated = [await _answers(mode, setup, lengths) for mode in ("disagg", "agg")]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        equal = aggregated.tokens[length] == pair.tokens[length]
        outcome.check(f"{length} input tokens", equal, "tokens equal" if equal else "tokens differ")
        ttft = {each.mode: each.first_token[length] * 1e3 for each in (aggregated, pair)}
        rows.append({"input_tokens": length, "equal": equal, **{f"ttft_{mode}_ms": ttft[mode] for mode in ttft}})
    for name, came in pair.features.items():
        outcome.check(name, came and aggregated.features[name])
    outcome.data |= {"versions": pair.versions, "rows": rows, "runs": [asdict(aggregated), asdict(pair)]}
    cells = [(str(row["input_tokens"]), f"{row['ttft_agg_ms']:.1f}", f"{row['ttft_disagg_ms']:.1f}") for row in rows]
    head = ("INPUT TOKENS", "TTFT AGGREGATED ms", "TTFT PAIR ms")
    outcome.tables.append("\n".join([pair.versions, *columns([head, *cells])]))


async def _answers(mode: Literal["agg", "disagg"], setup: Setup, lengths: tuple[int, ...]) -> Run:
    """Starts the cluster, asks every prompt, stops it."""
    async with baton(setup, mode, mode) as running:
        depend = await depend_on_the_context(running.client, setup.vocabulary)
        result = Run(mode, running.ready, running.versions, {}, {}, {"answers depend on the context": depend})
        for length in lengths:
            result.tokens[length], result.first_token[length] = await _ask(running.client, length, setup.vocabulary)
        if not setup.simulated:
            end = (await running.client.model_info()).eos_token_ids[0]
            result.features |= await _features(running.client, end, setup.vocabulary)
    return result


async def _ask(client: Client, length: int, vocabulary: int) -> tuple[list[int], float]:
    """The answer to the fixed prompt of that length, and the best time to first token of three other prompts."""
    answer = await client.generate(token_ids=prompt(length, "0", vocabulary), sampling=greedy(NEW_TOKENS))
    best = float("inf")
    for seed in ("1", "2", "3"):
        sent = time.monotonic()
        async for _ in client.stream(token_ids=prompt(length, seed, vocabulary), sampling=greedy(NEW_TOKENS)):
            best = min(best, time.monotonic() - sent)
    return answer.token_ids, best


async def _features(client: Client, end: int, vocabulary: int) -> dict[str, bool]:
    """What SGLang is asked for beside tokens, and whether it came. `end` is the model's end of sequence."""
    ask: dict[str, Any] = {"token_ids": prompt(50, "0", vocabulary)}
    likely = await client.generate(**ask, sampling=greedy(8), logprobs=2)
    forced: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "logit_bias": {end: 100.0}}
    short = await client.generate(**ask, sampling=SamplingParams(**forced))
    longer = await client.generate(**ask, sampling=SamplingParams(**forced, min_new_tokens=5))
    return {
        "log probabilities": [each.token_id for each in likely.logprobs] == likely.token_ids
        and all(each.logprob == each.top[0].logprob for each in likely.logprobs),
        "logit bias": short.token_ids == [end],
        "minimum length": len(longer.token_ids) >= 5 and end not in longer.token_ids[:4],
    }
