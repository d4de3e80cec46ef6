"""Percentiles: exact over a list, and within 0.5 % over a histogram of bounded size."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Durations in seconds. `percentiles` belong to PERCENTILES; everything is 0 when `count` is."""

    count: int
    mean: float
    percentiles: tuple[float, ...]
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        """Exact."""
        ordered = sorted(values)
        if not ordered:
            return cls(0, 0.0, (0.0,) * len(PERCENTILES), 0.0)
        ranks = tuple(percentile(ordered, share) for share in PERCENTILES)
        return cls(len(ordered), math.fsum(ordered) / len(ordered), ranks, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank: the smallest value that at least `share` per cent of the ascending values don't exceed."""
    return ordered[_rank(len(ordered), share) - 1]


def weighted_percentile(values: Sequence[float], counts: Sequence[int], share: float) -> float:
    """The same for values that each stand for so many (not 0); 0 without any."""
    total = sum(counts)
    if values and total == len(values):
        return percentile(sorted(values), share)
    left = _rank(total, share)
    for value, count in sorted(zip(values, counts, strict=True)):
        left -= count
        if left <= 0:
            return value
    return 0.0


def _rank(count: int, share: float) -> int:
    return max(1, math.ceil(count * share / 100))


class Histogram:
    """Durations from 1 µs to 10 h in buckets 1 % wide. Mean and maximum are exact, percentiles within 0.5 %."""

    _FLOOR = 1e-6
    _SCALE = 1 / math.log(1.01)
    _BUCKETS = 2 + int(math.log(36_000 / _FLOOR) * _SCALE)

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * self._BUCKETS))
        self._sum = 0.0
        self._count = 0
        self._maximum = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """A duration that occurred so many times."""
        self.add_all((seconds,), (times,))

    def add_all(self, durations: Sequence[float], times: Iterable[int]) -> None:
        """Durations in seconds, each of which occurred so many times."""
        if not durations:
            return
        # Once for every message of a run.
        counts, log, floor, scale, last = self._counts, math.log, self._FLOOR, self._SCALE, self._BUCKETS - 1
        for seconds, number in zip(durations, times, strict=False):
            bucket = 1 + int(log(seconds / floor) * scale) if seconds > floor else 0
            counts[min(bucket, last)] += number
            self._count += number
            self._sum += seconds * number
        self._maximum = max(self._maximum, *durations)

    def distribution(self) -> Distribution:
        """Of everything so far."""
        if not self._count:
            return Distribution.of(())
        ranks = tuple(self._percentile(share) for share in PERCENTILES)
        return Distribution(self._count, self._sum / self._count, ranks, self._maximum)

    def _percentile(self, share: float) -> float:
        left = _rank(self._count, share)
        for bucket, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                middle = self._FLOOR * math.exp((bucket - 0.5) / self._SCALE) if bucket else 0.0
                return min(middle, self._maximum)
        return self._maximum
