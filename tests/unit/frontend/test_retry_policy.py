"""Which workers a request does without after a failed attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.retry import RetryPolicy
from services.requests import Role


def pair(prefill: str, decode: str) -> Any:
    workers = [
        SimpleNamespace(role=Role.PREFILL, instance_id=prefill),
        SimpleNamespace(role=Role.DECODE, instance_id=decode),
    ]
    return SimpleNamespace(workers=workers)


def lost(leg: str) -> RequestError:
    return RequestError(grpc.StatusCode.UNAVAILABLE, Reason.WORKER_UNREACHABLE, "gone", leg=leg)


def test_who_failed_is_done_without() -> None:
    policy = RetryPolicy(2)
    policy.blame(lost("prefill"), pair("p0", "d0"))
    assert list(policy.exclusions()) == [{"p0"}]


def test_who_failed_earlier_is_better_than_nobody() -> None:
    """Frozen and thawed, say, before the other one was killed."""
    policy = RetryPolicy(2)
    policy.blame(lost("prefill"), pair("p0", "d0"))
    policy.blame(lost("prefill"), pair("p1", "d0"))
    assert list(policy.exclusions()) == [{"p0", "p1"}, {"p1"}]


def test_where_there_is_nobody_else_all_are_forgiven_but_who_is_no_good() -> None:
    policy = RetryPolicy(2)
    policy.blame(lost("prefill"), pair("p0", "d0"))
    policy.exclude({"d1"})
    policy.forgive()
    assert list(policy.exclusions()) == [{"d1"}]


def test_who_is_no_good_is_so_to_the_end() -> None:
    policy = RetryPolicy(2)
    policy.blame(lost("prefill"), pair("p0", "d0"))
    policy.exclude({"d1"})
    policy.blame(lost("decode"), pair("p1", "d0"))
    assert list(policy.exclusions()) == [{"p0", "d0", "d1"}, {"d0", "d1"}]
