"""The life of a request: every allowed step, and no other."""

from __future__ import annotations

import itertools

import grpc
import pytest

from kvbaton.errors import Reason, RequestError
from services.frontend.request.retry import retryable
from services.frontend.request.states import ENDS, TRANSITIONS, IllegalTransitionError, RequestState, State, Step

BEFORE_FIRST_TOKEN = {State.ADMITTED, State.PAIRED, State.BOOTSTRAPPING, State.PREFILLING, State.TRANSFERRING}


def walk(*steps: Step) -> State:
    state = RequestState()
    for step in steps:
        state.take(step)
    return state.now


def test_the_disaggregated_life() -> None:
    assert walk(Step.PAIR_CHOSEN, Step.DISPATCHED, Step.LEGS_ACCEPTED, Step.PREFILL_ENDED) is State.TRANSFERRING
    assert (
        walk(
            Step.PAIR_CHOSEN,
            Step.DISPATCHED,
            Step.LEGS_ACCEPTED,
            Step.PREFILL_ENDED,
            Step.FIRST_TOKEN,
            Step.COMPLETE,
        )
        is State.FINISHED
    )


def test_decodes_first_token_may_overtake_prefills_end() -> None:
    life = (Step.PAIR_CHOSEN, Step.DISPATCHED, Step.LEGS_ACCEPTED, Step.FIRST_TOKEN, Step.PREFILL_ENDED, Step.COMPLETE)
    assert walk(*life) is State.FINISHED


def test_every_step_that_the_table_lacks_raises() -> None:
    for state, step in itertools.product(State, Step):
        request = RequestState()
        request.now = state
        if (state, step) in TRANSITIONS:
            request.take(step)
        else:
            with pytest.raises(IllegalTransitionError):
                request.take(step)
            assert request.now is state, "an illegal step changes nothing"


def test_an_end_is_an_end() -> None:
    assert [step for state, step in TRANSITIONS if state in ENDS] == []


def test_retry_only_before_the_first_token() -> None:
    assert {state for state, step in TRANSITIONS if step is Step.RETRY} <= BEFORE_FIRST_TOKEN


def test_behind_the_first_token_an_answer_migrates_and_goes_on() -> None:
    assert [state for state, step in TRANSITIONS if step is Step.MIGRATE] == [State.DECODING]
    first = (Step.PAIR_CHOSEN, Step.DISPATCHED, Step.LEGS_ACCEPTED, Step.FIRST_TOKEN, Step.MIGRATE)
    again = (Step.PAIR_CHOSEN, Step.DISPATCHED, Step.LEGS_ACCEPTED, Step.PREFILL_ENDED)
    # Also a replay may fail before its own first token.
    assert walk(*first, *again, Step.RETRY, *again, Step.FIRST_TOKEN, Step.COMPLETE) is State.FINISHED


def test_whatever_is_alive_can_fail_and_be_cancelled() -> None:
    for step in (Step.ERROR, Step.CANCEL):
        assert {state for state, taken in TRANSITIONS if taken is step} == set(State) - ENDS


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.WORKER_UNREACHABLE, True),
        (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_ABORTED, True),
        (grpc.StatusCode.UNAVAILABLE, Reason.WORKER_DRAINING, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_PREFILL, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_TOTAL, False),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.ENGINE_REFUSED, False),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD, False),
        (grpc.StatusCode.CANCELLED, Reason.CANCELLED, False),
        (grpc.StatusCode.DATA_LOSS, Reason.FIRST_TOKEN_MISMATCH, False),
    ],
)
def test_only_the_workers_failures_are_tried_again(code: grpc.StatusCode, reason: Reason, expected: bool) -> None:
    assert retryable(RequestError(code, reason, "x")) is expected
