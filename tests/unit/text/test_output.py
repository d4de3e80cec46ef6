"""What is promised: the text up to a stop string, and exactly how many tokens it took."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.frontend.text import IncrementalDetokenizer, StopStringMatcher, TextDelta, TextOutput, TextTokenizer
from tests.unit.text.conftest import ids_of


def make(tokenizer: TextTokenizer, *stops: str, include_stop: bool = False) -> TextOutput:
    matcher = StopStringMatcher(stops, include_stop=include_stop) if stops else None
    return TextOutput(IncrementalDetokenizer(tokenizer), matcher)


def test_without_stop_strings_every_token_counts(smollm2: TextTokenizer) -> None:
    ids = smollm2._encode("Hello world 😀", False)
    output = make(smollm2)
    first = output.push(ids[:2])
    rest = output.push(ids[2:])
    assert first.text + rest.text + output.finish().text == "Hello world 😀"
    assert (first.token_count_used, rest.token_count_used) == (2, len(ids))
    assert rest.stopped is None


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_string_ends_the_answer_with_the_token_that_completed_it(
    byte_level: TextTokenizer, include_stop: bool
) -> None:
    ids = ids_of(byte_level, ["a", "b", "c", "d", "e"])
    output = make(byte_level, "bc", include_stop=include_stop)
    assert output.push(ids[:2]) == TextDelta("a", None, 2)
    assert output.push(ids[2:]) == TextDelta("bc" if include_stop else "", "bc", 3)
    assert output.push(ids) == TextDelta("", "bc", 3)
    assert output.finish() == TextDelta("", "bc", 3)


def test_a_stop_string_that_never_completes_is_text(byte_level: TextTokenizer) -> None:
    output = make(byte_level, "bcx")
    assert output.push(ids_of(byte_level, ["a", "b", "c"])) == TextDelta("a", None, 3)
    assert output.finish() == TextDelta("bc", None, 3)


def test_tokens_whose_text_was_held_back_are_counted_exactly(llama_style: TextTokenizer) -> None:
    """A newline is a byte token there: its text is final only with the next token, which is not part of the answer."""
    ids = ids_of(llama_style, ["a", "<0x0A>", "<0x0A>", "b"])
    output = make(llama_style, "\n")
    assert output.push(ids[:3]) == TextDelta("a", None, 3)
    assert output.push(ids[3:]) == TextDelta("", "\n", 2)


def test_a_stop_string_may_become_final_at_the_end(llama_style: TextTokenizer) -> None:
    output = make(llama_style, "\n")
    assert output.push(ids_of(llama_style, ["a", "<0x0A>"])) == TextDelta("a", None, 2)
    assert output.finish() == TextDelta("", "\n", 2)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), max_size=20))
def test_text_and_count_do_not_depend_on_the_chunks(
    any_tokenizer: TextTokenizer, data: st.DataObject, sizes: Sequence[int]
) -> None:
    ids = data.draw(st.lists(st.integers(0, min(400, any_tokenizer.vocab_size - 1)), max_size=40))
    text = any_tokenizer.decode(ids, skip_special_tokens=True)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + 3] or "x"

    def run(chunks: Sequence[Sequence[int]]) -> tuple[str, str | None, int]:
        output = make(any_tokenizer, stop)
        texts = [output.push(chunk).text for chunk in chunks]
        last = output.finish()
        return "".join(texts) + last.text, last.stopped, last.token_count_used

    chunks: list[Sequence[int]] = []
    rest: Sequence[int] = ids
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    result = run([*chunks, rest])

    assert result == run([[token_id] for token_id in ids])
    assert result[0] == text.split(stop)[0]
    assert result[2] <= len(ids)
