"""How completions are written, as a whole and as a stream.

The types are TypedDicts: they document the API, and an event costs one dict and one orjson call, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from kvbaton.errors import RequestError
from services.frontend.edge.answer import (
    Answer,
    BodyWriter,
    Choice,
    Ends,
    EventWriter,
    FinishWord,
    Usage,
    UsageEvents,
    usage_of,
)
from services.frontend.edge.errors import error_body
from services.frontend.edge.logprobs import CompletionLogprobs, CompletionOffsets
from services.frontend.edge.wire import DONE, event
from services.frontend.request.api import Output
from services.requests import TokenLogprob


class CompletionChoice(TypedDict):
    """New text in an event, the whole text otherwise."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
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


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer consists of. `echoes` is the text in front of the choices of each prompt, empty for none."""

    echoes: Sequence[str]
    per_prompt: int
    with_logprobs: bool = False

    @property
    def choices(self) -> int:
        """Of all prompts together."""
        return len(self.echoes) * self.per_prompt

    def echo(self, index: int) -> str:
        """The text in front of one choice."""
        return self.echoes[index // self.per_prompt]


class CompletionBody(BodyWriter):
    """The whole answer."""

    def __init__(self, answer: Answer, shape: Shape) -> None:
        self._answer = answer
        self._shape = shape
        self._choices = [Choice() for _ in range(shape.choices)]
        self._ends = Ends(len(shape.echoes), shape.per_prompt)

    def take(self, output: Output) -> None:
        """See `BodyWriter`."""
        self._choices[output.index].take(output)
        if output.finished is not None:
            self._ends.put(output.index, output.finished)

    def body(self) -> bytes:
        """See `BodyWriter`."""
        ends = self._ends.all()
        choices = [
            CompletionChoice(
                index=index,
                text=self._shape.echo(index) + "".join(choice.texts),
                logprobs=CompletionOffsets().written(choice.logprobs) if self._shape.with_logprobs else None,
                finish_reason=ends[index].reason.value,
            )
            for index, choice in enumerate(self._choices)
        ]
        body = _chunk(self._answer, choices)
        body["usage"] = self._ends.usage()
        return orjson.dumps(body)


class CompletionEvents(EventWriter):
    """The stream. Every choice ends with an event of its own."""

    def __init__(self, answer: Answer, shape: Shape, usage: UsageEvents) -> None:
        self._answer = answer
        self._shape = shape
        self._usage = usage
        self._echoed = [not shape.echo(index) for index in range(shape.choices)]
        self._offsets = [CompletionOffsets() for _ in range(shape.choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(shape.choices)]
        self._tokens = [0] * shape.choices
        self._prompt_tokens = [0] * len(shape.echoes)
        self._ends = Ends(len(shape.echoes), shape.per_prompt)

    def prompt(self, position: int, tokens: int) -> None:
        """See `EventWriter`."""
        self._prompt_tokens[position] = tokens

    def events(self, output: Output) -> bytes:
        """See `EventWriter`."""
        index, finished = output.index, output.finished
        self._tokens[index] += len(output.token_ids)
        if finished is not None:
            self._ends.put(index, finished)
            self._tokens[index] = finished.completion_tokens
        self._logprobs[index] += output.logprobs
        written = b""
        if not self._echoed[index]:
            self._echoed[index] = True
            written += self._written(index, self._shape.echo(index), None, None)
        if output.text:
            written += self._event(index, output.text, None)
        if finished is not None:
            written += self._event(index, "", finished.reason.value)
        return written

    def closing(self) -> bytes:
        """See `EventWriter`."""
        self._ends.all()
        if not self._usage.at_end:
            return DONE
        return event(_chunk(self._answer, []) | {"usage": self._ends.usage()}) + DONE

    def failed(self, error: RequestError) -> bytes:
        """See `EventWriter`. The error is the last event; there is no [DONE]."""
        return event(error_body(error))

    def _event(self, index: int, text: str, reason: FinishWord | None) -> bytes:
        """With the log probabilities of all tokens since the choice's last event: text may lag behind tokens."""
        logprobs = self._logprobs[index]
        if not logprobs:
            return self._written(index, text, None, reason)
        self._logprobs[index] = []
        return self._written(index, text, self._offsets[index].written(logprobs), reason)

    def _written(self, index: int, text: str, logprobs: CompletionLogprobs | None, reason: FinishWord | None) -> bytes:
        body = _chunk(self._answer, [CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)])
        if self._usage.always:
            body["usage"] = usage_of(self._prompt_tokens[index // self._shape.per_prompt], self._tokens[index])
        elif self._usage.at_end:
            body["usage"] = None
        return event(body)


def _chunk(answer: Answer, choices: list[CompletionChoice]) -> Completion:
    return Completion(
        id=answer.id,
        object="text_completion",
        created=answer.created,
        model=answer.model,
        choices=choices,
        system_fingerprint=None,
    )
