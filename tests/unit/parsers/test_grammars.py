"""Grammars of tools let through what the parsers read as calls, and nothing else: asked of xgrammar itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.frontend.parsers.catalog import TOOL_FORMATS
from services.frontend.parsers.grammars import (
    Function,
    SchemaConflictError,
    behind_reasoning,
    required_calls,
    strict_calls,
)
from services.frontend.parsers.tool_calls import ArrayCalls, MarkedCalls
from services.requests import Grammar, GrammarKind
from tests.unit.parsers.reading import Call, read

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"name": {"type": "string"}}}  # fmt: skip
WEATHER = Function("weather", "Now", CITY, strict=True)
TIME = Function("time")


@pytest.fixture(scope="module")
def xgrammar() -> Any:
    return pytest.importorskip("xgrammar")


@pytest.fixture(scope="module")
def compiler(xgrammar: Any) -> Any:
    """Of a vocabulary of bytes."""
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256]))


def accepts(xgrammar: Any, compiler: Any, grammar: Grammar, text: str) -> bool:
    """Whether `text` may be a whole answer, given to xgrammar as SGLang does."""
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        compiled = compiler.compile_json_schema(grammar.source)
    else:
        tag = json.loads(grammar.source)
        if "structures" in tag:
            items = [
                xgrammar.StructuralTagItem(begin=s["begin"], schema=json.dumps(s["schema"]), end=s["end"])
                for s in tag["structures"]
            ]
            tag = xgrammar.StructuralTag.from_legacy_structural_tag(items, tag["triggers"]).model_dump()
        compiled = compiler.compile_structural_tag(json.dumps(tag))
    matcher = xgrammar.GrammarMatcher(compiled)
    return matcher.accept_string(text) and matcher.accept_token(256)


PARIS = '{"name": "weather", "parameters": {"city": "Paris"}}'
NOW = '{"name": "time", "parameters": {}}'


@pytest.mark.parametrize(
    ("text", "calls", "one"),
    [
        (f"[{PARIS}]", True, True),
        (f"[{PARIS}, {NOW}]", True, False),
        ("[]", False, False),
        ('[{"name": "weather", "parameters": {}}]', False, False),
        ('[{"name": "rm", "parameters": {}}]', False, False),
        ("Paris", False, False),
    ],
)
def test_a_required_call(xgrammar: Any, compiler: Any, text: str, calls: bool, one: bool) -> None:
    many = required_calls([WEATHER, TIME], single=False)
    assert accepts(xgrammar, compiler, many, text) is calls
    assert accepts(xgrammar, compiler, required_calls([WEATHER, TIME], single=True), text) is one
    if calls:
        assert [call.name for call in read(ArrayCalls({"weather", "time"}), text).calls]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_strict_calls_are_what_the_parser_of_the_same_name_reads(xgrammar: Any, compiler: Any, name: str) -> None:
    form = TOOL_FORMATS[name]
    grammar = strict_calls([WEATHER, TIME], form)

    def call(function: str, arguments: str) -> str:
        return f'{form.before_name}{function}", "arguments":{arguments}{form.after_arguments}'

    good = "Well. " + call("weather", '{"city": "Paris"}') + " " + call("time", '{"anything": [1]}')
    assert accepts(xgrammar, compiler, grammar, good)
    assert accepts(xgrammar, compiler, grammar, "No call at all.")
    for bad in (call("weather", '{"town": "Paris"}'), call("time", "[]"), call("rm", "{}"), form.syntax.begin):
        assert not accepts(xgrammar, compiler, grammar, bad)
    found = read(MarkedCalls(form.syntax, {"weather", "time"}), good)
    assert found.calls == [Call("weather", '{"city": "Paris"}'), Call("time", '{"anything": [1]}')]


def test_a_grammar_leaves_room_for_reasoning(xgrammar: Any, compiler: Any) -> None:
    number = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}')
    opened, possible = behind_reasoning(number, opened=True), behind_reasoning(number, opened=False)
    for text in ("one and one</think>2", "hm\n</think>\n\n2"):
        assert accepts(xgrammar, compiler, opened, text)
        assert accepts(xgrammar, compiler, possible, "<think>" + text)
    assert not accepts(xgrammar, compiler, opened, "2")
    assert accepts(xgrammar, compiler, possible, "2")
    for grammar in (opened, possible):
        assert not accepts(xgrammar, compiler, grammar, "<think>hm</think>two")


@pytest.mark.parametrize(
    "grammar", [Grammar(GrammarKind.REGEX, "[0-9]+"), Grammar(GrammarKind.EBNF, 'root ::= "1" | "2"')]
)
def test_so_does_every_other_kind(xgrammar: Any, compiler: Any, grammar: Grammar) -> None:
    assert accepts(xgrammar, compiler, behind_reasoning(grammar, opened=True), "hm</think>2")
    assert not accepts(xgrammar, compiler, behind_reasoning(grammar, opened=True), "hm</think>two")


def test_a_structural_tag_describes_a_whole_answer_and_stays_as_it_is() -> None:
    grammar = strict_calls([WEATHER], TOOL_FORMATS["qwen"])
    assert behind_reasoning(grammar, opened=True) is grammar


def test_two_definitions_of_one_name_are_refused() -> None:
    other = Function("other", "", {"type": "object", "$defs": {"name": {"type": "integer"}}})
    with pytest.raises(SchemaConflictError, match=r"other: \$defs 'name'"):
        required_calls([WEATHER, other], single=False)
    required_calls([WEATHER, Function("same", "", CITY)], single=False)


def tree(reference: str) -> Function:
    """Its arguments refer to themselves."""
    children = {"type": "array", "items": {"$ref": reference}}
    return Function("tree", "", {"type": "object", "properties": {"children": children}}, strict=True)


@pytest.mark.parametrize("reference", ["#", "#/properties/children", "#node"])
def test_a_reference_to_what_is_not_at_the_root_of_required_calls_is_refused(reference: str) -> None:
    with pytest.raises(SchemaConflictError, match=rf"tree: \$ref '{reference}'"):
        required_calls([WEATHER, tree(reference)], single=False)


def test_a_strict_tool_may_refer_to_its_own_root(xgrammar: Any, compiler: Any) -> None:
    grammar = strict_calls([tree("#")], TOOL_FORMATS["qwen"])
    form = TOOL_FORMATS["qwen"]
    for arguments, good in (('{"children": [{"children": []}]}', True), ('{"children": [1]}', False)):
        text = f'{form.before_name}tree", "arguments":{arguments}{form.after_arguments}'
        assert accepts(xgrammar, compiler, grammar, text) is good
