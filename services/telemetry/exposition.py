"""One page of Prometheus metrics from several sources: this process's own, and those of an engine's children."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector


def exposition(others: Iterable[Metric] = ()) -> bytes:
    """This process's metrics and `others`, each family once: the format allows no family twice.

    Blocks while `others` reads its files.
    """
    page = CollectorRegistry()
    page.register(_Merged([*REGISTRY.collect(), *others]))
    return generate_latest(page)


class _Merged(Collector):
    """Families of one name become one; a sample that comes twice is counted where it came first."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        for family in self._families:
            target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
            for sample in family.samples:
                identity = (sample.name, tuple(sorted(sample.labels.items())))
                if identity not in seen:
                    seen.add(identity)
                    target.samples.append(sample)
        return iter(merged.values())

    def describe(self) -> Iterator[Metric]:
        """Nothing: collecting is all that this page is for."""
        return iter(())
