"""What a bench has measured: a row for each load on each system, their table, and every token's time."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.tools.bench.results import Results
from services.tools.bench.samples import Kind, Sample
from services.tools.bench.statistics import PERCENTILES, Distribution

# Seconds. A step of decode takes a few milliseconds at all loads: what is longer has a cause of its own.
_SLOW_GAP = 0.03


@dataclass
class Round:
    """One load on one system, once."""

    results: Results
    samples: list[Sample] = field(default_factory=list[Sample])
    began: float = field(default_factory=time.time)
    """Seconds since the epoch, to find the same moment in a log."""

    def slow_gaps(self) -> list[tuple[float, int, int, float]]:
        """Of tokens that came late: seconds since the round began, request, token in it, seconds since the last one."""
        return sorted(
            (now - self.results.began, sample.index, position, now - before)
            for sample in self.samples
            for position, (before, now) in enumerate(pairwise(sample.times), start=1)
            if now - before > _SLOW_GAP
        )

    def times(self) -> list[dict[str, Any]]:
        """Of every request: when it was due and when its messages came, milliseconds since the round began."""

        def since(seconds: float) -> float:
            return round((seconds - self.results.began) * 1e3, 2)

        return [
            {"index": each.index, "start": since(each.start), "times": [since(time) for time in each.times]}
            for each in self.samples
        ]


@dataclass
class Measured:
    """All rounds of one load on one system."""

    load: str
    system: str
    rounds: list[Round] = field(default_factory=list[Round])

    def row(self) -> dict[str, Any]:
        """Milliseconds; the median round's percentiles, all rounds' counts."""
        results = [each.results for each in self.rounds]
        finished = [each.count(Kind.FINISHED) for each in results]
        return {
            "load": self.load,
            "system": self.system,
            "rounds": len(results),
            "finished": sum(finished),
            "failed": sum(map(len, results)) - sum(finished),
            "requests_per_second": _middle([n / each.elapsed for n, each in zip(finished, results, strict=True)]),
            "goodput_share": goodput_share(results),
            "good_per_second": _middle([each.good / each.elapsed for each in results]),
            "slow_gaps": sum(len(each.slow_gaps()) for each in self.rounds),
            **{
                f"{metric}_p{share}_ms": _middle([_percentile(each.latency(metric), share) for each in results])
                for metric in ("ttft", "itl")
                for share in (50, 99)
            },
        }


def goodput_share(results: Sequence[Results]) -> float:
    """Of all requests, those that finished within the objectives; a failed one is not good."""
    return sum(each.good for each in results) / max(1, sum(map(len, results)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    head = ("load", "system", "req/s", "TTFT p50", "p99", "ITL p50", "p99", "good", "good/s", "slow", "failed")
    form = "{:<14} {:<14} {:>7} {:>9} {:>9} {:>8} {:>8} {:>5} {:>6} {:>5} {:>6}"
    lines = [form.format(*head)]
    lines += [
        form.format(
            row["load"],
            row["system"],
            *(f"{row[name]:.1f}" for name in ("requests_per_second", "ttft_p50_ms", "ttft_p99_ms")),
            *(f"{row[name]:.2f}" for name in ("itl_p50_ms", "itl_p99_ms", "goodput_share", "good_per_second")),
            row["slow_gaps"],
            row["failed"],
        )
        for row in sorted(rows, key=lambda row: row["load"])
    ]
    return "\n".join(lines)


def write_times(measured: Sequence[Measured], path: Path) -> None:
    """Every token of every request, and the slow ones apart; gzipped JSON."""
    report = [
        {
            "load": each.load,
            "system": each.system,
            "round": number,
            "began": turn.began,
            "slow_gaps": turn.slow_gaps(),
            "requests": turn.times(),
        }
        for each in measured
        for number, turn in enumerate(each.rounds)
    ]
    path.write_bytes(gzip.compress(json.dumps(report).encode()))


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def _percentile(distribution: Distribution, share: int) -> float:
    return distribution.percentiles[PERCENTILES.index(share)] * 1e3
