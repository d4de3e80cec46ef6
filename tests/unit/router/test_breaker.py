"""What opens a worker's breaker, what closes it, and which workers it keeps requests from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.config.frontend import BreakerFlags
from services.frontend.router.breaker import Breaker, BreakerState
from services.frontend.router.ejection import ejected
from tests.support.waiting import eventually

FAULTS = 3


class Probed:
    """A worker's probe."""

    def __init__(self) -> None:
        self.calls = 0
        self.sick = False

    async def __call__(self) -> None:
        self.calls += 1
        if self.sick:
            raise RuntimeError("no token")


def make(probe: Probed, *, faults: int = FAULTS, pause: float = 60.0, changed: Callable[[], None] = lambda: None):
    flags = BreakerFlags(breaker_faults=faults, breaker_pause=pause, breaker_longest_pause=max(pause, 60.0))
    return Breaker(flags, worker="w1", role="decode", probe=probe, changed=changed)


def fail(breaker: Breaker, times: int, *, shared: bool = False) -> None:
    """So many requests, one after the other."""
    for _ in range(times):
        breaker.failed("it broke", sent=time.monotonic(), shared=shared)


async def test_faults_in_a_row_open_it_and_a_success_begins_anew() -> None:
    breaker = make(Probed())
    fail(breaker, FAULTS - 1)
    breaker.succeeded()
    fail(breaker, FAULTS - 1)
    assert breaker.closed
    fail(breaker, 1)
    assert breaker.state is BreakerState.OPEN
    await breaker.close()


async def test_one_event_that_ends_many_requests_is_one_fault() -> None:
    breaker = make(Probed())
    sent = time.monotonic()
    for _ in range(20 * FAULTS):
        breaker.failed("the session broke", sent=sent)
    assert breaker.closed


async def test_a_failed_hand_over_counts_half_and_a_good_one_clears_the_failed_ones_only() -> None:
    breaker = make(Probed())
    fail(breaker, 2 * FAULTS - 1, shared=True)
    breaker.handed_over()
    fail(breaker, FAULTS - 1)
    fail(breaker, 1, shared=True)
    assert breaker.closed
    breaker.handed_over()
    fail(breaker, 1)
    assert not breaker.closed, "what happens behind the hand-over is the worker's own"
    await breaker.close()


async def test_zero_faults_switch_it_off() -> None:
    breaker = make(Probed(), faults=0)
    fail(breaker, 100)
    assert breaker.closed


async def test_a_probe_closes_it_on_trial() -> None:
    probe = Probed()
    breaker = make(probe, pause=0.02)
    fail(breaker, FAULTS)
    await eventually(lambda: breaker.closed)
    fail(breaker, 1)
    assert not breaker.closed, "one more fault before a success"
    await eventually(lambda: breaker.closed)
    breaker.succeeded()
    fail(breaker, FAULTS - 1)
    assert breaker.closed
    assert probe.calls == 2


async def test_a_failing_probe_is_repeated_and_every_change_is_one_line() -> None:
    probe, states = Probed(), list[BreakerState]()
    probe.sick = True
    with capture_logs() as logs:
        breaker = make(probe, pause=0.02, changed=lambda: states.append(breaker.state))
        fail(breaker, FAULTS)
        await eventually(lambda: probe.calls == 2)
        assert not breaker.closed
        probe.sick = False
        await eventually(lambda: breaker.closed)
    half = [BreakerState.HALF_OPEN, BreakerState.OPEN]
    assert states == [BreakerState.OPEN, *half, *half, BreakerState.HALF_OPEN, BreakerState.CLOSED]
    assert [line["event"] for line in logs] == ["breaker open", "probe failed", "probe failed", "breaker closed"]


async def test_of_a_worker_that_is_gone_nobody_is_probed() -> None:
    probe = Probed()
    breaker = make(probe, pause=0.02)
    fail(breaker, FAULTS)
    await breaker.close()
    await asyncio.sleep(0.1)
    assert probe.calls == 0


def worker(name: str, opened_at: float = 0.0, **pool: Any) -> Any:
    """`opened_at` 0: its breaker is closed."""
    record = SimpleNamespace(
        model=SimpleNamespace(name=pool.get("model", "m")), compat_hash=pool.get("compat_hash", "c")
    )
    breaker = SimpleNamespace(closed=not opened_at, opened_at=opened_at)
    answering = pool.get("answering", True)
    fields = {"name": name, "role": pool.get("role", "decode"), "record": record, "breaker": breaker}
    return _Worker(**fields, answering=answering)


class _Worker(SimpleNamespace):
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType,reportUnannotatedClassAttribute]


def names(workers: list[Any]) -> set[str]:
    gone: Any = ejected(workers)
    return {each.name for each in gone}


@pytest.mark.parametrize(
    ("opened", "gone"),
    [
        ([1.0], set[str]()),
        ([1.0, 0.0], {"w0"}),
        ([2.0, 1.0], {"w1"}),
        ([3.0, 1.0, 2.0], {"w1"}),
        ([0.0, 4.0, 3.0, 2.0], {"w3", "w2"}),
    ],
)
def test_never_more_than_half_and_the_last_to_open_stays(opened: list[float], gone: set[str]) -> None:
    assert names([worker(f"w{number}", at) for number, at in enumerate(opened)]) == gone


def test_a_pool_is_workers_of_one_role_model_and_compat_hash() -> None:
    sick = worker("sick", 1.0)
    others: list[dict[str, Any]] = [{"role": "prefill"}, {"model": "other"}, {"compat_hash": "other"}]
    for other in (*others, {"answering": False}):
        assert not names([sick, worker("other", **other)])
    assert names([sick, worker("same")]) == {"sick"}
