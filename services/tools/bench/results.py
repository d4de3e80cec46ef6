"""All requests of a run in compact arrays: about 70 bytes a request, whatever its length."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

from services.tools.bench.options import Objective
from services.tools.bench.samples import Kind, Outcome, Sample
from services.tools.bench.statistics import Distribution, Histogram


@dataclass(frozen=True, slots=True)
class Row:
    """One request; durations in seconds, `start` since the run began, NaN for what didn't happen."""

    index: int
    outcome: str
    code: str
    reason: str
    start: float
    send_lag: float
    ttft: float
    e2e: float
    tpot: float
    itl_p99: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    messages: int
    good: bool

    def as_json(self) -> dict[str, object]:
        """NaN becomes null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


class Results:
    """Collects samples. Latencies are those of finished requests; tokens are those of all."""

    _INTEGERS = ("index", "prompt_tokens", "cached_tokens", "output_tokens", "messages")
    _SECONDS = ("start", "send_lag", "ttft", "e2e", "tpot", "itl_p99")

    def __init__(self, objectives: Sequence[Objective] = ()) -> None:
        self.objectives = tuple(objectives)
        self.outcomes: Counter[Outcome] = Counter()
        self.examples: dict[Outcome, str] = {}
        self.cancels_planned = 0
        self.good = 0
        self._known: dict[Outcome, int] = {}
        self._outcome, self._good = array("H"), array("B")
        self._integers: dict[str, array[int]] = {name: array("I") for name in self._INTEGERS}
        self._seconds = {name: array("d") for name in self._SECONDS}
        self._itl, self._message_gaps = Histogram(), Histogram()
        self.began = self.ended = 0.0

    def begin(self, now: float) -> None:
        """Where rows begin to count, and rates."""
        self.began = self.ended = now

    def add(self, sample: Sample) -> None:
        """A request that has ended."""
        outcome = sample.outcome
        finished = outcome.kind is Kind.FINISHED
        good = finished and all(sample.metric(name) <= seconds for name, seconds in self.objectives)
        self.outcomes[outcome] += 1
        if sample.detail:
            self.examples.setdefault(outcome, sample.detail)
        self.cancels_planned += sample.cancel_planned
        self.good += good
        self.ended = max(self.ended, sample.ended)
        self._outcome.append(self._known.setdefault(outcome, len(self._known)))
        self._good.append(good)
        self._append(sample)
        if finished:
            self._itl.add_all(sample.gaps.per_token, sample.gaps.tokens)
            self._message_gaps.add_all(sample.gaps.messages, repeat(1))

    def _append(self, sample: Sample) -> None:
        integers = (
            sample.index,
            sample.prompt_tokens,
            sample.cached_tokens,
            sample.output_tokens,
            len(sample.times),
        )
        for name, integer in zip(self._INTEGERS, integers, strict=True):
            self._integers[name].append(integer)
        seconds = (
            sample.start - self.began,
            sample.send_lag,
            sample.ttft,
            sample.e2e,
            sample.tpot,
            sample.itl_percentile(99),
        )
        for name, duration in zip(self._SECONDS, seconds, strict=True):
            self._seconds[name].append(duration)

    def __len__(self) -> int:
        return len(self._outcome)

    def count(self, kind: Kind) -> int:
        """Requests that ended so."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.kind is kind)

    def errors(self) -> list[tuple[Outcome, int]]:
        """By code and reason, the most frequent first."""
        return [(outcome, count) for outcome, count in self.outcomes.most_common() if outcome.kind is Kind.ERROR]

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning until the last request ended."""
        return self.ended - self.began

    def total(self, name: str) -> int:
        """Of an integer column, over all requests."""
        return sum(self._integers[name])

    def latency(self, name: str) -> Distribution:
        """Of finished requests: ttft, itl, tpot, message_gap, e2e. Of all: send_lag."""
        match name:
            case "itl":
                return self._itl.distribution()
            case "message_gap":
                return self._message_gaps.distribution()
            case "send_lag":
                return Distribution.of(self._seconds[name])
            case _:
                finished = {number for outcome, number in self._known.items() if outcome.kind is Kind.FINISHED}
                values = zip(self._seconds[name], self._outcome, strict=True)
                return Distribution.of(value for value, outcome in values if outcome in finished and value == value)

    def rows(self) -> Iterator[Row]:
        """In the order in which they ended."""
        outcomes = list(self._known)
        for position, number in enumerate(self._outcome):
            kind, code, reason = outcomes[number]
            columns: dict[str, Any] = {name: column[position] for name, column in self._columns()}
            yield Row(
                outcome=kind.value,
                code=code,
                reason=reason,
                good=bool(self._good[position]),
                **columns,
            )

    def _columns(self) -> Iterator[tuple[str, array[Any]]]:
        yield from self._integers.items()
        yield from self._seconds.items()
