"""The frontend's side of a session's credits."""

from __future__ import annotations

import pytest

from kvbaton.v1.session_pb2 import ConnectResponse
from services.frontend.link.credits import SessionCredits
from services.frontend.link.protocol import Credit


def heard(credits: SessionCredits, granted: int, free: int, window: int = 4) -> bool:
    return credits.heard(ConnectResponse(credits_granted=granted, window=window, free_slots=free))


def told(credits: SessionCredits) -> tuple[int, int] | None:
    news = credits.news()
    return None if news is None else (news.up_to, news.returned)


def with_spare(window: int = 8) -> SessionCredits:
    """One request has come and gone, nobody wants a credit, and the worker has granted the spare one."""
    credits = SessionCredits(1)
    heard(credits, 0, window, window)
    assert told(credits) is None, "no request has come"
    credits.ask(1)
    assert told(credits) == (2, 0)
    heard(credits, 2, window - 2, window)
    assert credits.take() is not None
    credits.ask(0)
    heard(credits, 2, window - 1, window)
    assert told(credits) is None
    return credits


def test_fewer_free_slots_are_news_as_well() -> None:
    """Who asked this worker because it seemed free must ask another one."""
    credits = SessionCredits(1)
    assert heard(credits, 0, 2)
    assert not heard(credits, 0, 2)
    assert heard(credits, 0, 0)
    assert heard(credits, 1, 0)


def test_the_worker_is_told_only_what_is_new() -> None:
    credits = SessionCredits(1)
    assert credits.news() is None
    credits.ask(2)
    asked = credits.news()
    assert asked is not None
    assert (asked.up_to, asked.returned) == (2, 0)
    credits.ask(2)
    assert credits.news() is None
    heard(credits, 2, 0)
    credits.ask(0)
    assert credits.news() is None, "two granted and none more wanted is what it knows"


def test_a_credit_of_an_earlier_session_is_void() -> None:
    old, new = SessionCredits(1), SessionCredits(2)
    heard(old, 1, 0)
    credit = old.take()
    assert credit is not None
    new.give_back(credit)
    assert new.news() is None
    assert old.take() is None


def test_the_spare_credit_is_for_who_asks_and_is_replaced() -> None:
    credits = with_spare()
    assert credits.take() is None
    credits.ask(1)
    assert credits.take() == Credit(session=1)
    assert credits.take() is None
    credits.ask(0)
    assert told(credits) == (3, 0), "the next one"


def test_a_burst_takes_the_spare_one_and_asks_for_the_others() -> None:
    credits = with_spare()
    credits.ask(3)
    assert credits.take() is not None
    assert credits.take() is None
    assert told(credits) == (5, 0), "two that wait, and the next spare one"
    heard(credits, 5, 4, 8)
    assert [credits.take() is not None for _ in range(3)] == [True, True, False]


def test_the_slot_of_the_spare_credit_is_free_for_us() -> None:
    assert with_spare(8).free_slots == 8


def test_a_large_window_spares_several_and_is_asked_when_half_of_them_are_used() -> None:
    credits = SessionCredits(1)
    heard(credits, 0, 64, 64)
    credits.ask(1)
    assert told(credits) == (5, 0)
    heard(credits, 5, 59, 64)
    for asked in (None, None, None, (8, 0)):
        credits.ask(1)
        assert credits.take() is not None
        credits.ask(0)
        assert told(credits) == asked
    assert credits.free_slots == 60
    credits.ask(5)
    assert told(credits) == (13, 0), "four of those that wait, and four spare ones; the fifth has its own"


@pytest.mark.parametrize("free", [1, 0])
def test_the_spare_credit_goes_back_when_slots_are_scarce(free: int) -> None:
    credits = with_spare()
    assert heard(credits, 2, free, 8), "whoever hands credits out must look"
    credit = credits.take()
    assert credit is not None
    credits.give_back(credit)
    assert told(credits) == (2, 1)
    assert credits.take() is None


def test_who_has_given_spare_credits_back_asks_for_new_ones_with_its_next_request() -> None:
    """Frontends that ask as soon as there are slots again, all at once, would make them scarce again, for ever."""
    credits = with_spare()
    heard(credits, 2, 0, 8)
    credit = credits.take()
    assert credit is not None
    credits.give_back(credit)
    assert told(credits) == (2, 1)
    heard(credits, 2, 8, 8)
    assert told(credits) is None
    credits.ask(1)
    assert told(credits) == (4, 1)


def test_a_spare_credit_is_not_given_back_before_slots_are_scarce() -> None:
    """Or frontends that each see a slot less would give back and ask again in turn."""
    credits = with_spare()
    heard(credits, 2, 2, 8)
    assert (credits.take(), told(credits)) == (None, None)
    heard(credits, 2, 1, 8)
    assert credits.take() is not None


@pytest.mark.parametrize(("window", "free"), [(3, 3), (8, 4), (0, 0)])
def test_no_spare_credit_of_a_small_window_or_a_half_full_one(window: int, free: int) -> None:
    credits = SessionCredits(1)
    heard(credits, 0, free, window)
    credits.ask(1)
    assert told(credits) == (1, 0)
