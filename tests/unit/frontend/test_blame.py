"""By whom an attempt has failed, and what its workers' breakers hear: server faults only, never the other leg's."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason, RequestError, cancelled, invalid
from services.frontend.request.blame import Blame
from services.frontend.router.placement import Placement
from services.requests import Role


@dataclass
class Told:
    """A breaker that only listens."""

    closed: bool = True
    heard: list[str] = field(default_factory=list[str])

    def failed(self, why: str, *, sent: float, shared: bool = False) -> None:
        self.heard.append("shared" if shared else "own")

    def succeeded(self) -> None:
        self.heard.append("succeeded")

    def handed_over(self) -> None:
        self.heard.append("handed over")


def pair() -> tuple[Blame, Told, Told]:
    """The blame of an attempt, prefill's breaker and decode's."""
    prefill, decode = Told(), Told()
    workers: list[Any] = [
        SimpleNamespace(role=Role.DECODE, breaker=decode),
        SimpleNamespace(role=Role.PREFILL, breaker=prefill),
    ]
    return Blame(Placement(*workers)), prefill, decode


def error(reason: Reason, leg: str = "", code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> RequestError:
    return RequestError(code, reason, "why", leg=leg)


OWN = [
    error(Reason.WORKER_UNREACHABLE, "prefill"),
    error(Reason.WORKER_SILENT, "prefill"),
    error(Reason.ENGINE_DEAD, "prefill"),
    error(Reason.LEG_ENDED_EARLY, "prefill", grpc.StatusCode.INTERNAL),
    error(Reason.INTERNAL, "prefill", grpc.StatusCode.INTERNAL),
    error(Reason.UNTYPED, "prefill", grpc.StatusCode.UNKNOWN),
]
NOBODYS = [
    invalid("sampling.top_p", "too large").with_context(leg="prefill"),
    error(Reason.ENGINE_REFUSED, "prefill", grpc.StatusCode.INVALID_ARGUMENT),
    error(Reason.NO_CREDIT, "prefill", grpc.StatusCode.RESOURCE_EXHAUSTED),
    error(Reason.UNTYPED, "prefill", grpc.StatusCode.RESOURCE_EXHAUSTED),
    error(Reason.QUEUE_FULL, code=grpc.StatusCode.RESOURCE_EXHAUSTED),
    error(Reason.CLIENT_TOO_SLOW, code=grpc.StatusCode.RESOURCE_EXHAUSTED),
    cancelled().with_context(leg="prefill"),
    error(Reason.DEADLINE_QUEUE, code=grpc.StatusCode.DEADLINE_EXCEEDED),
    error(Reason.DEADLINE_TOTAL, code=grpc.StatusCode.DEADLINE_EXCEEDED),
    error(Reason.WORKER_DRAINING, "prefill"),
    error(Reason.WORKER_NOT_SERVING, "prefill"),
    error(Reason.SHUTTING_DOWN, "prefill"),
    # A bug of the frontend's own.
    error(Reason.INTERNAL, code=grpc.StatusCode.INTERNAL),
]
HAND_OVER = [
    error(Reason.ENGINE_ABORTED, "decode"),
    error(Reason.ENGINE_ABORTED, "prefill"),
    error(Reason.DEADLINE_PREFILL, code=grpc.StatusCode.DEADLINE_EXCEEDED),
    error(Reason.DEADLINE_TRANSFER, code=grpc.StatusCode.DEADLINE_EXCEEDED),
    error(Reason.FIRST_TOKEN_MISMATCH, code=grpc.StatusCode.DATA_LOSS),
]


@pytest.mark.parametrize("failure", OWN, ids=str)
def test_a_worker_is_blamed_for_what_it_did_itself_and_its_partner_is_not(failure: RequestError) -> None:
    blame, prefill, decode = pair()
    blame.ended(answered=False, error=failure)
    assert (prefill.heard, decode.heard) == (["own"], [])


@pytest.mark.parametrize("failure", [*NOBODYS, None], ids=str)
def test_clients_and_orderly_refusals_are_nobodys_fault(failure: RequestError | None) -> None:
    blame, prefill, decode = pair()
    blame.ended(answered=False, error=failure)
    assert (prefill.heard, decode.heard) == ([], [])


@pytest.mark.parametrize("failure", HAND_OVER, ids=str)
def test_a_failed_hand_over_is_shared_unless_one_of_the_two_is_known_to_be_bad(failure: RequestError) -> None:
    blame, prefill, decode = pair()
    blame.ended(answered=False, error=failure)
    assert (prefill.heard, decode.heard) == (["shared"], ["shared"])
    blame, prefill, decode = pair()
    prefill.closed = False
    blame.ended(answered=False, error=failure)
    assert (prefill.heard, decode.heard) == ([], [])


@pytest.mark.parametrize("reason", [Reason.ENGINE_ABORTED, Reason.DEADLINE_TOKEN_GAP], ids=str)
def test_behind_the_hand_over_it_is_the_worker_that_streams(reason: Reason) -> None:
    blame, prefill, decode = pair()
    blame.handed_over()
    blame.proven()
    leg = "decode" if reason is Reason.ENGINE_ABORTED else ""
    blame.ended(answered=False, error=error(reason, leg))
    assert (prefill.heard, decode.heard) == (["succeeded"], ["handed over", "own"])


def test_an_answer_is_decodes_success() -> None:
    blame, prefill, decode = pair()
    blame.ended(answered=True, error=None)
    assert (prefill.heard, decode.heard) == ([], ["succeeded"])


def test_an_aggregated_worker_has_nobody_to_share_with() -> None:
    told = Told()
    worker: Any = SimpleNamespace(role=Role.AGGREGATED, breaker=told)
    for failure in (error(Reason.ENGINE_ABORTED, "aggregated"), error(Reason.DEADLINE_PREFILL)):
        Blame(Placement(worker)).ended(answered=False, error=failure)
    assert told.heard == ["own", "own"]


@pytest.mark.parametrize("proven", [True, False])
def test_behind_decodes_first_token_it_is_the_worker_that_says_so(proven: bool) -> None:
    """Whether prefill's token has come by then or not: decode had the whole KV cache."""
    blame, _, decode = pair()
    blame.handed_over()
    if proven:
        blame.proven()
    verdict = blame.verdict(error(Reason.ENGINE_ABORTED, "decode"))
    assert ([worker.role for worker in verdict.suspects], verdict.faulty) == ([Role.DECODE], True)
    blame.ended(answered=False, error=error(Reason.ENGINE_ABORTED, "decode"))
    assert decode.heard[-1] == "own"


def test_tokens_that_differ_are_the_fault_of_either_whichever_came_last() -> None:
    blame, prefill, decode = pair()
    blame.handed_over()
    blame.ended(answered=False, error=error(Reason.FIRST_TOKEN_MISMATCH, code=grpc.StatusCode.DATA_LOSS))
    assert (prefill.heard, decode.heard) == (["shared"], ["shared"])


@pytest.mark.parametrize("reason", [Reason.WORKER_DRAINING, Reason.WORKER_NOT_SERVING, Reason.SHUTTING_DOWN])
def test_who_does_as_it_should_is_avoided_all_the_same(reason: Reason) -> None:
    blame, _, _ = pair()
    verdict = blame.verdict(error(reason, "prefill"))
    assert ([worker.role for worker in verdict.suspects], verdict.faulty) == ([Role.PREFILL], False)


def test_an_error_that_names_nobody_may_be_either_ones_and_counts_for_neither() -> None:
    blame, prefill, decode = pair()
    verdict = blame.verdict(error(Reason.INTERNAL, code=grpc.StatusCode.INTERNAL))
    assert (len(verdict.suspects), verdict.faulty) == (2, False)
    blame.ended(answered=False, error=error(Reason.INTERNAL, code=grpc.StatusCode.INTERNAL))
    assert (prefill.heard, decode.heard) == ([], [])
