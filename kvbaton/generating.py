"""What a client asks for, in Python's types and as a GenerateRequest."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from kvbaton.errors import invalid
from kvbaton.token_ids import pack
from kvbaton.v1 import generate_pb2
from kvbaton.v1.generate_pb2 import (
    Bootstrap,
    ChatInput,
    ChatMessage,
    GenerateRequest,
    SamplingParams,
    Tool,
    ToolChoice,
)

Messages = Sequence[ChatMessage | Mapping[str, Any]]
Tools = Sequence[Tool | Mapping[str, Any]]

_TOOL_MODES = {
    "auto": generate_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": generate_pb2.TOOL_CHOICE_MODE_NONE,
    "required": generate_pb2.TOOL_CHOICE_MODE_REQUIRED,
}
_INPUTS = ("text", "chat", "token_ids")


class GenerateOptions(TypedDict, total=False):
    """Fields of GenerateRequest and, beside a chat, of ChatInput, which say what each means.

    None, or leaving it out, leaves a field unset. Exactly one of text, chat and token_ids.
    """

    text: str | None
    chat: Messages | None
    token_ids: Iterable[int] | None
    sampling: SamplingParams | None
    model: str
    request_id: str
    """Made up when empty."""
    n: int | None
    logprobs: int | None
    priority: int | None
    prefill_worker: str
    decode_worker: str
    cache_salt: str
    lora: str
    allow_inexact_migration: bool | None
    bootstrap: Bootstrap | None
    """For a worker, as is `dp_rank`."""
    dp_rank: int | None

    tools: Tools
    tool_choice: ToolChoice | str | None
    """Also "auto", "none", "required" or a function's name."""
    parallel_tool_calls: bool | None
    template_arguments: Mapping[str, Any] | None
    separate_reasoning: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


def generate_request(options: GenerateOptions) -> GenerateRequest:
    """The message. Raises RequestError for options that contradict each other, TypeError for unknown ones."""
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"unexpected keyword arguments: {', '.join(unknown)}")
    fields: dict[str, Any] = {name: value for name, value in options.items() if name not in _INPUTS}
    chat = chat_options(**{name: fields.pop(name) for name in _CHAT_OPTIONS if name in fields})
    fields["request_id"] = fields.get("request_id") or uuid.uuid4().hex
    request = GenerateRequest(**fields)
    request.MergeFrom(prompt(options.get("text"), options.get("chat"), options.get("token_ids"), chat))
    return request


def prompt(
    text: str | None, chat: Messages | None, token_ids: Iterable[int] | None, options: ChatInput
) -> GenerateRequest:
    """A request with its input and nothing else; `options` are the chat's. Raises RequestError."""
    given = [name for name, value in zip(_INPUTS, (text, chat, token_ids), strict=True) if value is not None]
    if len(given) != 1:
        raise invalid("input", f"exactly one of text, chat and token_ids, not {' and '.join(given) or 'none'}")
    if chat is not None:
        options.messages.extend(m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in chat)
        return GenerateRequest(chat=options)
    if fields := options.ListFields():
        raise invalid(f"chat.{fields[0][0].name}", "only with a chat")
    if text is not None:
        return GenerateRequest(text=text)
    return GenerateRequest(token_ids=pack(token_ids or ()))


def chat_options(
    *,
    tools: Tools = (),
    tool_choice: ToolChoice | str | None = None,
    parallel_tool_calls: bool | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    separate_reasoning: bool | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> ChatInput:
    """A chat without its messages."""
    if isinstance(tool_choice, str):
        mode = _TOOL_MODES.get(tool_choice)
        tool_choice = ToolChoice(function=tool_choice) if mode is None else ToolChoice(mode=mode)
    return ChatInput(
        tools=[tool if isinstance(tool, Tool) else _tool(tool) for tool in tools],
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        template_arguments=json.dumps(dict(template_arguments)) if template_arguments else "",
        separate_reasoning=separate_reasoning,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(continue_final_message),
    )


_CHAT_OPTIONS = frozenset(ChatInput.DESCRIPTOR.fields_by_name) - {"messages"}


def _tool(tool: Mapping[str, Any]) -> Tool:
    """Its fields, with `parameters` as an object or as text."""
    fields: dict[str, Any] = dict(tool)
    if isinstance(fields.get("parameters"), Mapping):
        fields["parameters"] = json.dumps(fields["parameters"])
    return Tool(**fields)
