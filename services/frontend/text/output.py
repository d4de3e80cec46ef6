"""What of the engine's tokens goes to the client: text, until a stop string, and the number of tokens it took."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from services.frontend.text.detokenizer import IncrementalDetokenizer, Piece
from services.frontend.text.stop_strings import StopStringMatcher


class TextDelta(NamedTuple):
    """What one more message of tokens brought."""

    text: str
    """New text of the answer; may be empty."""
    stopped: str | None
    """The stop string that ended the answer, None while it goes on."""
    token_count_used: int
    """Tokens of the whole answer so far: all that were pushed, or, once stopped, those up to and including the one that
    completed the stop string. It may then be lower than the delta before said, when the text of that token became final
    only later."""


class TextOutput:
    """The text side of one answer: ids in as they come from the engine, text out as it goes to the client."""

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: StopStringMatcher | None = None) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._token_count = 0
        self._stopped: str | None = None

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Takes more ids; after a stop nothing more comes out or is counted."""
        if self._stopped is not None:
            return self._delta("")
        if self._stops is None:
            self._token_count += len(ids)
            return self._delta(self._detokenizer.push(ids))
        texts: list[str] = []
        for token_id in ids:
            self._token_count += 1
            texts.append(self._match(self._detokenizer.step(token_id), self._stops))
            if self._stopped is not None:
                break
        return self._delta("".join(texts))

    def finish(self) -> TextDelta:
        """The engine has no more ids: the rest of the text, which may still complete a stop string."""
        if self._stopped is not None:
            return self._delta("")
        if self._stops is None:
            return self._delta(self._detokenizer.finish())
        text = self._match(self._detokenizer.finish_pieces(), self._stops)
        return self._delta(text if self._stopped is not None else text + self._stops.flush().text)

    def _match(self, pieces: Iterable[Piece], stops: StopStringMatcher) -> str:
        texts: list[str] = []
        for piece in pieces:
            result = stops.push(piece.text)
            texts.append(result.text)
            if result.matched is not None:
                self._stopped = result.matched
                self._token_count = piece.ids
                break
        return "".join(texts)

    def _delta(self, text: str) -> TextDelta:
        return TextDelta(text, self._stopped, self._token_count)
