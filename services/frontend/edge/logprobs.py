"""How log probabilities are written: OpenAI's two shapes, of chats and of completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from typing_extensions import TypedDict

from services.requests import TokenLogprob


class TopLogprob(TypedDict):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TypedDict):
    """One generated token. `token` is spelled in escapes where it is no whole text; `bytes` is exact."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Every token that was generated, those of reasoning and of tool calls too."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Four lists with one entry a token. `text_offset` counts characters of the text, `bytes:…` is no whole text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class _Token(Protocol):
    @property
    def token_id(self) -> int: ...

    @property
    def token(self) -> bytes: ...


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    """The logprobs of a choice, or of an event."""
    return ChatLogprobs(content=chat_tokens(logprobs), refusal=None)


def chat_tokens(logprobs: Iterable[TokenLogprob]) -> list[ChatLogprob]:
    """Its content."""
    return [
        ChatLogprob(
            token=_spelled(each),
            logprob=each.logprob,
            bytes=list(each.token),
            top_logprobs=[
                TopLogprob(token=_spelled(top), logprob=top.logprob, bytes=list(top.token)) for top in each.top
            ],
        )
        for each in logprobs
    ]


class CompletionOffsets:
    """Writes the logprobs of one choice piece by piece; remembers how long its text is. `start` in characters."""

    def __init__(self, start: int = 0) -> None:
        self._length = start
        # A character may lie in several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def written(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens."""
        offsets: list[int] = []
        for each in logprobs:
            offsets.append(self._length)
            self._length += len(self._decoder.decode(each.token))
        return CompletionLogprobs(
            tokens=[_spelled(each, prefix="bytes:") for each in logprobs],
            token_logprobs=[each.logprob for each in logprobs],
            top_logprobs=[_by_token(each) for each in logprobs],
            text_offset=offsets,
        )


def _by_token(logprob: TokenLogprob) -> dict[str, float]:
    likeliest = {_spelled(top, prefix="bytes:"): top.logprob for top in logprob.top}
    # OpenAI always has the token itself, so there may be one more than was asked for.
    return likeliest | {_spelled(logprob, prefix="bytes:"): logprob.logprob}


def _spelled(token: _Token, prefix: str = "") -> str:
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in token.token)
