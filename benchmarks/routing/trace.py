"""The requests that every policy gets: when, which prefix, how long a rest of its own.

python -m benchmarks.routing.trace    # writes trace.jsonl anew; the same file for the same code
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

TRACE = Path(__file__).with_name("trace.jsonl")
# Token ids of prefixes and of the rests behind them; the simulated engine's first few are special.
_FIRST_TOKEN, _LAST_TOKEN = 100, 31_999


@dataclass(frozen=True)
class Setting:
    """What the trace was made from. Rates in requests per second, the rest behind a prefix in tokens."""

    prefixes: int = 64
    prefix_tokens: int = 2000
    zipf: float = 1.0
    workers: int = 16
    holders_of_each: int = 2
    """So that each of 16 workers holds an eighth of 64 prefixes."""
    requests: int = 1200
    rate: float = 24.0
    shortest_rest: int = 600
    longest_rest: int = 1400
    seed: int = 6


@dataclass(frozen=True)
class Arrival:
    """One request: seconds from the beginning, its prefix, tokens behind that."""

    at: float
    prefix: int
    rest: int


@dataclass(frozen=True)
class Trace:
    """`held` are each worker's prefixes before the first request."""

    setting: Setting
    held: list[list[int]]
    arrivals: list[Arrival]

    @cached_property
    def prefixes(self) -> list[list[int]]:
        """The tokens of each prefix."""
        setting = self.setting
        return [_tokens(f"prefix {number}", setting.prefix_tokens) for number in range(setting.prefixes)]

    def prompt(self, number: int) -> list[int]:
        """The tokens of the request with that number."""
        arrival = self.arrivals[number]
        return [*self.prefixes[arrival.prefix], *_tokens(f"rest {number}", arrival.rest)]


def read_trace() -> Trace:
    """The committed one."""
    first, *lines = TRACE.read_text().splitlines()
    head = json.loads(first)
    return Trace(Setting(**head["setting"]), head["held"], [Arrival(*json.loads(line)) for line in lines])


def make_trace(setting: Setting) -> Trace:
    """Poisson arrivals, prefixes by Zipf's law, rests of equally likely lengths."""
    rng = random.Random(setting.seed)
    weights = [1 / (rank + 1) ** setting.zipf for rank in range(setting.prefixes)]
    arrivals: list[Arrival] = []
    at = 0.0
    for _ in range(setting.requests):
        at += rng.expovariate(setting.rate)
        prefix = rng.choices(range(setting.prefixes), weights)[0]
        arrivals.append(Arrival(round(at, 4), prefix, rng.randint(setting.shortest_rest, setting.longest_rest)))
    return Trace(setting, _deal(setting, rng), arrivals)


def _deal(setting: Setting, rng: random.Random) -> list[list[int]]:
    """As many prefixes for each worker, none twice."""
    each = setting.prefixes * setting.holders_of_each // setting.workers
    while True:
        cards = [prefix for prefix in range(setting.prefixes) for _ in range(setting.holders_of_each)]
        rng.shuffle(cards)
        held = [cards[worker * each : (worker + 1) * each] for worker in range(setting.workers)]
        if all(len(set(prefixes)) == each for prefixes in held):
            return held


def _tokens(seed: str, count: int) -> list[int]:
    return random.Random(seed).choices(range(_FIRST_TOKEN, _LAST_TOKEN + 1), k=count)


def _write(trace: Trace) -> None:
    head = json.dumps({"setting": asdict(trace.setting), "held": trace.held})
    rows = [json.dumps([arrival.at, arrival.prefix, arrival.rest]) for arrival in trace.arrivals]
    TRACE.write_text("\n".join([head, *rows]) + "\n")


if __name__ == "__main__":
    _write(make_trace(Setting()))
