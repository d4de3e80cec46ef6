"""How the routes' answers stand in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from services.frontend.edge.errors import ErrorBody

Responses = dict[int | str, dict[str, Any]]


def documented(body: type[Any], description: str = "The answer.") -> Responses:
    """A route that answers with JSON."""
    return {
        200: {"model": body, "description": description},
        "4XX": {"model": ErrorBody, "description": "The request was refused."},
        "5XX": {"model": ErrorBody, "description": "The request failed."},
    }


def documented_stream(body: type[Any], events: Any, description: str) -> Responses:
    """A route that answers with JSON, and with events of one of the types of `events` where a stream is asked for."""
    responses = documented(body)
    # OpenAPI 3.1 has no word for the type of a stream's events; 3.2 calls it itemSchema.
    stream = {"schema": {"type": "string", "description": description}, "x-itemSchema": _self_contained(events)}
    responses[200]["content"] = {"text/event-stream": stream}
    return responses


def _self_contained(kind: Any) -> Any:
    """The JSON Schema of a type that does not contain itself, without references."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        match node:
            case {"$ref": str() as place}:
                return resolved(definitions[place.rpartition("/")[2]])
            case dict():
                return {key: resolved(value) for key, value in node.items() if key != "discriminator"}
            case list():
                return [resolved(value) for value in node]
            case _:
                return node

    return resolved(schema)
