"""What does a chat ask for, tools and template variables included: every check that needs no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn, cast

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.frontend.parsers.grammars import Function
from services.frontend.text.chat_template import RESERVED_ARGUMENTS, ChatMessage

# Millions fit a gRPC message: seconds of the event loop, and gigabytes, before a token is counted.
MAX_MESSAGES = 32_768
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1024 * 1024
MAX_CALL_BYTES = 1024 * 1024
MAX_TEMPLATE_ARGUMENTS_BYTES = 64 * 1024
# Brackets within brackets. Templates and grammars write the value again, and Python's stack must hold it there too.
MAX_JSON_DEPTH = 100
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class ToolMode(Enum):
    """Whether the model calls functions."""

    NONE = auto()
    AUTO = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a chat."""

    functions: tuple[Function, ...] = ()
    mode: ToolMode = ToolMode.NONE
    chosen: Function | None = None
    """The one that must be called."""
    parallel: bool = True
    """Whether there may be several calls."""

    @property
    def names(self) -> frozenset[str]:
        """Of all of them."""
        return frozenset(function.name for function in self.functions)

    @property
    def single(self) -> bool:
        """Whether there is one call at most."""
        return self.chosen is not None or not self.parallel

    @property
    def strict(self) -> int | None:
        """Which of them is the first whose arguments must hold to their schema; None without one."""
        return next((place for place, function in enumerate(self.functions) if function.strict), None)

    def for_template(self) -> list[dict[str, Any]] | None:
        """As OpenAI writes them, None where the model is not told of any."""
        if self.mode is ToolMode.NONE:
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    **({"description": function.description} if function.description else {}),
                    "parameters": function.schema,
                },
            }
            for function in self.functions
        ]


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that any template can be given."""

    messages: Sequence[ChatMessage]
    tools: Tools
    template_arguments: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    separate_reasoning: bool | None
    """None: where it can be."""


def read_chat(chat: generate_pb2.ChatInput) -> Chat:
    """Raises RequestError naming the field."""
    if not chat.messages:
        raise invalid("chat.messages", "no message")
    if len(chat.messages) > MAX_MESSAGES:
        raise invalid("chat.messages", f"{len(chat.messages)} messages, at most {MAX_MESSAGES}")
    return Chat(
        messages=[_message(f"chat.messages[{index}]", message) for index, message in enumerate(chat.messages)],
        tools=_tools(chat),
        template_arguments=_template_arguments(chat.template_arguments),
        add_generation_prompt=_adds_generation_prompt(chat),
        continue_final_message=chat.continue_final_message,
        separate_reasoning=chat.separate_reasoning if chat.HasField("separate_reasoning") else None,
    )


def _adds_generation_prompt(chat: generate_pb2.ChatInput) -> bool:
    given = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None
    if not chat.continue_final_message:
        return given is not False
    field, last = "chat.continue_final_message", chat.messages[-1]
    if given:
        raise invalid(field, "contradicts add_generation_prompt: true")
    if last.role != "assistant" or not last.content.strip() or last.tool_calls:
        raise invalid(field, "the last message is not text of the assistant's")
    return False


def _message(field: str, message: generate_pb2.ChatMessage) -> ChatMessage:
    if not message.role:
        raise invalid(f"{field}.role", "missing")
    if message.role == "tool" and not message.tool_call_id:
        raise invalid(f"{field}.tool_call_id", "missing: which call does the message answer?")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{field}.tool_calls", f"only the assistant calls tools, not {message.role!r}")
    return ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name or None,
        tool_calls=[_made_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)],
        tool_call_id=message.tool_call_id or None,
        reasoning=message.reasoning or None,
    )


def _made_call(field: str, call: generate_pb2.ToolCall) -> dict[str, Any]:
    """As templates take it: the arguments are an object, not text."""
    if not call.name:
        raise invalid(f"{field}.name", "missing")
    # A function without arguments is called with none.
    arguments = _json_object(f"{field}.arguments", call.arguments, MAX_CALL_BYTES) if call.arguments else {}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tools(chat: generate_pb2.ChatInput) -> Tools:
    if not chat.tools:
        if chat.HasField("tool_choice") and chat.tool_choice.mode != generate_pb2.TOOL_CHOICE_MODE_NONE:
            raise invalid("chat.tool_choice", "only with tools")
        return Tools()
    if len(chat.tools) > MAX_TOOLS:
        raise invalid("chat.tools", f"{len(chat.tools)} tools, at most {MAX_TOOLS}")
    if chat.ByteSize() > MAX_TOOLS_BYTES and sum(tool.ByteSize() for tool in chat.tools) > MAX_TOOLS_BYTES:
        raise invalid("chat.tools", f"more than {MAX_TOOLS_BYTES} bytes")
    functions = tuple(_function(f"chat.tools[{index}]", tool) for index, tool in enumerate(chat.tools))
    names: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in names:
            raise invalid(f"chat.tools[{index}].name", f"{function.name!r} is there twice")
        names.add(function.name)
    mode, chosen = _choice(chat.tool_choice, functions)
    return Tools(functions, mode, chosen, chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True)


def _function(field: str, tool: generate_pb2.Tool) -> Function:
    if not _FUNCTION_NAME.fullmatch(tool.name):
        raise invalid(f"{field}.name", 'letters, digits, "_", "-" and ".", 1 to 64 of them')
    parameters = _json_object(f"{field}.parameters", tool.parameters, MAX_TOOLS_BYTES) if tool.parameters else None
    return Function(tool.name, tool.description, parameters, tool.strict)


def _choice(choice: generate_pb2.ToolChoice, functions: Sequence[Function]) -> tuple[ToolMode, Function | None]:
    if choice.WhichOneof("choice") == "function":
        for function in functions:
            if function.name == choice.function:
                return ToolMode.REQUIRED, function
        raise invalid("chat.tool_choice.function", f"{choice.function!r} is not among the tools")
    match choice.mode:
        case generate_pb2.TOOL_CHOICE_MODE_UNSPECIFIED | generate_pb2.TOOL_CHOICE_MODE_AUTO:
            return ToolMode.AUTO, None
        case generate_pb2.TOOL_CHOICE_MODE_NONE:
            return ToolMode.NONE, None
        case generate_pb2.TOOL_CHOICE_MODE_REQUIRED:
            return ToolMode.REQUIRED, None
        case _:
            raise invalid("chat.tool_choice", f"{choice.mode} is no mode")


def _template_arguments(text: str) -> dict[str, Any]:
    field = "chat.template_arguments"
    arguments = _json_object(field, text, MAX_TEMPLATE_ARGUMENTS_BYTES) if text else {}
    if reserved := RESERVED_ARGUMENTS.intersection(arguments):
        raise invalid(field, f"{min(reserved)!r} is set by fields of its own")
    return arguments


def _json_object(field: str, text: str, max_bytes: int) -> dict[str, Any]:
    if len(text.encode()) > max_bytes:
        raise invalid(field, f"more than {max_bytes} bytes")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid(field, "not a JSON object")
    if _deeper(value, MAX_JSON_DEPTH):
        raise invalid(field, f"nested deeper than {MAX_JSON_DEPTH} levels")
    return cast("dict[str, Any]", value)


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested in more levels."""
    level: list[object] = [value]
    for _ in range(levels):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += cast("dict[str, object]", each).values()
            elif isinstance(each, list):
                inner += cast("list[object]", each)
        if not inner:
            return False
        level = inner
    return any(isinstance(each, dict | list) for each in level)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
