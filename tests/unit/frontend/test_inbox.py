"""What an owner hears comes in order and in time; one timer serves many items, and none is left."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import grpc
import pytest

from kvbaton.errors import Reason, RequestError
from services.frontend.dispatch.line import Ticket
from services.frontend.request.deadlines import DeadlineClock, Deadlines
from services.frontend.request.events import End, EndedError, FromQueue, Inbox
from services.frontend.request.states import State

REFUSED = RequestError(grpc.StatusCode.UNAVAILABLE, Reason.NO_WORKER, "none")


def news() -> FromQueue:
    return FromQueue(cast("Ticket", object()), REFUSED)


def clock_of(*, queue: float = 60.0, token_gap: float = 60.0, total: float = 60.0) -> DeadlineClock:
    return DeadlineClock(Deadlines(queue=queue, prefill=60.0, transfer=60.0, token_gap=token_gap, total=total))


async def test_items_come_in_order_whether_somebody_waits_or_not() -> None:
    inbox = Inbox(clock_of())
    items = [news() for _ in range(4)]
    inbox.put(items[0])
    inbox.put(items[1])
    assert [await inbox.get_in_time(), await inbox.get_in_time()] == items[:2]
    waiting = asyncio.create_task(inbox.get_in_time())
    await asyncio.sleep(0)
    inbox.put(items[2])
    inbox.put(items[3])
    assert [await waiting, await inbox.get()] == items[2:]
    inbox.close()


async def test_an_end_is_raised_in_its_turn() -> None:
    inbox = Inbox(clock_of())
    inbox.put(first := news())
    inbox.put(End(REFUSED))
    assert await inbox.get_in_time() is first
    with pytest.raises(EndedError) as ended:
        await inbox.get_in_time()
    assert ended.value.error is REFUSED


async def test_a_deadline_that_passes_is_told_by_its_name() -> None:
    began = time.monotonic()
    with pytest.raises(RequestError) as passed:
        await Inbox(clock_of(queue=0.05)).get_in_time()
    assert (passed.value.code, passed.value.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_QUEUE)
    assert time.monotonic() - began >= 0.049
    with pytest.raises(RequestError) as passed:
        await Inbox(clock_of(queue=0.05, total=0.01)).get_in_time()
    assert passed.value.reason is Reason.DEADLINE_TOTAL


async def test_what_has_come_is_heard_behind_its_deadline() -> None:
    inbox = Inbox(clock_of(queue=0.0))
    inbox.put(item := news())
    assert await inbox.get_in_time() is item
    with pytest.raises(RequestError):
        await inbox.get_in_time()


async def test_tokens_move_the_deadline_and_need_no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    wake_at = Inbox._wake_at

    def counted(inbox: Inbox, deadline: float) -> None:
        made.append(deadline)
        wake_at(inbox, deadline)

    monkeypatch.setattr(Inbox, "_wake_at", counted)
    clock = clock_of(token_gap=0.2)
    inbox = Inbox(clock)
    clock.enter(State.DECODING)
    for _ in range(20):
        waiting = asyncio.create_task(inbox.get_in_time())
        await asyncio.sleep(0.02)
        inbox.put(news())
        await waiting
        clock.token()
    last = time.monotonic()
    assert 1 <= len(made) < 10
    with pytest.raises(RequestError) as passed:
        await inbox.get_in_time()
    assert passed.value.reason is Reason.DEADLINE_TOKEN_GAP
    assert time.monotonic() - last >= 0.15


async def test_a_nearer_deadline_counts_at_once() -> None:
    clock = clock_of(queue=60.0, token_gap=0.05)
    inbox = Inbox(clock)
    waiting = asyncio.create_task(inbox.get_in_time())
    await asyncio.sleep(0)
    inbox.put(news())
    await waiting
    clock.enter(State.DECODING)
    async with asyncio.timeout(5):
        with pytest.raises(RequestError) as passed:
            await inbox.get_in_time()
    assert passed.value.reason is Reason.DEADLINE_TOKEN_GAP


async def test_nothing_is_left_of_one_that_is_closed() -> None:
    inbox = Inbox(clock_of())
    waiting = asyncio.create_task(inbox.get_in_time())
    await asyncio.sleep(0)
    assert inbox._timer is not None
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    timer = inbox._timer
    inbox.close()
    assert timer.cancelled()
    inbox.put(item := news())
    assert await inbox.get() is item
