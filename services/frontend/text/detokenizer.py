"""Which text is final after these tokens: token ids in, pieces of text out, never half a character.

The pieces of one stream, joined, are exactly `tokenizer.decode(all ids)`. Two streams keep that promise:

- byte-level tokenizers (Llama 3, Qwen, DeepSeek, GPT): every token is a run of bytes, so a UTF-8 decoder is enough;
- all others (Llama 2, Mistral, Gemma, BERT): a token's text depends on its neighbours, so a short window is decoded
  twice.

Neither keeps or decodes again what was already given out. Not exact are decoders that rewrite the joined text with a
pattern longer than one character (a `Replace` behind a `Fuse`); none is known among language models.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from services.frontend.text.byte_level import byte_pieces
from services.frontend.text.tokenizer import BYTE_TOKEN, TextTokenizer, decoder_steps

_REPLACEMENT = "\ufffd"
_EAGER_WINDOW = 8
"""A window longer than this that ends within a character is decoded again only each time its length has doubled."""


class Piece(NamedTuple):
    """Text that has become final."""

    text: str
    ids: int
    """How many ids of the stream were needed for it; may be fewer than have been pushed."""


class _Stream(Protocol):
    def step(self, token_id: int) -> list[Piece]: ...

    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> list[Piece]: ...


class IncrementalDetokenizer:
    """The text of one growing answer.

    Held back are: bytes that do not form a character yet; and, for tokenizers with byte fallback, a run of byte tokens
    up to the next ordinary token, because one invalid byte turns the whole run into U+FFFD.

    With `prompt_ids` the text is what the answer adds to the text of the prompt: a leading space that the tokenizer
    would strip at the start of a text is kept, and a character that the prompt left unfinished is completed.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """`keep` are special tokens that are text even where the others are skipped."""
        hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        if not hidden.isdisjoint(keep):
            hidden -= keep
        self._stream: _Stream
        if tokenizer.decoder_config.get("type") == "ByteLevel":
            self._stream = _ByteStream(tokenizer, hidden, prompt_ids)
        else:
            self._stream = _WindowStream(tokenizer, hidden, prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that has become final with `ids`."""
        return self._stream.push(ids)

    def step(self, token_id: int) -> list[Piece]:
        """Like `push` for one id, and tells which id completed what."""
        return self._stream.step(token_id)

    def finish(self) -> str:
        """The rest, as `decode` gives it: an unfinished character is U+FFFD. Nothing may be pushed afterwards."""
        return "".join(piece.text for piece in self._stream.finish())

    def finish_pieces(self) -> list[Piece]:
        """Like `finish`, and tells which id completed what."""
        return self._stream.finish()


class _ByteStream:
    """Tokens are bytes. Python's and the library's UTF-8 decoders replace invalid bytes alike (WHATWG's rule)."""

    _PROMPT_TAIL = 3
    """No unfinished character is longer, and every visible token is at least one byte."""

    def __init__(self, tokenizer: TextTokenizer, hidden: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._bytes = byte_pieces(tokenizer, hidden)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = 0
        self._utf8.decode(b"".join(self._prompt_tail(prompt_ids)))

    def push(self, ids: Sequence[int]) -> str:
        self._ids += len(ids)
        return self._utf8.decode(b"".join([self._bytes[token_id] for token_id in ids]))

    def step(self, token_id: int) -> list[Piece]:
        text = self.push((token_id,))
        return [Piece(text, self._ids)] if text else []

    def finish(self) -> list[Piece]:
        text = self._utf8.decode(b"", final=True)
        return [Piece(text, self._ids)] if text else []

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> list[bytes]:
        visible = (piece for token_id in reversed(prompt_ids) if (piece := self._bytes[token_id]))
        return [piece for piece, _ in zip(visible, range(self._PROMPT_TAIL), strict=False)][::-1]


class _WindowStream:
    """The new text of a window is what it adds to the text of the context, a few visible ids just before it.

    The context has text of its own, so whatever the decoder does to the start of a text happens inside it. Windows end
    behind an ordinary token, so no run of byte tokens and no character is ever cut.
    """

    def __init__(self, tokenizer: TextTokenizer, hidden: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        steps = decoder_steps(tokenizer.decoder_config)
        self._byte_fallback = "ByteFallback" in steps
        self._may_end_within_character = "ByteLevel" in steps
        self._ids = 0
        self._context: list[list[int]] = []
        self._context_text = ""
        self._window: list[int] = []
        self._positions: list[int] = []
        self._decode_at = 0
        self._known_chars = 0  # how many characters at the start of the window are the prompt's
        if prompt_ids:
            self._start_behind(prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        return "".join([piece.text for token_id in ids for piece in self.step(token_id)])

    def step(self, token_id: int) -> list[Piece]:
        self._ids += 1
        token = self._visible(token_id)
        if token is None:
            return []
        self._window.append(token_id)
        self._positions.append(self._ids)
        if self._byte_fallback and BYTE_TOKEN.fullmatch(token):
            return []
        if len(self._window) < self._decode_at:
            return []
        return self._decode_window(final=False)

    def finish(self) -> list[Piece]:
        return self._decode_window(final=True) if self._window else []

    def _visible(self, token_id: int) -> str | None:
        return None if token_id in self._hidden else self._tokenizer.token_text(token_id)

    def _decode(self, segments: Iterable[list[int]]) -> str:
        # Hidden ids never get here.
        return self._tokenizer.decode([id for segment in segments for id in segment], skip_special_tokens=False)

    def _decode_window(self, *, final: bool) -> list[Piece]:
        full = self._decode([*self._context, self._window])
        text = full[len(self._context_text) :]
        if self._may_end_within_character and not final and text.endswith(_REPLACEMENT):
            length = len(self._window)
            self._decode_at = length + 1 if length < _EAGER_WINDOW else 2 * length
            return []
        pieces = list(_without_first(self._known_chars, self._split(text)))
        self._move_context(full)
        self._window, self._positions, self._decode_at, self._known_chars = [], [], 0, 0
        return pieces

    def _move_context(self, text: str) -> None:
        """The shortest run of the latest windows that has text of its own becomes the context."""
        self._context.append(self._window)
        self._context_text = text
        while len(self._context) > 1 and (shorter := self._decode(self._context[1:])):
            del self._context[0]
            self._context_text = shorter

    def _split(self, text: str) -> Iterator[Piece]:
        """A byte run's characters were complete with its own ids; the rest of the window is complete with its last."""
        held_back = self._byte_fallback and len(self._window) > 1
        run = list(_run_characters(self._byte_run())) if held_back else []
        run_text = "".join(character for character, _ in run)
        if not text.startswith(run_text):  # a space that the decoder strips at the start
            run, run_text = run[1:], run_text[1:]
        if not text.startswith(run_text):
            run, run_text = [], ""
        for character, length in run:
            yield Piece(character, self._positions[length - 1])
        if rest := text[len(run_text) :]:
            yield Piece(rest, self._positions[-1])

    def _byte_run(self) -> bytes:
        tokens = (self._tokenizer.token_text(token_id) or "" for token_id in self._window)
        matches = (BYTE_TOKEN.fullmatch(token) for token in tokens)
        return bytes(int(match[1], 16) for match in matches if match)

    def _start_behind(self, prompt_ids: Sequence[int]) -> None:
        """Takes the end of the prompt as context, its unfinished end as the start of the first window."""
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            token = self._visible(token_id)
            if token is None:
                continue
            if self._byte_fallback and not context and BYTE_TOKEN.fullmatch(token):
                self._window.insert(0, token_id)
                continue
            context.insert(0, token_id)
            self._context_text = self._decode([context])
            if self._context_text and not self._starts_within_character():
                break
        if self._may_end_within_character:
            while context and self._context_text.endswith(_REPLACEMENT) and len(self._window) < 3:
                self._window.insert(0, context.pop())
                self._context_text = self._decode([context])
        self._context = [context] if context else []
        self._positions = [0] * len(self._window)
        known = self._decode([*self._context, self._window])[len(self._context_text) :]
        self._known_chars = len(known.rstrip(_REPLACEMENT))

    def _starts_within_character(self) -> bool:
        return self._may_end_within_character and not self._context_text.strip(_REPLACEMENT)


def _run_characters(run: bytes) -> Iterator[tuple[str, int]]:
    """A byte run's characters, each with the number of bytes up to its end."""
    try:
        text = run.decode("utf-8")
    except UnicodeDecodeError:
        yield from ((_REPLACEMENT, index + 1) for index in range(len(run)))
        return
    length = 0
    for character in text:
        length += len(character.encode())
        yield character, length


def _without_first(count: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        text = piece.text[count:]
        count = max(0, count - len(piece.text))
        if text:
            yield Piece(text, piece.ids)
