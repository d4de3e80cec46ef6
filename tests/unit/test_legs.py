"""A worker's live legs: ids are unique while they live, and an abort is never lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import grpc
import pytest

from kvbaton.errors import RequestError
from services.early_aborts import EarlyAborts
from services.requests import Role
from services.worker.engines.protocol import EngineDelta, EngineFinish, Finish
from services.worker.legs import Leg, LiveLegs


async def tokens_after(release: asyncio.Event) -> AsyncIterator[EngineDelta]:
    yield EngineDelta([1])
    await release.wait()
    yield EngineDelta([2], EngineFinish(Finish.LENGTH))


async def nothing_yet() -> AsyncIterator[EngineDelta]:
    await asyncio.Event().wait()
    yield EngineDelta([])


def admit(legs: LiveLegs, request_id: str, deltas: AsyncIterator[EngineDelta] | None = None) -> Leg:
    return legs.admit(request_id, lambda leg: deltas or nothing_yet())


class Aborts(list[str]):
    async def __call__(self, engine_id: str) -> None:
        self.append(engine_id)


@pytest.fixture
def aborts() -> Aborts:
    return Aborts()


@pytest.fixture
def legs(aborts: Aborts) -> LiveLegs:
    return LiveLegs(Role.DECODE, aborts)


async def test_engine_ids_are_fixed_width_because_sglang_matches_aborts_by_prefix(legs: LiveLegs) -> None:
    leg = admit(legs, "a")
    assert re.fullmatch(r"[0-9a-f]{32}", leg.engine_id)
    assert admit(legs, "a1").engine_id != leg.engine_id


async def test_a_live_id_is_refused_and_free_again_after_its_end(legs: LiveLegs) -> None:
    release = asyncio.Event()
    leg = admit(legs, "a", tokens_after(release))
    with pytest.raises(RequestError) as caught:
        admit(legs, "a")
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert caught.value.field == "request_id"
    release.set()
    assert leg.task is not None
    await leg.task
    assert admit(legs, "a").engine_id != leg.engine_id, "a second life has an engine id of its own"


async def test_abort_reaches_the_engine_under_the_engine_id(legs: LiveLegs, aborts: Aborts) -> None:
    leg = admit(legs, "a")
    assert await legs.abort("a")
    assert aborts == [leg.engine_id]
    assert leg.abort_requested


async def test_an_abort_that_overtakes_its_request_still_takes_effect(legs: LiveLegs) -> None:
    assert not await legs.abort("late")
    with pytest.raises(RequestError) as caught:
        admit(legs, "late")
    assert caught.value.code is grpc.StatusCode.CANCELLED
    admit(legs, "late")  # once


async def test_an_early_abort_is_forgotten_after_its_time(legs: LiveLegs, monkeypatch: pytest.MonkeyPatch) -> None:
    await legs.abort("late")
    monkeypatch.setattr("services.early_aborts.REMEMBERED_SECONDS", -1.0)
    admit(legs, "late")


async def test_drained_waits_for_the_last_leg(legs: LiveLegs) -> None:
    release = asyncio.Event()
    admit(legs, "a", tokens_after(release))
    assert not await legs.drained(0.01)
    release.set()
    assert await legs.drained(1.0)


async def test_a_caller_that_leaves_does_not_free_the_leg_before_the_engine_does(
    legs: LiveLegs, aborts: Aborts
) -> None:
    release = asyncio.Event()
    leg = admit(legs, "a", tokens_after(release))
    reading = asyncio.ensure_future(anext(leg.deltas()))
    await asyncio.sleep(0)
    reading.cancel()
    await legs.leave(leg)
    assert aborts == [leg.engine_id]
    assert len(legs) == 1, "its pages are in use until the engine says otherwise"
    release.set()
    assert await legs.drained(1.0)


def test_repeating_an_early_abort_does_not_keep_others_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("services.early_aborts.time.monotonic", lambda: now)
    aborts = EarlyAborts()
    aborts.remember("x")
    now = 1.0
    aborts.remember("y")
    now = 9.9
    aborts.remember("x")
    now = 15.0
    assert not aborts.claim("y"), "ten seconds are over"
    assert aborts.claim("x")


def test_early_aborts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.early_aborts.MOST_REMEMBERED", 3)
    aborts = EarlyAborts()
    for number in range(10):
        aborts.remember(str(number))
    assert [number for number in range(10) if aborts.claim(str(number))] == [7, 8, 9]
