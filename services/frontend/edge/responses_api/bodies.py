"""The types of a response's body, its items and its events."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from services.frontend.edge.logprobs import ChatLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatLogprob]


class ReasoningTextPart(TypedDict):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class MessageOutput(TypedDict):
    """What the model said."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputTextPart]


class ReasoningOutput(TypedDict):
    """What the model thought; can be sent back as an item of the next input."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningTextPart]


class FunctionCallOutput(TypedDict):
    """A call of the model; the arguments are JSON in a string."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = MessageOutput | ReasoningOutput | FunctionCallOutput


class InputTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class OutputTokensDetails(TypedDict):
    """`reasoning_tokens` are those until the last piece of reasoning, as it was streamed."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    """Why a stream failed; the event `error` before it has the code that other routes have."""

    code: Literal["server_error"]
    message: str


class Response(TypedDict):
    """The answer of /v1/responses, and a part of some events."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseEvent(TypedDict):
    """One event of a stream: what every one has; the rest depends on its type, as OpenAI documents it."""

    type: str
    sequence_number: int
