"""Writes docs/openai.md from the code, or to the file given as the first argument. A test keeps it fresh."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from typing_extensions import get_type_hints, is_typeddict

from services.frontend.edge.fields import BODIES, RequestField, fields_of

ROOT = Path(__file__).parent.parent

SDK_PARAMS: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ],
    "/v1/completions": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "/v1/embeddings": [embedding_create_params.EmbeddingCreateParams],
    "/v1/responses": [
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ],
}
"""What OpenAI's SDK says that a body of each route may hold."""

_INTRODUCTION = (ROOT / "scripts" / "openai_introduction.md").read_text("utf-8")


def sdk_fields(route: str, stop: frozenset[str] = frozenset()) -> list[str]:
    """Every field's path in OpenAI's SDK, written as in `RequestField`; nothing below the paths of `stop`."""
    paths: dict[str, None] = {}
    for params in SDK_PARAMS[route]:
        paths.update(dict.fromkeys(_fields(params, "", stop)))
    return list(paths)


def _fields(params: Any, prefix: str, stop: frozenset[str]) -> Iterator[str]:
    for name, annotation in get_type_hints(params, include_extras=True).items():
        path = f"{prefix}{name}"
        if not prefix or not (name == "type" or (name == "role" and len(_literals(annotation)) == 1)):
            yield path
        if path not in stop:
            for nested, variant in _objects(annotation):
                if variant:
                    yield f"{path}{variant}"
                if f"{path}{variant}" not in stop:
                    yield from _fields(nested, f"{path}{variant}.", stop)


def _objects(annotation: Any) -> Iterator[tuple[Any, str]]:
    origin = get_origin(annotation)
    if is_typeddict(annotation):
        yield from ((annotation, variant) for variant in _variants(annotation))
    elif origin in (Annotated, Required, NotRequired):
        yield from _objects(get_args(annotation)[0])
    elif origin in (Union, types.UnionType) or (origin is not None and origin not in (Literal, dict)):
        # The others are kinds of lists.
        for argument in get_args(annotation):
            yield from _objects(argument)


def _variants(params: Any) -> list[str]:
    """In brackets, each value of the field that tells what an object is; one empty string where there is none."""
    hints = get_type_hints(params, include_extras=True)
    role, kinds = _literals(hints.get("role")), _literals(hints.get("type"))
    values = role if len(role) == 1 else kinds
    return [f"[{value}]" for value in values] or [""]


def _literals(annotation: Any) -> tuple[str, ...]:
    origin = get_origin(annotation)
    if origin is Literal:
        return get_args(annotation)
    if origin in (Annotated, Required, NotRequired, Union, types.UnionType):
        return tuple(value for argument in get_args(annotation) for value in _literals(argument))
    return ()


def document() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(_section(route) for route in BODIES)


def _section(route: str) -> str:
    order = {path: place for place, path in enumerate(sdk_fields(route))}
    # As OpenAI has them, then what only we have.
    fields = sorted(fields_of(route), key=lambda field: order.get(field.path, len(order)))
    rows = "".join(_row(field, extension=field.path not in order) for field in fields)
    return f"\n### {route}\n\n| field | what becomes of it | |\n|---|---|---|\n{rows}"


def _row(field: RequestField, *, extension: bool) -> str:
    name = f"`{field.path}`" + (", extension" if extension else "")
    handling = field.handling.value
    if field.accepts:
        handling += ", except " + ", ".join(f"`{value}`" for value in field.accepts)
    return f"| {name} | {handling} | {field.note} |\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "openai.md"
    target.write_text(document(), "utf-8")
