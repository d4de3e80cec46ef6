"""What the answers of all generating routes share: who writes them, and token counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from kvbaton.errors import RequestError
from services.frontend.request.api import Output

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


def usage_of(prompt_tokens: int, completion_tokens: int, *, cached: int = 0) -> Usage:
    """OpenAI's counts."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
