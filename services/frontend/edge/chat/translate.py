"""How the body of a chat becomes a kvbaton.v1 request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.frontend.edge.calls import Call, openai_name
from services.frontend.edge.chat.messages import AssistantMessage, ChatMessage, proto_message
from services.frontend.edge.chat.schema import ChatCompletionRequest, ConversationBody, ReasoningEffort
from services.frontend.edge.chat.tools import NamedToolChoice, ToolChoice, proto_tool, proto_tool_choice
from services.frontend.edge.formats import grammar_of
from services.frontend.edge.sampling import chosen_grammar, sampling_params
from services.frontend.edge.values import json_text

# What the contract keeps flat and OpenAI keeps under `function`.
_OF_A_FUNCTION = re.compile(r"(tools|tool_calls)(\[\d+\])\.(name|description|parameters|strict|arguments)$")
_NAMES = {
    "sampling.min_new_tokens": "min_tokens",
    "chat.template_arguments": "chat_template_kwargs",
    "chat.tool_choice.function": "tool_choice.function.name",
}


def chat_call(body: ChatCompletionRequest, request_id: str) -> Call:
    """Raises RequestError for fields that contradict each other."""
    newer = body.max_completion_tokens is not None
    if newer and body.max_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")
    max_tokens = body.max_completion_tokens if newer else body.max_tokens
    grammar = chosen_grammar(body, grammar_of(body.response_format))
    request = generate_pb2.GenerateRequest(
        request_id=request_id,
        model=body.model,
        chat=chat_input(body, body.messages),
        sampling=sampling_params(body, max_tokens, grammar),
        priority=body.priority,
        allow_inexact_migration=body.allow_inexact_migration,
        n=body.n,
        logprobs=_logprobs(body),
    )
    renames = _NAMES | {
        "sampling.max_new_tokens": "max_completion_tokens" if newer else "max_tokens",
        "logprobs": "logprobs" if body.top_logprobs is None else "top_logprobs",
    }
    if grammar is not None:
        renames[f"sampling.{grammar.kind}"] = grammar.place
    return Call(request, partial(chat_name, renames))


def chat_name(renames: Mapping[str, str], field: str) -> str:
    """The name of a field of the request in the body."""
    if field in renames or not field.startswith("chat."):
        return openai_name(field, renames, "messages")
    place = _OF_A_FUNCTION.sub(r"\1\2.function.\3", field.removeprefix("chat."))
    return place.removesuffix("reasoning") + "reasoning_content" if place.endswith("].reasoning") else place


def template_arguments(effort: ReasoningEffort | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of the chat template. The two switches are what the templates of different models look at."""
    from_effort: dict[str, Any] = {}
    if effort is not None:
        thinks = effort != "none"
        from_effort = {"reasoning_effort": effort, "thinking": thinks, "enable_thinking": thinks}
    return from_effort | dict(given or {})


def chat_input(body: ConversationBody, messages: list[ChatMessage]) -> generate_pb2.ChatInput:
    """The prompt of a chat. Raises RequestError for fields that contradict each other."""
    arguments = template_arguments(body.reasoning_effort, body.chat_template_kwargs)
    tools = body.tools or []
    return generate_pb2.ChatInput(
        messages=[proto_message(message) for message in messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=_continues(body, messages[-1]),
        tools=[proto_tool(tool.function) for tool in tools],
        tool_choice=_tool_choice(body.tool_choice, tools=bool(tools)),
        parallel_tool_calls=body.parallel_tool_calls,
        template_arguments=json_text(arguments, "chat_template_kwargs") if arguments else "",
        separate_reasoning=body.separate_reasoning,
    )


def _tool_choice(choice: ToolChoice | None, *, tools: bool) -> generate_pb2.ToolChoice | None:
    match choice:
        case None:
            return None
        case NamedToolChoice():
            return proto_tool_choice(choice.function.name, named=True, tools=tools)
        case _:
            return proto_tool_choice(choice, named=False, tools=tools)


def _continues(body: ConversationBody, last: ChatMessage) -> bool:
    if not body.continue_final_message:
        return False
    if body.add_generation_prompt:
        raise invalid("continue_final_message", "contradicts add_generation_prompt: true")
    if not isinstance(last, AssistantMessage):
        raise invalid("continue_final_message", "the last message is not the assistant's")
    return True


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise invalid("top_logprobs", "only with logprobs: true")
    return None
