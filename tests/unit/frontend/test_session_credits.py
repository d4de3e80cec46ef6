"""The frontend's side of a session's credits."""

from __future__ import annotations

from kvbaton.v1.session_pb2 import ConnectResponse
from services.frontend.link.credits import SessionCredits


def heard(credits: SessionCredits, granted: int, free: int) -> bool:
    return credits.heard(ConnectResponse(credits_granted=granted, window=4, free_slots=free))


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
