"""What chats and completions write alike: answers that consist of choices, each with an end of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbaton.errors import RequestError
from services.frontend.edge.answer import BodyWriter, EventWriter, Usage, UsageEvents, usage_of
from services.frontend.edge.errors import error_body, internal_error
from services.frontend.edge.wire import DONE, event
from services.frontend.request.api import Finished, Output, ToolCallDelta
from services.requests import TokenLogprob


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


class ChoicesBody(BodyWriter):
    """A whole answer; `body` is the route's own."""

    def __init__(self, prompts: int, per_prompt: int) -> None:
        self._choices = [Choice() for _ in range(prompts * per_prompt)]
        self._ends = Ends(prompts, per_prompt)

    def take(self, output: Output) -> None:
        """See `BodyWriter`."""
        self._choices[output.index].take(output)
        if output.finished is not None:
            self._ends.put(output.index, output.finished)


class ChoicesEvents(EventWriter):
    """A stream; a failure is its last event, without [DONE]. What an event looks like is the route's own."""

    def __init__(self, prompts: int, per_prompt: int, usage: UsageEvents) -> None:
        self._per_prompt = per_prompt
        self._usage = usage
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(prompts * per_prompt)]
        self._tokens = [0] * (prompts * per_prompt)
        self._prompt_tokens = [0] * prompts
        self._ends = Ends(prompts, per_prompt)

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
        return self._news(output)

    def closing(self) -> bytes:
        """See `EventWriter`."""
        self._ends.all()
        if not self._usage.at_end:
            return DONE
        return event(self._chunk([]) | {"usage": self._ends.usage()}) + DONE

    def failed(self, error: RequestError) -> bytes:
        """See `EventWriter`."""
        return event(error_body(error))

    @abstractmethod
    def _news(self, output: Output) -> bytes:
        """The events of one output, which has been counted."""

    @abstractmethod
    def _chunk(self, choices: list[Any]) -> Any:
        """The body of an event, without `usage`."""

    def _take_logprobs(self, index: int) -> list[TokenLogprob]:
        """Of all tokens since the choice's last event: text may lag behind tokens."""
        logprobs, self._logprobs[index] = self._logprobs[index], []
        return logprobs

    def _event(self, index: int, choice: Any) -> bytes:
        """One choice's news, in an event with the token counts that the client wants there."""
        body = self._chunk([choice])
        if self._usage.always:
            body["usage"] = usage_of(self._prompt_tokens[index // self._per_prompt], self._tokens[index])
        elif self._usage.at_end:
            body["usage"] = None
        return event(body)
