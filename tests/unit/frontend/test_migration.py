"""What goes on elsewhere, what may not, and an answer whose end alone was lost."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2
from services.frontend.request.migration import Migration, lost_end, replay, what_keeps
from services.frontend.request.prepare import PreparedRequest
from services.requests import Grammar, GrammarKind, Role, Sampling

EOS = 2
GREEDY = Sampling(max_new_tokens=10, min_new_tokens=4, temperature=0.0, stop_token_ids=(9,))
DEAD = RequestError(
    grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD, "killed", leg="decode", worker="d0", room=5, retry_after=1.0
)
BOTH = {"p0", "d0"}
LENGTH, STOP = generate_pb2.FINISH_REASON_LENGTH, generate_pb2.FINISH_REASON_STOP


def placement(*, revision: str = "r1", **limits: Any) -> Any:
    defaults = {"max_prompt_tokens": 100, "context_length": 200, "seeded_sampling": True, "cache_salts": True}
    runtime = SimpleNamespace(kv_cache_dtype="bf16", **{**defaults, **limits})
    workers = [
        SimpleNamespace(
            role=role,
            record=SimpleNamespace(
                runtime=runtime, model=SimpleNamespace(revision=revision), incarnation=SimpleNamespace(uuid=name)
            ),
        )
        for role, name in ((Role.PREFILL, "p0"), (Role.DECODE, "d0"))
    ]
    return SimpleNamespace(workers=workers, decode=workers[1])


def prepared(sampling: Sampling = GREEDY, **more: Any) -> PreparedRequest:
    ends = frozenset() if sampling.ignore_eos else frozenset({EOS, *sampling.stop_token_ids})
    return PreparedRequest("r", "m", [5, 6, 7], sampling, None, ends=ends, **more)


def test_the_rest_is_a_request_of_its_own() -> None:
    rest = replay(prepared(logprobs=3), [20, 21, 22])
    assert rest.token_ids == [5, 6, 7, 20, 21, 22]
    assert rest.sampling == replace(GREEDY, max_new_tokens=7, min_new_tokens=1)
    assert rest.logprobs == 3
    assert replay(prepared(), [20] * 6).sampling.min_new_tokens == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"logit_bias": ((5, 1.0),)}, ""),
        ({"temperature": 0.7, "seed": 0}, ""),
        ({"temperature": 0.7, "top_k": 1}, ""),
        ({"temperature": 0.7}, "sampling.temperature without sampling.seed"),
        ({"frequency_penalty": -0.1}, "sampling.frequency_penalty"),
        ({"presence_penalty": 0.1, "seed": 3}, "sampling.presence_penalty"),
        ({"repetition_penalty": 0.9}, "sampling.repetition_penalty"),
        ({"grammar": Grammar(GrammarKind.EBNF, "root ::= [a]")}, "sampling.ebnf"),
    ],
)
def test_what_keeps_an_answer_where_it_is(changes: dict[str, Any], why: str) -> None:
    request = prepared(replace(GREEDY, min_new_tokens=0, **changes))
    assert what_keeps(request) == why
    allowed = what_keeps(replace(request, inexact_migration=True))
    assert allowed == (why if "grammar" in changes else "")


def test_a_grammar_is_called_what_the_client_calls_it() -> None:
    sampling = replace(GREEDY, grammar=Grammar(GrammarKind.STRUCTURAL_TAG, "{}"))
    assert what_keeps(prepared(sampling, grammar_field="chat.tool_choice")) == "chat.tool_choice"


@pytest.mark.parametrize(
    ("taken", "changes", "reason"),
    [
        ([], {}, None),
        ([20] * 9, {}, None),
        ([20] * 10, {}, LENGTH),
        ([20, 20, 20, 20, EOS], {}, STOP),
        ([20, 20, 20, 9], {}, STOP),
        ([20] * 9 + [EOS], {}, STOP),  # a stop beats a length
        ([20, 20, EOS], {}, None),  # below the minimum it is a token like any other
        ([20, 20, 20, 20, EOS], {"ignore_eos": True}, None),
    ],
)
def test_an_answer_that_is_all_there_needs_no_other_worker(
    taken: list[int], changes: dict[str, Any], reason: int | None
) -> None:
    end = lost_end(prepared(replace(GREEDY, **changes)), taken)
    assert (None if end is None else end.finished.reason) == reason
    if end is not None:
        assert end.token_ids == []
        matched = end.finished.matched_token_id if end.finished.WhichOneof("matched") else None
        assert matched == (taken[-1] if reason == STOP else None)


def test_the_limit_counts_the_moves() -> None:
    migration = Migration(prepared(), 2)
    for taken in ([20], [20, 21]):
        assert migration.begin(DEAD, placement(), taken).token_ids == [5, 6, 7, *taken]
    with pytest.raises(RequestError) as caught:
        migration.begin(DEAD, placement(), [20, 21, 22])
    assert caught.value is DEAD


def test_switched_off_the_workers_own_error_is_the_clients() -> None:
    with pytest.raises(RequestError) as caught:
        Migration(prepared(replace(GREEDY, frequency_penalty=0.5)), 0).begin(DEAD, placement(), [20])
    assert caught.value is DEAD


def test_the_error_says_who_failed_why_and_what_keeps_it() -> None:
    with pytest.raises(RequestError) as caught:
        Migration(prepared(replace(GREEDY, frequency_penalty=0.5)), 3).begin(DEAD, placement(), [20, 21])
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, Reason.NOT_MIGRATABLE)
    assert (error.leg, error.worker, error.room, error.retry_after) == ("decode", "d0", 5, 1.0)
    for part in ("2 tokens", "ENGINE_DEAD: killed", "sampling.frequency_penalty"):
        assert part in error.message


def test_only_workers_with_room_and_the_same_weights_can_take_over() -> None:
    whole = prepared(replace(GREEDY, seed=3), cache_salt="s")
    migration = Migration(whole, 3)
    assert not migration.unfit(placement(max_prompt_tokens=1), whole), "the workers say so of a first attempt"
    rest = migration.begin(DEAD, placement(), [20])
    total = 3 + GREEDY.max_new_tokens
    assert not migration.unfit(placement(max_prompt_tokens=4, context_length=total), rest)
    assert migration.unfit(placement(max_prompt_tokens=3), rest) == BOTH
    assert migration.unfit(placement(context_length=total - 1), rest) == BOTH
    assert migration.unfit(placement(seeded_sampling=False), rest) == BOTH
    assert migration.unfit(placement(cache_salts=False), rest) == BOTH
    assert migration.unfit(placement(revision="r2"), rest) == BOTH
    assert migration.cause is DEAD
