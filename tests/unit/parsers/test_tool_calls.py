"""Tool calls come out exactly as the model wrote them, at once, however its text is divided; all else is content."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.frontend.parsers.call_object import MAX_HELD
from services.frontend.parsers.catalog import TOOL_FORMATS
from services.frontend.parsers.protocol import StreamParser
from services.frontend.parsers.tool_calls import MAX_SPACE, ArrayCalls, MarkedCalls
from tests.unit.parsers.reading import Call, Read, borders, cut, patient, read

NAMES = frozenset(("get_weather", "f", "list-files.v2"))


def hermes(*, single: bool = False) -> MarkedCalls:
    return MarkedCalls(TOOL_FORMATS["hermes"].syntax, NAMES, single=single)


def llama3(*, single: bool = False) -> MarkedCalls:
    return MarkedCalls(TOOL_FORMATS["llama3"].syntax, NAMES, single=single)


def array() -> ArrayCalls:
    return ArrayCalls(NAMES)


MAKERS: list[Callable[[], StreamParser]] = [hermes, llama3, array]
AS_MODELS_WRITE = {
    "qwen": (
        hermes,
        'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        Read("Let me look.", calls=[Call("get_weather", '{"city": "Paris"}'), Call("f", "{}")]),
    ),
    "arguments first": (
        hermes,
        '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>',
        Read(calls=[Call("f", '{"a": 1}')]),
    ),
    "text between and behind": (
        hermes,
        'a\n<tool_call>{"name":"f","arguments":{}}</tool_call>\nb <tool_call>{"name":"f"}</tool_call> c ',
        Read("a\n\nb  c", calls=[Call("f", "{}"), Call("f", "{}")]),
    ),
    "llama with its tag": (
        llama3,
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": [1, {"y": "}"}]}}',
        Read(calls=[Call("f", '{"x": [1, {"y": "}"}]}')]),
    ),
    "llama bare, several": (
        llama3,
        '{"name": "f", "parameters": {"a":1}}; {"name": "f", "parameters": {}};',
        Read(calls=[Call("f", '{"a":1}'), Call("f", "{}")]),
    ),
    "llama behind text": (
        llama3,
        'Well: <|python_tag|>{"name": "f", "parameters": {}}',
        Read("Well:", calls=[Call("f", "{}")]),
    ),
    "array": (
        array,
        '[{"name": "f", "parameters": {"a": "]"}},\n {"name": "get_weather", "parameters": {}}]',
        Read(calls=[Call("f", '{"a": "]"}'), Call("get_weather", "{}")]),
    ),
    "bytes are kept": (
        hermes,
        '<tool_call>{"name":"f","arguments":{ "s" :\t"\\u00e9é \\"</tool_call>\\" {\\\\" , "n": 1.0e+5 }}</tool_call>',
        Read(calls=[Call("f", '{ "s" :\t"\\u00e9é \\"</tool_call>\\" {\\\\" , "n": 1.0e+5 }')]),
    ),
    "null arguments": (hermes, '<tool_call>{"name":"f","arguments":null}</tool_call>', Read(calls=[Call("f", "{}")])),
    "other keys behind the name": (
        hermes,
        '<tool_call>{"name":"f","why":{"a":["}"]},"n":1,"arguments":{},"z":"x"}</tool_call>',
        Read(calls=[Call("f", "{}")]),
    ),
    "a name in escapes": (hermes, '<tool_call>{"name":"\\u0066"}</tool_call>', Read(calls=[Call("f", "{}")])),
}
NO_CALLS = {
    "unknown function": (hermes, 'a <tool_call>\n{"name": "rm", "arguments": {"x": "<"}}\n</tool_call>\n'),
    "no object": (hermes, "Use <tool_call> and </tool_call> like <this>."),
    "half a marker": (hermes, "a < b, <tool, <tool_cal"),
    "no JSON": (hermes, '<tool_call>\n{name: "f"}\n</tool_call>'),
    "a string as arguments": (hermes, '<tool_call>{"name":"f","arguments":"{}"}</tool_call>'),
    "a list as arguments": (hermes, '<tool_call>{"name":"f","arguments":[1]}</tool_call>'),
    "no name": (hermes, '<tool_call>{"arguments":{"a":1}}</tool_call>'),
    "cut off before it is a call": (hermes, 'a\n<tool_call>\n{"name": "get_wea'),
    "cut off behind the name": (hermes, '<tool_call>{"name": "f"'),
    "a name of escapes that are no text": (hermes, '<tool_call>{"name":"\\ud800"}</tool_call>'),
    "a bad escape": (hermes, '<tool_call>{"name":"\\x"}</tool_call>'),
    "another JSON answer": (llama3, '{"answer": 42} \n'),
    "not at the start": (llama3, 'The call is {"name": "f", "parameters": {}}'),
    "python": (llama3, "<|python_tag|>print('hi')"),
    "refusal": (array, " I can't.\n"),
    "array of numbers": (array, "[1, 2]"),
    "array cut off": (array, '[ {"name": "f", "par'),
}


@pytest.mark.parametrize("case", AS_MODELS_WRITE)
def test_calls_as_models_write_them(case: str) -> None:
    make, text, expected = AS_MODELS_WRITE[case]
    assert read(make(), [text]) == expected
    assert read(make(), text) == expected, "character by character"


@pytest.mark.parametrize("case", NO_CALLS)
def test_what_is_no_call_comes_out_as_it_was_written(case: str) -> None:
    make, text = NO_CALLS[case]
    assert read(make(), [text]) == Read(text)
    assert read(make(), text) == Read(text), "character by character"


@pytest.mark.parametrize("behind", ["", "\n</tool_call>", "}}\n</tool_call>"])
def test_a_call_that_breaks_off_keeps_the_arguments_that_went_out(behind: str) -> None:
    """Arguments are not validated: what they lack the client sees in their JSON, as with OpenAI."""
    answer = read(hermes(), ['<tool_call>{"name":"f","arguments":{"a": [1, 2', behind])
    assert answer.calls[0].name == "f"
    assert answer.calls[0].arguments.startswith('{"a": [1, 2')
    assert "tool_call" not in answer.content


def test_an_end_marker_ends_arguments_that_lack_a_brace() -> None:
    text = (
        '<tool_call>{"name":"f","arguments":{"a":1}\n</tool_call>\n<tool_call>{"name":"f","arguments":{"a":</tool_call>'
    )
    assert read(hermes(), text) == Read(calls=[Call("f", '{"a":1}'), Call("f", '{"a":')])


def test_a_stray_brace_is_content_but_the_end_marker_is_not() -> None:
    assert read(hermes(), '<tool_call>{"name":"f","arguments":{}}}\n</tool_call>') == Read("}", calls=[Call("f", "{}")])


def test_arguments_stream_while_they_are_written() -> None:
    parser, answer = hermes(), Read()
    answer.add(parser.push('<tool_call>{"name": "f", "arguments": {"text": "once'))
    assert answer.calls == [Call("f", '{"text": "once')]
    answer.add(parser.push(" upon"))
    assert answer.calls == [Call("f", '{"text": "once upon')]


def test_content_is_not_held_back() -> None:
    parser = hermes()
    assert parser.push("a < b").content == "a < b"
    assert parser.push("no <b>ne").content == "no <b>ne"
    assert parser.push(" <tool_ca").content == "", "the white space belongs to a call, if it is one"
    assert parser.push("t").content == " <tool_cat"


def test_ids_are_openais_and_all_different() -> None:
    text = '<tool_call>{"name":"f"}</tool_call>' * 50
    ids = [call.id for call in read(hermes(), [text]).calls]
    assert all(re.fullmatch("call_[0-9a-f]{24}", each) for each in ids)
    assert len(set(ids)) == 50


@pytest.mark.parametrize("make", [hermes, llama3])
def test_with_one_call_at_most_the_answer_ends_behind_it(make: Callable[..., MarkedCalls]) -> None:
    begin = "<tool_call>" if make is hermes else "<|python_tag|>"
    for pieces in ([text := f'a {begin}{{"name":"f","arguments":{{"a":1}}}};b{begin}{{"name":"f"}}'], text):
        parser = make(single=True)
        answer = Read()
        for piece in pieces:
            answer.add(parser.push(piece))
        assert parser.complete
        answer.add(parser.finish())
        assert answer == Read("a", calls=[Call("f", '{"a":1}')])


# Every division of a text.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
    | st.sampled_from(["</tool_call>", "<tool_call>", '{"', "}]", "\\", '"', "<|python_tag|>", ";"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
white = st.text(" \n\t", max_size=3)
words = st.text(st.characters(exclude_characters='<{["\\', exclude_categories=("Cs",)), min_size=1, max_size=20)


@st.composite
def argument_texts(draw: st.DrawFn) -> str:
    value = draw(st.dictionaries(st.text(max_size=8), json_values, max_size=3))
    indent = draw(st.sampled_from([None, 0, 2]))
    return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent, separators=draw(separators))


separators = st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")])


@st.composite
def hermes_answers(draw: st.DrawFn) -> tuple[str, list[Call], str]:
    """A text, its calls, and its content without white space."""
    text, content, calls = "", "", list[Call]()
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            said = draw(words)
            text, content = text + said, content + said
        else:
            name, arguments = draw(st.sampled_from(sorted(NAMES))), draw(argument_texts())
            fields = [f'"name"{draw(white)}:{draw(white)}"{name}"', f'"arguments":{draw(white)}{arguments}']
            inner = f",{draw(white)}".join(draw(st.permutations(fields)))
            text += (
                f"<tool_call>{draw(white)}{{{draw(white)}{inner}{draw(white)}}}{draw(white)}</tool_call>{draw(white)}"
            )
            calls.append(Call(name, arguments))
    return text, calls, "".join(content.split())


@patient
@given(hermes_answers(), borders())
def test_every_division_gives_the_models_own_arguments(answer: tuple[str, list[Call], str], places: list[int]) -> None:
    text, calls, content = answer
    got = read(hermes(), cut(text, places))
    assert got.calls == calls
    assert "".join(got.content.split()) == content
    if not calls:
        assert got.content == text
    assert got == read(hermes(), [text])


@patient
@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), argument_texts()), min_size=1, max_size=3), white, borders())
def test_every_division_of_llamas_and_of_required_calls(
    calls: list[tuple[str, str]], space: str, places: list[int]
) -> None:
    objects = [f'{{"name":{space}"{name}",{space}"parameters": {arguments}{space}}}' for name, arguments in calls]
    expected = Read(calls=[Call(*call) for call in calls])
    for make, text in (
        (llama3, space + f"{space};{space}".join(objects)),
        (llama3, "<|python_tag|>" + space + "<|python_tag|>".join(objects)),
        (array, f"{space}[{space}" + f"{space},{space}".join(objects) + f"{space}]{space}"),
    ):
        assert read(make(), cut(text, places)) == expected


TOKENS = ["<tool_call>", "</tool_call>", "<|python_tag|>", '{"name": "f"', '"arguments": ', "{", "}", "[", "]", ",",
          ":", '"', "\\", "\n", " ", ";", '"f"', '"name"', '"parameters"', "null", "1", "<", "</", "x", "\\u",
          "é"]  # fmt: skip


@patient
@given(st.lists(st.sampled_from(TOKENS), max_size=25).map("".join), borders())
@example('<tool_call>{"name": "f","arguments": {"<</tool_call>', [])
@example('{"name": "f"};;', [])
def test_nonsense_never_raises_and_reads_the_same_in_every_division(text: str, places: list[int]) -> None:
    for make in MAKERS:
        whole = read(make(), [text])
        assert read(make(), cut(text, places)) == whole
        assert read(make(), text) == whole
        if not whole.calls:
            assert whole.content == text, "nothing is lost"


@patient
@given(st.text(max_size=60), borders())
def test_text_without_calls_stays_as_it_is(text: str, places: list[int]) -> None:
    for make in MAKERS:
        answer = read(make(), cut(text, places))
        assert answer == Read(text)


# Bounds.


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (hermes, "<" * 400_000),
        (hermes, "<tool_call>" * 40_000),
        (hermes, '<tool_call>{"name":"f","arguments":{"a":"' + "x<" * 200_000),
        (hermes, '<tool_call>{"name":"f","arguments":' + '{"a":' * 80_000),
        (hermes, '<tool_call>{"arguments":{"a":"' + "x" * 2 * MAX_HELD),
        (hermes, '<tool_call>{"id":"' + '\\"' * MAX_HELD),
        (hermes, "a" + " \n" * 200_000 + "b"),
        (llama3, ";" * 400_000),
        (llama3, " " * 400_000),
        (llama3, '{"name": "x"};' * 30_000),
        (array, "[" * 400_000),
    ],
)  # fmt: skip
def test_time_is_linear_and_memory_bounded(make: Callable[[], StreamParser], text: str) -> None:
    """400 000 characters, one by one; looking at all of them for each would take hours."""
    parser, answer = make(), list[str]()
    started = time.process_time()
    given = 0
    for piece in cut(text, range(0, len(text), 3)):
        parsed = parser.push(piece)
        given += len(piece) - len(parsed.content) - sum(len(call.arguments) for call in parsed.tool_calls)
        answer.append(parsed.content)
        assert given <= MAX_HELD + 2 * MAX_SPACE + 64
    answer.append(parser.finish().content)
    assert time.process_time() - started < 20
    if not parser.called:
        assert "".join(answer) == text


def test_more_than_is_held_back_is_content_at_the_same_place_in_every_division() -> None:
    text = '<tool_call>{"arguments":{"a":"' + "x" * MAX_HELD + '"},"name":"f"}</tool_call><tool_call>{"name":"f"}'
    whole = read(hermes(), [text])
    assert whole == Read(text.removesuffix('<tool_call>{"name":"f"}'), calls=[Call("f", "{}")])
    assert read(hermes(), cut(text, range(0, len(text), 1000))) == whole
