"""The typed error survives the wire."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason, RequestError, invalid


class FakeRpcError(grpc.RpcError):
    """What a client catches, made from a server's status."""

    def __init__(self, status: grpc.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> Any:
        return tuple(self._status.trailing_metadata or ())


@pytest.mark.parametrize(
    "error",
    [
        invalid("sampling.top_p", "0 is not in (0, 1]"),
        RequestError(
            grpc.StatusCode.UNAVAILABLE,
            Reason.ENGINE_ABORTED,
            "transfer failed",
            leg="decode",
            worker="decode-1",
            room=(1 << 63) - 1,
            request_id="r",
            retry_after=1.5,
        ),
    ],
)
def test_all_fields_survive(error: RequestError) -> None:
    back = RequestError.from_rpc_error(FakeRpcError(error.to_status()))
    for field in ("code", "reason", "message", "field", "leg", "worker", "room", "request_id", "retry_after"):
        assert getattr(back, field) == getattr(error, field), field


def test_a_foreign_status_is_untyped() -> None:
    plain = RequestError(grpc.StatusCode.UNAVAILABLE, Reason.INTERNAL, "gone").to_status()
    foreign = FakeRpcError(plain._replace(trailing_metadata=()))  # type: ignore[attr-defined]
    assert RequestError.from_rpc_error(foreign).reason is Reason.UNTYPED


def test_context_fills_gaps_and_does_not_overwrite_the_origin() -> None:
    inner = RequestError(grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD, "x", leg="prefill", request_id="leg-id")
    outer = inner.with_context(leg="decode", worker="w", request_id="client-id")
    assert (outer.leg, outer.worker, outer.request_id) == ("prefill", "w", "client-id")
