"""How the answer to a chat is written, as a whole and as a stream.

The types are TypedDicts: they document the API, and an event costs one dict and one orjson call, no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from services.frontend.edge.answer import Answer, FinishWord, Usage, UsageEvents
from services.frontend.edge.choices import Choice, ChoicesBody, ChoicesEvents
from services.frontend.edge.logprobs import ChatLogprobs, chat_logprobs
from services.frontend.request.api import Output, ToolCallDelta


class Function(TypedDict):
    """What is called; the arguments are JSON in a string."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call of the model."""

    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(TypedDict):
    """What the model said. `content` is null beside calls or reasoning without any text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
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


class FunctionDelta(TypedDict):
    """The name comes once, the arguments piece by piece."""

    name: NotRequired[str]
    arguments: str


class ToolCallDeltaBody(TypedDict):
    """`id`, `type` and the name come first, alone; only `index` says which call the others belong to."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """`role` in a choice's first event, something new in the next ones, nothing in the last."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str
    tool_calls: list[ToolCallDeltaBody]


class ChatChunkChoice(TypedDict):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
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


class ChatBody(ChoicesBody):
    """The whole answer. `with_logprobs` says whether they were asked for."""

    def __init__(self, answer: Answer, choices: int, *, with_logprobs: bool) -> None:
        super().__init__(1, choices)
        self._answer = answer
        self._with_logprobs = with_logprobs

    def body(self) -> bytes:
        """See `BodyWriter`."""
        ends = self._ends.all()
        choices = [
            ChatChoice(
                index=index,
                message=_message(choice),
                logprobs=chat_logprobs(choice.logprobs) if self._with_logprobs else None,
                finish_reason=ends[index].reason.value,
            )
            for index, choice in enumerate(self._choices)
        ]
        return orjson.dumps(
            ChatCompletion(
                id=self._answer.id,
                object="chat.completion",
                created=self._answer.created,
                model=self._answer.model,
                choices=choices,
                usage=self._ends.usage(),
                system_fingerprint=None,
            )
        )


class ChatEvents(ChoicesEvents):
    """The stream. Every choice opens with its first news and ends with an event of its own."""

    def __init__(self, answer: Answer, choices: int, usage: UsageEvents) -> None:
        super().__init__(1, choices, usage)
        self._answer = answer
        self._opened = [False] * choices

    def _news(self, output: Output) -> bytes:
        index, finished = output.index, output.finished
        written = b""
        for delta in _deltas(output):
            if not self._opened[index]:
                written += self._opening(index, delta)
            written += self._with_logprobs(index, delta)
        if finished is not None:
            if not self._opened[index]:
                written += self._opening(index, ChatDelta(content=""))
            written += self._with_logprobs(index, ChatDelta(), finished.reason.value)
        return written

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._answer.id,
            object="chat.completion.chunk",
            created=self._answer.created,
            model=self._answer.model,
            choices=choices,
            system_fingerprint=None,
        )

    def _opening(self, index: int, first: ChatDelta) -> bytes:
        """The event that says who speaks. What begins without text may never have any: null, as in the whole answer."""
        self._opened[index] = True
        content = "" if "content" in first else None
        return self._written(index, ChatDelta(role="assistant", content=content, refusal=None), None, None)

    def _with_logprobs(self, index: int, delta: ChatDelta, reason: FinishWord | None = None) -> bytes:
        logprobs = self._take_logprobs(index)
        return self._written(index, delta, chat_logprobs(logprobs) if logprobs else None, reason)

    def _written(self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None, reason: FinishWord | None) -> bytes:
        return self._event(index, ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason))


def _message(choice: Choice) -> AssistantMessage:
    text, reasoning = "".join(choice.texts), "".join(choice.reasoning)
    content = None if not text and (reasoning or choice.calls) else text
    message = AssistantMessage(role="assistant", content=content, refusal=None)
    if reasoning:
        message["reasoning_content"] = reasoning
    if choice.calls:
        message["tool_calls"] = [
            ToolCall(id=call.id, type="function", function=Function(name=call.name, arguments="".join(call.arguments)))
            for _, call in sorted(choice.calls.items())
        ]
    return message


def _deltas(output: Output) -> Iterator[ChatDelta]:
    """What an output has that is new, in the order in which a model says it; one call in each."""
    if output.reasoning:
        yield ChatDelta(reasoning_content=output.reasoning)
    if output.text:
        yield ChatDelta(content=output.text)
    for call in output.tool_calls:
        for delta in _call_deltas(call):
            yield ChatDelta(tool_calls=[delta])


def _call_deltas(call: ToolCallDelta) -> Iterator[ToolCallDeltaBody]:
    if call.id or call.name:
        function = FunctionDelta(name=call.name, arguments="")
        yield ToolCallDeltaBody(index=call.index, id=call.id, type="function", function=function)
    if call.arguments:
        yield ToolCallDeltaBody(index=call.index, function=FunctionDelta(arguments=call.arguments))
