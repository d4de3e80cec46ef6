"""What becomes of every request field of OpenAI's routes: the one table, read off the schemas of the bodies.

A field without a word about it in its annotation is forwarded. The variants that OpenAI has and the schemas don't are
listed here; whatever else a body holds is refused by name as well.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, PlainValidator
from pydantic.fields import FieldInfo

from services.frontend.edge.chat.schema import ChatCompletionRequest
from services.frontend.edge.completions.schema import CompletionRequest
from services.frontend.edge.embeddings import EmbeddingsRequest
from services.frontend.edge.responses_api.schema import ResponsesRequest
from services.frontend.edge.values import Handling, Only

_TEXT_ONLY = "Text only."
_FUNCTIONS_ONLY = "Functions only."
_NO_BUILT_IN_TOOLS = "There are no built-in tools."
_NO_REFUSALS = "No model of ours answers with one."
_SEND_FEWER = "Send only the tools that are allowed."

# Of the Responses API: tools that OpenAI's servers run, and the items that only they make.
_BUILT_IN_TOOLS = (
    "apply_patch",
    "code_interpreter",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "shell",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
_CHOSEN_BUILT_IN_TOOLS = (
    "apply_patch",
    "code_interpreter",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "mcp",
    "shell",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
_ITEMS_OF_BUILT_IN_TOOLS = (
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "shell_call",
    "shell_call_output",
    "web_search_call",
)

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/responses": ResponsesRequest,
}
"""The routes that OpenAI has, and what a body of each is."""

REFUSED_VARIANTS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {
        "messages[function]": "The older form of role `tool`.",
        "messages[user].content[image_url]": _TEXT_ONLY,
        "messages[user].content[input_audio]": _TEXT_ONLY,
        "messages[user].content[file]": _TEXT_ONLY,
        "messages[assistant].content[refusal]": _NO_REFUSALS,
        "messages[assistant].tool_calls[custom]": _FUNCTIONS_ONLY,
        "tools[custom]": _FUNCTIONS_ONLY,
        "tool_choice[custom]": _FUNCTIONS_ONLY,
        "tool_choice[allowed_tools]": _SEND_FEWER,
    },
    "/v1/responses": {
        "input[message].content[input_image]": _TEXT_ONLY,
        "input[message].content[input_file]": _TEXT_ONLY,
        "input[assistant].content[refusal]": _NO_REFUSALS,
        "input[function_call_output].output[input_image]": _TEXT_ONLY,
        "input[function_call_output].output[input_file]": _TEXT_ONLY,
        "input[custom_tool_call]": _FUNCTIONS_ONLY,
        "input[custom_tool_call_output]": _FUNCTIONS_ONLY,
        "input[item_reference]": "Nothing is stored.",
        **{f"input[{kind}]": _NO_BUILT_IN_TOOLS for kind in _ITEMS_OF_BUILT_IN_TOOLS},
        "tools[custom]": _FUNCTIONS_ONLY,
        **{f"tools[{kind}]": _NO_BUILT_IN_TOOLS for kind in _BUILT_IN_TOOLS},
        "tool_choice[custom]": _FUNCTIONS_ONLY,
        "tool_choice[allowed_tools]": _SEND_FEWER,
        **{f"tool_choice[{kind}]": _NO_BUILT_IN_TOOLS for kind in _CHOSEN_BUILT_IN_TOOLS},
    },
}
"""By route and path; a variant is told by its `type` or `role`, which stands in brackets."""


@dataclass(frozen=True, slots=True)
class RequestField:
    """One field, or one variant of an object. `accepts`: values of a refused field that mean nothing, as JSON."""

    path: str
    handling: Handling
    note: str
    accepts: tuple[str, ...] = ()

    @property
    def is_variant(self) -> bool:
        """Whether it says what an object may be, and not what a field is."""
        return self.path.endswith("]")


def fields_of(route: str) -> list[RequestField]:
    """Every field of a route, those of nested objects after the one that holds them, refused variants last."""
    refused = REFUSED_VARIANTS.get(route, {})
    variants = [RequestField(path, Handling.REFUSED, reason) for path, reason in refused.items()]
    return [*_fields(BODIES[route], ""), *variants]


def _fields(model: type[BaseModel], prefix: str) -> Iterator[RequestField]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        if not prefix or variant_of(info.annotation) is None:
            yield _field(path, info)
        for nested, variant in _objects(
            Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        ):
            if variant:
                yield RequestField(f"{path}{variant}", Handling.FORWARDED, inspect.getdoc(nested) or "")
            yield from _fields(nested, f"{path}{variant}.")


def _field(path: str, info: FieldInfo) -> RequestField:
    handling, accepts = Handling.FORWARDED, ()
    for each in info.metadata:
        if isinstance(each, Handling):
            handling = each
        elif isinstance(each, Only):
            handling, accepts = Handling.REFUSED, each.spelled
    return RequestField(path, handling, info.description or "", accepts)


def _objects(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """The objects that a value may be or hold, each with what its path has: its variant in brackets."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, _variant(annotation)
    elif origin is Annotated:
        inner, *metadata = get_args(annotation)
        given = [each for each in metadata if isinstance(each, BeforeValidator | PlainValidator)]
        for kind in [each.json_schema_input_type for each in given] or [inner]:
            yield from _objects(kind)
    elif origin in (Union, types.UnionType, list):
        for argument in get_args(annotation):
            yield from _objects(argument)


def _variant(model: type[BaseModel]) -> str:
    for name in ("role", "type"):
        if name in model.model_fields and (variant := variant_of(model.model_fields[name].annotation)) is not None:
            return f"[{variant}]"
    return ""


def variant_of(annotation: Any) -> str | None:
    """The one string that a literal allows, null or not."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        return variant_of(kinds[0]) if len(kinds) == 1 else None
    arguments = get_args(annotation)
    return arguments[0] if get_origin(annotation) is Literal and len(arguments) == 1 else None
