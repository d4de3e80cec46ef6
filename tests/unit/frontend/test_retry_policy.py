"""Which workers a request does without after a failed attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvbaton.v1 import worker_pb2
from services.frontend.request.blame import Verdict
from services.frontend.request.retry import RetryPolicy
from services.requests import Role

P0, P1, D0, D1 = "p0", "p1", "d0", "d1"


def by(*uuids: str) -> Verdict:
    """One of these incarnations has failed."""
    workers: list[Any] = [
        SimpleNamespace(
            role=Role.PREFILL if uuid.startswith("p") else Role.DECODE,
            record=worker_pb2.WorkerRecord(incarnation=worker_pb2.Incarnation(uuid=uuid)),
        )
        for uuid in uuids
    ]
    return Verdict(tuple(workers), faulty=True)


def test_who_failed_is_done_without() -> None:
    policy = RetryPolicy(2)
    policy.failed(by(P0))
    assert list(policy.exclusions()) == [{P0}]


def test_where_nobody_knows_who_failed_another_pair_is_best_and_one_other_worker_will_do() -> None:
    policy = RetryPolicy(2)
    policy.failed(by(P0, D0))
    assert list(policy.exclusions()) == [{P0, D0}, {P0}, {D0}]


def test_who_failed_earlier_is_better_than_nobody() -> None:
    """Frozen and thawed, say, before the other one was killed."""
    policy = RetryPolicy(2)
    policy.failed(by(P0))
    policy.failed(by(P1))
    assert list(policy.exclusions()) == [{P0, P1}, {P1}]


def test_where_there_is_nobody_else_all_are_forgiven_but_who_is_no_good() -> None:
    policy = RetryPolicy(2)
    policy.failed(by(P0))
    policy.exclude({D1})
    policy.forgive()
    assert list(policy.exclusions()) == [{D1}]


def test_who_is_no_good_is_so_to_the_end() -> None:
    policy = RetryPolicy(2)
    policy.failed(by(P0))
    policy.exclude({D1})
    policy.failed(by(D0))
    assert list(policy.exclusions()) == [{P0, D0, D1}, {D0, D1}]
