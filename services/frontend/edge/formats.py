"""`response_format`: what it may be, and the grammar that it becomes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Tag

from services.frontend.edge.sampling import Grammar
from services.frontend.edge.values import Body, Handling, json_text, told_by

ANY_JSON_OBJECT = '{"type":"object"}'

JsonObject = dict[str, Any]


class TextFormat(Body):
    """No restriction."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A schema and what it is called."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")], Handling.NO_EFFECT]
    """The model does not see it."""
    json_schema: JsonObject = Field(alias="schema")
    """JSON Schema that the answer is held to while it is generated."""
    description: Annotated[str | None, Handling.NO_EFFECT] = None
    """The model does not see it: say in a message what the answer is for."""
    strict: Annotated[bool | None, Handling.NO_EFFECT] = None
    """The answer is held to the schema in any case."""


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema
    """The schema and its name."""


class StructuralTagFormat(Body):
    """Extension: xgrammar's structural tag, text that is free but for the parts that its triggers begin."""

    type: Literal["structural_tag"]
    format: JsonObject
    """As xgrammar defines it."""


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[StructuralTagFormat, Tag("<structural_tag>")],
    told_by("type", "text", "json_object", "json_schema", "structural_tag"),
]


def grammar_of(format: ResponseFormat | None, place: str = "response_format") -> Grammar | None:
    """None where the answer is free text."""
    match format:
        case JsonObjectFormat():
            return Grammar(place, "json_schema", ANY_JSON_OBJECT)
        case JsonSchemaFormat():
            place = f"{place}.json_schema.schema"
            return Grammar(place, "json_schema", json_text(format.json_schema.json_schema, place))
        case StructuralTagFormat():
            tag = {"type": format.type, "format": format.format}
            return Grammar(place, "structural_tag", json_text(tag, place))
        case _:
            return None
