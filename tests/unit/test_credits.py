"""A worker's window: never more promised than there is, shared in turn, and free again whatever becomes of a credit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvbaton.errors import Reason, RequestError
from services.requests import Role
from services.worker.credits import CreditAccount, CreditWindow
from services.worker.engines.protocol import EngineDelta, EngineFinish, Finish
from services.worker.legs import LiveLegs
from tests.support.waiting import eventually


async def _no_abort(_: str) -> None:
    pass


@pytest.fixture
def legs() -> LiveLegs:
    return LiveLegs(Role.DECODE, _no_abort)


def window_of(legs: LiveLegs, size: int) -> CreditWindow:
    window = CreditWindow(legs)
    window.open(size)
    return window


def account_of(window: CreditWindow) -> CreditAccount:
    return window.account(lambda: None)


def test_no_more_is_granted_than_the_window_holds(legs: LiveLegs) -> None:
    window = window_of(legs, 4)
    first, second = account_of(window), account_of(window)
    first.ask(up_to=3, returned=0)
    second.ask(up_to=3, returned=0)
    assert (first.granted, second.granted, window.free) == (3, 1, 0)


def test_free_slots_go_round_among_those_who_ask(legs: LiveLegs) -> None:
    window = window_of(legs, 1)
    accounts = [account_of(window) for _ in range(3)]
    for account in accounts:
        account.ask(up_to=10, returned=0)
    for turn in range(1, 10):
        holder = next(account for account in accounts if account.unused)
        holder.ask(up_to=10, returned=holder.granted)
        assert sum(account.granted for account in accounts) == turn + 1
    assert {account.granted for account in accounts} == {3, 4}


def test_nothing_is_granted_before_the_engine_is_there(legs: LiveLegs) -> None:
    window = CreditWindow(legs)
    account = account_of(window)
    account.ask(up_to=2, returned=0)
    assert account.granted == 0
    window.open(1)
    assert account.granted == 1


def test_asking_for_less_takes_nothing_back(legs: LiveLegs) -> None:
    window = window_of(legs, 4)
    account = account_of(window)
    account.ask(up_to=3, returned=0)
    account.ask(up_to=0, returned=0)
    assert (account.granted, account.unused) == (3, 3)


def test_messages_that_cross_do_not_ask_twice(legs: LiveLegs) -> None:
    window = window_of(legs, 8)
    account = account_of(window)
    account.ask(up_to=2, returned=0)
    # The frontend has not seen the two grants yet, and one more request waits there.
    account.ask(up_to=3, returned=0)
    assert account.granted == 3


def test_who_keeps_a_credit_in_hand_hears_that_somebody_waits(legs: LiveLegs) -> None:
    """A frontend without requests gives its spare credit back, and does so at once, not at the next heartbeat."""
    woken: list[str] = []
    window = window_of(legs, 2)
    idle, busy = window.account(lambda: woken.append("idle")), window.account(lambda: woken.append("busy"))
    idle.ask(up_to=1, returned=0)
    busy.ask(up_to=1, returned=0)
    assert woken == ["idle", "busy"]
    woken.clear()
    busy.spend()
    busy.ask(up_to=2, returned=0)
    assert (woken, window.free) == (["idle"], 0)
    idle.ask(up_to=1, returned=1)
    assert (busy.granted, window.free) == (2, 0)


def test_the_end_of_a_session_frees_what_it_had(legs: LiveLegs) -> None:
    window = window_of(legs, 2)
    first, second = account_of(window), account_of(window)
    first.ask(up_to=2, returned=0)
    second.ask(up_to=2, returned=0)
    assert second.granted == 0
    first.close()
    assert second.granted == 2


def test_a_leg_needs_a_credit(legs: LiveLegs) -> None:
    window = window_of(legs, 1)
    account = account_of(window)
    with pytest.raises(RequestError) as caught:
        account.spend()
    assert caught.value.reason is Reason.NO_CREDIT
    account.ask(up_to=1, returned=0)
    account.spend()
    with pytest.raises(RequestError):
        account.spend()


def test_what_was_never_granted_can_not_be_given_back(legs: LiveLegs) -> None:
    account = account_of(window_of(legs, 2))
    account.ask(up_to=2, returned=0)
    account.spend()
    with pytest.raises(RequestError) as caught:
        account.ask(up_to=2, returned=2)
    assert caught.value.field == "credits.returned"


async def test_a_slot_is_taken_from_the_credit_to_the_end_of_the_leg(legs: LiveLegs) -> None:
    window = window_of(legs, 1)
    account, other = account_of(window), account_of(window)
    account.ask(up_to=1, returned=0)
    entry = account.spend()
    other.ask(up_to=1, returned=0)
    assert (window.free, other.granted) == (0, 0), "on its way in"
    ends = asyncio.Event()

    async def engine() -> AsyncIterator[EngineDelta]:
        await ends.wait()
        yield EngineDelta([], EngineFinish(Finish.LENGTH))

    legs.admit("a", lambda _: engine())
    entry.done()
    entry.done()
    assert (window.free, other.granted) == (0, 0), "live"
    ends.set()
    await eventually(lambda: other.granted == 1, what="the slot goes to who waits")


async def test_legs_without_credits_take_slots_too(legs: LiveLegs) -> None:
    window = window_of(legs, 1)
    ends = asyncio.Event()

    async def engine() -> AsyncIterator[EngineDelta]:
        await ends.wait()
        yield EngineDelta([], EngineFinish(Finish.LENGTH))

    legs.admit("a stream's leg", lambda _: engine())
    account = account_of(window)
    account.ask(up_to=1, returned=0)
    assert account.granted == 0
    ends.set()
    await eventually(lambda: account.granted == 1)


def test_who_has_heard_that_a_worker_is_full_hears_that_it_has_room_again(legs: LiveLegs) -> None:
    window, told = CreditWindow(legs), list[str]()
    busy = window.account(lambda: told.append("busy"))
    elsewhere = window.account(lambda: told.append("elsewhere"))
    window.account(lambda: told.append("has not heard of it"))
    window.open(2)
    busy.ask(up_to=2, returned=0)
    assert elsewhere.tell_free() == 0
    told.clear()
    busy.ask(up_to=2, returned=1)
    assert told == ["elsewhere"]
    assert elsewhere.tell_free() == 1
    busy.ask(up_to=2, returned=2)
    assert told == ["elsewhere"], "it knows of room already"
