"""The benchmark's promises, on the beginning of its trace; it runs in simulated time, so they hold on any machine."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.routing.play import play
from benchmarks.routing.report import plot, table
from benchmarks.routing.trace import make_trace, read_trace
from services.config.common import RoutingFlags


def test_the_committed_trace_is_what_its_setting_makes() -> None:
    trace = read_trace()
    assert trace == make_trace(trace.setting)
    assert sum(len(held) for held in trace.held) == 16 * 64 // 8


def test_on_a_third_of_the_trace_kv_aware_finds_twice_the_prefixes_and_answers_sooner() -> None:
    """How even the load is takes the whole trace to say; the benchmark does."""
    whole = read_trace()
    trace = replace(whole, arrivals=whole.arrivals[:400])
    turns, least, kv_aware = plays = [
        play(name, RoutingFlags(decode_policy=name), trace)  # type: ignore[arg-type]
        for name in ("round-robin", "least-loaded", "kv-aware")
    ]
    assert not any(played.errors for played in plays)
    assert [len(played.samples) for played in plays] == [400] * 3
    assert kv_aware.hit_tokens >= 2 * turns.hit_tokens
    assert kv_aware.mean_ttft < 0.75 * least.mean_ttft
    assert kv_aware.busiest_by_tokens < 2
    assert plot(plays).count("<rect") == 1 + 4 * len(plays)
    assert "kv-aware" in table(plays)
