"""Grammars, log probabilities, biases and minimum lengths through both legs, against the aggregated worker's and
transformers' answers; and grammars that no engine should ever see.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.requests import Room
from tests.e2e.conftest import Pair
from tests.e2e.reference import NEAR_TIE, log_probabilities
from tests.e2e.sampling_cases import (
    CASES,
    CITY_KEYS,
    CODE,
    EARLY_END,
    PARIS,
    RIVERS,
    THE,
    Given,
    ask,
    ask_all_cases_at_once,
)

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

WITH_LOGPROBS = [name for name, request in CASES.items() if request.HasField("logprobs")]
# Distributions that transformers knows: nothing keeps a token away, and greedy or not plays no part.
UNBOUND = [name for name in WITH_LOGPROBS if CASES[name].text == PARIS]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def answers(pair: Pair) -> dict[str, Given]:
    """The pair's, all in flight together."""
    return await ask_all_cases_at_once(pair.cluster.grpc_endpoint)


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_path / "tokenizer.json"))


async def test_every_worker_says_what_holds_answers_to_a_grammar(pair: Pair) -> None:
    assert {worker.runtime.grammar_backend for worker in pair.cluster.workers.values()} == {"xgrammar"}


@pytest.mark.parametrize("name", CASES)
async def test_the_pair_answers_as_the_aggregated_worker(
    answers: dict[str, Given], sampled_aggregated: dict[str, Given], name: str
) -> None:
    """Prefill's token is the grammar's, and decode goes on behind it."""
    here, there = answers[name], sampled_aggregated[name]
    assert (here.token_ids, here.text) == (there.token_ids, there.text)
    assert (here.finished.reason, here.finished.matched_stop) == (there.finished.reason, there.finished.matched_stop)
    assert here.finished.usage.completion_tokens == there.finished.usage.completion_tokens == len(here.token_ids)
    for mine, theirs in zip(here.logprobs, there.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [top.logprob for top in mine.top] == pytest.approx([top.logprob for top in theirs.top], abs=1e-3)


async def test_a_json_schema_is_kept(answers: dict[str, Given]) -> None:
    answer = answers["json schema"]
    assert answer.stopped
    city = json.loads(answer.text)
    assert list(city) == CITY_KEYS
    assert isinstance(city["city"], str)
    assert len(city["city"]) <= 20
    assert isinstance(city["capital"], bool)
    assert city["river"] in RIVERS


async def test_any_json_object(answers: dict[str, Given]) -> None:
    assert answers["json object"].stopped
    assert isinstance(json.loads(answers["json object"].text), dict)


async def test_a_regular_expression_is_kept_greedy_and_sampled(answers: dict[str, Given]) -> None:
    for name in ("regex", "regex, sampled", "logprobs, regex"):
        assert answers[name].stopped
        assert re.fullmatch(CODE, answers[name].text), answers[name].text


async def test_a_grammar_in_ebnf_is_kept(answers: dict[str, Given]) -> None:
    assert answers["ebnf"].text in ("yes.", "no.")
    assert answers["ebnf"].stopped


async def test_a_structural_tag_is_kept(answers: dict[str, Given]) -> None:
    inside = re.fullmatch(r"<call>(.*)</call>", answers["structural tag"].text, re.DOTALL)
    assert inside is not None, answers["structural tag"].text
    assert isinstance(json.loads(inside[1]), dict)


async def test_max_new_tokens_cuts_what_a_grammar_has_begun(answers: dict[str, Given]) -> None:
    cut = answers["grammar, cut"]
    assert cut.finished.reason == generate_pb2.FINISH_REASON_LENGTH
    assert answers["regex"].token_ids[:2] == cut.token_ids


async def test_min_tokens_keeps_the_end_of_sequence_away(answers: dict[str, Given]) -> None:
    early, late = answers["ends early"], answers["min tokens"]
    assert early.stopped
    assert len(early.token_ids) < 40
    assert len(late.token_ids) >= 40
    assert late.token_ids[: len(early.token_ids) - 1] == early.token_ids[:-1], "up to the end that was kept away"
    assert early.token_ids[-1] not in late.token_ids[:39]


async def test_min_tokens_keeps_stop_tokens_away(answers: dict[str, Given]) -> None:
    early, late = answers["stop token"], answers["min tokens, stop token"]
    assert early.finished.matched_token_id == 30
    assert len(early.token_ids) < 10
    assert len(late.token_ids) >= 10
    assert 30 not in late.token_ids[:9]


async def test_a_bias_forces_a_token_and_bans_one(pair: Pair, answers: dict[str, Given]) -> None:
    assert answers["forced"].token_ids == [THE] * 5
    first = answers["plain"].token_ids[0]
    request = generate_pb2.GenerateRequest()
    request.CopyFrom(CASES["plain"])
    request.sampling.logit_bias[first] = -100.0
    assert first not in (await ask(pair.cluster.grpc_endpoint, request)).token_ids


@pytest.mark.parametrize("name", UNBOUND)
async def test_log_probabilities_are_transformers(
    answers: dict[str, Given], model_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    """At every temperature those of the model's own distribution."""
    answer = answers[name]
    prompt = tokenizer.encode(PARIS, add_special_tokens=False).ids
    expected = log_probabilities(model_path, prompt, answer.token_ids)
    for position, given in enumerate(answer.logprobs):
        row = expected[position]
        assert given.logprob == pytest.approx(row[given.token_id], abs=1e-3)
        assert len(given.top) == CASES[name].logprobs
        best = sorted(row, reverse=True)[: len(given.top)]
        assert [top.logprob for top in given.top] == pytest.approx(best, abs=1e-3)
        assert [row[top.token_id] for top in given.top] == pytest.approx(best, abs=NEAR_TIE)


async def test_under_a_grammar_only_what_it_allows_has_a_probability(
    answers: dict[str, Given], tokenizer: Tokenizer
) -> None:
    first, dash = answers["logprobs, regex"].logprobs[0], answers["logprobs, regex"].logprobs
    assert len(first.top) == 5
    assert all(re.match(r"[A-Z]+", tokenizer.decode([top.token_id])) for top in first.top)
    alone = [each for each in dash if tokenizer.decode([each.token_id]) == "-"]
    assert [(round(each.logprob, 3), len(each.top)) for each in alone] == [(0.0, 1)], "nothing else can come"


@pytest.mark.parametrize(
    ("kind", "source", "named"),
    [
        ("json_schema", '{"type": "nothing"}', "nothing"),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no text at all"),
        ("regex", "(a", "not closed"),
        ("regex", "a\0b", "NUL"),
        ("regex", "(?=a)a", "Lookahead"),
        ("ebnf", "root ::= other", "other"),
        ("ebnf", 'root ::= root "a"', "no text at all"),
        ("structural_tag", "{}", "does not compile"),
    ],
)
async def test_a_grammar_that_is_none_is_refused_by_its_field(pair: Pair, kind: str, source: str, named: str) -> None:
    error = await refusal(pair, **{kind: source})
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"sampling.{kind}")
    assert named in error.message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_grammar_that_leads_nowhere_on_the_way_ends_its_request_alone(pair: Pair, temperature: float) -> None:
    error = await refusal(pair, ebnf='root ::= "ab" x\nx ::= x "c"', temperature=temperature)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.ebnf")
    assert "no token of the vocabulary goes on" in error.message


async def test_what_takes_for_ever_to_compile_is_refused_while_others_are_answered(
    pair: Pair, answers: dict[str, Given]
) -> None:
    hostile = {
        "regex": "a?" * 5000 + "a" * 5000,
        "json_schema": json.dumps({"type": "string", "pattern": "^(([a-z]{1,1000}){1,1000}){1,1000}$"}),
        "ebnf": "root ::= " + "[a-z]* " * 5000,
    }
    refusals = [asyncio.create_task(refusal(pair, **{kind: source})) for kind, source in hostile.items()]
    assert (await ask(pair.cluster.grpc_endpoint, CASES["json schema"])).text == answers["json schema"].text
    for kind, error in zip(hostile, await asyncio.gather(*refusals), strict=True):
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"sampling.{kind}")
        assert "takes more than" in error.message
    assert (await ask(pair.cluster.grpc_endpoint, CASES["regex"])).token_ids == answers["regex"].token_ids


async def test_a_leg_by_hand_is_refused_by_the_worker_itself(pair: Pair) -> None:
    bootstrap = pair.cluster.workers["prefill"].bootstrap
    for worker in ("prefill", "decode"):
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=[1, 2]),
            sampling=generate_pb2.SamplingParams(max_new_tokens=2, regex="(a"),
            bootstrap=Room(bootstrap.host, bootstrap.port, 99).to_proto(),
        )
        with pytest.raises(RequestError) as caught:
            await ask(pair.cluster.endpoint(worker), request)
        assert (caught.value.field, caught.value.leg) == ("sampling.regex", worker)


async def test_a_minimum_length_and_a_grammar_contradict_each_other(pair: Pair) -> None:
    assert (await refusal(pair, regex="a", min_new_tokens=2)).field == "sampling.min_new_tokens"


async def refusal(pair: Pair, **sampling: object) -> RequestError:
    params = generate_pb2.SamplingParams(max_new_tokens=8, **sampling)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError) as caught:
        await ask(pair.cluster.grpc_endpoint, generate_pb2.GenerateRequest(text=EARLY_END, sampling=params))
    return caught.value
