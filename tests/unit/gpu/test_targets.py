"""Whether Baton is within its targets beside bare SGLang."""

from typing import Any

import pytest

from benchmarks.gpu.targets import against_bare, penalties


def row(system: str, load: str, ttft: float = 30.0, rate: float = 10.0, itl: float = 8.0) -> dict[str, Any]:
    numbers = {"ttft_p50_ms": ttft, "requests_per_second": rate, "itl_p99_ms": itl}
    return {"system": system, "variant": system.partition("+")[2], "load": load, **numbers}


@pytest.mark.parametrize("load", ["500/32 c=1", "500/32 c=1 idle"])
@pytest.mark.parametrize(("ttft", "within"), [(33.0, True), (33.1, False), (28.0, True)])
def test_alone_the_first_token_decides(load: str, ttft: float, within: bool) -> None:
    (found,) = against_bare([row("baton", load, ttft=ttft, itl=100.0), row("bare", load)])
    assert found["ttft_p50_later_ms"] == pytest.approx(ttft - 30)
    assert found["within"] is within


@pytest.mark.parametrize(("rate", "itl", "within"), [(9.8, 8.8, True), (9.7, 8.0, False), (10.0, 8.9, False)])
def test_under_load_rate_and_gaps_decide(rate: float, itl: float, within: bool) -> None:
    load = "2000/128 c=32"
    (found,) = against_bare([row("baton", load, ttft=500.0, rate=rate, itl=itl), row("bare", load)])
    assert found["requests_ratio"] == pytest.approx(rate / 10)
    assert found["within"] is within


def test_only_the_same_load_and_variant_is_compared() -> None:
    rows = [row("baton", "a c=1"), row("bare", "b c=1"), row("baton+early", "b c=1"), row("http", "b c=1")]
    assert against_bare(rows) == []
    assert len(against_bare([*rows, row("bare+early", "b c=1")])) == 1


def test_a_pair_is_compared_with_its_own_kind_of_aggregated_worker_at_rest() -> None:
    load = "500/32 c=1 idle"
    rows = [row("baton", load, ttft=36.0), row("baton-agg", load, ttft=30.0), row("bare", load, ttft=33.0)]
    assert penalties(rows) == [{"system": "baton", "load": load, "later_ms": 6.0, "within": False}]
    rows += [row("bare-agg", load, ttft=28.0), row("baton", "500/32 c=1"), row("baton-agg", "500/32 c=1")]
    assert [(each["system"], each["within"]) for each in penalties(rows)] == [("baton", False), ("bare", True)]
