"""The histogram of gaps between tokens is one as Prometheus has them, and costs a token under two microseconds."""

from __future__ import annotations

import timeit

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.telemetry.gaps import GapHistogram, TokenGaps

BOUNDS = (0.001, 0.01, 0.1)


def page(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_the_page_is_the_one_of_a_plain_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = GapHistogram("gap_seconds", "x", BOUNDS, ours).of("m")
    plain = Histogram("gap_seconds", "x", ["model"], buckets=BOUNDS, registry=theirs).labels("m")
    for seconds in (0.0005, 0.001, 0.00101, 0.05, 0.1, 0.11, 7.0):
        gaps.observe(seconds, 1)
        plain.observe(seconds)
    assert page(ours) == page(theirs)


def test_tokens_that_come_together_share_the_time() -> None:
    registry = CollectorRegistry()
    GapHistogram("gap_seconds", "x", BOUNDS, registry).of("m").observe(0.04, 8)
    samples = page(registry)
    assert samples["gap_seconds_bucket", "0.01"] == samples["gap_seconds_count", ""] == 8
    assert samples["gap_seconds_sum", ""] == 0.04


def test_every_model_has_its_own() -> None:
    registry = CollectorRegistry()
    histogram = GapHistogram("gap_seconds", "x", BOUNDS, registry)
    assert histogram.of("a") is histogram.of("a")
    assert histogram.of("a") is not histogram.of("b")
    assert 'model="b"' in generate_latest(registry).decode()


def test_a_token_costs_less_than_two_microseconds() -> None:
    gaps = TokenGaps(BOUNDS)
    assert min(timeit.repeat(lambda: gaps.observe(0.02, 1), number=10_000, repeat=10)) / 10_000 < 2e-6
