"""The fields of sampling that all generating routes share, and the kvbaton.v1 message that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.frontend.edge.values import (
    Body,
    Handling,
    Int32,
    ModelName,
    Natural,
    Penalty,
    Stop,
    StopTokenIds,
)
from services.requests import LOGIT_BIAS_LIMIT, MAX_LOGIT_BIASES, MAX_TOP_LOGPROBS

MAX_CHOICES = 128
"""Answers to one HTTP request; the contract's limit on `n`."""

Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
_TokenIdKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
_Bias = Annotated[float, Field(ge=-LOGIT_BIAS_LIMIT, le=LOGIT_BIAS_LIMIT)]
LogitBias = Annotated[
    dict[_TokenIdKey, _Bias], Field(max_length=MAX_LOGIT_BIASES, json_schema_extra={"additionalProperties": False})
]


class SamplingBody(Body):
    """What every generating route takes."""

    model: ModelName
    """A name that /v1/models reports."""
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """0 is greedy. Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default 1."""
    stream: Annotated[bool | None, Handling.EMULATED] = None
    """Answer with server-sent events."""

    frequency_penalty: Penalty | None = None
    """Default 0."""
    presence_penalty: Penalty | None = None
    """Default 0."""
    logit_bias: LogitBias | None = None
    """Added to the logits of these token ids; the keys are ids as strings."""
    seed: Natural | None = None
    """Refused where the engine does not sample deterministically. With `n`, each choice has one derived from it."""
    stop: Stop | None = None
    """Strings that end the answer and are not part of it."""

    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """At least 1; -1 switches it off, which is the default."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Default 0."""
    min_tokens: Natural | None = None
    """No end-of-sequence or stop token ends the answer before so many tokens. Default 0."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    """Default 1."""
    stop_token_ids: StopTokenIds | None = None
    """Token ids that end the answer beside the model's own."""
    ignore_eos: bool | None = None
    """Do not stop at the model's end-of-sequence tokens. Default false."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    priority: Int32 | None = None
    """While requests wait for workers, higher goes first. Default 0."""
    allow_inexact_migration: bool | None = None
    """If the worker fails behind the first token, go on with another one also where the rest of the answer may differ
    from what it would have been: with penalties, or sampling without a seed. Default false."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    """Holds the answer to a regular expression."""
    ebnf: Annotated[str, Field(min_length=1)] | None = None
    """Holds the answer to a grammar in EBNF."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What holds the answer; `kind` is a field of SamplingParams' `grammar`, `place` the body's that it came from."""

    place: str
    kind: str
    source: str


def chosen_grammar(body: SamplingBody, *further: Grammar | None) -> Grammar | None:
    """The one grammar of a request. Raises RequestError for a second one."""
    given = [each for each in further if each is not None]
    if body.regex is not None:
        given.append(Grammar("regex", "regex", body.regex))
    if body.ebnf is not None:
        given.append(Grammar("ebnf", "ebnf", body.ebnf))
    if len(given) > 1:
        raise invalid(given[1].place, f"contradicts {given[0].place}; an answer is held to one of them")
    return given[0] if given else None


def sampling_params(body: SamplingBody, max_tokens: int | None, grammar: Grammar | None) -> generate_pb2.SamplingParams:
    """Every field that was given, and none that was not."""
    held: dict[str, Any] = {} if grammar is None else {grammar.kind: grammar.source}
    # None leaves an optional proto field unset.
    return generate_pb2.SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        ignore_eos=body.ignore_eos,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        skip_special_tokens=body.skip_special_tokens,
        logit_bias=_by_token_id(body.logit_bias),
        **held,
    )


def _by_token_id(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    by_id = {int(token): bias for token, bias in biases.items()}
    if any(token >= 1 << 32 for token in by_id):
        raise invalid("logit_bias", f"{max(by_id)} is not a token id")
    return by_id
