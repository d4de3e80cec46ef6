"""What is promised: the text given out, joined, is `decode` of all ids, however the ids arrive."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.frontend.text import IncrementalDetokenizer, TextTokenizer
from tests.unit.text.conftest import ids_of

SHARED = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
HARD_TEXTS = [
    "plain words, and some more.",
    "👨\u200d👩\u200d👧\u200d👦 🇩🇪 🏳️\u200d🌈",
    "你好世界 日本語 한국어",
    "e\u0301 n\u0303 a\u0308\u0323",
    "real \ufffd replacement \ufffd\ufffd",
    "   spaces  and\n\n\ttabs ",
    "Ω≈ç√∫ мир שלום",
    "",
]


def pieces_of(detokenizer: IncrementalDetokenizer, chunks: Sequence[Sequence[int]]) -> list[str]:
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


def cut(ids: Sequence[int], borders: Sequence[int]) -> list[Sequence[int]]:
    points = [0, *sorted({border % (len(ids) + 1) for border in borders}), len(ids)]
    return [ids[start:end] for start, end in pairwise(points)]


def encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer._encode(text, False)


borders = st.lists(st.integers(0, 200), max_size=12)


@SHARED
@given(data=st.data(), chunk_borders=borders, skip=st.booleans())
def test_random_ids_come_out_as_decode_gives_them(
    any_tokenizer: TextTokenizer, data: st.DataObject, chunk_borders: list[int], skip: bool
) -> None:
    token = st.integers(0, any_tokenizer.vocab_size + 2)
    special = st.sampled_from(sorted(any_tokenizer.special_token_ids) or [0])
    low = st.integers(0, min(300, any_tokenizer.vocab_size))  # bytes and single characters
    ids = data.draw(st.lists(st.one_of(token, low, special), max_size=40))

    pieces = pieces_of(IncrementalDetokenizer(any_tokenizer, skip_special_tokens=skip), cut(ids, chunk_borders))

    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@SHARED
@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(HARD_TEXTS)).map("".join)), chunk_borders=borders)
def test_encoded_text_comes_out_as_decode_gives_it(
    any_tokenizer: TextTokenizer, text: str, chunk_borders: list[int]
) -> None:
    ids = encode(any_tokenizer, text)

    pieces = pieces_of(IncrementalDetokenizer(any_tokenizer), cut(ids, chunk_borders))

    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_no_piece_holds_half_a_character(smollm2: TextTokenizer, llama_style: TextTokenizer, text: str) -> None:
    for tokenizer in (smollm2, llama_style):
        ids = encode(tokenizer, text)
        pieces = pieces_of(IncrementalDetokenizer(tokenizer), [[token_id] for token_id in ids])
        assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_text_is_given_out_as_soon_as_it_is_final(smollm2: TextTokenizer) -> None:
    ids = encode(smollm2, "Hello world 👨\u200d👩 end")
    detokenizer = IncrementalDetokenizer(smollm2)
    given_out = ""
    for count in range(1, len(ids) + 1):
        given_out += detokenizer.push(ids[count - 1 : count])
        assert given_out == smollm2.decode(ids[:count], skip_special_tokens=True).rstrip("\ufffd")


def test_an_unfinished_character_is_flushed_at_the_end(llama_style: TextTokenizer, byte_level: TextTokenizer) -> None:
    for tokenizer in (llama_style, byte_level):
        ids = encode(tokenizer, "a😀")[:-1]
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert detokenizer.push(ids) == "a"
        assert set(detokenizer.finish()) == {"\ufffd"}


def test_one_invalid_byte_turns_its_whole_run_into_replacements(llama_style: TextTokenizer) -> None:
    """Why a run of byte tokens is held back: "你" is complete, and lost all the same."""
    run = [llama_style.token_id(f"<0x{byte:02X}>") or 0 for byte in (*"你".encode(), 0xFF)]
    after = llama_style.token_id("a") or 0

    pieces = pieces_of(IncrementalDetokenizer(llama_style), [[token_id] for token_id in [*run, after]])

    assert "".join(pieces) == "\ufffd" * 4 + "a" == llama_style.decode([*run, after], skip_special_tokens=True)


def test_the_first_space_is_stripped_behind_skipped_tokens_too(llama_style: TextTokenizer) -> None:
    """A context of nothing but skipped tokens would strip the space of every word behind it."""
    eos, word = llama_style.token_id("</s>") or 0, llama_style.token_id("▁th") or 0
    ids = [eos, eos, word, eos, eos, word, eos, word]
    pieces = pieces_of(IncrementalDetokenizer(llama_style), [[token_id] for token_id in ids])
    assert "".join(pieces) == "th th th"


def test_a_space_behind_a_space_is_kept(llama_style: TextTokenizer, two_stripped: TextTokenizer) -> None:
    for tokenizer in (llama_style, two_stripped):
        ids = ids_of(tokenizer, ["a", "▁", "▁th"])
        pieces = pieces_of(IncrementalDetokenizer(tokenizer), [[token_id] for token_id in ids])
        assert "".join(pieces) == "a  th"


def test_an_answer_behind_a_prompt_keeps_its_first_space(any_tokenizer: TextTokenizer) -> None:
    prompt, answer = encode(any_tokenizer, "the fox"), encode(any_tokenizer, "the fox, the dog")
    both = any_tokenizer.decode([*prompt, *answer], skip_special_tokens=True)

    pieces = pieces_of(IncrementalDetokenizer(any_tokenizer, prompt_ids=prompt), [[token_id] for token_id in answer])

    assert any_tokenizer.decode(prompt, skip_special_tokens=True) + "".join(pieces) == both


@SHARED
@given(text=st.lists(st.sampled_from(HARD_TEXTS)).map("".join), border=st.integers(0, 200))
def test_a_prompt_may_end_within_a_character(any_tokenizer: TextTokenizer, text: str, border: int) -> None:
    ids = encode(any_tokenizer, text)
    border %= len(ids) + 1
    prompt = any_tokenizer.decode(ids[:border], skip_special_tokens=True)
    whole = any_tokenizer.decode(ids, skip_special_tokens=True)
    if not whole.startswith(prompt):
        prompt = prompt.rstrip("\ufffd")

    pieces = pieces_of(IncrementalDetokenizer(any_tokenizer, prompt_ids=ids[:border]), [ids[border:]])

    if "\ufffd" not in whole:
        assert prompt + "".join(pieces) == whole


@pytest.mark.parametrize("kind", ["normal", "incomplete"])
def test_cost_grows_linearly(any_tokenizer: TextTokenizer, kind: str) -> None:
    """Ten times the tokens take about ten times as long; a quadratic stream would take a hundred times."""
    unit = encode(any_tokenizer, "the quick brown fox, ")
    if kind == "incomplete":
        unit = [any_tokenizer.token_id("<0xF0>") or any_tokenizer.token_id("ð") or unit[0]]

    def seconds(count: int) -> float:
        ids = (unit * count)[:count]
        best = float("inf")
        for _ in range(3):
            detokenizer = IncrementalDetokenizer(any_tokenizer)
            start = time.perf_counter()
            for token_id in ids:
                detokenizer.push((token_id,))
            detokenizer.finish()
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(20_000) < 40 * seconds(2_000)


def test_ids_that_no_vocabulary_can_hold_are_refused(any_tokenizer: TextTokenizer) -> None:
    from services.frontend.text import TokenizerError

    bad: Any
    for bad in (-1, 2**32):
        with pytest.raises(TokenizerError):
            IncrementalDetokenizer(any_tokenizer).push([bad])
        with pytest.raises(TokenizerError):
            any_tokenizer.decode([bad], skip_special_tokens=True)
