"""Has the answer reached one of the client's stop strings, and which text may go out before that is known.

The answer is read character by character: the first moment at which it ends with a stop string ends it, and the text is
cut where that stop string begins. If several end at the same character, the longest counts. So neither the order of the
stop strings nor the way the text is divided matters, and no token is generated that could still have been avoided.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """What one more piece of text brought."""

    text: str
    """Text that is now certain to belong to the answer."""
    matched: str | None
    """The stop string that ended the answer, None while it goes on."""


class StopStringMatcher:
    """Aho-Corasick over the stop strings: each character is looked at once, whatever their number.

    With `include_stop` the stop string stays at the end of the text. Raises `ValueError` for an empty stop string.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        for index, stop in enumerate(stops):
            if not stop:
                raise ValueError(f"stop[{index}] is empty")
        self._include_stop = include_stop
        self._children, self._depth, self._fallback, self._longest_stop = _build(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer, None while it goes on."""
        return self._matched

    def push(self, text: str) -> StopResult:
        """Takes more text; after a match nothing more comes out."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if self._state == 0 and self._first_characters.isdisjoint(text):
            return StopResult(text, None)
        buffer = self._held + text
        for end in range(len(self._held) + 1, len(buffer) + 1):
            self._state = self._next_state(buffer[end - 1])
            if length := self._longest_stop[self._state]:
                return self._stop(buffer, end - length, end)
        final = len(buffer) - self._depth[self._state]
        self._held = buffer[final:]
        return StopResult(buffer[:final], None)

    def flush(self) -> StopResult:
        """The answer ends here: what was held back belongs to it."""
        held, self._held, self._state = self._held, "", 0
        return StopResult(held, self._matched)

    def _stop(self, buffer: str, start: int, end: int) -> StopResult:
        self._matched = buffer[start:end]
        self._held = ""
        return StopResult(buffer[: end if self._include_stop else start], self._matched)

    def _next_state(self, character: str) -> int:
        state = self._state
        while True:
            child = self._children[state].get(character)
            if child is not None:
                return child
            if state == 0:
                return 0
            state = self._fallback[state]


def _build(stops: Sequence[str]) -> tuple[list[dict[str, int]], list[int], list[int], list[int]]:
    """A trie of the stop strings. Per state: its children, its depth, the state of its longest proper suffix, and the
    length of the longest stop string that it ends with (0: none)."""
    children: list[dict[str, int]] = [{}]
    depth, fallback, longest_stop = [0], [0], [0]
    for stop in stops:
        state = 0
        for character in stop:
            if character not in children[state]:
                children[state][character] = len(children)
                children.append({})
                depth.append(depth[state] + 1)
                fallback.append(0)
                longest_stop.append(0)
            state = children[state][character]
        longest_stop[state] = len(stop)
    queue = deque(children[0].values())
    while queue:
        state = queue.popleft()
        for character, child in children[state].items():
            suffix = fallback[state]
            while suffix and character not in children[suffix]:
                suffix = fallback[suffix]
            fallback[child] = children[suffix].get(character, 0)
            longest_stop[child] = longest_stop[child] or longest_stop[fallback[child]]
            queue.append(child)
    return children, depth, fallback, longest_stop
