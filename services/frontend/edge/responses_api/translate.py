"""How the body of a response becomes a kvbaton.v1 request: its items become the messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvbaton.v1 import generate_pb2
from services.frontend.edge.calls import Call, openai_name
from services.frontend.edge.chat.tools import proto_tool, proto_tool_choice
from services.frontend.edge.chat.translate import template_arguments
from services.frontend.edge.formats import ANY_JSON_OBJECT, JsonObjectFormat
from services.frontend.edge.responses_api.items import (
    AssistantItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    ReasoningItem,
)
from services.frontend.edge.responses_api.schema import (
    LOGPROBS,
    FlatJsonSchemaFormat,
    NamedTool,
    ResponsesRequest,
    ToolChoice,
)
from services.frontend.edge.sampling import Grammar, chosen_grammar, sampling_params
from services.frontend.edge.values import json_text

_IN_A_MESSAGE = re.compile(r"chat\.messages\[(\d+)\](?:\.tool_calls\[(\d+)\]\.(\w+))?")
_NAMES = {
    "sampling.min_new_tokens": "min_tokens",
    "sampling.max_new_tokens": "max_output_tokens",
    "chat.tool_choice.function": "tool_choice.name",
}


def responses_call(body: ResponsesRequest, request_id: str) -> Call:
    """Raises RequestError for fields that contradict each other."""
    conversation = _Conversation()
    if body.instructions is not None:
        conversation.say(generate_pb2.ChatMessage(role="system", content=body.instructions), "instructions")
    for place, item in enumerate(body.input):
        conversation.add(item, f"input[{place}]")
    grammar = chosen_grammar(body, _grammar(body))
    request = generate_pb2.GenerateRequest(
        request_id=request_id,
        model=body.model,
        chat=_chat_input(body, conversation.messages),
        sampling=sampling_params(body, body.max_output_tokens, grammar),
        priority=body.priority,
        allow_inexact_migration=body.allow_inexact_migration,
        logprobs=_logprobs(body),
    )
    effort_only = body.chat_template_kwargs is None
    renames = _NAMES | {
        "logprobs": "include" if body.top_logprobs is None else "top_logprobs",
        "chat.template_arguments": "reasoning.effort" if effort_only else "chat_template_kwargs",
    }
    if grammar is not None:
        renames[f"sampling.{grammar.kind}"] = grammar.place
    return Call(request, partial(_name_of, renames, conversation.places))


@dataclass(slots=True)
class _Places:
    """Where a message comes from, and where each of its calls does."""

    message: str
    calls: list[str] = field(default_factory=list)


class _Conversation:
    """What the model did in one turn is one message: its reasoning, its text, its calls."""

    def __init__(self) -> None:
        self.messages: list[generate_pb2.ChatMessage] = []
        self.places: list[_Places] = []

    def say(self, message: generate_pb2.ChatMessage, place: str) -> None:
        """A message of its own."""
        self.messages.append(message)
        self.places.append(_Places(place))

    def add(self, item: InputItem, place: str) -> None:
        """The next item."""
        match item:
            case ReasoningItem():
                self.say(generate_pb2.ChatMessage(role="assistant", reasoning=item.text), place)
            case AssistantItem():
                self._turn(place, speaks=True).content = item.content
            case FunctionCallItem():
                call = generate_pb2.ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)
                self._turn(place).tool_calls.append(call)
                self.places[-1].calls.append(place)
            case FunctionCallOutputItem():
                message = generate_pb2.ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
                self.say(message, place)
            case _:
                self.say(generate_pb2.ChatMessage(role=item.role, content=item.content), place)

    def _turn(self, place: str, *, speaks: bool = False) -> generate_pb2.ChatMessage:
        """The assistant's message that goes on, or a new one: text comes once in a message, and before its calls."""
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant" or (speaks and (last.content or last.tool_calls)):
            self.say(generate_pb2.ChatMessage(role="assistant"), place)
        return self.messages[-1]


def _chat_input(body: ResponsesRequest, messages: Sequence[generate_pb2.ChatMessage]) -> generate_pb2.ChatInput:
    effort = None if body.reasoning is None else body.reasoning.effort
    arguments = template_arguments(effort, body.chat_template_kwargs)
    tools = body.tools or []
    return generate_pb2.ChatInput(
        messages=messages,
        tools=[proto_tool(tool) for tool in tools],
        tool_choice=_tool_choice(body.tool_choice, tools=bool(tools)),
        parallel_tool_calls=body.parallel_tool_calls,
        template_arguments=json_text(arguments, "chat_template_kwargs") if arguments else "",
    )


def _tool_choice(choice: ToolChoice | None, *, tools: bool) -> generate_pb2.ToolChoice | None:
    match choice:
        case None:
            return None
        case NamedTool():
            return proto_tool_choice(choice.name, named=True, tools=tools)
        case "auto" if not tools:
            # The SDK's own examples say it; here it is what leaving it out means.
            return None
        case _:
            return proto_tool_choice(choice, named=False, tools=tools)


def _grammar(body: ResponsesRequest) -> Grammar | None:
    match None if body.text is None else body.text.format:
        case JsonObjectFormat():
            return Grammar("text.format", "json_schema", ANY_JSON_OBJECT)
        case FlatJsonSchemaFormat() as given:
            return Grammar("text.format.schema", "json_schema", json_text(given.json_schema, "text.format.schema"))
        case _:
            return None


def _logprobs(body: ResponsesRequest) -> int | None:
    if body.top_logprobs is None and LOGPROBS in (body.include or ()):
        return 0
    return body.top_logprobs


def _name_of(renames: Mapping[str, str], places: Sequence[_Places], field: str) -> str:
    if field in renames or not field.startswith("chat."):
        return openai_name(field, renames, "input")
    if found := _IN_A_MESSAGE.match(field):
        message, call, of_call = found.groups()
        place = places[int(message)]
        if call is None:
            return place.message
        return f"{place.calls[int(call)]}.{'call_id' if of_call == 'id' else of_call}"
    return "input" if field == "chat.messages" else field.removeprefix("chat.")
