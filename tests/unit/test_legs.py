"""A worker's live legs: ids are unique while they live, and an abort is never lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import grpc
import pytest

from kvbaton.errors import RequestError
from services.requests import Role
from services.worker.engines.protocol import EngineDelta, EngineFinish, Finish
from services.worker.legs import Leg, LiveLegs


async def two_tokens() -> AsyncIterator[EngineDelta]:
    yield EngineDelta([1])
    yield EngineDelta([2], EngineFinish(Finish.LENGTH))


async def run_to_the_end(legs: LiveLegs, leg: Leg) -> None:
    legs.run(leg, two_tokens())
    assert leg.task is not None
    await leg.task


class Aborts(list[str]):
    async def __call__(self, engine_id: str) -> None:
        self.append(engine_id)


@pytest.fixture
def aborts() -> Aborts:
    return Aborts()


@pytest.fixture
def legs(aborts: Aborts) -> LiveLegs:
    return LiveLegs(Role.DECODE, aborts)


def test_engine_ids_are_fixed_width_because_sglang_matches_aborts_by_prefix(legs: LiveLegs) -> None:
    leg = legs.admit("a")
    assert re.fullmatch(r"[0-9a-f]{32}", leg.engine_id)
    assert legs.admit("a1").engine_id != leg.engine_id


async def test_a_live_id_is_refused_and_free_again_after_its_end(legs: LiveLegs) -> None:
    leg = legs.admit("a")
    with pytest.raises(RequestError) as caught:
        legs.admit("a")
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert caught.value.field == "request_id"
    await run_to_the_end(legs, leg)
    assert legs.admit("a").engine_id != leg.engine_id, "a second life has an engine id of its own"


async def test_abort_reaches_the_engine_under_the_engine_id(legs: LiveLegs, aborts: Aborts) -> None:
    leg = legs.admit("a")
    assert await legs.abort("a")
    assert aborts == [leg.engine_id]
    assert leg.abort_requested


async def test_an_abort_that_overtakes_its_request_still_takes_effect(legs: LiveLegs) -> None:
    assert not await legs.abort("late")
    with pytest.raises(RequestError) as caught:
        legs.admit("late")
    assert caught.value.code is grpc.StatusCode.CANCELLED
    legs.admit("late")  # once


async def test_an_early_abort_is_forgotten_after_its_time(legs: LiveLegs, monkeypatch: pytest.MonkeyPatch) -> None:
    await legs.abort("late")
    monkeypatch.setattr("services.worker.legs.EARLY_ABORT_SECONDS", -1.0)
    legs.admit("late")


async def test_drained_waits_for_the_last_leg(legs: LiveLegs) -> None:
    leg = legs.admit("a")
    assert not await legs.drained(0.01)
    await run_to_the_end(legs, leg)
    assert await legs.drained(0.01)


async def test_a_caller_that_leaves_does_not_free_the_leg_before_the_engine_does(
    legs: LiveLegs, aborts: Aborts
) -> None:
    release = asyncio.Event()

    async def slow() -> AsyncIterator[EngineDelta]:
        await release.wait()
        yield EngineDelta([], EngineFinish(Finish.ABORT))

    leg = legs.admit("a")
    legs.run(leg, slow())
    reading = asyncio.ensure_future(anext(leg.deltas()))
    await asyncio.sleep(0)
    reading.cancel()
    await legs.leave(leg)
    assert aborts == [leg.engine_id]
    assert len(legs) == 1, "its pages are in use until the engine says otherwise"
    release.set()
    assert await legs.drained(1.0)
