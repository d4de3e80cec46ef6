"""Tools that the model may call, and whether it must."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.frontend.edge.values import Body, json_text, told_by

MAX_TOOLS = 128
MODES = {
    "auto": generate_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": generate_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generate_pb2.TOOL_CHOICE_MODE_REQUIRED,
}

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
ChoiceWord = Literal["none", "auto", "required"]


class FunctionDefinition(Body):
    """A function of the client."""

    name: FunctionName
    """What the model calls it by."""
    description: str | None = None
    """For the model: when to call it and how."""
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments. Default: no arguments."""
    strict: bool | None = None
    """Hold the arguments to the schema while they are generated. Needs a grammar backend. Default false."""


class ChatTool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition
    """What it is."""


class NamedFunction(Body):
    """Which function."""

    name: FunctionName
    """As in `tools`."""


class NamedToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction
    """Which one."""


ToolChoice = Annotated[
    Annotated[ChoiceWord, Tag("<>")] | Annotated[NamedToolChoice, Tag("<function>")], told_by("type", "function")
]


def proto_tool(definition: FunctionDefinition) -> generate_pb2.Tool:
    """As the frontend takes it."""
    parameters = definition.parameters
    return generate_pb2.Tool(
        name=definition.name,
        description=definition.description or "",
        parameters="" if parameters is None else json_text(parameters, "tools"),
        strict=definition.strict,
    )


def proto_tool_choice(word_or_name: str, *, named: bool, tools: bool) -> generate_pb2.ToolChoice:
    """As the frontend takes it. Raises RequestError for a choice among no tools."""
    if not tools and (named or word_or_name != "none"):
        raise invalid("tool_choice", "only with tools")
    if named:
        return generate_pb2.ToolChoice(function=word_or_name)
    return generate_pb2.ToolChoice(mode=MODES[word_or_name])
