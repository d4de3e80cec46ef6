"""What a parser makes of an answer's text while it grows: content, reasoning and tool calls."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from services.frontend.request.api import ToolCallDelta


class Parsed(NamedTuple):
    """What has become certain. The pieces of each part, joined, don't depend on how the text was divided."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


NOTHING = Parsed()


class StreamParser(Protocol):
    """Takes text piece by piece. Time is linear in the text; what is held back is bounded. It never raises."""

    @property
    def called(self) -> bool:
        """Whether there was a tool call."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the answer ends here, whatever the model has to add: it made the one call that it may make."""
        ...

    def push(self, text: str) -> Parsed:
        """What is certain with `text`."""
        ...

    def finish(self) -> Parsed:
        """The text ends here: what was held back. Nothing may be pushed afterwards."""
        ...


class Chain:
    """Tool calls in the content behind the reasoning."""

    def __init__(self, reasoning: StreamParser, calls: StreamParser) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def called(self) -> bool:
        """See `StreamParser`."""
        return self._calls.called

    @property
    def complete(self) -> bool:
        """See `StreamParser`."""
        return self._calls.complete

    def push(self, text: str) -> Parsed:
        """See `StreamParser`."""
        first = self._reasoning.push(text)
        if not first.content:
            return first
        content, _, calls = self._calls.push(first.content)
        return Parsed(content, first.reasoning, calls)

    def finish(self) -> Parsed:
        """See `StreamParser`."""
        rest = self._reasoning.finish()
        before = self._calls.push(rest.content) if rest.content else NOTHING
        last = self._calls.finish()
        return Parsed(before.content + last.content, rest.reasoning, before.tool_calls + last.tool_calls)
