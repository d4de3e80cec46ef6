"""One page of metrics from several sources is still one that a scraper can parse."""

from __future__ import annotations

import re
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.parser import text_string_to_metric_families

from services.telemetry import metrics
from services.telemetry.exposition import exposition


def parsed(page: bytes) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(page.decode()))
    assert len({family.name for family in families}) == len(families), "each family once"
    return {family.name: family for family in families}


def family(name: str, **values: float) -> Metric:
    made = Metric(name, "help", "counter")
    for label, value in values.items():
        made.add_sample(f"{name}_total", {"rank": label}, value)
    return made


def test_families_of_several_sources_are_one() -> None:
    page = parsed(exposition([family("sglang:x", a=1), family("sglang:y", a=5), family("sglang:x", b=2, a=9)]))
    samples = {sample.labels["rank"]: sample.value for sample in page["sglang:x"].samples}
    assert samples == {"a": 1, "b": 2}
    assert "kvbaton_worker_legs" in page


def test_a_family_of_ours_can_have_more_from_elsewhere() -> None:
    metrics.WORKER_LEGS.labels("prefill", "finished").inc()
    elsewhere = Metric("kvbaton_worker_legs", "help", "counter")
    elsewhere.add_sample("kvbaton_worker_legs_total", {"role": "x", "outcome": "y"}, 7)
    samples = parsed(exposition([elsewhere]))["kvbaton_worker_legs"].samples
    assert {"x", "prefill"} <= {sample.labels["role"] for sample in samples}


def test_every_metric_of_ours_has_the_prefix_and_says_what_it_is() -> None:
    registry = CollectorRegistry()
    Counter("probe", "help", registry=registry)
    ours = [each for each in prometheus_client.REGISTRY.collect() if each.name.startswith("kvbaton_")]
    assert len(ours) > 10
    assert all(each.documentation for each in ours)
    names = {name for name in vars(metrics) if name.isupper() and not name.startswith("_")}
    assert len(names) == len(ours), "all of them are in the one module"


def test_nothing_else_makes_metrics() -> None:
    services = Path(metrics.__file__).parents[1]
    makers = [
        path.relative_to(services).as_posix()
        for path in services.rglob("*.py")
        if re.search(r"import (Counter|Gauge|Histogram)\b", path.read_text())
        and "prometheus_client" in path.read_text()
    ]
    assert makers == ["telemetry/metrics.py"]
