"""Where does a JSON object, array or string end, in text that comes in pieces."""

from __future__ import annotations

import re

_STRING_PART = re.compile(r'["\\]')
_BRACKET = re.compile(r'["{}\[\]<]')


class JsonValue:
    """Loose: brackets are counted and not matched, literals not looked at, so that a flawed value still has an end."""

    def __init__(self, first: str, end_marker: str) -> None:
        """`first` is the value's first character. `end_marker` begins with "<", or is empty: outside a string, where
        JSON has no "<", it cuts the value off."""
        self._end_marker = end_marker
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.complete = False
        self.cut_off = False
        self._take(first)

    def read(self, text: str, position: int, end: int) -> int:
        """Takes text up to the value's end, or `end`, or a "<" that is or may become the end marker."""
        while position < end and not self.complete:
            if self._in_string:
                position = self._read_string(text, position, end)
                continue
            found = _BRACKET.search(text, position, end)
            if found is None:
                return end
            position = found.start()
            if text[position] != "<":
                self._take(text[position])
            elif self._end_marker and self._end_marker.startswith(text[position : position + len(self._end_marker)]):
                self.cut_off = text.startswith(self._end_marker, position)
                return position
            position += 1
        return position

    def _read_string(self, text: str, position: int, end: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        found = _STRING_PART.search(text, position, end)
        if found is None:
            return end
        if found[0] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.complete = self._depth == 0
        return found.end()

    def _take(self, character: str) -> None:
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        else:
            self._depth -= 1
            self.complete = self._depth == 0
