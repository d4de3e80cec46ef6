"""One call, `{"name": ..., "arguments": {...}}`, read out of text that comes in pieces.

A call is *open* once its name is known and its arguments have begun; until then all of it is held back, because it may
still turn out to be no call. From then on the arguments go out as the model writes them, byte for byte. They are not
validated: brackets and strings alone tell where they end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from services.frontend.parsers.json_value import JsonValue

# Characters held back of what may still be no call: a name and its key, or arguments that come before the name.
MAX_HELD = 256 * 1024

_NOT_WHITESPACE = re.compile(r"[^ \t\r\n]")
_STRING_PART = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[^-+.0-9A-Za-z]")
_ARGUMENTS = frozenset(("arguments", "parameters"))
# What may stand before the name. Any other key there says that this is no call.
_KEYS = frozenset(("name", "id", "type", *_ARGUMENTS))


class CallObject:
    """Behind its opening brace. Keys other than the name's and the arguments' are passed over."""

    def __init__(self, names: Collection[str], end_marker: str = "") -> None:
        """`names` are the functions that there are; `end_marker` as for `JsonValue`."""
        self._names = names
        self._end_marker = end_marker
        self._held = ["{"]
        self._held_length = 1
        # What reads a run of text, None where one character is expected, which then goes to `_expected`.
        self._run: Callable[[str, int, int], int] | None = None
        self._expected: Callable[[str], bool] = self._key_or_end
        self._waiting = False
        self._string: list[str] = []
        self._escaped = False
        self._is_name = False
        self._key = ""
        self._value: JsonValue | None = None
        self._arguments: list[str] = []
        self._has_arguments = False
        self.name = ""
        self.open = False
        self.ended = False
        """Behind the last brace, or, of an open call, where it can't go on."""
        self.refused = False
        """It is no call, but text: `held` and what comes behind it."""

    @property
    def held(self) -> str:
        """The text of a call that is not open."""
        return "".join(self._held)

    def take_arguments(self) -> str:
        """What is new of an open call's arguments."""
        new, self._arguments = "".join(self._arguments), []
        return new

    def read(self, text: str, position: int) -> int:
        """Takes what belongs to the call. Stops where it ends or is refused, or at a "<" that needs more text."""
        self._waiting = False
        while position < len(text) and not (self.ended or self.refused or self._waiting):
            end = len(text) if self.open else min(len(text), position + MAX_HELD - self._held_length)
            if end == position:
                self.refused = True
                break
            reached = self._advance(text, position, end)
            if not self.open:
                self._held.append(text[position:reached])
                self._held_length += reached - position
            position = reached
        return position

    def _advance(self, text: str, position: int, end: int) -> int:
        if self._run is not None:
            return self._run(text, position, end)
        found = _NOT_WHITESPACE.search(text, position, end)
        if found is None:
            return end
        return found.end() if self._expected(found[0]) else found.start()

    # What one character is expected for. False: it is not part of the call.

    def _key_or_end(self, character: str) -> bool:
        return self._end() if character == "}" else self._key_begins(character)

    def _key_begins(self, character: str) -> bool:
        if character != '"':
            return self._broken()
        self._string, self._is_name, self._run = [], False, self._read_string
        return True

    def _colon(self, character: str) -> bool:
        self._expected = self._value_begins
        return character == ":" or self._broken()

    def _value_begins(self, character: str) -> bool:
        if self._key == "name" and not self.name:
            if character != '"':
                return self._broken()
            self._string, self._is_name, self._run = [], True, self._read_string
            return True
        is_arguments = self._key in _ARGUMENTS and not self._has_arguments
        if character == "{" and is_arguments:
            self._has_arguments = True
            self._value, self._run = JsonValue(character, self._end_marker), self._read_arguments
            self._arguments.append(character)
            self.open = bool(self.name)
        elif character in '{["' and not is_arguments:
            self._value, self._run = JsonValue(character, self._end_marker), self._skip_value
        elif _SCALAR_END.match(character):
            return self._broken()
        else:
            self._string, self._run = [character], self._read_scalar
        return True

    def _comma_or_end(self, character: str) -> bool:
        if character == "}":
            return self._end()
        self._expected = self._key_begins
        return character == "," or self._broken()

    # Runs.

    def _read_string(self, text: str, position: int, end: int) -> int:
        if self._escaped:
            self._escaped = False
            self._string.append(text[position])
            return position + 1
        found = _STRING_PART.search(text, position, end)
        self._string.append(text[position : end if found is None else found.start()])
        if found is None:
            return end
        if found[0] == "\\":
            self._string.append("\\")
            self._escaped = True
            return found.end()
        self._run = None
        return found.end() if self._take_string() else found.start()

    def _read_scalar(self, text: str, position: int, end: int) -> int:
        found = _SCALAR_END.search(text, position, end)
        reached = end if found is None else found.start()
        self._string.append(text[position:reached])
        if found is not None:
            self._run, self._expected = None, self._comma_or_end
            if self._key in _ARGUMENTS and not self._has_arguments and "".join(self._string) != "null":
                self._broken()
        return reached

    def _read_arguments(self, text: str, position: int, end: int) -> int:
        reached = self._skip_value(text, position, end)
        self._arguments.append(text[position:reached])
        return reached

    def _skip_value(self, text: str, position: int, end: int) -> int:
        value = self._value
        assert value is not None
        reached = value.read(text, position, end)
        if value.complete:
            self._run, self._expected = None, self._comma_or_end
        elif value.cut_off:
            self._broken()
        else:
            self._waiting = reached < end
        return reached

    # What follows from it.

    def _take_string(self) -> bool:
        try:
            value = json.loads(f'"{"".join(self._string)}"')
        except ValueError:
            return self._broken()
        if self._is_name:
            if value not in self._names:
                return self._broken()
            self.name, self.open = value, self._has_arguments
            self._expected = self._comma_or_end
            return True
        if value not in _KEYS and not self.name:
            return self._broken()
        self._key, self._expected = value, self._colon
        return True

    def _end(self) -> bool:
        if not self.name:
            return self._broken()
        if not self.open:
            self.open = True
            self._arguments = ["{}"]
        self.ended = True
        return True

    def _broken(self) -> bool:
        """Goes on as text from here; what has gone out of an open call stays."""
        self.ended = self.open
        self.refused = not self.open
        return False
