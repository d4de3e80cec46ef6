"""What the body of POST /v1/chat/completions may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from services.frontend.edge.chat.messages import ChatMessage
from services.frontend.edge.chat.tools import MAX_TOOLS, ChatTool, ToolChoice
from services.frontend.edge.formats import ResponseFormat
from services.frontend.edge.sampling import Choices, SamplingBody, TopLogprobs
from services.frontend.edge.stream_options import StreamOptions
from services.frontend.edge.values import Body, Handling, Only, Positive

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ConversationBody(Body):
    """What becomes the prompt of a chat, beside the messages."""

    tools: Annotated[list[ChatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call. Needs a tool parser in the model's record."""
    tool_choice: ToolChoice | None = None
    """Default: auto with tools, none without. `required` and a function's name need a grammar backend."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Default true."""
    reasoning_effort: ReasoningEffort | None = None
    """Becomes the template arguments `reasoning_effort`, and `thinking` and `enable_thinking`, false for `none`."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template; they win over what `reasoning_effort` sets."""
    separate_reasoning: bool | None = None
    """Reasoning goes to `reasoning_content` and not to `content`. Default true."""
    add_generation_prompt: bool | None = None
    """False opens no assistant turn behind the messages. Default true."""
    continue_final_message: bool | None = None
    """The answer goes on where the last message ends, which must be the assistant's."""


class ChatCompletionRequest(SamplingBody, ConversationBody):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    """The conversation, oldest message first."""
    max_completion_tokens: Positive | None = None
    """Tokens to generate. Default: all that the context length leaves after the prompt."""
    max_tokens: Positive | None = None
    """The older name of `max_completion_tokens`; one of the two."""
    n: Choices | None = None
    """Answers, each a request of its own. Default 1."""
    logprobs: bool | None = None
    """The log probability of every generated token, those of reasoning and of tool calls too."""
    top_logprobs: TopLogprobs | None = None
    """The likeliest tokens at each position. Only with `logprobs`."""
    response_format: ResponseFormat | None = None
    """Holds the answer to JSON or to a schema. Needs a grammar backend, except `text`."""
    stream_options: Annotated[StreamOptions | None, Handling.EMULATED] = None
    """Only with `stream`."""

    metadata: Annotated[Metadata | None, Handling.NO_EFFECT] = None
    """Labels of stored completions; nothing is stored."""
    prompt_cache_key: Annotated[str | None, Handling.NO_EFFECT] = None
    """The prefix cache needs no key."""
    safety_identifier: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nobody is watched."""
    user: Annotated[str | None, Handling.NO_EFFECT] = None
    """As `safety_identifier`."""

    audio: Annotated[object, Only()] = None
    """Text only."""
    function_call: Annotated[object, Only("none")] = None
    """The older name of `tool_choice`."""
    functions: Annotated[object, Only([])] = None
    """The older name of `tools`."""
    modalities: Annotated[object, Only(["text"])] = None
    """Text only."""
    prediction: Annotated[object, Only()] = None
    """There is no speculative decoding from a given text."""
    prompt_cache_retention: Annotated[object, Only("in-memory")] = None
    """How long the prefix cache keeps a prompt is the engine's decision."""
    service_tier: Annotated[object, Only("auto", "default")] = None
    """There is one tier; `priority` orders requests."""
    store: Annotated[object, Only(False)] = None
    """Nothing is stored."""
    verbosity: Annotated[object, Only("medium")] = None
    """No template takes it; say it in a message."""
    web_search_options: Annotated[object, Only()] = None
    """There are no built-in tools."""
