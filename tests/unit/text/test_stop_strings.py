"""What is promised: the text is cut where the stop string begins that is complete first, however the text arrives."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.frontend.text import StopResult, StopStringMatcher


def cut_at_first_stop(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, str | None]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def run(chunks: list[str], stops: list[str], *, include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include_stop=include_stop)
    text = "".join(matcher.push(chunk).text for chunk in chunks)
    last = matcher.flush()
    return text + last.text, last.matched


letters = st.text(alphabet="ab\n", max_size=8)


@given(chunks=st.lists(letters, max_size=12), stops=st.lists(letters.filter(bool), max_size=5), include=st.booleans())
@example(chunks=["aab", "aaab"], stops=["aaab", "baa"], include=False)
def test_any_chunking_gives_the_text_up_to_the_first_stop(chunks: list[str], stops: list[str], include: bool) -> None:
    expected = cut_at_first_stop("".join(chunks), stops, include_stop=include)
    assert run(chunks, stops, include_stop=include) == expected


@given(text=letters, stops=st.lists(letters.filter(bool), min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    if cut_at_first_stop(text, stops, include_stop=False)[1] is not None:
        return
    matcher = StopStringMatcher(stops)
    out = "".join(matcher.push(character).text for character in text)
    suffixes = [text[start:] for start in range(len(text) + 1)]
    longest = max((suffix for suffix in suffixes if any(stop.startswith(suffix) for stop in stops)), key=len)
    assert out + longest == text


def test_the_longest_of_the_stops_that_end_together_counts() -> None:
    assert run(["say END"], ["END", "y END", "ND"]) == ("sa", "y END")


def test_the_stop_that_is_complete_first_counts() -> None:
    """Waiting for "bcde" would cost tokens that a client who asked to stop at "cd" has no use for."""
    assert run(["abcde"], ["bcde", "cd"]) == ("ab", "cd")


def test_nothing_comes_out_behind_a_match() -> None:
    matcher = StopStringMatcher(["\n\n"])
    assert matcher.push("one\n") == StopResult("one", None)
    assert matcher.push("\ntwo") == StopResult("", "\n\n")
    assert matcher.push("three") == StopResult("", "\n\n")
    assert matcher.flush() == StopResult("", "\n\n")
    assert matcher.matched == "\n\n"


def test_without_stop_strings_everything_passes() -> None:
    assert run(["a", "", "b"], []) == ("ab", None)


def test_an_empty_stop_string_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\] is empty"):
        StopStringMatcher(["x", ""])


def test_cost_grows_linearly_on_an_almost_matching_text() -> None:
    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            matcher = StopStringMatcher(["a" * 500 + "b"])
            start = time.perf_counter()
            for _ in range(count):
                matcher.push("aaaa")
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(10_000) < 40 * seconds(1_000)
