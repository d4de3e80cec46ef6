"""What every correct request must answer: tokens as a pure function of the prompt and its sampling.

A token depends on all tokens before it, prompt and output alike, and on the sampling. So an answer can go on elsewhere
from any of its tokens, and one wrong byte in a KV cache changes the rest. Rooms, incarnations, page sizes, roles and
times play no part.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from services.requests import LOGIT_BIAS_LIMIT, TopLogprob
from services.worker.engines.protocol import Finish, Sampling, TokenLogprob, Vector

if TYPE_CHECKING:
    from hashlib import blake2b as Hash  # noqa: N812 - a class in the type stubs only

BOS_TOKEN = 1
EOS_TOKEN = 2
TOKEN_BYTES = 4
_FIRST_TOKEN = 3
_PRIME = b"kvbaton simulated KV"
_PARAMETERS = struct.Struct("<fffq")
_PENALTIES = struct.Struct("<fff")
# Until the first token that may come is taken instead.
_REDRAWS = 100


def to_bytes(tokens: Iterable[int]) -> bytes:
    """Tokens as a KV cache holds them: four bytes each, little endian on every machine that runs this."""
    return array("I", tokens).tobytes()


def new_context(content: bytes = b"") -> Hash:
    """A running digest of a KV cache's content; it goes on with `update`."""
    return hashlib.blake2b(_PRIME + content, digest_size=16)


@dataclass(slots=True)
class TokenModel:
    """The "model": two engines with equal ones answer alike. Scripts may be added while it runs."""

    vocab_size: int = 32000
    eos_rate: float = 0.0
    scripts: dict[bytes, int] = field(default_factory=dict[bytes, int])
    answer_to_all: tuple[int, ...] | None = None
    """What prompts without a script of their own are answered with, if anything."""

    def play(self, prompt: Sequence[int] | None, tokens: Sequence[int]) -> None:
        """From now on `prompt` is answered with `tokens` and then the end of the sequence; None: every other prompt."""
        for token in (*(prompt or ()), *tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        if prompt is None:
            self.answer_to_all = (*tokens, EOS_TOKEN)
            return
        context = new_context(to_bytes(prompt))
        for token in (*tokens, EOS_TOKEN):
            self.scripts[context.digest()] = token
            context.update(to_bytes([token]))

    def load_script(self, file: Path) -> None:
        """Plays every answer of a JSON file, as `SimulatedOptions.script` describes it. Raises ValueError."""
        try:
            answers = cast("list[dict[str, Any]]", json.loads(file.read_text()))
            for answer in answers:
                self.play(answer.get("prompt"), answer["tokens"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--sim: script={file}: {error!r}") from error


class TokenRule:
    """One request's way from a KV cache to the next token, and its end."""

    __slots__ = ("_banned", "_barred", "_counts", "_eos_threshold", "_forced", "_key", "_model", "_sampling", "_stops")

    def __init__(self, model: TokenModel, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._key, self._counts = _sampling_key(sampling)
        self._stops = frozenset() if sampling.ignore_eos else frozenset((EOS_TOKEN, *sampling.stop_token_ids))
        # SGLang keeps what would end a request out of its first min_new_tokens.
        self._barred = frozenset((EOS_TOKEN, *sampling.stop_token_ids)) if sampling.min_new_tokens else frozenset()
        # Here the strongest bias decides by itself: it forces a token or bans it.
        biases = sampling.logit_bias
        self._forced = next((token for token, bias in biases if bias >= LOGIT_BIAS_LIMIT), None)
        self._banned = frozenset(token for token, bias in biases if bias <= -LOGIT_BIAS_LIMIT)
        self._eos_threshold = int(model.eos_rate * 2**32)

    def next_token(self, context: Hash, produced: int) -> int:
        """The token behind `context`, of which `produced` tokens are output."""
        if (scripted := self._scripted(context, produced)) is not None:
            return scripted
        if self._forced is not None:
            return self._forced
        kept_out = self._banned | self._barred if produced < self._sampling.min_new_tokens else self._banned
        draw = self._draw(context, produced)
        token = self._token(draw)
        for _ in range(_REDRAWS):
            if token not in kept_out:
                return token
            draw.update(b"again")
            token = self._token(draw)
        return next((each for each in range(_FIRST_TOKEN, self._model.vocab_size) if each not in kept_out), EOS_TOKEN)

    def finish(self, token: int, produced: int) -> Finish | None:
        """Whether `token` ends the request, whose output then has `produced` tokens. A stop beats a length."""
        if token in self._stops and produced >= self._sampling.min_new_tokens:
            return Finish.STOP
        return Finish.LENGTH if produced >= self._sampling.max_new_tokens else None

    def logprob(self, context: Hash, produced: int, token: int, top: int) -> TokenLogprob:
        """Of `token` behind `context`: it has more than half of the probability, the next ones half of the rest each.

        A function of the context, the sampling and the number of output tokens alone, as the token itself.
        """
        number = int.from_bytes(self._draw(context, produced).digest(), "little")
        likelihood = 0.5 + (number % 1000) / 2001
        others = (_FIRST_TOKEN + (token + step) % self._span for step in range(1, top))
        rest = (TopLogprob(each, math.log((1 - likelihood) / 2**place)) for place, each in enumerate(others, 1))
        likeliest = (TopLogprob(token, math.log(likelihood)), *rest)[:top]
        return TokenLogprob(token, math.log(likelihood), likeliest)

    @property
    def _span(self) -> int:
        return self._model.vocab_size - _FIRST_TOKEN

    def _scripted(self, context: Hash, produced: int) -> int | None:
        model = self._model
        if model.scripts and (scripted := model.scripts.get(context.digest())) is not None:
            return scripted
        answer = model.answer_to_all
        return answer[produced] if answer is not None and produced < len(answer) else None

    def _draw(self, context: Hash, produced: int) -> Hash:
        draw = context.copy()
        draw.update(self._key)
        if self._counts:
            draw.update(produced.to_bytes(8, "little"))
        return draw

    def _token(self, draw: Hash) -> int:
        number = int.from_bytes(draw.digest(), "little")
        if self._eos_threshold and number >> 96 < self._eos_threshold:
            return EOS_TOKEN
        return _FIRST_TOKEN + (number & 0xFFFFFFFFFFFFFFFF) % self._span


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """A whole answer, the token that stopped it included, as SGLang's without a tokenizer."""

    token_ids: list[int]
    finish: Finish


def expected_answer(prompt: Sequence[int], sampling: Sampling, model: TokenModel | None = None) -> ExpectedAnswer:
    """The answer of every role, pair and attempt, as long as nothing is wrong."""
    rule = TokenRule(model or TokenModel(), sampling)
    context = new_context(to_bytes(prompt))
    tokens: list[int] = []
    while True:
        token = rule.next_token(context, len(tokens))
        tokens.append(token)
        if (finish := rule.finish(token, len(tokens))) is not None:
            return ExpectedAnswer(tokens, finish)
        context.update(to_bytes([token]))


def expected_tokens(prompt: Sequence[int], sampling: Sampling, model: TokenModel | None = None) -> list[int]:
    """The tokens of `expected_answer`."""
    return expected_answer(prompt, sampling, model).token_ids


def expected_logprobs(
    prompt: Sequence[int], sampling: Sampling, top: int, model: TokenModel | None = None
) -> list[TokenLogprob]:
    """Of each token of `expected_answer`, with so many of the likeliest."""
    model = model or TokenModel()
    rule, context = TokenRule(model, sampling), new_context(to_bytes(prompt))
    found: list[TokenLogprob] = []
    for token in expected_tokens(prompt, sampling, model):
        found.append(rule.logprob(context, len(found), token, top))
        context.update(to_bytes([token]))
    return found


def expected_embedding(tokens: Sequence[int], dimensions: int) -> Vector:
    """The vector of every correct embedding of `tokens`, of length 1; shorter ones are the beginning of longer ones."""
    seed = new_context(to_bytes(tokens)).digest()
    drawn = hashlib.shake_256(seed).digest(4 * dimensions)
    numbers = [number / 2**31 - 1 for number in array("I", drawn)]
    length = math.hypot(*numbers)
    return array("f", [number / length for number in numbers])


def _sampling_key(sampling: Sampling) -> tuple[bytes, bool]:
    """What of the sampling changes tokens, and whether the number of output tokens does.

    Unseeded sampling is as deterministic as seeded. Penalties see output tokens only, as SGLang's: behind a replayed
    prefix they differ.
    """
    greedy = sampling.temperature == 0.0 or sampling.top_k == 1
    key = b"greedy"
    if not greedy:
        # Single precision, because that is what a proto's float leaves of them.
        chosen = _PARAMETERS.pack(sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
        key = chosen + repr(sampling.seed).encode()
    penalties = (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty)
    counts = penalties != (0.0, 0.0, 1.0)
    key += _PENALTIES.pack(*penalties) if counts else b""
    return key + (repr(sampling.logit_bias).encode() if sampling.logit_bias else b""), counts
