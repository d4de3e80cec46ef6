"""Which grammar holds a model to its tools: JSON Schema for calls that must be, structural tags for strict ones.

The forms are those that SGLang's own server hands to its grammar backends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.frontend.parsers.catalog import ToolFormat
from services.frontend.parsers.reasoning import THINK, THINK_END
from services.requests import Grammar, GrammarKind

_ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}
# What "$ref" may point into from the root of a schema.
_DEFINITIONS = ("$defs", "definitions")
_MOVED = tuple(f"#/{kind}/" for kind in _DEFINITIONS)


class SchemaConflictError(ValueError):
    """The schemas of the tools can't be put into one, which means what each of them does."""


@dataclass(frozen=True, slots=True)
class Function:
    """A tool as the model is told of it. `parameters` is a JSON Schema, None for a function without arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the arguments."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters


def required_calls(functions: Sequence[Function], *, single: bool) -> Grammar:
    """A JSON array of one call or more, `{"name", "parameters"}`. Raises SchemaConflictError."""
    definitions: dict[str, dict[str, Any]] = {}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(function, definitions) for function in functions]},
    }
    if single:
        schema["maxItems"] = 1
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema | definitions, ensure_ascii=False))


def strict_calls(functions: Sequence[Function], form: ToolFormat) -> Grammar:
    """Free text, but for calls: arguments of a strict function hold to its schema, those of others are any object."""
    structures = [
        {
            "begin": f'{form.before_name}{function.name}", "arguments":',
            "schema": function.schema if function.strict else _ANY_ARGUMENTS,
            "end": form.after_arguments,
        }
        for function in functions
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": [form.syntax.begin]}
    return Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(tag, ensure_ascii=False))


def behind_reasoning(grammar: Grammar, *, opened: bool) -> Grammar:
    """The grammar, once the reasoning has ended. `opened`: it has begun in the prompt; else the model may begin it.

    In the form of structural tags that xgrammar alone knows. A structural tag describes a whole answer, reasoning
    included, and stays as it is.
    """
    if grammar.kind is GrammarKind.STRUCTURAL_TAG:
        return grammar
    answer = _format(grammar)
    thought = {"type": "tag", "begin": "" if opened else THINK, "content": {"type": "any_text"}, "end": THINK_END}
    newlines = {"type": "regex", "pattern": "\\n{0,2}"}
    form = f'{{"type": "sequence", "elements": [{json.dumps(thought)}, {json.dumps(newlines)}, {answer}]}}'
    if not opened:
        form = f'{{"type": "or", "elements": [{form}, {answer}]}}'
    return Grammar(GrammarKind.STRUCTURAL_TAG, f'{{"type": "structural_tag", "format": {form}}}')


def _format(grammar: Grammar) -> str:
    """The JSON of it. A schema is JSON already, and may be too deep to be read and written again."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return f'{{"type": "json_schema", "json_schema": {grammar.source}}}'
        case GrammarKind.REGEX:
            return json.dumps({"type": "regex", "pattern": grammar.source}, ensure_ascii=False)
        case _:
            return json.dumps({"type": "grammar", "grammar": grammar.source}, ensure_ascii=False)


def _call_schema(function: Function, definitions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of a call; the definitions of its arguments go to the root, where references look for them."""
    parameters = dict(function.schema)
    for reference in _references(parameters):
        if reference.startswith("#") and not reference.startswith(_MOVED):
            # The root is the array of calls: there it would mean something else, without an error.
            where = " and ".join(f"#/{kind}" for kind in _DEFINITIONS)
            raise SchemaConflictError(f"{function.name}: $ref {reference!r}, only {where} can be referred to here")
    for kind in _DEFINITIONS:
        named = parameters.pop(kind, None)
        if not isinstance(named, dict):
            continue
        known = definitions.setdefault(kind, {})
        for name, definition in named.items():
            if known.setdefault(name, definition) != definition:
                raise SchemaConflictError(f"{function.name}: {kind} {name!r} differs from another tool's")
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [function.name]}, "parameters": parameters},
        "required": ["name", "parameters"],
    }


def _references(schema: object) -> Iterator[str]:
    """Every "$ref" in it, however deep."""
    left = [schema]
    while left:
        match left.pop():
            case dict() as entries:
                if isinstance(reference := entries.get("$ref"), str):
                    yield reference
                left += entries.values()
            case list() as elements:
                left += elements
            case _:
                pass
