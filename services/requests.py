"""What a request is inside Baton, and the checks that refuse a bad one by field before any engine sees it.

The frontend and the workers run the same checks, so a leg that comes straight from grpcurl is refused like one from a
frontend.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kvbaton.errors import invalid
from kvbaton.token_ids import unpack
from kvbaton.v1 import generate_pb2, worker_pb2

MAX_REQUEST_ID_BYTES = 128
MAX_STOP_STRINGS = 16
# Matching keeps some 300 bytes of memory for each of them.
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
LOGIT_BIAS_LIMIT = 100.0
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_TOP_LOGPROBS = 20
ROOM_LIMIT = 1 << 63
# A name, an IPv4 or a bracketed IPv6 address: SGLang puts it into a URL as it stands.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.%]{2,64}\]|[0-9A-Fa-f:]{2,45}")
# SGLang takes this one for "no peer": decode would answer from pages that nobody wrote.
_RESERVED_HOSTS = frozenset({"2.2.2.2"})
_REQUEST_ID = re.compile(r"[\x21-\x7e]+")


class Role(StrEnum):
    """What one worker computes of a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"
    EMBEDDING = "embedding"

    @property
    def disaggregated(self) -> bool:
        """Whether a request in this role needs a peer."""
        return self in (Role.PREFILL, Role.DECODE)

    def to_proto(self) -> worker_pb2.WorkerRole:
        """The wire value."""
        return _ROLE_TO_PROTO[self]

    @classmethod
    def from_proto(cls, role: worker_pb2.WorkerRole) -> Role:
        """The role of a record. Raises KeyError for one that this version doesn't know."""
        return _ROLE_FROM_PROTO[role]


_ROLE_TO_PROTO = {
    Role.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    Role.AGGREGATED: worker_pb2.WORKER_ROLE_AGGREGATED,
    Role.EMBEDDING: worker_pb2.WORKER_ROLE_EMBEDDING,
}
_ROLE_FROM_PROTO = {wire: role for role, wire in _ROLE_TO_PROTO.items()}


@dataclass(frozen=True, slots=True)
class Room:
    """Where the two legs of one attempt meet: prefill's bootstrap server and a non-zero 63-bit room."""

    host: str
    port: int
    room: int

    def to_proto(self) -> generate_pb2.Bootstrap:
        """The wire value, the same for both legs."""
        return generate_pb2.Bootstrap(host=self.host, port=self.port, room=self.room)


class GrammarKind(StrEnum):
    """The language that a grammar is written in; the values are the names of the wire's fields."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is held to while it is generated."""

    kind: GrammarKind
    source: str

    @property
    def field(self) -> str:
        """Its name in an error."""
        return f"sampling.{self.kind}"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at some position. `token` is what it stands for, empty on a worker."""

    token_id: int
    logprob: float
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of a generated token's probability, and of the likeliest ones', most likely first."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    token: bytes = b""

    def to_proto(self) -> generate_pb2.TokenLogprob:
        """The wire value."""
        top = [generate_pb2.TopLogprob(token_id=t.token_id, logprob=t.logprob, token=t.token) for t in self.top]
        return generate_pb2.TokenLogprob(token_id=self.token_id, logprob=self.logprob, top=top, token=self.token)

    @classmethod
    def from_proto(cls, wire: generate_pb2.TokenLogprob) -> TokenLogprob:
        """From another process."""
        top = tuple(TopLogprob(each.token_id, each.logprob, each.token) for each in wire.top)
        return cls(wire.token_id, wire.logprob, top, wire.token)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling of one request, complete and checked; None only where "off" has no number."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None

    def to_proto(self) -> generate_pb2.SamplingParams:
        """The wire value for a worker: every field explicit, so that no default of another process matters."""
        grammar = {} if self.grammar is None else {self.grammar.kind.value: self.grammar.source}
        return generate_pb2.SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            logit_bias=dict(self.logit_bias),
            **grammar,  # pyright: ignore[reportArgumentType]
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model's engine takes, in tokens."""

    context_length: int
    max_prompt_tokens: int
    vocab_size: int
    seeded_sampling: bool
    grammar: bool = False

    def capped(self, max_prompt_tokens: int | None) -> Limits:
        """These, with an operator's limit on prompts."""
        if max_prompt_tokens is None:
            return self
        return replace(self, max_prompt_tokens=min(self.max_prompt_tokens, max_prompt_tokens))

    @classmethod
    def smallest(cls, limits: Sequence[Limits]) -> Limits:
        """What every one of these takes; at least one."""
        return cls(
            context_length=min(each.context_length for each in limits),
            max_prompt_tokens=min(each.max_prompt_tokens for each in limits),
            vocab_size=min(each.vocab_size for each in limits),
            seeded_sampling=all(each.seeded_sampling for each in limits),
            grammar=all(each.grammar for each in limits),
        )

    @classmethod
    def from_runtime(cls, runtime: worker_pb2.RuntimeConfig) -> Limits:
        """The limits that a worker published."""
        return cls(
            context_length=runtime.context_length,
            max_prompt_tokens=runtime.max_prompt_tokens,
            vocab_size=runtime.vocab_size,
            seeded_sampling=runtime.seeded_sampling,
            grammar=bool(runtime.grammar_backend),
        )


def check_request_id(request_id: str) -> str:
    """The id as given, or an error that names `request_id`. Empty is allowed: the caller makes one up."""
    if len(request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise invalid("request_id", f"longer than {MAX_REQUEST_ID_BYTES} bytes")
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise invalid("request_id", "must be printable ASCII without spaces")
    return request_id


def sent_tokens(wire: generate_pb2.TokenIds, *, field: str = "token_ids") -> Sequence[int]:
    """The ids of a prompt as they came, unchecked, or an error that names `field`."""
    try:
        return unpack(wire)
    except ValueError as error:
        raise invalid(field, str(error)) from error


def check_prompt(token_ids: Sequence[int], limits: Limits, *, field: str = "token_ids") -> list[int]:
    """The prompt as a list: not empty, inside the context, inside the vocabulary; the cheap checks first."""
    if not token_ids:
        raise invalid(field, "the prompt is empty")
    if len(token_ids) > limits.max_prompt_tokens:
        raise invalid(
            field,
            f"the prompt has {len(token_ids)} tokens, the model takes {limits.max_prompt_tokens}"
            f" (context length {limits.context_length})",
        )
    tokens = list(token_ids)  # first: any other sequence makes each number anew, as often as it is looked at
    if max(tokens) >= limits.vocab_size:
        position = next(i for i, token in enumerate(tokens) if token >= limits.vocab_size)
        raise invalid(
            field,
            f"token {tokens[position]} at position {position} is outside the vocabulary of {limits.vocab_size}",
        )
    return tokens


def check_room(bootstrap: generate_pb2.Bootstrap) -> Room:
    """The room of one leg, complete."""
    if not bootstrap.host:
        raise invalid("bootstrap.host", "missing")
    if not _HOST.fullmatch(bootstrap.host) or bootstrap.host in _RESERVED_HOSTS:
        raise invalid("bootstrap.host", "not a host name or an address of a bootstrap server")
    if not 0 < bootstrap.port < 65536:
        raise invalid("bootstrap.port", f"{bootstrap.port} is not a port")
    if not 0 < bootstrap.room < ROOM_LIMIT:
        raise invalid("bootstrap.room", f"{bootstrap.room} is not in [1, 2^63)")
    return Room(host=bootstrap.host, port=bootstrap.port, room=bootstrap.room)


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings: few, none empty, none long."""
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid("sampling.stop", f"{len(stops)} strings, at most {MAX_STOP_STRINGS}")
    if any(not stop for stop in stops):
        raise invalid("sampling.stop", "an empty string")
    if any(len(stop.encode()) > MAX_STOP_BYTES for stop in stops):
        raise invalid("sampling.stop", f"a string of more than {MAX_STOP_BYTES} bytes")
    return tuple(stops)


def check_min_new(min_new_tokens: float, grammar: Grammar | None) -> None:
    """Raises RequestError when the two contradict each other."""
    if grammar is not None and min_new_tokens:
        raise invalid(
            "sampling.min_new_tokens",
            f"{min_new_tokens:g} with a grammar, which says itself when an answer may end",
        )


def check_sampling(params: generate_pb2.SamplingParams, *, prompt_tokens: int, limits: Limits) -> Sampling:
    """Sampling with every default filled in. `stop` and `skip_special_tokens` are the frontend's and not looked at."""
    room_left = limits.context_length - prompt_tokens
    max_new = params.max_new_tokens if params.HasField("max_new_tokens") else max(room_left, 1)
    if max_new < 1:
        raise invalid("sampling.max_new_tokens", f"{max_new} is less than 1")
    if max_new > room_left:
        raise invalid(
            "sampling.max_new_tokens",
            f"{max_new} and a prompt of {prompt_tokens} tokens exceed the context length of {limits.context_length}",
        )
    min_new = _bounded(params, "min_new_tokens", 0, 0, max_new)
    top_k = params.top_k if params.HasField("top_k") else -1
    if top_k != -1 and not 1 <= top_k < 2**31:
        raise invalid("sampling.top_k", f"{top_k} is neither -1 nor a positive 31-bit integer")
    top_p = _bounded(params, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0.0:
        raise invalid("sampling.top_p", "0 is not in (0, 1]")
    grammar = _grammar(params, limits)
    check_min_new(min_new, grammar)
    repetition_penalty = _bounded(params, "repetition_penalty", 1.0, 0.0, 2.0)
    if repetition_penalty == 0.0:
        raise invalid("sampling.repetition_penalty", "0 is not in (0, 2]")
    return Sampling(
        max_new_tokens=max_new,
        min_new_tokens=int(min_new),
        temperature=_bounded(params, "temperature", 1.0, 0.0, 1e6),
        top_p=top_p,
        top_k=top_k,
        min_p=_bounded(params, "min_p", 0.0, 0.0, 1.0),
        frequency_penalty=_bounded(params, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=_bounded(params, "presence_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=repetition_penalty,
        seed=_seed(params, limits),
        ignore_eos=params.ignore_eos,
        stop_token_ids=_stop_token_ids(params.stop_token_ids, limits),
        logit_bias=_logit_bias(params.logit_bias, limits),
        grammar=grammar,
    )


def check_logprobs(request: generate_pb2.GenerateRequest) -> int | None:
    """How many of the likeliest tokens come with each token; None without log probabilities."""
    if not request.HasField("logprobs"):
        return None
    if request.logprobs > MAX_TOP_LOGPROBS:
        raise invalid("logprobs", f"{request.logprobs} is not in [0, {MAX_TOP_LOGPROBS}]")
    return request.logprobs


def _bounded(params: generate_pb2.SamplingParams, name: str, default: float, low: float, high: float) -> float:
    value = getattr(params, name) if params.HasField(name) else default  # type: ignore[arg-type]
    if not (math.isfinite(value) and low <= value <= high):
        raise invalid(f"sampling.{name}", f"{value:g} is not in [{low:g}, {high:g}]")
    return float(value)


def _seed(params: generate_pb2.SamplingParams, limits: Limits) -> int | None:
    if not params.HasField("seed"):
        return None
    if params.seed < 0:
        raise invalid("sampling.seed", "negative")
    if not limits.seeded_sampling:
        raise invalid("sampling.seed", "the workers' engine does not sample deterministically")
    return params.seed


def _logit_bias(biases: Mapping[int, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise invalid("sampling.logit_bias", f"{len(biases)} token ids, at most {MAX_LOGIT_BIASES}")
    for token, bias in biases.items():
        if token >= limits.vocab_size:
            raise invalid("sampling.logit_bias", f"{token} is outside the vocabulary of {limits.vocab_size}")
        if not abs(bias) <= LOGIT_BIAS_LIMIT:
            raise invalid("sampling.logit_bias", f"{bias:g} is not in [-{LOGIT_BIAS_LIMIT:g}, {LOGIT_BIAS_LIMIT:g}]")
    return tuple(sorted(biases.items()))


def _grammar(params: generate_pb2.SamplingParams, limits: Limits) -> Grammar | None:
    given = params.WhichOneof("grammar")
    if given is None:
        return None
    field, source = f"sampling.{given}", str(getattr(params, given))
    if not source:
        raise invalid(field, "empty")
    if len(source.encode()) > MAX_GRAMMAR_BYTES:
        raise invalid(field, f"more than {MAX_GRAMMAR_BYTES} bytes")
    if not limits.grammar:
        raise invalid(field, "the workers' engine has no grammar backend")
    if given in ("json_schema", "structural_tag"):
        _check_json_object(field, source)
    return Grammar(GrammarKind(given), source)


def _check_json_object(field: str, text: str) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid(field, "not a JSON object")


def _stop_token_ids(ids: Sequence[int], limits: Limits) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise invalid("sampling.stop_token_ids", f"{len(ids)} ids, at most {MAX_STOP_TOKEN_IDS}")
    for token in ids:
        if token >= limits.vocab_size:
            raise invalid("sampling.stop_token_ids", f"{token} is outside the vocabulary of {limits.vocab_size}")
    return tuple(ids)
