"""A histogram of the times between tokens that costs a token next to nothing.

prometheus_client's takes two locks and walks its bounds, some three microseconds for every token. This one belongs to
one thread, the event loop's, which writes it and answers scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class TokenGaps:
    """The gaps of one model's answers."""

    __slots__ = ("_bounds", "_counts", "_seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the upper ones of the buckets, in seconds, ascending."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        """So many tokens came together, `seconds` behind those before them: each counts with its share.

        As SGLang counts: the sum is the time of the streams, and the count their tokens behind the first.
        """
        self._counts[bisect_left(self._bounds, seconds / tokens)] += tokens
        self._seconds += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Its samples."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family.add_metric(labels, buckets, self._seconds)


class GapHistogram(Collector):
    """`TokenGaps` by model, as one metric of a registry."""

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.name = name
        self._documentation = documentation
        self._bounds = bounds
        self._models: dict[str, TokenGaps] = {}
        registry.register(self)

    def of(self, model: str) -> TokenGaps:
        """Where an answer's gaps go; looked up once, not for every token."""
        return self._models.setdefault(model, TokenGaps(self._bounds))

    def describe(self) -> Iterator[Metric]:
        """The metric without samples, for the registry."""
        yield HistogramMetricFamily(self.name, self._documentation, labels=["model"])

    def collect(self) -> Iterator[Metric]:
        """The metric as it stands."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=["model"])
        for model, gaps in self._models.items():
            gaps.add_to(family, [model])
        yield family
