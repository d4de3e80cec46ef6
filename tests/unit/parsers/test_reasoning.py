"""Reasoning is told from the answer by its markers alone, however the text is divided, and loses nothing but them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.parsers.catalog import TOOL_FORMATS
from services.frontend.parsers.protocol import Chain
from services.frontend.parsers.reasoning import ThinkParser
from services.frontend.parsers.tool_calls import MarkedCalls
from tests.unit.parsers.reading import Call, Read, borders, cut, patient, read


def opened() -> ThinkParser:
    """DeepSeek-R1, Qwen3-thinking: the template has written <think>."""
    return ThinkParser(inside=True)


def possible() -> ThinkParser:
    """Qwen3: the model writes it, or not."""
    return ThinkParser(inside=False)


def with_calls(*, inside: bool) -> Chain:
    calls = MarkedCalls(TOOL_FORMATS["qwen25"].syntax, {"f"})
    return Chain(ThinkParser(inside=inside, call_marker="<tool_call>"), calls)


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (opened, "\nHm.\nYes.\n</think>\n\nParis.\n", Read("Paris.\n", "Hm.\nYes.")),
        (opened, "<think>\nHm.\n</think>\n\nParis.", Read("Paris.", "Hm.")),
        (opened, "never closed\n", Read("", "never closed\n")),
        (opened, "</think>Paris.", Read("Paris.")),
        (opened, "a < b </thin</think> c", Read(" c", "a < b </thin")),
        (opened, "a <tool_call>{} b</think>c", Read("c", "a <tool_call>{} b")),
        (opened, "Hm.</think>\n\n", Read("", "Hm.")),
        (possible, "<think>\nHm.\n</think>\n\nParis.", Read("Paris.", "Hm.")),
        (possible, "\n <think>Hm.</think>Paris. <think>", Read("Paris. <think>", "Hm.")),
        (possible, "<think>\n\n</think>\n\nParis.", Read("Paris.")),
        (possible, " Paris. <think>no</think>", Read(" Paris. <think>no</think>")),
        (possible, "  <thin", Read("  <thin")),
        (possible, "<thinking>", Read("<thinking>")),
        (possible, "", Read()),
    ],
)
def test_reasoning_as_models_write_it(make: Callable[[], ThinkParser], text: str, expected: Read) -> None:
    assert read(make(), [text]) == expected
    assert read(make(), text) == expected, "character by character"


def test_both_parts_stream() -> None:
    parser = opened()
    assert parser.push("Hm, ").reasoning == "Hm, "
    assert parser.push("so </thin").reasoning == "so "
    assert parser.push("k>").reasoning == ""
    assert parser.push("\n\nPa").content == "Pa"
    assert parser.push("ris</think>").content == "ris</think>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<think>f?\n</think>\n\nLet me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            Read("Let me see.", "f?", [Call("f", '{"a": 1}')]),
        ),
        (
            '<think>f?\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            Read("", "f?", [Call("f", "{}")]),
        ),
        ("<think>I may use <tool_call> here.\n</think>\n\nNo.", Read("No.", "I may use <tool_call> here.")),
        ("<think>cut off\n<tool_call>\n", Read("", "cut off\n<tool_call>\n")),
    ],
)
def test_calls_behind_reasoning(text: str, expected: Read) -> None:
    """The second one forgets to close its reasoning, as Qwen3.5 does; a mention of the marker is no call."""
    for parser, answer in ((with_calls(inside=False), text), (with_calls(inside=True), text.removeprefix("<think>"))):
        assert read(parser, answer) == expected


TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name":"f"', "}", "{", "\n", " ", "<", "</", "x", "é"]


@patient
@given(st.lists(st.sampled_from(TOKENS), max_size=20).map("".join), borders())
def test_every_division_reads_the_same(text: str, places: list[int]) -> None:
    for make in (
        opened,
        possible,
        lambda: with_calls(inside=True),
        lambda: with_calls(inside=False),
    ):
        whole = read(make(), [text])
        assert read(make(), cut(text, places)) == whole
        assert read(make(), text) == whole


@patient
@given(st.text(max_size=40), st.text(max_size=40), borders())
def test_nothing_but_markers_and_their_newlines_is_lost(thought: str, said: str, places: list[int]) -> None:
    answer = read(opened(), cut(f"\n{thought}\n</think>\n\n{said}", places))
    assert answer.reasoning.strip("\n") == thought.strip("\n")
    assert answer.content == said.lstrip("\n")
    assert answer.calls == []
