"""Bad input is refused by field before any engine sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import grpc
import pytest

from kvbaton.errors import RequestError
from kvbaton.v1.generate_pb2 import Bootstrap, GenerateRequest, SamplingParams
from services.requests import (
    Grammar,
    GrammarKind,
    Limits,
    TokenLogprob,
    TopLogprob,
    check_logprobs,
    check_prompt,
    check_request_id,
    check_room,
    check_sampling,
    check_stops,
)

LIMITS = Limits(context_length=100, max_prompt_tokens=90, vocab_size=50, seeded_sampling=True, grammar=True)


def refused_field(call: object) -> str:
    with pytest.raises(RequestError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.field in caught.value.message
    return caught.value.field


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(max_new_tokens=0), "sampling.max_new_tokens"),
        (SamplingParams(max_new_tokens=-1), "sampling.max_new_tokens"),
        (SamplingParams(max_new_tokens=91), "sampling.max_new_tokens"),
        (SamplingParams(min_new_tokens=-1), "sampling.min_new_tokens"),
        (SamplingParams(max_new_tokens=4, min_new_tokens=5), "sampling.min_new_tokens"),
        (SamplingParams(temperature=-0.1), "sampling.temperature"),
        (SamplingParams(temperature=math.nan), "sampling.temperature"),
        (SamplingParams(temperature=math.inf), "sampling.temperature"),
        (SamplingParams(top_p=0), "sampling.top_p"),
        (SamplingParams(top_p=1.01), "sampling.top_p"),
        (SamplingParams(top_k=0), "sampling.top_k"),
        (SamplingParams(top_k=-2), "sampling.top_k"),
        (SamplingParams(min_p=1.5), "sampling.min_p"),
        (SamplingParams(frequency_penalty=2.5), "sampling.frequency_penalty"),
        (SamplingParams(presence_penalty=-2.5), "sampling.presence_penalty"),
        (SamplingParams(repetition_penalty=0), "sampling.repetition_penalty"),
        (SamplingParams(seed=-1), "sampling.seed"),
        (SamplingParams(stop_token_ids=[50]), "sampling.stop_token_ids"),
        (SamplingParams(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
        (SamplingParams(logit_bias={50: 1}), "sampling.logit_bias"),
        (SamplingParams(logit_bias={1: 100.5}), "sampling.logit_bias"),
        (SamplingParams(logit_bias={1: -math.inf}), "sampling.logit_bias"),
        (SamplingParams(logit_bias={1: math.nan}), "sampling.logit_bias"),
        (SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias"),
        (SamplingParams(json_schema=""), "sampling.json_schema"),
        (SamplingParams(json_schema="{"), "sampling.json_schema"),
        (SamplingParams(json_schema="[]"), "sampling.json_schema"),
        (SamplingParams(json_schema='{"items":' * 6000 + "{}" + "}" * 6000), "sampling.json_schema"),
        (SamplingParams(structural_tag="true"), "sampling.structural_tag"),
        (SamplingParams(regex=""), "sampling.regex"),
        (SamplingParams(regex="é" * 32769), "sampling.regex"),
        (SamplingParams(ebnf=""), "sampling.ebnf"),
        (SamplingParams(regex="a", min_new_tokens=1), "sampling.min_new_tokens"),
    ],
)
def test_bad_sampling_names_its_field(params: SamplingParams, field: str) -> None:
    assert refused_field(lambda: check_sampling(params, prompt_tokens=10, limits=LIMITS)) == field


def test_unset_sampling_takes_the_documented_defaults() -> None:
    sampling = check_sampling(SamplingParams(), prompt_tokens=10, limits=LIMITS)
    assert sampling.max_new_tokens == 90, "all that the context leaves"
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, -1)
    assert sampling.seed is None


def test_an_explicit_zero_is_not_a_default() -> None:
    assert check_sampling(SamplingParams(temperature=0), prompt_tokens=10, limits=LIMITS).temperature == 0.0


EVERYTHING = SamplingParams(
    max_new_tokens=7,
    min_new_tokens=2,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    repetition_penalty=1.5,
    seed=11,
    ignore_eos=True,
    stop_token_ids=[4, 5],
    logit_bias={7: 1.5, 3: -100},
)
FRONTEND_ONLY = {"stop", "skip_special_tokens"}
GRAMMARS = {"json_schema": '{"type": "object"}', "regex": "a+", "ebnf": 'root ::= "a"', "structural_tag": "{}"}


def test_every_sampling_field_survives_the_way_to_a_worker() -> None:
    """Fields are compared by name, so a new one that `to_proto` forgets fails here."""
    sent = check_sampling(EVERYTHING, prompt_tokens=10, limits=LIMITS).to_proto()
    names = {field.name for field in SamplingParams.DESCRIPTOR.fields} - FRONTEND_ONLY - GRAMMARS.keys()
    assert {name: getattr(sent, name) for name in names} == {name: getattr(EVERYTHING, name) for name in names}
    plain = check_sampling(SamplingParams(max_new_tokens=8), prompt_tokens=10, limits=LIMITS).to_proto()
    assert [name for name in names if getattr(plain, name) == getattr(sent, name)] == [], "none at its default"


@pytest.mark.parametrize("name", [field.name for field in SamplingParams.DESCRIPTOR.oneofs_by_name["grammar"].fields])
def test_every_kind_of_grammar_survives_the_way_to_a_worker(name: str) -> None:
    given = SamplingParams(**{name: GRAMMARS[name]})  # type: ignore[arg-type]
    sampling = check_sampling(given, prompt_tokens=10, limits=LIMITS)
    expected = Grammar(GrammarKind(name), GRAMMARS[name])
    assert sampling.grammar == expected
    assert expected.field == f"sampling.{name}"
    sent = sampling.to_proto()
    assert (sent.WhichOneof("grammar"), getattr(sent, name)) == (name, GRAMMARS[name])
    assert check_sampling(sent, prompt_tokens=10, limits=LIMITS) == sampling


def test_what_a_worker_is_sent_it_reads_as_it_was() -> None:
    sampling = check_sampling(EVERYTHING, prompt_tokens=10, limits=LIMITS)
    assert check_sampling(sampling.to_proto(), prompt_tokens=10, limits=LIMITS) == sampling


def test_the_largest_biases_are_taken() -> None:
    sampling = check_sampling(SamplingParams(logit_bias={49: 100, 0: -100}), prompt_tokens=10, limits=LIMITS)
    assert sampling.logit_bias == ((0, -100.0), (49, 100.0))


def test_a_grammar_is_refused_where_nothing_holds_an_answer_to_it() -> None:
    without = Limits(context_length=100, max_prompt_tokens=90, vocab_size=50, seeded_sampling=True)
    for name, source in GRAMMARS.items():
        params = SamplingParams(**{name: source})  # type: ignore[arg-type]
        assert refused_field(lambda p=params: check_sampling(p, prompt_tokens=1, limits=without)) == f"sampling.{name}"
    assert not Limits.smallest([LIMITS, without]).grammar, "one worker of a model is enough to refuse them"


def test_log_probabilities_of_up_to_twenty_tokens() -> None:
    assert check_logprobs(GenerateRequest()) is None
    assert check_logprobs(GenerateRequest(logprobs=0)) == 0
    assert check_logprobs(GenerateRequest(logprobs=20)) == 20
    assert refused_field(lambda: check_logprobs(GenerateRequest(logprobs=21))) == "logprobs"


def test_log_probabilities_survive_the_way_back() -> None:
    given = TokenLogprob(5, -0.25, (TopLogprob(5, -0.25, b"a"), TopLogprob(6, -1.5, b"\xc3")), b"a")
    wire = given.to_proto()
    assert TokenLogprob.from_proto(wire) == given
    for message in (wire, wire.top[0]):
        assert {field.name for field, _ in message.ListFields()} == {f.name for f in message.DESCRIPTOR.fields}


def test_a_seed_is_refused_where_it_would_mean_nothing() -> None:
    limits = Limits(context_length=100, max_prompt_tokens=90, vocab_size=50, seeded_sampling=False)
    assert (
        refused_field(lambda: check_sampling(SamplingParams(seed=1), prompt_tokens=1, limits=limits)) == "sampling.seed"
    )


@pytest.mark.parametrize("tokens", [[], [49, 50], [1] * 91])
def test_bad_prompts_are_refused(tokens: list[int]) -> None:
    assert refused_field(lambda: check_prompt(tokens, LIMITS)) == "token_ids"


def test_a_prompt_of_millions_is_refused_by_its_length_alone() -> None:
    class Counted(Sequence[int]):
        def __len__(self) -> int:
            return 16_000_000

        def __getitem__(self, index: object) -> NoReturn:
            raise AssertionError("looked at")

    assert refused_field(lambda: check_prompt(Counted(), LIMITS)) == "token_ids"


@pytest.mark.parametrize(
    ("bootstrap", "field"),
    [
        (Bootstrap(port=1, room=1), "bootstrap.host"),
        (Bootstrap(host="h", room=1), "bootstrap.port"),
        (Bootstrap(host="h", port=65536, room=1), "bootstrap.port"),
        (Bootstrap(host="h", port=1, room=0), "bootstrap.room"),
        (Bootstrap(host="h", port=1, room=1 << 63), "bootstrap.room"),
    ],
)
def test_bad_rooms_are_refused(bootstrap: Bootstrap, field: str) -> None:
    assert refused_field(lambda: check_room(bootstrap)) == field


def test_the_largest_room_is_taken() -> None:
    assert check_room(Bootstrap(host="h", port=1, room=(1 << 63) - 1)).room == (1 << 63) - 1


@pytest.mark.parametrize("stops", [[""], ["a", ""], ["a"] * 17, ["a" * 1025], ["a", "é" * 513]])
def test_bad_stop_strings_are_refused(stops: list[str]) -> None:
    assert refused_field(lambda: check_stops(stops)) == "sampling.stop"


def test_the_longest_stop_string_is_taken() -> None:
    assert check_stops(["é" * 512]) == ("é" * 512,)


@pytest.mark.parametrize("request_id", ["x" * 129, "a b", "tab\t", "ü"])
def test_bad_request_ids_are_refused(request_id: str) -> None:
    assert refused_field(lambda: check_request_id(request_id)) == "request_id"
