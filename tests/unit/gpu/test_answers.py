"""Which differences between two answers rounding can explain."""

import pytest

from benchmarks.gpu.answers import Answered, Difference, difference

LIKELY = [(7, -0.10), (8, -0.12)]


def answer(*tokens: int, tops: dict[int, list[tuple[int, float]]] | None = None) -> Answered:
    sure = [[(token, -0.01), (999, -9.0)] for token in tokens]
    return Answered(list(tokens), [(tops or {}).get(position, top) for position, top in enumerate(sure)])


def test_equal_answers_have_no_difference() -> None:
    assert difference(answer(1, 2, 3), answer(1, 2, 3)) is None


def test_two_likely_tokens_that_changed_places_are_a_near_tie() -> None:
    one = answer(1, 7, 3, tops={1: LIKELY})
    other = answer(1, 8, 5, tops={1: [(8, -0.11), (7, -0.11)]})
    found = difference(one, other)
    assert found is not None
    assert (found.position, found.tokens) == (1, (7, 8))
    assert found.gap == pytest.approx(0.02)
    assert found.near_tie


def test_the_wider_gap_of_both_answers_decides() -> None:
    one = answer(7, tops={0: LIKELY})
    other = answer(8, tops={0: [(8, -0.01), (7, -2.0)]})
    found = difference(one, other)
    assert found is not None
    assert found.gap == pytest.approx(1.99)
    assert not found.near_tie


@pytest.mark.parametrize("gap", [0.05, 0.2])
def test_a_gap_of_a_twentieth_is_no_near_tie(gap: float) -> None:
    assert not Difference(0, (1, 2), gap).near_tie


def test_a_token_that_was_not_likely_is_no_near_tie() -> None:
    found = difference(answer(7, tops={0: LIKELY}), answer(5))
    assert found is not None
    assert found.gap is None
    assert not found.near_tie


def test_a_shorter_answer_differs_where_it_ends() -> None:
    found = difference(answer(1, 2), answer(1))
    assert found is not None
    assert (found.position, found.tokens, found.near_tie) == (1, (2, None), False)


def test_without_candidates_nothing_is_a_near_tie() -> None:
    found = difference(Answered([1], []), Answered([2], []))
    assert found is not None
    assert not found.near_tie
