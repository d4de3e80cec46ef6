"""How completions are written, as a whole and as a stream.

The types are TypedDicts: they document the API, and an event costs one dict and one orjson call, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from services.frontend.edge.answer import Answer, FinishWord, Usage, UsageEvents
from services.frontend.edge.choices import ChoicesBody, ChoicesEvents
from services.frontend.edge.logprobs import CompletionLogprobs, CompletionOffsets
from services.frontend.request.api import Output


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


class CompletionBody(ChoicesBody):
    """The whole answer."""

    def __init__(self, answer: Answer, shape: Shape) -> None:
        super().__init__(len(shape.echoes), shape.per_prompt)
        self._answer = answer
        self._shape = shape

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


class CompletionEvents(ChoicesEvents):
    """The stream. Every choice ends with an event of its own."""

    def __init__(self, answer: Answer, shape: Shape, usage: UsageEvents) -> None:
        super().__init__(len(shape.echoes), shape.per_prompt, usage)
        self._answer = answer
        self._shape = shape
        self._echoed = [not shape.echo(index) for index in range(shape.choices)]
        self._offsets = [CompletionOffsets() for _ in range(shape.choices)]

    def _news(self, output: Output) -> bytes:
        index, finished = output.index, output.finished
        written = b""
        if not self._echoed[index]:
            self._echoed[index] = True
            written += self._written(index, self._shape.echo(index), None, None)
        if output.text:
            written += self._with_logprobs(index, output.text, None)
        if finished is not None:
            written += self._with_logprobs(index, "", finished.reason.value)
        return written

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return _chunk(self._answer, choices)

    def _with_logprobs(self, index: int, text: str, reason: FinishWord | None) -> bytes:
        logprobs = self._take_logprobs(index)
        return self._written(index, text, self._offsets[index].written(logprobs) if logprobs else None, reason)

    def _written(self, index: int, text: str, logprobs: CompletionLogprobs | None, reason: FinishWord | None) -> bytes:
        return self._event(index, CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason))


def _chunk(answer: Answer, choices: list[CompletionChoice]) -> Completion:
    return Completion(
        id=answer.id,
        object="text_completion",
        created=answer.created,
        model=answer.model,
        choices=choices,
        system_fingerprint=None,
    )
