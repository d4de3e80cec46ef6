"""OpenAI's response bodies and stream events.

The types are TypedDicts: they document the API, and an event costs one dict and one orjson call, no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol

import orjson
from fastapi import Response
from typing_extensions import TypedDict

from services.frontend.request.api import Finished

DONE = b"data: [DONE]\n\n"

FinishWord = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts of one request; `cached_tokens` were held by a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(TypedDict):
    """New text in an event, the whole text otherwise."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishWord | None


class Completion(TypedDict):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: None
    usage: NotRequired[Usage | None]


class AssistantMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """The one answer."""

    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishWord


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None


class ChatDelta(TypedDict, total=False):
    """`role` in the first event, new `content` in the next ones, nothing in the last."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChunkChoice(TypedDict):
    """New text of the one answer."""

    index: int
    delta: ChatDelta
    logprobs: None
    finish_reason: FinishWord | None


class ChatCompletionChunk(TypedDict):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: None
    usage: NotRequired[Usage | None]


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def usage_of(finished: Finished) -> Usage:
    """OpenAI's counts."""
    return Usage(
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        total_tokens=finished.prompt_tokens + finished.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=finished.cached_prompt_tokens),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What every body and event of one answer repeats. `created` in seconds since the epoch."""

    id: str
    model: str
    created: int
    include_usage: bool
    """Whether a stream ends with an event of its own for the usage; the other events then say `usage: null`."""


class AnswerFormat(Protocol):
    """How one route writes an answer down."""

    def whole(self, text: str, finished: Finished) -> bytes:
        """The body of a plain answer."""
        ...

    def opening(self) -> bytes:
        """The events before any text; may be empty."""
        ...

    def piece(self, text: str) -> bytes:
        """The event of some new text."""
        ...

    def closing(self, finished: Finished) -> bytes:
        """The events after all text, up to [DONE]."""
        ...


class CompletionFormat:
    """/v1/completions."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def whole(self, text: str, finished: Finished) -> bytes:
        """See `AnswerFormat`."""
        body = self._body([_completion_choice(text, finished.reason.value)])
        body["usage"] = usage_of(finished)
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """Nothing: the first text is the first event."""
        return b""

    def piece(self, text: str) -> bytes:
        """See `AnswerFormat`."""
        return event(self._chunk([_completion_choice(text, None)]))

    def closing(self, finished: Finished) -> bytes:
        """See `AnswerFormat`."""
        events = event(self._chunk([_completion_choice("", finished.reason.value)]))
        if self._answer.include_usage:
            events += event(self._chunk([]) | {"usage": usage_of(finished)})
        return events + DONE

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        body = self._body(choices)
        if self._answer.include_usage:
            body["usage"] = None
        return body

    def _body(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._answer.id,
            object="text_completion",
            created=self._answer.created,
            model=self._answer.model,
            choices=choices,
            system_fingerprint=None,
        )


class ChatFormat:
    """/v1/chat/completions."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def whole(self, text: str, finished: Finished) -> bytes:
        """See `AnswerFormat`."""
        message = AssistantMessage(role="assistant", content=text, refusal=None)
        body = ChatCompletion(
            id=self._answer.id,
            object="chat.completion",
            created=self._answer.created,
            model=self._answer.model,
            choices=[ChatChoice(index=0, message=message, logprobs=None, finish_reason=finished.reason.value)],
            usage=usage_of(finished),
            system_fingerprint=None,
        )
        return orjson.dumps(body)

    def opening(self) -> bytes:
        """The event that says who speaks."""
        return event(self._chunk([_chat_choice(ChatDelta(role="assistant", content="", refusal=None), None)]))

    def piece(self, text: str) -> bytes:
        """See `AnswerFormat`."""
        return event(self._chunk([_chat_choice(ChatDelta(content=text), None)]))

    def closing(self, finished: Finished) -> bytes:
        """See `AnswerFormat`."""
        events = event(self._chunk([_chat_choice(ChatDelta(), finished.reason.value)]))
        if self._answer.include_usage:
            events += event(self._chunk([]) | {"usage": usage_of(finished)})
        return events + DONE

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        body = ChatCompletionChunk(
            id=self._answer.id,
            object="chat.completion.chunk",
            created=self._answer.created,
            model=self._answer.model,
            choices=choices,
            system_fingerprint=None,
        )
        if self._answer.include_usage:
            body["usage"] = None
        return body


def _completion_choice(text: str, finish_reason: FinishWord | None) -> CompletionChoice:
    return CompletionChoice(index=0, text=text, logprobs=None, finish_reason=finish_reason)


def _chat_choice(delta: ChatDelta, finish_reason: FinishWord | None) -> ChatChunkChoice:
    return ChatChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
