"""Which tool calls has the model written, and which text around them: the formats that hold calls as JSON objects.

Text that looks like a call and is none, for its JSON or its function's name, comes out as content, as it was written.
White space beside a call goes out only with text that follows it: it belongs to the format.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from services.frontend.parsers.call_object import CallObject
from services.frontend.parsers.protocol import NOTHING, Parsed
from services.frontend.request.api import ToolCallDelta

WHITESPACE = " \t\r\n"
# Characters of white space held back at most.
MAX_SPACE = 1024


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a model marks its calls."""

    begin: str
    """Stands before a call; begins with "<"."""
    end: str = ""
    """Stands behind a call; begins with "<"."""
    bare: bool = False
    """Whether a call at the very start of the answer may do without `begin`."""
    separator: str = ""
    """One character between a call and one that follows it without `begin`."""


def new_call_id() -> str:
    """As OpenAI's: "call_" and 24 hex digits."""
    return f"call_{secrets.token_hex(12)}"


class _Emitted:
    """What one push brings, with one delta for each call."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self._calls: list[ToolCallDelta] = []

    def call(self, delta: ToolCallDelta) -> None:
        """A call's beginning, or more of its arguments."""
        if self._calls and self._calls[-1].index == delta.index:
            last = self._calls.pop()
            delta = ToolCallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
        self._calls.append(delta)

    def take(self) -> Parsed:
        """All of it."""
        if not (self.content or self._calls):
            return NOTHING
        parsed = Parsed("".join(self.content), "", tuple(self._calls))
        self.content, self._calls = [], []
        return parsed


class _CallReader:
    """What the formats share: a state that takes text from a position on, and the call that is being read."""

    def __init__(self, names: Collection[str], end_marker: str, single: bool, new_id: Callable[[], str]) -> None:
        self._names = names
        self._end_marker = end_marker
        self._single = single
        self._new_id = new_id
        self._state: Callable[[str, int], int]
        self._rest = ""
        self._emitted = _Emitted()
        self._calls = 0
        self._call: CallObject | None = None
        # Of what may become a call: what stands before its brace.
        self._held = ""
        self.complete = False

    @property
    def called(self) -> bool:
        """See `StreamParser`."""
        return self._calls > 0

    def push(self, text: str) -> Parsed:
        """See `StreamParser`."""
        text = self._rest + text
        position = 0
        while position < len(text) and not self.complete:
            before = position, self._state
            position = self._state(text, position)
            if (position, self._state) == before:
                break
        # Never more than the beginning of a marker.
        self._rest = "" if self.complete else text[position:]
        return self._emitted.take()

    def finish(self) -> Parsed:
        """See `StreamParser`."""
        rest, self._rest = self._rest, ""
        if self.complete:
            return NOTHING
        if self._call is not None and self._call.open:
            self._arguments(rest)
        elif self._call is not None:
            self._no_call(self._held + self._call.held + rest)
        else:
            self._no_call(self._unfinished(rest))
        self._finish_content()
        return self._emitted.take()

    def _begin_call(self) -> None:
        """Behind an opening brace."""
        self._call = CallObject(self._names, self._end_marker)
        self._state = self._in_call

    def _in_call(self, text: str, position: int) -> int:
        call = self._call
        assert call is not None
        announced = call.open
        position = call.read(text, position)
        if call.open and not announced:
            self._emitted.call(ToolCallDelta(self._calls, self._new_id(), call.name))
            self._calls += 1
            self._held = ""
        if call.open:
            self._arguments(call.take_arguments())
        if call.refused:
            self._call = None
            self._no_call(self._held + call.held)
        elif call.ended:
            self._call = None
            self.complete = self._single
            self._behind_call()
        return position

    def _arguments(self, piece: str) -> None:
        if piece:
            self._emitted.call(ToolCallDelta(self._calls - 1, arguments=piece))

    def _unfinished(self, rest: str) -> str:
        """What is content of text that ends where a call was looked for."""
        return self._held + rest

    def _behind_call(self) -> None:
        raise NotImplementedError

    def _no_call(self, text: str) -> None:
        """`text` is content, and so is what follows until the next call."""
        raise NotImplementedError

    def _finish_content(self) -> None:
        """The text has ended."""


class MarkedCalls(_CallReader):
    """Calls that a marker stands before, anywhere in the text."""

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        *,
        single: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`names` are the functions that there are. With `single` the answer ends behind its first call."""
        super().__init__(names, syntax.end, single, new_id)
        self._syntax = syntax
        self._state = self._between if syntax.bare else self._content
        self._markers = [syntax.begin]
        self._space = ""

    def _content(self, text: str, position: int) -> int:
        """Text until a marker."""
        found = text.find("<", position)
        while found >= 0:
            for marker in self._markers:
                if text.startswith(marker, found):
                    self._text(text[position:found])
                    return self._take_marker(marker, found)
                if marker.startswith(text[found:]):
                    self._text(text[position:found])
                    return found
            found = text.find("<", found + 1)
        self._text(text[position:])
        return len(text)

    def _take_marker(self, marker: str, position: int) -> int:
        self._markers = [self._syntax.begin]
        if marker == self._syntax.begin:
            self._held += marker
            self._state = self._before_brace
        return position + len(marker)

    def _before_brace(self, text: str, position: int) -> int:
        """White space between marker and brace."""
        if text[position] == "{":
            self._begin_call()
        elif text[position] in WHITESPACE and len(self._held) < MAX_SPACE:
            self._held += text[position]
        else:
            self._no_call(self._held)
            return position
        return position + 1

    def _between(self, text: str, position: int) -> int:
        """Where a call needs no marker: at the start, and behind a separator."""
        if text[position] == "{":
            self._begin_call()
            return position + 1
        if text[position] == "<":
            marker = self._syntax.begin
            if text.startswith(marker, position):
                return self._take_marker(marker, position)
            if marker.startswith(text[position:]):
                return position
        separator = self._syntax.separator if self._calls and self._syntax.separator not in self._held else ""
        if text[position] in WHITESPACE + separator and len(self._held) < MAX_SPACE:
            self._held += text[position]
            return position + 1
        self._no_call(self._held)
        return position

    def _behind_call(self) -> None:
        self._state = self._between if self._syntax.separator else self._content
        # The end marker is part of the call even if something else comes first.
        self._markers = [self._syntax.begin, *([self._syntax.end] if self._syntax.end else [])]

    def _no_call(self, text: str) -> None:
        self._held = ""
        self._state = self._content
        self._text(text)

    def _unfinished(self, rest: str) -> str:
        if self._calls and not self._held.strip(WHITESPACE + self._syntax.separator):
            return rest
        return self._held + rest

    def _finish_content(self) -> None:
        if not self._calls and self._space:
            self._emitted.content.append(self._space)

    def _text(self, text: str) -> None:
        text = self._space + text
        end = len(text.rstrip(WHITESPACE))
        end = max(end, len(text) - MAX_SPACE)
        self._space = text[end:]
        if end:
            self._emitted.content.append(text[:end])


class ArrayCalls(_CallReader):
    """An answer that is nothing but a JSON array of calls, as the grammar of a required call makes it."""

    def __init__(
        self, names: Collection[str], *, single: bool = False, new_id: Callable[[], str] = new_call_id
    ) -> None:
        """See `MarkedCalls`."""
        super().__init__(names, "", single, new_id)
        self._expected = "["
        self._state = self._between

    def _between(self, text: str, position: int) -> int:
        """White space, and the brackets and commas around calls."""
        character = text[position]
        if character in WHITESPACE and len(self._held) < MAX_SPACE:
            self._held += character
        elif character not in self._expected:
            self._no_call(self._held)
            return position
        elif character == "{":
            self._begin_call()
        else:
            self._held += character
            self._expected = "" if character == "]" else "{"
        return position + 1

    def _content(self, text: str, position: int) -> int:
        self._emitted.content.append(text[position:])
        return len(text)

    def _behind_call(self) -> None:
        self._expected, self._state = ",]", self._between

    def _no_call(self, text: str) -> None:
        self._held = ""
        self._state = self._content
        if text:
            self._emitted.content.append(text)

    def _unfinished(self, rest: str) -> str:
        if self._calls and not self._held.strip(WHITESPACE + ",]"):
            return rest
        return self._held + rest
