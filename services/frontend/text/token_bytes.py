"""Which bytes does a single token stand for, which may be part of a character."""

from collections.abc import Iterator, Mapping

from services.frontend.text.byte_level import byte_pieces
from services.frontend.text.tokenizer import BYTE_TOKEN, TextTokenizer, decoder_steps


def token_bytes(tokenizer: TextTokenizer) -> Mapping[int, bytes]:
    """The bytes of each id, special tokens as their text, empty for unknown ids; filled as it is used.

    A leading space is kept that the tokenizer strips where a text begins.
    """
    steps = decoder_steps(tokenizer.decoder_config)
    if "ByteLevel" in steps:
        return byte_pieces(tokenizer, frozenset())
    if not tokenizer.token_bytes_cache:
        tokenizer.token_bytes_cache = _TokenBytes(tokenizer, byte_fallback="ByteFallback" in steps)
    return tokenizer.token_bytes_cache


class _TokenBytes(dict[int, bytes]):
    """What a token adds to the text of a word before it: decoders treat the first token of a text differently."""

    def __init__(self, tokenizer: TextTokenizer, *, byte_fallback: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._byte_fallback = byte_fallback
        self._before = next(_words(tokenizer), [])
        self._before_text = self._decode([])

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.token_text(token_id)
        if token is None:
            return b""
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte is not None:
            piece = bytes([int(byte[1], 16)])
        elif token_id in self._tokenizer.special_token_ids:
            piece = token.encode()
        else:
            piece = self._decode([token_id])[len(self._before_text) :].encode()
        self[token_id] = piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids], skip_special_tokens=False)


def _words(tokenizer: TextTokenizer) -> Iterator[list[int]]:
    """Tokens that are a plain letter or word, each as a text of its own."""
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if text.isascii() and text.isalpha():
            yield [token_id]
