"""What the answers of all generating routes share: who writes them, token counts, how choices are collected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict

from kvbaton.errors import RequestError
from services.frontend.edge.errors import internal_error
from services.frontend.request.api import Finished, Output, ToolCallDelta
from services.requests import TokenLogprob

FinishWord = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts. A prompt counts once for all its answers; `cached_tokens` of it were held by a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True, slots=True)
class Answer:
    """What every body and event of one answer repeats. `created` in seconds since the epoch."""

    id: str
    model: str
    created: int


@dataclass(frozen=True, slots=True)
class UsageEvents:
    """Which events of a stream have token counts."""

    at_end: bool = False
    """An event of its own after the last choice; all others then say `usage: null`."""
    always: bool = False
    """Every event, with its choice's counts so far."""


class EventWriter(ABC):
    """Writes the stream of one answer. It is given every output once, choices numbered through."""

    def prompt(self, position: int, tokens: int) -> None:  # noqa: B027, not every stream needs it
        """The length of one of the request's prompts, before its first output."""

    @abstractmethod
    def events(self, output: Output) -> bytes:
        """The events of one output; may be empty."""

    @abstractmethod
    def closing(self) -> bytes:
        """The events after the last output. Raises RequestError where a choice has no end."""

    @abstractmethod
    def failed(self, error: RequestError) -> bytes:
        """The last events of a stream that failed."""


class BodyWriter(ABC):
    """Writes one answer as a whole. It is given every output once, choices numbered through."""

    @abstractmethod
    def take(self, output: Output) -> None:
        """Keeps what the body needs of one output."""

    @abstractmethod
    def body(self) -> bytes:
        """The answer. Raises RequestError where a choice has no end."""


@dataclass(slots=True)
class CollectedCall:
    """One tool call of a choice."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """All of one choice so far."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, CollectedCall] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: Output) -> None:
        """Adds one of the choice's outputs."""
        if output.text:
            self.texts.append(output.text)
        if output.reasoning:
            self.reasoning.append(output.reasoning)
        for delta in output.tool_calls:
            self._take_call(delta)
        self.logprobs += output.logprobs

    def _take_call(self, delta: ToolCallDelta) -> None:
        call = self.calls.setdefault(delta.index, CollectedCall())
        call.id = call.id or delta.id
        call.name = call.name or delta.name
        if delta.arguments:
            call.arguments.append(delta.arguments)


class Ends:
    """How the choices of an answer ended. `per_prompt` of them share each prompt."""

    def __init__(self, prompts: int, per_prompt: int) -> None:
        self._per_prompt = per_prompt
        self._ends: list[Finished | None] = [None] * (prompts * per_prompt)

    def put(self, index: int, finished: Finished) -> None:
        """The end of one choice."""
        self._ends[index] = finished

    def all(self) -> Sequence[Finished]:
        """By choice. Raises RequestError while one is missing."""
        complete = [end for end in self._ends if end is not None]
        if len(complete) < len(self._ends):
            raise internal_error("the answer ended without a finish reason")
        return complete

    def usage(self) -> Usage:
        """The counts of the whole answer. Raises RequestError while an end is missing."""
        ends = self.all()
        prompts = [ends[first : first + self._per_prompt] for first in range(0, len(ends), self._per_prompt)]
        return usage_of(
            sum(prompt[0].prompt_tokens for prompt in prompts),
            sum(end.completion_tokens for end in ends),
            # The contract says whose: the other choices may have found what the first one computed.
            cached=sum(prompt[0].cached_prompt_tokens for prompt in prompts),
        )


def usage_of(prompt_tokens: int, completion_tokens: int, *, cached: int = 0) -> Usage:
    """OpenAI's counts."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
