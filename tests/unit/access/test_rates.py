"""A key's rate: one minute's requests at once, then evenly, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.access.rates import RequestRate


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_a_full_bucket_holds_one_minute(per_minute: int) -> None:
    rate = RequestRate(per_minute)
    assert rate.remaining(0.0) == per_minute
    assert [rate.take(0.0) for _ in range(per_minute)] == [0.0] * per_minute
    assert rate.remaining(0.0) == 0
    assert rate.take(0.0) == pytest.approx(60 / per_minute)


@pytest.mark.parametrize("per_minute", [1, 7, 60])
def test_after_the_wait_that_it_names_there_is_exactly_one(per_minute: int) -> None:
    rate = RequestRate(per_minute)
    for _ in range(per_minute):
        rate.take(50.0)
    wait = rate.take(50.0)
    assert rate.take(50.0 + wait * 0.99) > 0
    assert rate.take(50.0 + wait) == 0
    assert rate.take(50.0 + wait) > 0


def test_a_refusal_takes_nothing() -> None:
    rate = RequestRate(2)
    rate.take(0.0)
    rate.take(0.0)
    assert {round(rate.take(0.0), 6) for _ in range(100)} == {30.0}


def test_it_says_when_it_will_be_full() -> None:
    rate = RequestRate(60)
    assert rate.seconds_to_full(0.0) == 0
    for _ in range(3):
        rate.take(0.0)
    assert rate.seconds_to_full(0.0) == pytest.approx(3)
    assert (rate.remaining(0.0), rate.remaining(1.0), rate.remaining(100.0)) == (57, 58, 60)


@given(st.integers(1, 200), st.lists(st.floats(0, 5), max_size=300))
def test_no_window_of_a_minute_has_more_than_two_minutes_worth(per_minute: int, gaps: list[float]) -> None:
    """The bucket, and what flows into it meanwhile."""
    rate, now, taken = RequestRate(per_minute), 0.0, []
    for gap in gaps:
        now += gap
        if rate.take(now) == 0:
            taken.append(now)
    for start in taken:
        assert sum(start <= at <= start + 60 for at in taken) <= 2 * per_minute + 1


def test_a_new_limit_counts_at_once() -> None:
    rate = RequestRate(60)
    for _ in range(60):
        rate.take(0.0)
    rate.per_minute = 120
    assert rate.take(0.0) == pytest.approx(0.5)
