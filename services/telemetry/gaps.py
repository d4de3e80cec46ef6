"""A histogram of the times between tokens that costs a token next to nothing.

prometheus_client's takes two locks and walks its bounds, some three microseconds for every token. This one belongs to
one thread, the event loop's, which writes it and answers scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from services.telemetry.shared import shared, shared_file


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


class SharedTokenGaps(TokenGaps):
    """The same in a file that other processes read (`services/telemetry/shared.py`)."""

    __slots__ = ("_file", "_keys", "_sum_key")

    def __init__(self, bounds: Sequence[float], name: str, documentation: str, model: str) -> None:
        super().__init__(bounds)
        # Not prometheus_client's values: what they do beside writing takes longer than that.
        self._file = file = shared_file("histogram", name)

        def key(suffix: str, **labels: str) -> str:
            return mmap_key(name, name + suffix, ["model", *labels], [model, *labels.values()], documentation)

        # The page adds up the buckets itself.
        self._keys = [key("_bucket", le=floatToGoString(bound)) for bound in (*bounds, float("inf"))]
        self._sum_key = key("_sum")
        # What the process counted whose place this one takes.
        self._counts = [int(file.read_value(each)[0]) for each in self._keys]
        self._seconds: float = file.read_value(self._sum_key)[0]

    def observe(self, seconds: float, tokens: int) -> None:
        """As `TokenGaps`."""
        bucket = bisect_left(self._bounds, seconds / tokens)
        self._counts[bucket] += tokens
        self._seconds += seconds
        self._file.write_value(self._keys[bucket], self._counts[bucket], 0.0)
        self._file.write_value(self._sum_key, self._seconds, 0.0)


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
        if model not in self._models:
            if shared():
                gaps = SharedTokenGaps(self._bounds, self.name, self._documentation, model)
            else:
                gaps = TokenGaps(self._bounds)
            self._models[model] = gaps
        return self._models[model]

    def describe(self) -> Iterator[Metric]:
        """The metric without samples, for the registry."""
        yield HistogramMetricFamily(self.name, self._documentation, labels=["model"])

    def collect(self) -> Iterator[Metric]:
        """The metric as it stands."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=["model"])
        for model, gaps in self._models.items():
            gaps.add_to(family, [model])
        yield family
