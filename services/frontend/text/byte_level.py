"""Which bytes does a token of a byte-level tokenizer stand for."""

from services.frontend.text.tokenizer import TextTokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _BytePieces(dict[int, bytes]):
    """The bytes of every id asked for so far."""

    def __init__(self, tokenizer: TextTokenizer, hidden: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden else self._tokenizer.token_text(token_id)
        if token is None:
            return b""
        try:
            piece = bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # an added token outside the alphabet is text as it stands
            piece = token.encode()
        self[token_id] = piece
        return piece


def byte_pieces(tokenizer: TextTokenizer, hidden: frozenset[int]) -> dict[int, bytes]:
    """The bytes of each id, empty for unknown and for hidden ones; one table per tokenizer, filled as it is used."""
    pieces = tokenizer.piece_caches.get(hidden)
    if pieces is None:
        pieces = tokenizer.piece_caches[hidden] = _BytePieces(tokenizer, hidden)
    return pieces
