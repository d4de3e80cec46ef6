"""Which part of the text is the model's reasoning: `<think>` to `</think>`, opened by the model or by its template.

Only a `<think>` at the start of the answer opens reasoning; everywhere else it is text. The newlines just inside the
two markers and behind the second belong to the format and to neither part, as templates that render reasoning have it.
"""

from __future__ import annotations

from collections.abc import Callable

from services.frontend.parsers.protocol import NOTHING, Parsed

THINK = "<think>"
THINK_END = "</think>"
WHITESPACE = " \t\r\n"
# Characters of white space held back at most.
MAX_SPACE = 1024


class ThinkParser:
    """Content and reasoning of one answer."""

    def __init__(self, *, inside: bool, call_marker: str = "") -> None:
        """`inside`: the prompt ends within the reasoning. `call_marker` with a brace behind it ends the reasoning too,
        for models that call without closing it; it begins with "<"."""
        self._state: Callable[[str, int], int] = self._start
        self._inside = inside
        self._call_marker = call_marker
        self._markers = [THINK_END, *([call_marker] if call_marker else [])]
        self._held = ""
        self._held_marker = ""
        self._rest = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []

    @property
    def called(self) -> bool:
        """See `StreamParser`."""
        return False

    @property
    def complete(self) -> bool:
        """See `StreamParser`."""
        return False

    def push(self, text: str) -> Parsed:
        """See `StreamParser`."""
        if self._state == self._behind:
            return Parsed(text)
        text = self._rest + text
        position = 0
        while position < len(text):
            before = position, self._state
            position = self._state(text, position)
            if (position, self._state) == before:
                break
        # Never more than the beginning of a marker.
        self._rest = text[position:]
        return self._take()

    def finish(self) -> Parsed:
        """See `StreamParser`."""
        rest = self._held + self._held_marker + self._rest
        if self._state == self._newlines:
            return NOTHING
        inside = self._state not in (self._start, self._behind) or self._inside
        (self._reasoning if inside else self._content).append(rest)
        return self._take()

    def _start(self, text: str, position: int) -> int:
        """White space, and a marker that may come or not."""
        if text[position] in WHITESPACE and len(self._held) < MAX_SPACE:
            self._held += text[position]
            return position + 1
        if text.startswith(THINK, position):
            self._held, self._state = "", self._thinking_begins
            return position + len(THINK)
        if THINK.startswith(text[position:]):
            return position
        self._state = self._thinking_begins if self._inside else self._behind
        if not self._inside:
            self._content.append(self._held)
            self._held = ""
        return position

    def _thinking_begins(self, text: str, position: int) -> int:
        """Newlines."""
        if text[position] in WHITESPACE and len(self._held) < MAX_SPACE:
            self._held += text[position]
            return position + 1
        self._held = self._held.lstrip("\n")
        self._state = self._thinking
        return position

    def _thinking(self, text: str, position: int) -> int:
        """Reasoning, until a marker."""
        found = text.find("<", position)
        while found >= 0:
            for marker in self._markers:
                if text.startswith(marker, found):
                    self._reason(text[position:found])
                    return self._take_marker(marker, found)
                if marker.startswith(text[found:]):
                    self._reason(text[position:found])
                    return found
            found = text.find("<", found + 1)
        self._reason(text[position:])
        return len(text)

    def _take_marker(self, marker: str, position: int) -> int:
        if marker == THINK_END:
            self._held, self._state = "", self._newlines
        else:
            self._held_marker, self._state = marker, self._before_brace
        return position + len(marker)

    def _before_brace(self, text: str, position: int) -> int:
        """A call, or reasoning about calls."""
        if text[position] in WHITESPACE and len(self._held_marker) < MAX_SPACE:
            self._held_marker += text[position]
            return position + 1
        held, self._held_marker = self._held_marker, ""
        if text[position] == "{":
            self._held, self._state = "", self._behind
            self._content.append(held)
        else:
            self._state = self._thinking
            self._reason(held)
        return position

    def _newlines(self, text: str, position: int) -> int:
        """Between the reasoning and the content."""
        while position < len(text) and text[position] == "\n":
            position += 1
        if position < len(text):
            self._state = self._behind
        return position

    def _behind(self, text: str, position: int) -> int:
        """Content."""
        self._content.append(text[position:])
        return len(text)

    def _reason(self, text: str) -> None:
        text = self._held + text
        end = max(len(text.rstrip("\n")), len(text) - MAX_SPACE)
        self._held = text[end:]
        self._reasoning.append(text[:end])

    def _take(self) -> Parsed:
        parsed = Parsed("".join(self._content), "".join(self._reasoning))
        self._content, self._reasoning = [], []
        return parsed if parsed.content or parsed.reasoning else NOTHING
